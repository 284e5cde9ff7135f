"""The depthwise convolution over scattered tiles: the one operator that looks beyond a tile.

The published form multiplies a dense map by the mask and convolves all of it. Here the map exists only as the tiles
of shown tokens, `(B, V, *tile, C)`, and a cell sees its neighbours in its own tile and in other shown tiles, zeros
elsewhere: exactly the published values, at the cost of the shown cells.

How: the leading axes of the kernel are taken tap by tap. For each, every tile, or the one so many steps away, is
convolved by itself with the two-dimensional depthwise kernel that every backend has in a fast form (three-dimensional
ones are slow on CPU and GPU alike); then the few neighbours that lie in other shown tiles are added pair by pair
(`grids.Neighbours`). So nothing is spent on hidden cells. The backward is the same operator with the kernel flipped,
for a shown cell is its neighbour's neighbour; it stores the input alone. A faster kernel for one device replaces
`_TileConvolution`, and may read other tables than `grids.Neighbours`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grids import Neighbours

BLOCK = {"cpu": 2**17, "cuda": 2**26}
"""Numbers gathered at once: on a CPU half a MB in float32, still in its cache when they are added."""


def tile_convolution(x: Tensor, weight: Tensor, neighbours: Neighbours | None) -> Tensor:
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
    out: Tensor = _TileConvolution.apply(x, weight, *neighbours)
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
        part = _convolve(padded[:, :, *window].flatten(0, 1 + lead), _tap(weight, tap))
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


def _convolve(cells: Tensor, weight: Tensor) -> Tensor:
    """Two-dimensional depthwise convolution, zeros beyond, channels last: `(N, H, W, C)`, weight `(C, 1, kh, kw)`."""
    padding = [k // 2 for k in weight.shape[2:]]
    out = F.conv2d(cells.permute(0, 3, 1, 2), weight, padding=padding, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1)


class _TileConvolution(torch.autograd.Function):
    """Takes the fields of `Neighbours` one by one, for only tensors among the arguments are seen by a tracer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, same_place: Tensor, rows: Tensor, sources: Tensor, taps: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, same_place, rows, sources, taps)
        return _sparse(x, weight, Neighbours(same_place, rows, sources, taps))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tables = ctx.saved_tensors
        neighbours = Neighbours(*tables)
        axes = tuple(range(2, weight.ndim))
        dx = _sparse(gradient, weight.flip(axes), neighbours) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(x, gradient, weight, neighbours) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None, None


def _pairs(neighbours: Neighbours, cells: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The pairs beyond the tile, a block at a time."""
    size = max(1, BLOCK.get(cells.device.type, BLOCK["cuda"]) // cells.shape[1])
    return zip(*(torch.split(each, size) for each in neighbours[1:]), strict=True)


def _planes(cells: Tensor, tile: Sequence[int], neighbours: Neighbours) -> Iterator[Tensor]:
    """For every leading tap, the tiles so many steps away, zeros where there is none: `(planes, H, W, C)`."""
    middle = len(neighbours.same_place) // 2
    extended = torch.cat([cells, cells.new_zeros(1, cells.shape[1])]) if middle else cells
    for tap, rows in enumerate(neighbours.same_place):
        moved = cells if tap == middle else extended.index_select(0, rows)
        yield moved.view(-1, *tile[-2:], cells.shape[1])


def _sparse(x: Tensor, weight: Tensor, neighbours: Neighbours) -> Tensor:
    cells = x.reshape(-1, x.shape[-1])
    out: Tensor | None = None
    for tap, plane in zip(_taps(weight.shape[2:-2]), _planes(cells, x.shape[2:-1], neighbours), strict=True):
        part = _convolve(plane, _tap(weight, tap))
        out = part if out is None else out.add_(part)
    assert out is not None
    out = out.reshape(cells.shape)
    by_tap = weight.flatten(1).t().contiguous()
    for rows, sources, taps in _pairs(neighbours, cells):
        out.index_add_(0, rows, cells.index_select(0, sources).mul_(by_tap.index_select(0, taps)))
    return out.view(x.shape)


def _weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, neighbours: Neighbours) -> Tensor:
    """Tap by tap: the products of gradients and the cells under the tap, summed over cells by a matrix product."""
    channels, (height, width) = x.shape[-1], x.shape[-3:-1]
    cells, flat = x.reshape(-1, channels), gradient.reshape(-1, channels)
    there = flat.view(-1, height, width, channels)
    ones, buffer = flat.new_ones(1, len(flat)), torch.empty_like(flat).flatten()
    # sums over many cells, so in float32 or better
    out = torch.zeros(
        math.prod(weight.shape[2:]), channels, device=flat.device, dtype=torch.promote_types(flat.dtype, torch.float32)
    )
    planes = _planes(cells, x.shape[2:-1], neighbours)
    in_plane = [[tap - k // 2 for tap in range(k)] for k in weight.shape[-2:]]
    places = ((plane, down, right) for plane in planes for down, right in itertools.product(*in_plane))
    for tap, (plane, down, right) in enumerate(places):
        if abs(down) < height and abs(right) < width:
            here = plane[:, max(0, down) : height + down, max(0, right) : width + right]
            product = buffer[: here.numel()].view(here.shape)
            torch.mul(here, there[:, max(0, -down) : height - down, max(0, -right) : width - right], out=product)
            out[tap] = torch.mm(ones[:, : here.numel() // channels], product.view(-1, channels))[0]
    for rows, sources, taps in _pairs(neighbours, cells):
        out.index_add_(0, taps, flat.index_select(0, rows).mul_(cells.index_select(0, sources)).to(out.dtype))
    return out.t().reshape(weight.shape).to(weight.dtype)
