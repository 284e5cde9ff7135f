"""What a run draws: original, masked and reconstruction side by side, and its loss curve.

Nothing here knows how many axes a model has: an image is a clip of one frame, and more frames are animated.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import write_whole
from .targets import unit_range

VERSIONS = ("original", "masked", "reconstruction")

# Legible on light and dark pages alike: pictures bring a dark ground, curves are mid tones on none.
_GROUND, _INK, _ACCENT, _GREY, _SEAM = (22, 24, 29), (178, 184, 194), (66, 135, 245), (112,) * 3, (126,) * 3
_BLUE, _ORANGE, _QUIET = "#4287f5", "#e08a3c", "#808790"
_GUTTER, _CLIP_GAP, _MARGIN = 4, 14, 12
_SMALLEST, _WIDEST = 128, 1200  # pixels: a cell's side is enlarged to the one, a row shrunk to the other
_STRIP_FRAMES, _FRAME_MS, _GIF_BYTES = 5, 120, 700_000


def save(stem: Path, x: Tensor, mask: Tensor, reconstruction: Tensor, *, rows: int = 3) -> list[Path]:
    """Draw the first samples of a batch: `stem.png`, and for clips of several frames also `stem.gif`.

    An image is a row of original, masked and reconstruction. A clip is three rows in the PNG, of a few frames
    spread over it; and one such row in the GIF, with all its frames.

    Args:
        stem: where to write, without a suffix; its folder is made.
        x: what the model saw, ImageNet-normalised `(B, 3, *size)`.
        mask: boolean `(B, *grid)`, True = hidden.
        reconstruction: what it made of that, ImageNet-normalised `(B, 3, *size)`.
        rows: at most how many samples to draw.

    Returns:
        The files written, each whole or not at all.
    """
    x, mask, reconstruction = (tensor[:rows].detach().cpu() for tensor in (x, mask, reconstruction))
    pixels = to_pixels(x)
    versions = torch.stack([pixels, hide(pixels, mask), to_pixels(reconstruction)], dim=1)
    clips = rearrange(versions, "b v c ... h w -> b v (...) h w c").numpy()
    frames = clips.shape[2]
    png, gif = (stem.with_name(stem.name + suffix) for suffix in (".png", ".gif"))
    if frames == 1:
        return [_write_png(png, _sheet(clips[:, :, 0], across=VERSIONS))]
    spread = np.linspace(0, frames - 1, min(frames, _STRIP_FRAMES)).round().astype(int)
    strips = rearrange(clips[:, :, spread], "b v t h w c -> (b v) t h w c")
    across = [f"frame {1 + frame}" for frame in spread]
    _write_png(png, _sheet(strips, across=across, down=VERSIONS * len(clips)))
    return [png, write_whole(gif, _animation(clips))]


def to_pixels(x: Tensor) -> Tensor:
    """Undo the ImageNet normalisation: `(B, 3, *size) -> (B, 3, *size)` uint8; NaN becomes black."""
    return (unit_range(x.detach().float(), axis=1).nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)


def hide(pixels: Tensor, mask: Tensor) -> Tensor:
    """Paint hidden patches grey, with faint seams: pixels `(B, 3, *size)` uint8, mask `(B, *grid)` -> pixels.

    The grid need not divide the size: a pixel belongs to the patch that its corner falls into.
    """
    hidden, seam = mask, torch.zeros((), dtype=torch.bool)
    size = pixels.shape[2:]
    for axis, (side, patches) in enumerate(zip(size, mask.shape[1:], strict=True)):
        owner = torch.arange(side) * patches // side
        hidden = hidden.index_select(1 + axis, owner)
        if axis >= len(size) - 2:  # a seam in time would be a frame that flashes
            border = owner.diff(prepend=owner[:1]) > 0
            seam = seam | border.view(-1, *[1] * (len(size) - 1 - axis))
    grey = torch.where(seam, _SEAM[0], _GREY[0]).to(torch.uint8)
    return torch.where(hidden.unsqueeze(1), grey, pixels)


def curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw loss and learning rate over steps, on a transparent ground.

    Args:
        metrics: in the order logged, with "step", "loss" and perhaps "learning_rate"; see `series`.
        path: where to write; its suffix names the format (png, svg, pdf).
    """
    from matplotlib.figure import Figure  # costs half a second: only for those who draw
    from matplotlib.ticker import MaxNLocator

    steps, loss, rate = series(metrics, "loss", "learning_rate")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    thin = slice(None, None, -(-len(steps) // 2000) or 1)
    smooth = smoothed(loss)
    upper.plot(steps[thin], loss[thin], color=_BLUE, alpha=0.3, linewidth=0.8)
    upper.plot(steps[thin], smooth[thin], color=_BLUE, linewidth=1.8)
    lower.plot(steps[thin], rate[thin], color=_ORANGE, linewidth=1.5)
    if len(steps):
        upper.plot(steps[-1:], smooth[-1:], "o", color=_BLUE, markersize=5)
        lower.plot(steps[-1:], rate[-1:], "o", color=_ORANGE, markersize=3)
        label = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        upper.annotate(f"{smooth[-1]:.4g}", (steps[-1], smooth[-1]), color=_BLUE, weight="bold", **label)
        if loss.min() > 0 and smooth.max() > 20 * smooth.min():
            upper.set_yscale("log")
    else:
        upper.text(0.5, 0.5, "no step yet", transform=upper.transAxes, ha="center", color=_QUIET)
    _dress(upper, "loss")
    _dress(lower, "learning rate")
    lower.set_xlabel("step", color=_QUIET)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lower.xaxis.set_major_formatter("{x:,.0f}")
    lower.set_xlim(0, 1.02 * max([1, *steps[-1:]]))
    return _save(figure, path)


def watched(metrics: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> Path:
    """Draw what else a run tells of its steps, each in a panel of its own, over steps, on a transparent ground.

    Args:
        metrics: in the order logged, with "step" and the names; see `series`.
        names: of what is drawn, one or more.
        path: where to write; its suffix names the format (png, svg, pdf).
    """
    from matplotlib.figure import Figure

    rows = -(-len(names) // 2)
    figure = Figure(figsize=(9, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for number, (panel, name) in enumerate(zip(panels, names, strict=False)):
        steps, values = series(metrics, name)
        thin, colour = slice(None, None, -(-len(steps) // 2000) or 1), _LINES[number % len(_LINES)]
        panel.plot(steps[thin], values[thin], color=colour, alpha=0.3, linewidth=0.8)
        panel.plot(steps[thin], smoothed(values)[thin], color=colour, linewidth=1.8)
        _dress(panel, f"{name} {smoothed(values)[-1]:.4g}" if len(values) else name)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return _save(figure, path)


def scores(told: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the parts that were right, as top-1, over epochs, on a transparent ground, in percent.

    Args:
        told: lines with "epoch", and values by name; what is no part from 0 to 1, as a loss, is not drawn.
        path: where to write; its suffix names the format (png, svg, pdf).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for line in told for name in line if name.split("_")[-1] not in _NO_PARTS)
    for number, name in enumerate(names):
        points = [(line["epoch"], 100 * line[name]) for line in told if isinstance(line.get(name), int | float)]
        epochs, values = zip(*points, strict=True)
        colour = _LINES[number % len(_LINES)]
        axes.plot(epochs, values, "o-", color=colour, markersize=3.5, linewidth=1.6, label=f"{name} {values[-1]:.1f}")
    _dress(axes, "% right")
    if names:
        axes.legend(frameon=False, labelcolor=_QUIET, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("epoch", color=_QUIET)
    return _save(figure, path)


_NO_PARTS = ("step", "epoch", "seconds", "loss", "rate", "unusable")
_LINES = (_BLUE, _ORANGE, "#3aa87a", "#b660cd", "#c9524f", "#8a7f5c")


def _dress(axes: Any, title: str) -> None:
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", fontsize=10, color=_QUIET)
    axes.tick_params(colors=_QUIET, labelsize=9, length=0, which="both")
    axes.grid(color=_QUIET, alpha=0.2, linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.yaxis.get_offset_text().set_color(_QUIET)


def _save(figure: Any, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150, transparent=True)
    return write_whole(path, drawn.getvalue())


def series(metrics: Sequence[Mapping[str, Any]], *names: str) -> tuple[NDArray[np.float64], ...]:
    """Columns of a log: steps, ascending and distinct, and the named values, NaN where a line has none.

    Lines without a finite number for the first name are left out. Of a step logged twice, by a run that was
    resumed, the later line counts.
    """

    def number(value: Any) -> float:
        return float(value) if isinstance(value, int | float) else math.nan

    lines = {number(m.get("step")): m for m in metrics if math.isfinite(number(m.get(names[0])))}
    steps = sorted(filter(math.isfinite, lines))
    return np.array(steps), *(np.array([number(lines[step].get(name)) for step in steps]) for name in names)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a window around each value, a thirtieth of them wide and narrower at the ends."""
    count = len(values)
    reach, at = -(-count // 60), np.arange(count)
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, count)
    total = np.concatenate([[0.0], np.cumsum(values)])
    means: NDArray[np.float64] = (total[stop] - total[start]) / (stop - start)
    return means


def _write_png(path: Path, sheet: Image.Image) -> Path:
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return write_whole(path, data.getvalue())


def _sheet(
    cells: NDArray[np.uint8], *, across: Sequence[str], down: Sequence[str] = (), widest: float = _WIDEST
) -> Image.Image:
    """Lay out cells `(rows, columns, H, W, 3)` under the labels `across` and beside the labels `down`."""
    rows, columns, *size = cells.shape[:4]
    height, width = _cell(size[0], size[1], columns, widest)
    enlarged = height >= size[0]
    label_height = max(13, columns * width // 48)
    font = ImageFont.load_default(label_height)
    left = _MARGIN + (max(round(font.getlength(label)) for label in down) + 10 if down else 0)
    top = _MARGIN + label_height + 8
    gaps = max(0, rows - 1) // len(VERSIONS) if down else 0
    sheet_height = top + rows * (height + _GUTTER) + gaps * _CLIP_GAP - _GUTTER + _MARGIN
    sheet = Image.new("RGB", (left + columns * (width + _GUTTER) - _GUTTER + _MARGIN, sheet_height), _GROUND)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(across):
        x = left + column * (width + _GUTTER)
        draw.text((x + width / 2, top - 7), label, fill=_INK, font=font, anchor="ms")
    for row in range(rows):
        y = top + row * (height + _GUTTER) + (row // len(VERSIONS) * _CLIP_GAP if down else 0)
        if down:
            draw.text((left - 10, y + height / 2), down[row], fill=_INK, font=font, anchor="rm")
        for column in range(columns):
            cell = Image.fromarray(cells[row, column])
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            sheet.paste(cell.resize((width, height), how), (left + column * (width + _GUTTER), y))
    return sheet


def _cell(height: int, width: int, columns: int, widest: float) -> tuple[int, int]:
    """The size to draw at: tiny cells a whole number of times larger, so exact; huge ones shrunk to fit."""
    fit = widest / max(columns * width, height)
    scale = min(-(-_SMALLEST // min(height, width)), int(fit)) if fit >= 1 else fit
    return max(1, round(height * scale)), max(1, round(width * scale))


def _animation(clips: NDArray[np.uint8]) -> bytes:
    """A looping GIF of clips `(B, versions, T, H, W, 3)`, drawn smaller until it is light enough to embed."""
    frames, widest = clips.shape[2], 0.5 * _WIDEST
    while True:
        sheets = [_sheet(clips[:, :, frame], across=VERSIONS, widest=widest) for frame in range(frames)]
        width, height = sheets[0].size
        for frame, sheet in enumerate(sheets):  # a bar shows the time; and equal frames would be merged
            bar = (0, height - 3, width * (1 + frame) // frames - 1, height)
            ImageDraw.Draw(sheet).rectangle(bar, fill=_ACCENT)
        data = _gif(sheets)
        if len(data) <= _GIF_BYTES or widest < 280:
            return data
        widest = min(widest, width) * max(0.5, 0.95 * math.sqrt(_GIF_BYTES / len(data)))


def _gif(sheets: Sequence[Image.Image]) -> bytes:
    """One palette for all frames and no dithering: what does not move does not flicker, and costs nothing."""
    fixed = np.array([_GROUND, _INK, _ACCENT, _GREY, _SEAM], dtype=np.uint8)
    palette = Image.new("P", (1, 1))
    adapted = _colours(np.stack([np.asarray(sheet)[::2, ::2] for sheet in sheets]), count=250)
    palette.putpalette([*fixed.flatten().tolist(), *adapted])
    first, *others = (sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets)
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=others, duration=_FRAME_MS, loop=0, optimize=False)
    return data.getvalue()


def _colours(pixels: NDArray[np.uint8], *, count: int) -> list[int]:
    """A palette, flat, for pixels `(..., 3)`, in which common colours do not crowd out a rare one."""
    pixels = pixels.reshape(-1, 3)
    coarse = (pixels >> 3).astype(np.uint16) @ np.array([1024, 32, 1], dtype=np.uint16)
    _, at, times = np.unique(coarse, return_index=True, return_counts=True)
    sample = np.repeat(pixels[at], np.ceil(times**0.4).astype(int), axis=0)
    return (Image.fromarray(sample[None]).quantize(count).getpalette() or [])[: 3 * count]
