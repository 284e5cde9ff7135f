"""Which tokens are hidden. A mask is boolean `(B, *grid)`, True = hidden, on the grid of the last stage.

A masking is anything callable as `masking(batch, grid, generator)`; one class covers the published ones:

    random(0.75)          every token by itself                                    MAE, ConvMAE
    block(0.75, size=2)   blocks of 2 x 2 tokens                                   CMAE's code
    tube(0.9)             the same tokens at every time step                       VideoMAE
    tube_block(0.9, 2)    the same blocks of 2 x 2 tokens at every time step       block-wise, in a tube
    complementary(4)      every token shown in exactly one of four masks           FastConvMAE

`running_cells(0.5)` is of another kind: which of the hidden tokens the decoder predicts (VideoMAE V2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Rounding = Literal["keep", "hide"]


class Part(Protocol):
    """Which hidden tokens the decoder predicts: a frozen dataclass with this call."""

    def __call__(self, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Masks `(R, *grid)`, True = hidden `-> (R, *grid)` uint8: 0 shown, 1 to predict, 2 left out; equal counts."""
        ...


class Masking(Protocol):
    """What a masking of your own must be: a frozen dataclass with this call, so that it prints and pickles.

    One that shows a sample under several masks says how many by an attribute `groups`.
    """

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw masks `(batch, *grid)`, boolean, True = hidden, on the CPU; equally many hidden in every sample.

        With groups, `(batch * groups, *grid)`, those of a sample after one another.

        Raises ValueError where the grid does not suit it: the builder reports it at `.build()`.
        """
        ...


def _coarse(block: tuple[int | None, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of blocks. Raises ValueError where the block does not fit."""
    block = block or (1,) * len(grid)
    if len(block) != len(grid):
        raise ValueError(f"block {block} has {len(block)} axes, the token grid {grid} has {len(grid)}")
    sides = [size if side is None else side for side, size in zip(block, grid, strict=True)]
    if any(size % side for side, size in zip(sides, grid, strict=True)):
        raise ValueError(f"block {block} does not divide the token grid {grid}")
    return tuple(size // side for side, size in zip(sides, grid, strict=True))


def _showing(kept: Tensor, coarse: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The masks that show these blocks alone: indices `(n, kept) -> (n, *grid)`."""
    mask = (
        torch.ones(len(kept), math.prod(coarse), dtype=torch.bool, device=kept.device)
        .scatter(1, kept, False)
        .view(-1, *coarse)
    )
    for axis, (side, count) in enumerate(zip(grid, coarse, strict=True)):
        mask = mask.repeat_interleave(side // count, dim=1 + axis)
    return mask


def _require_sides(block: tuple[int | None, ...]) -> None:
    if any(side is not None and side < 1 for side in block):
        raise ValueError(f"block sides are positive numbers of tokens, or None for an axis; got {block!r}")


@dataclass(frozen=True, kw_only=True)
class BlockMasking:
    """Hides whole blocks of tokens, drawn uniformly without replacement.

    Args:
        ratio: the share of blocks to hide, between 0 and 1.
        block: tokens of a block along each axis; None = the whole axis; `()` = one token (MAE's random masking).
        rounding: which count is truncated. "keep": `int(N·(1 - ratio))` blocks stay (MAE, ConvMAE, CMAE);
            "hide": `int(N·ratio)` are hidden (VideoMAE). At ratio 0.9 of 196: 19 stay, or 176 are hidden.

    Raises:
        ValueError: the ratio is not in (0, 1), a block side is not a positive number, or the rounding is unknown.
    """

    ratio: float
    block: tuple[int | None, ...] = ()
    rounding: Rounding = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is the share of tokens to hide, between 0 and 1; got {self.ratio!r}")
        _require_sides(self.block)
        if self.rounding not in ("keep", "hide"):
            raise ValueError(f'rounding is "keep" or "hide"; got {self.rounding!r}')

    def __repr__(self) -> str:
        return f"masking.BlockMasking(ratio={self.ratio}, block={self.block}, rounding={self.rounding!r})"

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw masks: boolean `(batch, *grid)`, True = hidden.

        Raises:
            ValueError: the block does not fit the grid, or the ratio would hide everything or nothing on it.
        """
        coarse = _coarse(self.block, grid)
        return self.from_noise(torch.rand(batch, math.prod(coarse), generator=generator, device="cpu"), grid)

    def from_noise(self, noise: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The mask that hides the blocks of largest noise: `(B, blocks) -> (B, *grid)`. For tests and replays."""
        coarse = _coarse(self.block, grid)
        return _showing(noise.argsort(dim=1)[:, : self._kept(math.prod(coarse), grid)], coarse, grid)

    def _kept(self, blocks: int, grid: tuple[int, ...]) -> int:
        kept = int(blocks * (1 - self.ratio)) if self.rounding == "keep" else blocks - int(blocks * self.ratio)
        if not 0 < kept < blocks:
            what = "everything" if kept == 0 else "nothing"
            raise ValueError(f"ratio {self.ratio} of {blocks} blocks hides {what} on the token grid {grid}")
        return kept


@dataclass(frozen=True, kw_only=True)
class ComplementaryMasking:
    """Deals all blocks of tokens out to several masks, each of which shows its own and hides the others' (FastConvMAE).

    A step then makes so many reconstructions of each sample from one set of pixels. Every cell of the convolution
    stages is shown in exactly one of them and is computed once; attention and decoder run for each mask.

    Args:
        groups: the masks of a sample, 2 or more; the share hidden is 1 - 1 / groups.
        block: tokens of a block along each axis; None = the whole axis; `()` = one token.

    Raises:
        ValueError: there are not two groups or more, or a block side is not a positive number.
    """

    groups: int
    block: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        if not isinstance(self.groups, int) or self.groups < 2:
            raise ValueError(
                f"groups is the number of masks that share a sample's tokens, 2 or more; got {self.groups!r}"
            )
        _require_sides(self.block)

    def __repr__(self) -> str:
        return f"masking.ComplementaryMasking(groups={self.groups}, block={self.block})"

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw masks: boolean `(batch * groups, *grid)`, True = hidden, those of a sample after one another.

        Raises:
            ValueError: the block does not fit the grid, or its blocks cannot be dealt out evenly.
        """
        coarse = _coarse(self.block, grid)
        return self.from_noise(torch.rand(batch, math.prod(coarse), generator=generator, device="cpu"), grid)

    def from_noise(self, noise: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The masks that deal blocks out by rising noise: `(B, blocks) -> (B * groups, *grid)`."""
        coarse = _coarse(self.block, grid)
        if math.prod(coarse) % self.groups:
            raise ValueError(
                f"{math.prod(coarse)} blocks on the token grid {grid} cannot be dealt out to {self.groups} groups"
            )
        return _showing(noise.argsort(dim=1).view(len(noise) * self.groups, -1), coarse, grid)


@dataclass(frozen=True, kw_only=True)
class RunningCells:
    """Which hidden tokens the decoder predicts: in every 2 x 2 tokens some, and others at the next time step.

    After the decoder masking of VideoMAE V2 (arXiv 2303.16727). The places that are kept go round the cell in time,
    from one drawn for each sample; that the start is drawn is ours, so that no token is never predicted. Where the mask
    leaves the cells uneven, tokens drawn from the others make up the number.

    Args:
        keep: the share of hidden tokens to predict, between 0 and 1.

    Raises:
        ValueError: the share is not in (0, 1).
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is the share of hidden tokens to predict, between 0 and 1; got {self.keep!r}")

    def __repr__(self) -> str:
        return f"masking.RunningCells(keep={self.keep})"

    def __call__(self, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Masks `(R, *grid)`, boolean, True = hidden `-> (R, *grid)`, uint8: 0 shown, 1 to predict, 2 left out."""
        rows, *grid = mask.shape
        *lead, height, width = grid
        rows_of, columns = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
        down, right = rows_of[:, None] % 2, columns % 2
        place = 2 * down + (down ^ right)  # round the cell: (0, 0), (0, 1), (1, 1), (1, 0)
        time = torch.arange(math.prod(lead), device="cpu").view(*lead, 1, 1)
        start = torch.randint(4, (rows, *[1] * len(grid)), generator=generator, device="cpu")
        running = (place + time + start) % 4 < round(4 * self.keep)
        hidden = mask.flatten(1)
        count = max(1, round(int(hidden[0].sum()) * self.keep)) if rows else 0
        order = 2 * (~hidden).long() + (~running).flatten(1)  # first the cells' own, then other hidden ones
        noise = torch.rand(order.shape, generator=generator, device="cpu")
        chosen = (order + noise).argsort(dim=1)[:, :count]
        return (2 * hidden.to(torch.uint8)).scatter(1, chosen, 1).view_as(mask)


def draw(
    masking: Masking, part: Part | None, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None
) -> Tensor:
    """Masks `(batch * groups, *grid)` on the CPU, as `grids.show` takes them: uint8 where a part is predicted."""
    mask = masking(batch, grid, generator)
    return mask if part is None else part(mask, generator)


def random(ratio: float, *, rounding: Rounding = "keep") -> BlockMasking:
    """Every token by itself (MAE, section 3; ConvMAE, section 3.2)."""
    return BlockMasking(ratio=ratio, rounding=rounding)


def block(ratio: float, size: int | Sequence[int] = 2, *, rounding: Rounding = "keep") -> BlockMasking:
    """Square blocks of tokens of an image (2 x 2 in CMAE's code), or blocks of the sides given."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return BlockMasking(ratio=ratio, block=sides, rounding=rounding)


def tube(ratio: float, *, rounding: Rounding = "hide") -> BlockMasking:
    """The same tokens at every time step (VideoMAE, section 3.3), for grids `(T, H, W)`."""
    return BlockMasking(ratio=ratio, block=(None, 1, 1), rounding=rounding)


def tube_block(ratio: float, size: int | tuple[int, int] = 2, *, rounding: Rounding = "hide") -> BlockMasking:
    """The same blocks of tokens at every time step, for grids `(T, H, W)`; `size` in tokens of the last stage."""
    height, width = (size, size) if isinstance(size, int) else size
    return BlockMasking(ratio=ratio, block=(None, height, width), rounding=rounding)


def complementary(groups: int = 4, block: Sequence[int | None] = ()) -> ComplementaryMasking:
    """Every token shown in exactly one of so many masks; with `block=(None, 1, 1)` in tubes, for grids `(T, H, W)`."""
    return ComplementaryMasking(groups=groups, block=tuple(block))


def running_cells(keep: float = 0.5) -> RunningCells:
    """Predict this share of the hidden tokens, in cells that move in time; for `.reconstruct_part(...)`."""
    return RunningCells(keep=keep)
