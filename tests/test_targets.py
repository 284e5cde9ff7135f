"""Targets: what is predicted, and the way back to pixels."""

import math

import pytest
import torch
from torch import Tensor

from convmae import AttentionStage, ConvMAE, ConvStage, masking, targets
from convmae.grids import assemble, cut, patches, product, quotient
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.targets import NormalizedPixels, Pixels
from video import VideoConvMAE

ALL: list[Pixels | NormalizedPixels] = [
    targets.pixels(),
    targets.pixels(unit=True),
    targets.normalized_pixels(),
    targets.normalized_pixels(per_channel=True),
]
each = pytest.mark.parametrize("target", ALL, ids=repr)


def some(pixels: int = 32) -> Tensor:
    return torch.randn(2, 5, pixels, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@each
def test_inverting_a_target_gives_the_pixels_back(target: Pixels | NormalizedPixels) -> None:
    x = some()
    values = target(x)
    assert values.shape == (2, 5, target.values(32, 3))
    assert torch.allclose(target.invert(values, x), x, rtol=0, atol=1e-12)


@each
def test_inverting_gives_back_a_constant_and_a_nearly_constant_patch(
    target: Pixels | NormalizedPixels,
) -> None:
    x = some()
    x[0, 0] = 0.3
    x[0, 1] = 0.3 + 1e-4 * x[0, 1]
    values = target(x)
    assert values.isfinite().all()
    assert torch.allclose(target.invert(values, x), x, rtol=0, atol=1e-10)


def test_pixels_are_the_pixels_in_order_of_pixel_then_channel() -> None:
    x = some()
    assert targets.pixels()(x).equal(x.flatten(2))
    unit = targets.pixels(unit=True)(x).view(x.shape)
    for channel in range(3):
        expected = x[..., channel] * targets.IMAGENET_STD[channel] + targets.IMAGENET_MEAN[channel]
        assert torch.allclose(unit[..., channel], expected, rtol=0, atol=1e-15)


def test_normalised_pixels_are_maes_one_liner() -> None:
    x = some()
    flat = x.flatten(2)
    expected = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True) + 1e-6) ** 0.5
    assert torch.allclose(targets.normalized_pixels()(x), expected, rtol=0, atol=1e-12)


def test_per_channel_normalised_pixels_are_videomaes_one_liner() -> None:
    x = some()
    unit = x * torch.tensor(targets.IMAGENET_STD).double() + torch.tensor(targets.IMAGENET_MEAN).double()
    spread = unit.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6
    expected = ((unit - unit.mean(dim=-2, keepdim=True)) / spread).flatten(2)
    ours = targets.normalized_pixels(per_channel=True)(x)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-6)  # constants of ImageNet in float32 here


def test_bytes_become_imagenet_normalised_floats_and_back() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    normal = targets.normalize(x)
    assert normal.dtype == torch.float32
    assert (targets.unit_range(normal, axis=1) * 255).round().to(torch.uint8).equal(x)
    zero = targets.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    expected = [-m / s for m, s in zip(targets.IMAGENET_MEAN, targets.IMAGENET_STD, strict=True)]
    assert zero.tolist() == pytest.approx(expected)


@each
def test_targets_print_as_code_and_are_values(target: Pixels | NormalizedPixels) -> None:
    again = eval(repr(target), {"targets": targets})
    assert again == target
    assert hash(again) == hash(target)


# --- cuts of grids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch"), [((8, 12), (4, 3)), ((4, 6, 8), (2, 3, 4)), ((2, 5, 7), (1, 5, 1))], ids=str
)
def test_assembling_patches_gives_the_input_back(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size)
    grid = quotient(size, patch)
    rows = patches(x, patch)
    assert rows.shape == (2, math.prod(grid), math.prod(patch), 3)
    assert assemble(rows, grid, patch).equal(x)
    assert product(grid, patch) == size
    # the last patch is the last corner, row-major inside
    corner = x[:, :, *(slice(-side, None) for side in patch)]
    assert rows[:, -1].equal(corner.flatten(2).transpose(1, 2))


def test_cutting_is_a_view() -> None:
    x = torch.randn(2, 4, 6, 3)
    tiles = cut(x, (2, 3))
    assert tiles.shape == (2, 2, 2, 2, 3, 3)
    assert tiles.data_ptr() == x.data_ptr()
    assert tiles[1, 1, 0, 1, 2].equal(x[1, 3, 2])


# --- pictures ---------------------------------------------------------------------------------------------------

IMAGE = (
    ConvMAE()
    .input((16, 24))
    .stages(
        ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3)),
        AttentionStage(dim=8, depth=1, stride=(2, 2), heads=2),
    )
    .mask(masking.random(0.5))
    .decode(dim=8, depth=1, heads=2)
)
CLIP = VideoConvMAE.inflate(IMAGE, frames=4).mask(masking.random(0.5)).decode(dim=12, depth=1, heads=2)
both = pytest.mark.parametrize("builder", [IMAGE, CLIP], ids=["image", "clip"])


def hidden_pixels(model: MaskedAutoencoder, mask: Tensor) -> Tensor:
    for axis, side in enumerate(model.trunk.stride, 1):
        mask = mask.repeat_interleave(side, axis)
    return mask.unsqueeze(1)


@each
@both
def test_a_reconstruction_keeps_shown_pixels_exactly(builder: ConvMAE, target: Pixels | NormalizedPixels) -> None:
    model = builder.predict(target).build()
    x = torch.randn(3, 3, *builder.size)
    out = model(x)
    picture = model.reconstruct(x, out["prediction"], out["mask"])
    hidden = hidden_pixels(model, out["mask"]).expand_as(x)
    assert picture.shape == x.shape
    assert not picture.requires_grad
    assert picture[~hidden].equal(x[~hidden])
    assert not torch.isclose(picture[hidden], x[hidden]).all()


@each
@both
def test_a_perfect_prediction_reconstructs_the_input(builder: ConvMAE, target: Pixels | NormalizedPixels) -> None:
    model = builder.predict(target).build()
    x = torch.randn(3, 3, *builder.size)
    perfect = target(patches(x, builder.stride))
    mask = model.draw_masks(3)
    assert float(model.loss(x, perfect, model.trunk.shown(mask, device=x.device))) < 1e-10
    assert torch.allclose(model.reconstruct(x, perfect, mask), x, atol=1e-5)


@both
def test_a_reconstruction_from_bfloat16_predictions_keeps_shown_pixels(builder: ConvMAE) -> None:
    model = builder.build()
    x = torch.randn(3, 3, *builder.size)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    picture = model.reconstruct(x, out["prediction"], out["mask"])
    hidden = hidden_pixels(model, out["mask"]).expand_as(x)
    assert picture[~hidden].equal(x[~hidden])


@both
def test_a_reconstruction_of_float64_pixels_keeps_shown_pixels_exactly(builder: ConvMAE) -> None:
    model = builder.build().double()
    x = torch.randn(3, 3, *builder.size, dtype=torch.float64)
    out = model(x)
    picture = model.reconstruct(x, out["prediction"], out["mask"])
    hidden = hidden_pixels(model, out["mask"]).expand_as(x)
    assert picture[~hidden].equal(x[~hidden])
