"""Arithmetic on grids: a grid is a tuple of ints, `(H, W)` or `(T, H, W)`, and its length is the number of axes.

Here are the cuts of tensors into patches and tiles, and `Shown`: which tokens of a batch are shown, and where
their tiles lie. Nothing here has parameters, and nothing here knows how many axes there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, ...]


def product(*grids: Sequence[int]) -> Grid:
    """The axis-wise product of grids: `product((2, 4, 4), (1, 2, 2)) == (2, 8, 8)`."""
    return tuple(math.prod(numbers) for numbers in zip(*grids, strict=True))


def quotient(grid: Sequence[int], by: Sequence[int]) -> Grid:
    """The axis-wise quotient; both must divide, which builders check before anyone gets here."""
    assert all(g % d == 0 for g, d in zip(grid, by, strict=True)), (grid, by)
    return tuple(g // d for g, d in zip(grid, by, strict=True))


def cut(x: Tensor, tile: Sequence[int], *, first: int = 1) -> Tensor:
    """Cut the axes that start at `first` into tiles: `(B, *(g·t), C) -> (B, *g, *t, C)`, a view."""
    axes = len(tile)
    shape = x.shape[first : first + axes]
    for axis in reversed(range(axes)):
        assert shape[axis] % tile[axis] == 0, (tuple(x.shape), tuple(tile))
        x = torch.unflatten(x, first + axis, (shape[axis] // tile[axis], tile[axis]))
    tail = range(first + 2 * axes, x.ndim)
    outer, inner = range(first, first + 2 * axes, 2), range(first + 1, first + 2 * axes, 2)
    return x.permute(*range(first), *outer, *inner, *tail)


def patches(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Pixels by patch: `x (B, C, *size) -> (B, L, P, C)`, P = the product of the patch's sides, row-major.

    In memory the channels come before the pixels: rows of the input are copied whole, and a patch's channel is dense.
    """
    axes = len(patch)
    tiles = cut(x, patch, first=2).movedim(1, 1 + axes)
    return tiles.flatten(2 + axes).flatten(1, axes).transpose(2, 3)


def assemble(patches: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The inverse of `patches`: `(B, L, P, C) -> (B, C, *size)` with `size = grid · patch`."""
    axes = len(patch)
    x = torch.unflatten(torch.unflatten(patches, 2, tuple(patch)), 1, tuple(grid))
    order = [axis for pair in zip(range(1, 1 + axes), range(1 + axes, 1 + 2 * axes), strict=True) for axis in pair]
    x = x.permute(0, 1 + 2 * axes, *order)
    for axis in range(axes):
        x = x.flatten(2 + axis, 3 + axis)
    return x


class Neighbours(NamedTuple):
    """Where the cells under a kernel lie, in rows of the shown cells `(B·V·tile, C)`.

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


class Shown:
    """The shown tokens of a batch, and the tiles that they cover in finer maps.

    A map of any stage is kept as tiles: `(B, V, *tile, C)`, V shown tokens, each with its tile of cells. Where
    nothing is masked the whole map is one tile, `(B, 1, *cells, C)`, so that dense is not a second code path.

    Args:
        grid: the token grid of the last stage.
        mask: boolean `(B, *grid)`, True = hidden, with equally many hidden tokens in every sample; None shows all.

    Raises:
        ValueError: the mask is not boolean, is not on the grid, or hides unequal counts.
    """

    def __init__(self, grid: Sequence[int], mask: Tensor | None = None, *, device: torch.device | None = None):
        self.grid = tuple(grid)
        self.index: Tensor | None = None
        self._neighbours: dict[tuple[Grid, Grid], Neighbours] = {}
        if mask is not None:
            self.index = shown_tokens(mask, self.grid).to(device or mask.device, non_blocking=True)

    @property
    def count(self) -> int:
        """V, the shown tokens of a sample."""
        return math.prod(self.grid) if self.index is None else self.index.shape[1]

    def take(self, volume: Tensor) -> Tensor:
        """The shown tokens' tiles of a map: `(B or 1, *cells, C) -> (B, V, *tile, C)`.

        Reads nothing of the hidden ones, so neither their values nor their gradients exist for what follows.
        Raises ValueError for a map of another batch size.
        """
        if self.index is None:
            return volume.unsqueeze(1)
        if volume.shape[0] not in (1, len(self.index)):
            raise ValueError(f"the mask is for {len(self.index)} samples, the input has {volume.shape[0]}")
        tile = quotient(volume.shape[1:-1], self.grid)
        batch = torch.arange(len(self.index), device=volume.device) % volume.shape[0]
        return cut(volume, tile)[batch[:, None], *self._coordinates()]

    def neighbours(self, tile: Grid, kernel: Grid) -> Neighbours | None:
        """Where the cells under a kernel lie, for every shown cell; None where nothing is masked. Kept for reuse."""
        if self.index is None:
            return None
        if (tile, kernel) not in self._neighbours:
            self._neighbours[tile, kernel] = self._find_neighbours(self.index, tile, kernel)
        return self._neighbours[tile, kernel]

    def _coordinates(self) -> tuple[Tensor, ...]:
        assert self.index is not None
        return torch.unravel_index(self.index, self.grid)

    def _find_neighbours(self, index: Tensor, tile: Grid, kernel: Grid) -> Neighbours:
        axes, (samples, shown), device = len(tile), index.shape, index.device
        # rank (B, *grid + margins): the position of a token among the shown ones, -1 = hidden or outside
        reach = [-(-(k // 2) // t) for k, t in zip(kernel, tile, strict=True)]
        at = [c.flatten() + r for c, r in zip(self._coordinates(), reach, strict=True)]
        batch = torch.arange(samples, device=device).repeat_interleave(shown)
        rank = index.new_full((samples, *(g + 2 * r for g, r in zip(self.grid, reach, strict=True))), -1)
        rank[batch, *at] = torch.arange(samples * shown, device=device)
        # the tiles around every shown one (B·V, all of 2·reach + 1)
        around = torch.cartesian_prod(*(torch.arange(-r, r + 1, device=device) for r in reach)).view(-1, axes)
        tiles = rank[batch[:, None], *(a[:, None] + away for a, away in zip(at, around.unbind(1), strict=True))]
        # for every tap and cell of a tile: which of these tiles it falls in, and where in it
        which, place, in_plane = _under_kernel(tile, kernel, reach, device)
        cells = math.prod(tile)
        absent = samples * shown * cells
        owner = tiles.index_select(1, which.flatten()).view(samples * shown, *which.shape)  # (B·V, taps, cells)
        source = torch.where(owner >= 0, owner * cells + place, absent).transpose(0, 1).reshape(*kernel, absent)
        same_plane = in_plane.repeat(1, samples * shown).view(source.shape)
        beyond = (source < absent) & ~same_plane
        tap, row = beyond.flatten(0, -2).nonzero(as_tuple=True)
        return Neighbours(
            same_place=source[..., kernel[-2] // 2, kernel[-1] // 2, :].reshape(-1, absent),
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


def shown_tokens(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """The row-major indices of the shown tokens, ascending: `mask (B, *grid) -> (B, V)`.

    Raises:
        ValueError: the mask is not boolean, is not on the grid, or hides unequal counts.
    """
    if mask.dtype != torch.bool or mask.ndim != 1 + len(grid) or tuple(mask.shape[1:]) != tuple(grid):
        raise ValueError(
            f"mask must be boolean of shape (B, {', '.join(map(str, grid))}), True = hidden; "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    counts = (~mask).flatten(1).sum(1)
    if len(counts) and not bool((counts == counts[0]).all()):
        raise ValueError(f"every sample must show equally many tokens; this mask shows {counts.tolist()}")
    return (~mask).flatten(1).nonzero()[:, 1].view(mask.shape[0], -1)
