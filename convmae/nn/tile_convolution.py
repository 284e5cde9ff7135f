"""The depthwise convolution over scattered tiles: the one operator that looks beyond a tile.

The published form multiplies a dense map by the mask and convolves all of it. Here the map exists only as the tiles
of shown tokens, `(B, V, *tile, C)`, and a cell sees its neighbours in its own tile and in other shown tiles, zeros
elsewhere: exactly the published values, at the cost of the shown cells.

How: the leading axes of the kernel are taken tap by tap; for each, the tiles with their halo are gathered by one
table of rows (`Shown.neighbours`), cells and channels contiguous, and convolved by the two-dimensional depthwise
kernel that every backend has in a fast form (three-dimensional depthwise kernels are slow on CPU and GPU alike).
The backward is the same operator with the kernel flipped, for a shown tile is its neighbour's neighbour; it stores
the input alone and gathers again. A faster kernel for one device replaces `_TileConvolution`, and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_convolution(x: Tensor, weight: Tensor, neighbours: Tensor | None) -> Tensor:
    """Depthwise convolution, stride 1, zeros beyond the border and where tokens are hidden.

    Args:
        x: shown tiles `(B, V, *tile, C)`.
        weight: `(C, 1, *kernel)`, odd kernels, as many axes as the tile, two or more.
        neighbours: `Shown.neighbours(tile, kernel)`; None where nothing is masked: then each tile is a whole map.

    Returns:
        `(B, V, *tile, C)`.
    """
    if neighbours is None:
        return _dense(x, weight)
    out: Tensor = _TileConvolution.apply(x, weight, neighbours)
    return out


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    """Whole maps, `(B, 1, *cells, C)`: the leading taps as shifts, the last two axes by the depthwise kernel."""
    tile, kernel = x.shape[2:-1], weight.shape[2:]
    lead = len(tile) - 2
    margins = [half for k in kernel[:lead][::-1] for half in (k // 2, k // 2)]
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, *margins)) if any(margins) else x
    out: Tensor | None = None
    for tap in _taps(kernel[:lead]):
        window = tuple(slice(t, t + size) for t, size in zip(tap, tile, strict=False))
        part = _convolve(padded[:, :, *window].flatten(0, 1 + lead), _tap(weight, tap), padding=True)
        out = part if out is None else out + part
    assert out is not None
    return out.reshape(x.shape)


def _taps(kernel: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(k) for k in kernel))


def _tap(weight: Tensor, tap: tuple[int, ...]) -> Tensor:
    """The two-dimensional kernel at a leading tap: `(C, 1, *kernel) -> (C, 1, kh, kw)`."""
    for place in tap:
        weight = weight[:, :, place]
    return weight


def _convolve(cells: Tensor, weight: Tensor, *, padding: bool = False) -> Tensor:
    """Two-dimensional depthwise convolution, channels last: `(N, H, W, C)`, weight `(C, 1, kh, kw)`."""
    pad = [k // 2 for k in weight.shape[2:]] if padding else [0, 0]
    out = F.conv2d(cells.permute(0, 3, 1, 2), weight, padding=pad, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1)


class _TileConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, neighbours)
        return _sparse(x, weight, neighbours)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, neighbours = ctx.saved_tensors
        axes = tuple(range(2, weight.ndim))
        dx = _sparse(gradient, weight.flip(axes), neighbours) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(x, gradient, weight, neighbours) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _halos(x: Tensor, kernel: tuple[int, ...], neighbours: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """For every leading tap, the halos of all tiles: tap, `(*leading tile sides · B·V, halo H, halo W, C)`."""
    tile, lead = x.shape[2:-1], x.ndim - 5
    cells = x.reshape(-1, x.shape[-1])
    cells = torch.cat([cells, cells.new_zeros(1, cells.shape[1])])
    for tap in _taps(kernel[:lead]):
        rows = neighbours[tuple(slice(t, t + side) for t, side in zip(tap, tile, strict=False))]
        yield tap, cells.index_select(0, rows.flatten()).view(-1, *rows.shape[-2:], cells.shape[1])


def _sparse(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    out: Tensor | None = None
    for tap, halo in _halos(x, tuple(weight.shape[2:]), neighbours):
        part = _convolve(halo, _tap(weight, tap))
        out = part if out is None else out.add_(part)
    assert out is not None
    return _tiles_first(out, x.shape)


def _tiles_first(cells: Tensor, shape: torch.Size) -> Tensor:
    """`(*leading tile sides · B·V, H, W, C) -> (B, V, *tile, C)`."""
    samples, shown, *tile, channels = shape
    lead = len(tile) - 2
    return cells.view(*tile[:lead], samples * shown, *tile[lead:], channels).movedim(lead, 0).reshape(shape)


def _weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    """Tap by tap: the products of shifted cells and gradients, summed over cells by one matrix product."""
    *tile, channels = x.shape[2:]
    lead = len(tile) - 2
    height, width = tile[lead:]
    flat = gradient.flatten(0, 1).movedim(0, lead).reshape(-1, height, width, channels)
    ones = flat.new_ones(1, math.prod(flat.shape[:3]))
    out = torch.empty(*weight.shape[2:], channels, dtype=flat.dtype, device=flat.device)
    buffer = torch.empty_like(flat)
    for tap, halo in _halos(x, tuple(weight.shape[2:]), neighbours):
        for row, column in _taps(tuple(weight.shape[-2:])):
            torch.mul(halo[:, row : row + height, column : column + width], flat, out=buffer)
            torch.mm(ones, buffer.view(-1, channels), out=out[*tap, row, column].unsqueeze(0))
    return out.movedim(-1, 0).unsqueeze(1).to(weight.dtype)
