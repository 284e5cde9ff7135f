"""Pictures are measured in the files that were written, not in what was about to be."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from convmae import pictures
from convmae.targets import normalize

GROUND, ACCENT = (22, 24, 29), (66, 135, 245)


def example(size: tuple[int, ...], grid: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(150, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    mask = torch.rand(batch, *grid, generator=generator) < 0.5
    return pixels, normalize(pixels), mask, normalize(255 - pixels)


def decoded(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def cells(sheet: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The cells of a drawn sheet, `(rows, columns, H, W, 3)`, found by the ground in its gutters."""
    ground = (sheet == np.array(GROUND)).all(-1)
    tall, wide = _spans(ground.mean(1), rows), _spans(ground.mean(0), columns)
    found = [[sheet[top:bottom, left:right] for left, right in wide] for top, bottom in tall]
    return np.array(found)


def _spans(ground: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The `count` stretches of most picture: the others are labels."""
    change = np.flatnonzero(np.diff((ground < 0.5).astype(int), prepend=0, append=0))
    spans = [(int(start), int(stop)) for start, stop in change.reshape(-1, 2)]
    return sorted(sorted(spans, key=lambda span: span[0] - span[1])[:count])


def hidden_pixels(mask: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Where an axis' patches all have one size: `(B, *grid) -> (B, *size)`."""
    for axis, (side, patches) in enumerate(zip(size, mask.shape[1:], strict=True)):
        mask = mask.repeat_interleave(side // patches, dim=1 + axis)
    return mask.numpy()


def enlarged(pixels: Tensor, times: int) -> np.ndarray:
    """`(..., 3, H, W) -> (..., H·times, W·times, 3)`."""
    return pixels.movedim(-3, -1).numpy().repeat(times, -3).repeat(times, -2)


def test_an_image_shows_the_original_grey_where_hidden_and_the_reconstruction(tmp_path: Path) -> None:
    pixels, x, mask, reconstruction = example((32, 32), (4, 4))
    (png,) = pictures.save(tmp_path / "deep" / "step-1.5", x, mask, reconstruction)
    assert png == tmp_path / "deep" / "step-1.5.png"
    original, masked, rebuilt = cells(decoded(png), 2, 3).swapaxes(0, 1)
    hidden = hidden_pixels(mask, (32, 32)).repeat(4, 1).repeat(4, 2)
    assert (original == enlarged(pixels, 4)).all()
    assert (rebuilt == enlarged(255 - pixels, 4)).all()
    assert (masked[~hidden] == original[~hidden]).all()
    assert (masked[hidden] == masked[hidden][:, :1]).all(), "hidden pixels are grey"
    assert set(masked[hidden][:, 0]) <= {112, 126}


def test_the_three_versions_of_a_clip_line_up_under_each_other(tmp_path: Path) -> None:
    pixels, x, mask, reconstruction = example((8, 32, 32), (4, 4, 4))
    png, _ = pictures.save(tmp_path / "clip", x, mask, reconstruction)
    shown = [0, 2, 4, 5, 7]
    sheet = cells(decoded(png), 6, 5).reshape(2, 3, 5, 128, 128, 3)
    drawn = enlarged(pixels[:, :, shown].movedim(1, 2), 4)
    hidden = hidden_pixels(mask, (8, 32, 32))[:, shown].repeat(4, 2).repeat(4, 3)
    assert (sheet[:, 0] == drawn).all()
    assert (sheet[:, 1][~hidden] == drawn[~hidden]).all()
    assert (sheet[:, 1][hidden].max(-1) == sheet[:, 1][hidden].min(-1)).all()
    assert (sheet[:, 2] == 255 - drawn).all()


@pytest.mark.parametrize("frames", [2, 7, 16])
def test_an_animation_has_every_frame_even_of_a_clip_that_stands_still(tmp_path: Path, frames: int) -> None:
    _, x, mask, _ = example((1, 16, 16), (1, 2, 2))
    x, mask = x.expand(-1, -1, frames, -1, -1), mask.expand(-1, 1, -1, -1)
    _, gif = pictures.save(tmp_path / "still", x, mask, x)
    with Image.open(gif) as animation:
        assert getattr(animation, "n_frames", 1) == frames
        assert animation.info["loop"] == 0
        assert 1000 / animation.info["duration"] == pytest.approx(8, abs=0.5)


def test_an_animation_keeps_a_rare_colour_among_many_common_ones(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ochre = torch.tensor([150.0, 100, 50]).view(3, 1, 1, 1)
    pixels = (ochre + 10 * torch.randn(1, 3, 8, 64, 64, generator=generator)).clamp(0, 255).to(torch.uint8)
    pink = torch.tensor([250, 20, 120], dtype=torch.uint8)
    pixels[0, :, 2, 4:9, 4:9] = pink.view(3, 1, 1)
    x, mask = normalize(pixels), torch.ones(1, 2, 2, 2, dtype=torch.bool)
    _, gif = pictures.save(tmp_path / "rare", x, mask, torch.zeros_like(x))
    with Image.open(gif) as animation:
        animation.seek(2)
        original = cells(np.asarray(animation.convert("RGB")), 1, 3)[0, 0].astype(int)
    assert np.abs(original[10:13, 10:13] - pink.numpy()).max() <= 50, "of 200 from the ochre around"
    assert np.abs(original - enlarged(pixels[0, :, 2], 2)).mean() <= 6


def test_a_heavy_animation_is_drawn_smaller(tmp_path: Path) -> None:
    _, x, mask, reconstruction = example((16, 128, 128), (8, 8, 8), batch=3)
    _, gif = pictures.save(tmp_path / "noise", x, mask, reconstruction)
    with Image.open(gif) as animation:
        assert animation.size[0] < 3 * 128
    assert gif.stat().st_size < 1_200_000


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        *[((7, 5), (3, 2)), ((1, 1), (1, 1)), ((9, 300), (2, 7)), ((1500, 20), (5, 5)), ((4, 4), (9, 9))],
        *[((3, 17, 31), (2, 4, 3)), ((1, 8, 8), (1, 2, 2)), ((5, 6, 700), (1, 1, 1))],
    ],
)
def test_odd_sizes_and_grids_are_drawn(tmp_path: Path, size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    _, x, mask, reconstruction = example(size, grid)
    written = pictures.save(tmp_path / "odd", x, mask, reconstruction)
    assert len(written) == (2 if len(size) > 2 and size[0] > 1 else 1)
    assert all(decoded(path).size for path in written)


def test_no_more_than_the_asked_rows_are_drawn(tmp_path: Path) -> None:
    _, x, mask, reconstruction = example((16, 16), (2, 2), batch=5)
    one, all_five = (pictures.save(tmp_path / f"{n}", x, mask, reconstruction, rows=n)[0] for n in (1, 9))
    assert cells(decoded(one), 1, 3).shape == (1, 3, 128, 128, 3)
    assert cells(decoded(all_five), 5, 3).shape == (5, 3, 128, 128, 3)


def test_pixels_survive_the_round_trip_and_what_is_no_number_is_black() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256).unsqueeze(-1)
    assert pictures.to_pixels(normalize(pixels)).equal(pixels)
    values = torch.tensor([math.nan, -math.inf, -9.0, math.inf]).expand(1, 3, 4)
    assert pictures.to_pixels(values.bfloat16())[0, 0].tolist() == [0, 0, 0, 255]


@pytest.mark.parametrize("count", [0, 1, 2, 100_000])
def test_a_curve_is_drawn_from_any_number_of_lines(tmp_path: Path, count: int) -> None:
    metrics = [{"step": 1 + n, "loss": 1 / (1 + n), "learning_rate": 1e-3} for n in range(count)]
    drawn = pictures.curve(metrics, tmp_path / "curve.svg")
    assert drawn.read_bytes().startswith(b"<?xml")
    assert drawn.stat().st_size < 400_000


def test_a_curve_is_transparent_and_marks_loss_and_learning_rate(tmp_path: Path) -> None:
    metrics = [{"step": n, "loss": 2.0 - n / 100, "learning_rate": n} for n in range(1, 101)]
    drawn = Image.open(io.BytesIO(pictures.curve(metrics, tmp_path / "curve.png").read_bytes()))
    seen = np.asarray(drawn.convert("RGBA")).reshape(-1, 4)
    assert (seen[:, 3] == 0).mean() > 0.5
    assert (seen == (*ACCENT, 255)).all(-1).any()
    assert (seen == (224, 138, 60, 255)).all(-1).any()


def test_a_curve_passes_over_broken_lines(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = [{"step": 1, "loss": math.nan}, {"loss": 1.0}, {"step": 2, "loss": None}, {}]
    assert pictures.curve(metrics, tmp_path / "curve.png").is_file()
    assert [len(column) for column in pictures.series(metrics, "loss")] == [0, 0]


def test_steps_that_a_resumed_run_logs_again_count_once() -> None:
    first = [{"step": n, "loss": 1.0} for n in range(1, 6)]
    again = [{"step": n, "loss": 0.5} for n in range(4, 8)]
    steps, loss = pictures.series([*first, *again], "loss")
    assert steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert loss.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_smoothing_is_the_mean_of_a_window_cut_at_the_ends() -> None:
    values = np.random.default_rng(0).normal(size=240)
    smooth = pictures.smoothed(values)
    assert smooth[0] == pytest.approx(values[:5].mean())
    assert smooth[100] == pytest.approx(values[96:105].mean())
    assert smooth[-1] == pytest.approx(values[-5:].mean())
    assert pictures.smoothed(np.array([3.0])).tolist() == [3.0]
