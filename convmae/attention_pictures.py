"""What a model looks at: the attention of its last stage over the input, and the maps of its stages in colours.

    python -m convmae.attention_pictures runs/a photo.jpg another.jpg --folder seen
    python -m convmae.attention_pictures runs/a photo.jpg --query 3 7

`python -m video.attention_pictures` does the same for clips. For each file it writes `NAME.png`, with attention and
maps, and `NAME-heads.png`, with the attention of every head. The functions give tensors, for pictures of one's own.

Nothing here knows how many axes a model has: an image is a clip of one frame. Attention is computed from a block's own
queries and keys beside the forward pass, which stays as it is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from . import command
from .builders import backbone_of
from .data import UnusableFileError
from .grids import Grid
from .images import CentreCrop, read
from .nn.layers import Attention
from .nn.trunk import AttentionStage
from .pictures import _GROUND, _sheet, _write_png
from .weights import Channels, Encoder, load_taking

Query = Literal["all", "class"] | tuple[int, ...]
"""Whose attention: the mean over all tokens', the class token's, or that of the token at a place of the grid."""

_SHARE = 0.55  # of the heat in a picture that it lies over
_OUTLIERS = 0.01  # of the values, at either end, that are drawn as the least and the largest
_COLUMNS, _FRAMES = 6, 5
_MARK = (66, 135, 245)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """What each token takes of each: `x (B, N, D) -> (B, heads, N, N)`, float32, queries first; rows sum to 1."""
    q, k, _ = rearrange(attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attention.heads).float()
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


def attention_maps(model: nn.Module, x: Tensor, *, query: Query = "all", block: int = -1) -> Tensor:
    """The attention of one block of the last stage, head by head: `(B, heads, *grid)`, float32.

    Args:
        model: with a trunk, as a masked autoencoder, a classifier or a backbone; it sees the whole input.
        x: `(B, C, *size)`, ImageNet-normalised floats, or uint8 pixels.
        query: whose attention; see `Query`.
        block: of the last stage's, from 0; negative from the end.

    Returns:
        The parts of its attention that it pays to each token. They sum to 1, less what goes to the class token.

    Raises:
        ValueError: the last stage has no attention, there is no such block or token, or x has another size.
    """
    found: list[Tensor] = []
    stage = _last_stage(model)
    if not -len(stage.blocks) <= block < len(stage.blocks):
        raise ValueError(f"block={block}: the last stage has {len(stage.blocks)}, counted from 0")
    with _watched([stage.blocks[block].get_submodule("attention")], found.append):
        _stages(model, x)
    return _paid(found[0], query, model)


def rollout(model: nn.Module, x: Tensor, *, query: Query = "all") -> Tensor:
    """The attention through all blocks of the last stage: `x (B, C, *size) -> (B, *grid)`, float32.

    Attention rollout (Abnar and Zuidema, 2020; arXiv 2005.00928): mean over heads, half of it and half the identity for
    the residual branch, multiplied block by block. Arguments and errors are those of `attention_maps`.
    """
    through: list[Tensor] = []

    def see(weights: Tensor) -> None:
        mean = weights.mean(1)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        through[:] = [step if not through else step @ through[0]]

    with _watched([block.get_submodule("attention") for block in _last_stage(model).blocks], see):
        _stages(model, x)
    return _paid(through[0], query, model)


def _last_stage(model: nn.Module) -> AttentionStage:
    stage = backbone_of(model).trunk.stages[-1]
    if not isinstance(stage, AttentionStage):
        raise ValueError("the model's last stage has convolution blocks, and so no attention")
    return stage


@torch.no_grad()
def _stages(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps of all stages, `(B, C, *grid)`, where nothing is dropped, whatever mode the model is in."""
    backbone = backbone_of(model)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        return backbone.features(x)
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _watched(attentions: Sequence[nn.Module], see: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `see` with the weights of these, as they are computed."""

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        see(attention_weights(module, given[0]))

    hooks = [attention.register_forward_pre_hook(before) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _paid(weights: Tensor, query: Query, model: nn.Module) -> Tensor:
    """What the query pays to each token of the grid: `(B, ..., N, N) -> (B, ..., *grid)`."""
    grid = backbone_of(model).trunk.grid
    first = weights.shape[-1] - math.prod(grid)
    if query == "all":
        paid = weights[..., first:, first:].mean(-2)
    elif query == "class":
        if not first:
            raise ValueError('query="class": the model has no class token; take "all", or the place of a token')
        paid = weights[..., 0, first:]
    else:
        paid = weights[..., first + _place(query, grid), first:]
    return torch.unflatten(paid, -1, grid)


def _place(query: tuple[int, ...], grid: Grid) -> int:
    """The token at a place of the grid, row-major."""
    if len(query) != len(grid) or any(not 0 <= at < side for at, side in zip(query, grid, strict=True)):
        raise ValueError(f"query={query} is no token's place: there are {grid}, counted from 0")
    return int(np.ravel_multi_index(query, grid))


# ---- colours ---------------------------------------------------------------------------------------------------------


def principal_colours(features: Tensor) -> Tensor:
    """A map's first three principal components as red, green and blue: `(C, *grid) -> (*grid, 3)` uint8.

    Components are those of this map's own tokens, all frames of a clip together, and each is spread over the range of
    its colour. What is alike is coloured alike; the colours themselves mean nothing, and differ between maps.
    """
    tokens = rearrange(features.detach(), "c ... -> (...) c").double()
    tokens = tokens - tokens.mean(0)
    _, directions = torch.linalg.eigh(tokens.T @ tokens)  # variances rise
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = tokens @ (directions * largest.sign())  # else the sign is the machine's choice
    components = F.pad(components, (0, 3 - components.shape[1]))
    spread = torch.stack([_spread(component) for component in components.T], dim=-1)
    return (spread * 255).round().byte().view(*features.shape[1:], 3)


def overlay(pixels: Tensor, values: Tensor) -> Tensor:
    """Lay a map over the input, as heat: pixels `(3, *size)` uint8, values `(*grid)` -> `(*size, 3)` uint8.

    Bright is much. The least and the largest values are those of all frames together.
    """
    import matplotlib  # costs half a second: only for those who draw

    grid, size = values.shape, pixels.shape[1:]
    planes = values.detach().float().cpu().reshape(1, -1, *grid[-2:])
    # bicubic would draw dark rings around what is bright
    smooth = F.interpolate(planes, size=size[-2:], mode="bilinear", align_corners=False)[0]
    frames = math.prod(size[:-2])  # a token's frames show the same
    smooth = smooth[torch.arange(frames) * len(smooth) // frames].view(*size)
    heat = torch.from_numpy(matplotlib.colormaps["inferno"](_spread(smooth).numpy())[..., :3])
    dimmed = pixels.cpu().movedim(0, -1).float().mean(-1, keepdim=True) / 255
    return ((_SHARE * heat + (1 - _SHARE) * dimmed) * 255).round().byte()


def _spread(values: Tensor) -> Tensor:
    """Values in [0, 1], but for outliers."""
    ordered = values.flatten().sort().values
    outside = int(_OUTLIERS * len(ordered))
    low, high = ordered[outside], ordered[-1 - outside]
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


# ---- pictures --------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture of the input: its title, and pixels uint8 `(T, H, W, 3)`; T is 1 for an image."""

    title: str
    frames: Tensor


def overview(model: nn.Module, pixels: Tensor, *, query: tuple[int, ...] | None = None) -> list[Picture]:
    """The input; attention of the last block, mean over heads, and rollout; the maps of all stages in colours.

    Args:
        model: as `attention_maps` takes it.
        pixels: uint8 `(3, *size)`.
        query: a token whose attention is drawn too, and which is marked in the input.

    Raises ValueError as `attention_maps` does.
    """
    x = pixels[None].to(next(model.parameters()).device)
    maps = [("attention", attention_maps(model, x).mean(1)), ("rollout", rollout(model, x))]
    if _last_stage(model).class_token is not None:
        maps.append(("class token", attention_maps(model, x, query="class").mean(1)))
    if query is not None:
        maps.append(("marked token", attention_maps(model, x, query=query).mean(1)))
    found = [_picture("input", pixels.movedim(0, -1) if query is None else _marked(model, pixels, query))]
    found += [_picture(title, overlay(pixels, values[0])) for title, values in maps]
    for number, features in enumerate(_stages(model, x), 1):
        colours = _enlarged(principal_colours(features[0].float().cpu()), tuple(pixels.shape[1:]))
        found.append(_picture(f"stage {number}", colours))
    return found


def heads(model: nn.Module, pixels: Tensor, *, query: Query = "all") -> list[Picture]:
    """The attention of every head of the last block; arguments and errors are those of `overview`."""
    maps = attention_maps(model, pixels[None].to(next(model.parameters()).device), query=query)[0]
    return [_picture(f"head {1 + head}", overlay(pixels, values)) for head, values in enumerate(maps)]


def _picture(title: str, pixels: Tensor) -> Picture:
    return Picture(title, pixels.reshape(-1, *pixels.shape[-3:]))


def _enlarged(colours: Tensor, size: Grid) -> Tensor:
    """Every cell as large as its pixels: `(*grid, 3) -> (*size, 3)`."""
    for axis, side in enumerate(size):
        colours = colours.index_select(axis, torch.arange(side) * colours.shape[axis] // side)
    return colours


def _marked(model: nn.Module, pixels: Tensor, query: tuple[int, ...]) -> Tensor:
    """The input with a frame around a token: `(3, *size) -> (*size, 3)`."""
    stride = backbone_of(model).trunk.stride
    token = tuple(slice(at * side, (at + 1) * side) for at, side in zip(query, stride, strict=True))
    marked = pixels.movedim(0, -1).clone()
    width = max(1, stride[-1] // 8)
    inner = (*token[:-2], *(slice(part.start + width, part.stop - width) for part in token[-2:]))
    inside = marked[inner].clone()
    marked[token] = torch.tensor(_MARK, dtype=torch.uint8)
    marked[inner] = inside
    return marked


def sheet(found: Sequence[Picture]) -> Image.Image:
    """Images side by side; of clips a row each, with a few frames spread over it."""
    count = len(found[0].frames)
    if count > 1:
        chosen = np.linspace(0, count - 1, min(count, _FRAMES)).round().astype(int)
        first, *others = [[title, *[""] * (len(chosen) - 1)] for title, _ in found]
        labels = [
            [f"{title}{', ' * bool(title)}frame {1 + at}" for title, at in zip(first, chosen, strict=True)],
            *others,
        ]
        rows = [picture.frames[chosen] for picture in found]
    else:
        columns = math.ceil(len(found) / math.ceil(len(found) / _COLUMNS))
        blank = torch.tensor(_GROUND, dtype=torch.uint8).expand(found[0].frames.shape)
        padded = [*found, *[Picture("", blank)] * (-len(found) % columns)]
        starts = range(0, len(padded), columns)
        labels = [[title for title, _ in padded[at : at + columns]] for at in starts]
        rows = [torch.cat([frames for _, frames in padded[at : at + columns]]) for at in starts]
    return _stacked([_sheet(row.numpy()[None], across=across) for row, across in zip(rows, labels, strict=True)])


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), _GROUND)
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw what a model looks at in each file: its attention, and the maps of its stages.

    Args:
        model: a run's folder, or a checkpoint.
        files: to draw.
        folder: to write to.
        query: draw the attention of this token too: its row and column on the last stage's grid, from 0; of clips, the
            time step before them.
        size: of the input: height and width in pixels. (default: the model's)
        encoder: of a CMAE: online or target.
        channels: of the authors' CMAE: rgb, or bgr, which the released weights saw.
    """

    model: Path
    files: tuple[Path, ...]
    folder: Path = Path("attention_pictures")
    query: tuple[int, ...] = ()
    size: int | None = None
    encoder: Encoder = "online"
    channels: Channels = "rgb"


def carry_out(options: Options, model: nn.Module, pixels_of: Callable[[Path, Grid], Tensor]) -> int:
    """Draw each file, and say what was written and what could not be; the exit code, 1 where nothing was.

    Raises ValueError as `overview` does, and where two files would be drawn to one.
    """
    stems = [file.stem for file in options.files]
    if again := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ValueError(f"several files would be drawn to {options.folder / again}.png: draw one, or rename it")
    written = 0
    for file in options.files:
        try:
            pixels = pixels_of(file, backbone_of(model).trunk.size)
        except UnusableFileError as problem:
            print(problem, file=sys.stderr)
            continue
        query = options.query or None
        drawn = {"": overview(model, pixels, query=query), "-heads": heads(model, pixels, query=query or "all")}
        for name, pictures in drawn.items():
            print(_write_png(options.folder / f"{file.stem}{name}.png", sheet(pictures)))
            written += 1
    return 0 if written else 1


def _draw(options: Options) -> int:
    model = load_taking(2, options, other="video.attention_pictures")

    def pixels_of(file: Path, size: Grid) -> Tensor:
        return CentreCrop(ratio=1)(read(file), (size[0], size[1]), torch.Generator())

    return carry_out(options, model, pixels_of)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw images; the exit code, 1 where none could be, 2 where it cannot be done."""
    return command.run(Options, "convmae.attention_pictures", _draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
