"""Arithmetic on grids: a grid is a tuple of ints, `(H, W)` or `(T, H, W)`, and its length is the number of axes.

Here are the cuts of tensors into patches and tiles, and `Shown`: which tokens of a batch are shown, and where
their tiles lie. Nothing here has parameters, and nothing here knows how many axes there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Shown:
    """The shown tokens of a batch, and the tiles that they cover in finer maps.

    A map of any stage is kept as tiles: `(B, V, *tile, C)`, V shown tokens, each with its tile of cells. Where
    nothing is masked the whole map is one tile, `(B, 1, *cells, C)`, so that dense is not a second code path.

    Args:
        grid: the token grid of the last stage.
        index: the shown tokens, row-major and ascending, `(R, V)`; None: all of them. R is B, or a multiple of it: then
            every sample is seen under several masks, one after the other.
        decoded: the hidden tokens that the decoder predicts, `(R, N)`; None: it predicts every token.
    """

    grid: Grid
    index: Tensor | None = None
    decoded: Tensor | None = None

    @property
    def count(self) -> int:
        """V, the shown tokens of a sample."""
        return math.prod(self.grid) if self.index is None else self.index.shape[1]

    @property
    def hidden(self) -> Tensor:
        """The mask `(R, *grid)`, boolean, True = hidden."""
        assert self.index is not None
        everything = torch.ones(len(self.index), math.prod(self.grid), dtype=torch.bool, device=self.index.device)
        return everything.scatter(1, self.index, 0).view(-1, *self.grid)

    def to(self, device: torch.device) -> Shown:
        """The same on another device; on the way to a GPU nothing waits."""

        def moved(index: Tensor | None) -> Tensor | None:
            if index is None or index.device == device:
                return index
            pinned = index.pin_memory() if index.device.type == "cpu" and device.type == "cuda" else index
            return pinned.to(device, non_blocking=True)

        return Shown(self.grid, moved(self.index), moved(self.decoded))

    def take(self, volume: Tensor) -> Tensor:
        """The shown tokens' tiles of a map: `(B or 1, *cells, C) -> (R, V, *tile, C)`.

        Reads nothing of the hidden ones, so neither their values nor their gradients exist for what follows.
        Raises ValueError for a map of a batch size that does not divide R.
        """
        if self.index is None:
            return volume.unsqueeze(1)
        rows = len(self.index)
        times = rows // max(1, len(volume))
        if times * len(volume) != rows:
            raise ValueError(f"the mask is for {rows} samples, the input has {len(volume)}")
        tiles = cut(volume, quotient(volume.shape[1:-1], self.grid))
        sample = torch.arange(rows, device=volume.device) // max(1, times)
        return tiles[sample[:, None], *_coordinates(self.index, self.grid)]

    def around(self, reach: Sequence[int]) -> Tensor | None:
        """For every shown tile the tiles around it, so many along each axis: `(R·V, product of 2·reach + 1)`, int32.

        Rows of the shown tiles, row-major over the steps; -1 where the tile is hidden or beyond the border. None where
        nothing is masked. Its shape follows from shapes alone, so a GPU need not be waited for.
        """
        if self.index is None:
            return None
        rows, shown = self.index.shape
        device = self.index.device
        # the position of every token among the shown ones, on the grid with a margin as wide as the reach
        sides = [side + 2 * r for side, r in zip(self.grid, reach, strict=True)]
        at = torch.zeros_like(self.index)
        steps = torch.zeros(1, dtype=torch.long, device=device)
        for coordinate, side, r in zip(_coordinates(self.index, self.grid), sides, reach, strict=True):
            at = at * side + coordinate + r
            steps = (steps[:, None] * side + torch.arange(-r, r + 1, device=device)).flatten()
        number = torch.arange(rows * shown, device=device, dtype=torch.int32).view(rows, shown)
        rank = torch.full((rows, math.prod(sides)), -1, device=device, dtype=torch.int32).scatter(1, at, number)
        return rank.gather(1, (at[:, :, None] + steps).flatten(1)).view(rows * shown, len(steps))


def show(mask: Tensor, grid: Sequence[int]) -> Shown:
    """What a mask shows: `mask (R, *grid)`, boolean, True = hidden, or uint8.

    In uint8, 0 is shown, 1 is hidden and to be predicted, 2 is hidden and left out by the decoder. Worked out where the
    mask is: on the CPU, then, if a GPU is not to be waited for.

    Raises:
        ValueError: the mask is neither, is not on the grid, has other numbers or none to predict, or counts differ
            between samples.
    """
    if (
        mask.dtype not in (torch.bool, torch.uint8)
        or mask.ndim != 1 + len(grid)
        or tuple(mask.shape[1:]) != tuple(grid)
    ):
        raise ValueError(
            f"mask must be boolean of shape (B, {', '.join(map(str, grid))}), True = hidden; "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if mask.dtype == torch.uint8 and mask.numel() and (int(mask.max()) > 2 or not bool((mask == 1).any())):
        raise ValueError(
            "a uint8 mask has 0 where tokens are shown, 1 where they are hidden and predicted, 2 where they are left "
            f"out, and some 1; got {sorted(set(mask.flatten().tolist()))}"
        )
    decoded = _equally_many(mask == 1, "have equally many tokens to predict") if mask.dtype == torch.uint8 else None
    return Shown(tuple(grid), _equally_many(mask == 0, "show equally many tokens"), decoded)


def _equally_many(chosen: Tensor, what: str) -> Tensor:
    """The row-major indices of the chosen tokens, ascending: `(R, *grid) -> (R, n)`."""
    counts = chosen.flatten(1).sum(1)
    if len(counts) and not bool((counts == counts[0]).all()):
        raise ValueError(f"every sample must {what}; in this mask they have {counts.tolist()}")
    return chosen.flatten(1).nonzero()[:, 1].view(len(chosen), int(counts[0]) if len(counts) else 0)


def _coordinates(index: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Row-major indices as coordinates, one tensor an axis."""
    found: list[Tensor] = []
    for side in reversed(grid):
        found.insert(0, index % side)
        index = index // side
    return tuple(found)
