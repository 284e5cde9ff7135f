"""Which tokens are hidden. A mask is boolean `(B, *grid)`, True = hidden, on the grid of the last stage.

A masking is anything callable as `masking(batch, grid, generator)`; one class covers the published ones:

    random(0.75)          every token by itself                                    MAE, ConvMAE
    block(0.75, size=2)   blocks of 2 x 2 tokens                                   CMAE's code
    tube(0.9)             the same tokens at every time step                       VideoMAE
    tube_block(0.9, 2)    the same blocks of 2 x 2 tokens at every time step       block-wise, in a tube
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Rounding = Literal["keep", "hide"]


class Masking(Protocol):
    """What a masking of your own must be: a frozen dataclass with this call, so that it prints and pickles."""

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw masks `(batch, *grid)`, boolean, True = hidden, on the CPU; equally many hidden in every sample.

        Raises ValueError where the grid does not suit it: the builder reports it at `.build()`.
        """
        ...


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
        if any(side is not None and side < 1 for side in self.block):
            raise ValueError(f"block sides are positive numbers of tokens, or None for an axis; got {self.block!r}")
        if self.rounding not in ("keep", "hide"):
            raise ValueError(f'rounding is "keep" or "hide"; got {self.rounding!r}')

    def __repr__(self) -> str:
        return f"masking.BlockMasking(ratio={self.ratio}, block={self.block}, rounding={self.rounding!r})"

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw masks: boolean `(batch, *grid)`, True = hidden.

        Raises:
            ValueError: the block does not fit the grid, or the ratio would hide everything or nothing on it.
        """
        coarse = self._blocks(grid)
        return self.from_noise(torch.rand(batch, math.prod(coarse), generator=generator, device="cpu"), grid)

    def from_noise(self, noise: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The mask that hides the blocks of largest noise: `(B, blocks) -> (B, *grid)`. For tests and replays."""
        coarse = self._blocks(grid)
        kept = noise.argsort(dim=1)[:, : self._kept(math.prod(coarse), grid)]
        mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, kept, False).view(-1, *coarse)
        for axis, (side, count) in enumerate(zip(grid, coarse, strict=True)):
            mask = mask.repeat_interleave(side // count, dim=1 + axis)
        return mask

    def _blocks(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        block = self.block or (1,) * len(grid)
        if len(block) != len(grid):
            raise ValueError(f"block {self.block} has {len(block)} axes, the token grid {grid} has {len(grid)}")
        sides = [size if side is None else side for side, size in zip(block, grid, strict=True)]
        if any(size % side for side, size in zip(sides, grid, strict=True)):
            raise ValueError(f"block {self.block} does not divide the token grid {grid}")
        return tuple(size // side for side, size in zip(sides, grid, strict=True))

    def _kept(self, blocks: int, grid: tuple[int, ...]) -> int:
        kept = int(blocks * (1 - self.ratio)) if self.rounding == "keep" else blocks - int(blocks * self.ratio)
        if not 0 < kept < blocks:
            what = "everything" if kept == 0 else "nothing"
            raise ValueError(f"ratio {self.ratio} of {blocks} blocks hides {what} on the token grid {grid}")
        return kept


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
