"""The tile convolution in plain torch, for any device and any number of axes.

The leading axes of the kernel are taken tap by tap. For each, every tile, or the one so many steps away, is convolved
by itself with the two-dimensional depthwise kernel that every backend has in a fast form (three-dimensional ones are
slow on CPU and GPU alike); then the few neighbours that lie in other shown tiles are added pair by pair. So nothing is
spent on hidden cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils.weak import WeakTensorKeyDictionary

from ..grids import Grid

BLOCK_ON_CPU, BLOCK = 2**17, 2**26
"""Numbers gathered at once: on a CPU half a MB in float32, still in its cache when they are added."""


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Whole maps, `(B, 1, *cells, C)`: the leading taps as shifts, the last two axes by the depthwise kernel."""
    kernel, weight = weight.shape[2:], weight.to(x.dtype)
    out: Tensor | None = None
    for tap, window in _windows(x, kernel):
        part = _convolve(window, _tap(weight, tap))
        out = part if out is None else out + part
    assert out is not None
    out = out.reshape(x.shape)
    return out if bias is None else out + bias.to(x.dtype)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, around: Tensor | None, turned: bool) -> Tensor:
    """See `tile_convolution`; `turned` takes the kernel point-reflected."""
    weight = weight.to(x.dtype)
    if turned:
        weight = weight.flip(tuple(range(2, weight.ndim)))
    if around is None:
        return dense(x, weight, bias)
    neighbours = _neighbours(around, x.shape[2:-1], weight.shape[2:])
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
    if bias is not None:
        out += bias.to(x.dtype)
    return out.contiguous().view(x.shape)


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, around: Tensor | None) -> Tensor:
    """Tap by tap: the products of gradients and the cells under the tap, summed over cells by a matrix product."""
    if around is None:
        return _dense_weight_gradient(x, gradient, weight)
    neighbours = _neighbours(around, x.shape[2:-1], weight.shape[2:])
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
    return out.t().reshape(weight.shape).to(weight.dtype).contiguous()


def _windows(x: Tensor, kernel: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """For every leading tap the planes under it, zeros beyond the border: `(planes, H, W, C)`."""
    tile, lead = x.shape[2:-1], x.ndim - 5
    margins = [half for k in kernel[:lead][::-1] for half in (k // 2, k // 2)]
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, *margins)) if any(margins) else x
    for tap in _taps(kernel[:lead]):
        window = tuple(slice(t, t + size) for t, size in zip(tap, tile, strict=False))
        yield tap, padded[:, :, *window].flatten(0, 1 + lead)


def _dense_weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """As `dense` goes: leading tap by leading tap."""
    kernel, slopes = weight.shape[2:], gradient.flatten(0, gradient.ndim - 4).permute(0, 3, 1, 2)
    shape, padding = (len(weight), 1, *kernel[-2:]), [k // 2 for k in kernel[-2:]]
    weigh: Callable[..., Tensor] = partial(conv2d_weight, padding=padding, groups=len(weight))
    parts = [weigh(window.permute(0, 3, 1, 2), shape, slopes) for _, window in _windows(x, kernel)]
    return torch.stack(parts, dim=2).reshape(weight.shape).to(weight.dtype)


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


def _pairs(neighbours: _Neighbours, cells: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The pairs beyond the tile, a block at a time."""
    size = max(1, (BLOCK_ON_CPU if cells.device.type == "cpu" else BLOCK) // cells.shape[1])
    return zip(*(torch.split(each, size) for each in neighbours[1:]), strict=True)


def _planes(cells: Tensor, tile: Sequence[int], neighbours: _Neighbours) -> Iterator[Tensor]:
    """For every leading tap, the tiles so many steps away, zeros where there is none: `(planes, H, W, C)`."""
    middle = len(neighbours.same_place) // 2
    extended = torch.cat([cells, cells.new_zeros(1, cells.shape[1])]) if middle else cells
    for tap, rows in enumerate(neighbours.same_place):
        moved = cells if tap == middle else extended.index_select(0, rows)
        yield moved.view(-1, *tile[-2:], cells.shape[1])


class _Neighbours(NamedTuple):
    """Where the cells under a kernel lie, in rows of the shown cells `(R·V·tile, C)`.

    Two axes at a time are convolved tile by tile; this says what else there is.

    same_place: for every tap of the leading axes, row-major, `(taps, rows)`: the cell at the same place in the plane,
        so many steps away; the row past the last where it is hidden or outside.
    rows, sources, taps: every pair of a row and a neighbour of it that is shown, under a tap, in another tile of its
        plane; taps count over the kernel, row-major, and ascend.
    """

    same_place: Tensor
    rows: Tensor
    sources: Tensor
    taps: Tensor


_known: Any = WeakTensorKeyDictionary()
"""What was worked out for a tensor `around`, and a copy of it: all blocks of a stage need the same.

The copy tells when the tensor holds other numbers than it did, as where compiled code uses its memory again.
"""


def _neighbours(around: Tensor, tile: Grid, kernel: Grid) -> _Neighbours:
    tile, kernel = tuple(tile), tuple(kernel)
    if around not in _known or not _known[around][0].equal(around):
        _known[around] = (around.clone(), {})
    found: dict[tuple[Grid, Grid], _Neighbours] = _known[around][1]
    if (tile, kernel) not in found:
        found[tile, kernel] = _find_neighbours(around, tile, kernel)
    return found[tile, kernel]


def _find_neighbours(around: Tensor, tile: Grid, kernel: Grid) -> _Neighbours:
    """For every tap and cell of a tile: which of the tiles around it falls in, and where in it."""
    reach = [-(-(k // 2) // t) for k, t in zip(kernel, tile, strict=True)]
    which, place, in_plane = _under_kernel(tile, kernel, reach, around.device)
    tiles, cells = len(around), math.prod(tile)
    absent = tiles * cells
    owner = around.long().index_select(1, which.flatten()).view(tiles, *which.shape)  # (R·V, taps, cells)
    source = torch.where(owner >= 0, owner * cells + place, absent).transpose(0, 1).reshape(*kernel, absent)
    same_plane = in_plane.repeat(1, tiles).view(source.shape)
    beyond = (source < absent) & ~same_plane
    tap, row = beyond.flatten(0, -2).nonzero(as_tuple=True)
    return _Neighbours(
        same_place=source[..., kernel[-2] // 2, kernel[-1] // 2, :].reshape(math.prod(kernel[:-2]), absent),
        rows=row,
        sources=source[beyond],
        taps=tap,
    )


def _under_kernel(
    tile: Grid, kernel: Grid, reach: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For every tap of a kernel and cell of a tile, `(taps, cells)`: the tile it falls in, of the 2·reach + 1 around an
    axis; the cell of that tile; and whether that tile is beside this one along no more than the leading axes."""
    axes, zero = len(tile), torch.zeros((), dtype=torch.long, device=device)
    which, place, in_plane = zero, zero, torch.tensor(True, device=device)
    for axis, (k, t, r) in enumerate(zip(kernel, tile, reach, strict=True)):
        steps = torch.arange(k, device=device)[:, None] + torch.arange(t, device=device) - k // 2
        steps = steps.view(*(k if a == axis else 1 for a in range(axes)), *(t if a == axis else 1 for a in range(axes)))
        away = steps.div(t, rounding_mode="floor")
        which, place = which * (2 * r + 1) + away + r, place * t + steps % t
        if axis >= axes - 2:
            in_plane = in_plane & (away == 0)
    taps, cells = math.prod(kernel), math.prod(tile)
    whole = (*kernel, *tile)
    return (
        which.reshape(taps, cells),
        place.reshape(taps, cells),
        in_plane.expand(whole).reshape(taps, cells),
    )
