"""Fixed sine-cosine position tables, and resizing a table to another grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def widths(dim: int, axes: int) -> list[int]:
    """How many of the channels encode each axis: even numbers, as equal as can be, more for the last axes."""
    pairs, rest = divmod(dim // 2, axes)
    return [2 * (pairs + (axis >= axes - rest)) for axis in range(axes)]


def sincos(grid: Sequence[int], dim: int) -> Tensor:
    """The separable sine-cosine table of MAE and ConvMAE, for any number of axes: `(*grid, dim)`, float32.

    The channels are split over the axes, the last axis (the column) first, as in the authors' tables; each part
    holds the sines, then the cosines, of `coordinate / 10000^(i / n)` with i in 0..n-1, computed in float64.

    Raises:
        ValueError: dim is odd, or too small to give every axis a sine and a cosine.
    """
    axes = len(grid)
    if dim % 2 or dim < 2 * axes:
        raise ValueError(f"positions on {axes} axes need an even dim of at least {2 * axes}; got {dim}")
    parts = []
    for axis, width in zip(reversed(range(axes)), reversed(widths(dim, axes)), strict=True):
        frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
        angles = torch.arange(grid[axis], dtype=torch.float64)[:, None] * frequencies
        part = torch.cat([angles.sin(), angles.cos()], dim=1)
        parts.append(part.view(-1, *[1] * (axes - 1 - axis), width).expand(*grid, width))
    return torch.cat(parts, dim=-1).float()


def resize(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Interpolate a table `(*old, D)` to `(*grid, D)`: bicubic over the last two axes, linear over those before."""
    old, new = table.shape[:-1], tuple(grid)
    if tuple(old) == new:
        return table
    x = table.float().movedim(-1, 0)
    *lead, height, width = old
    x = F.interpolate(x.reshape(1, -1, height, width), size=new[-2:], mode="bicubic", align_corners=False)
    x = x.view(-1, *lead, *new[-2:])
    for axis in range(1, 1 + len(lead)):
        moved = x.movedim(axis, -1)
        flat = F.interpolate(
            moved.reshape(1, -1, moved.shape[-1]), size=new[axis - 1], mode="linear", align_corners=False
        )
        x = flat.view(*moved.shape[:-1], -1).movedim(-1, axis)
    return x.movedim(0, -1).to(table.dtype)
