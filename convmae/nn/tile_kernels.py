"""The tile convolution in Triton: tiles of two or three axes on a GPU.

A program takes a block of a tile's plane, up to 4 x 4 cells, and some channels. Which cell of which block around meets
which cell of this one under which tap is known when the kernel is compiled; what is left to run time is which of the
blocks around are shown, one number each, and the sums, which stay in registers. A block that is hidden costs a branch,
a cell that is shown is read once. Sums are in float32 (float64 for float64), in an order that never changes.

Nothing else is in memory than the tiles and the table of the tiles around each: no dense map, no gathered copy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 4
"""The longest side of a block: 4 x 4 sums of two channels each leave room for a 5 x 5 kernel's weights in registers."""


@triton.jit
def _with(items, at: tl.constexpr, item):
    """The tuple with one item replaced."""
    return items[:at] + (item,) + items[at + 1 :]


@triton.jit
def _place(number, TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):
    """The tile, plane, row and column of a block, counted over all tiles: `(tile, t, y, x)`, y and x in blocks."""
    across: tl.constexpr = TW // SW
    down: tl.constexpr = TH // SH
    return (
        number // (TT * down * across),
        number // (down * across) % TT,
        number // across % down,
        number % across,
    )


@triton.jit
def _block_there(tile, t, y, x, around, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """The first cell's row of the block at (t, y, x), which may be beyond the tile; -1 where that is hidden."""
    TT: tl.constexpr = SHAPE[0]
    TH: tl.constexpr = SHAPE[1]
    TW: tl.constexpr = SHAPE[2]
    SH: tl.constexpr = SHAPE[3]
    SW: tl.constexpr = SHAPE[4]
    RT: tl.constexpr = SHAPE[8]
    RH: tl.constexpr = SHAPE[9]
    RW: tl.constexpr = SHAPE[10]
    down: tl.constexpr = TH // SH
    across: tl.constexpr = TW // SW
    # from 0 up, for integer division rounds towards 0
    at, ay, ax = (t + RT * TT) // TT, (y + RH * down) // down, (x + RW * across) // across
    if MASKED:
        which = (at * (2 * RH + 1) + ay) * (2 * RW + 1) + ax
        owner = tl.load(around + tile * ((2 * RT + 1) * (2 * RH + 1) * (2 * RW + 1)) + which)
    else:
        owner = tl.where((at == RT) & (ay == RH) & (ax == RW), tile, -1)
    t, y, x = t + (RT - at) * TT, y + (RH - ay) * down, x + (RW - ax) * across
    return tl.where(owner >= 0, ((owner * TT + t) * TH + y * SH) * TW + x * SW, -1)


@triton.jit
def _add(sums, factors, x, first, channels, channel, here, dy: tl.constexpr, dx: tl.constexpr, SHAPE: tl.constexpr,
         PRECISE: tl.constexpr, BY_TAP: tl.constexpr):  # fmt: skip
    """Add the products of a block's cells with `factors`, one an own cell or one a tap, to sums by the other.

    dy, dx: where the block begins, as the place under the kernel of this block's first cell.
    """
    TW: tl.constexpr = SHAPE[2]
    SH: tl.constexpr = SHAPE[3]
    SW: tl.constexpr = SHAPE[4]
    KH: tl.constexpr = SHAPE[6]
    KW: tl.constexpr = SHAPE[7]
    for sy in tl.static_range(SH):
        for sx in tl.static_range(SW):
            if (dy + sy >= 0) & (dy + sy < SH + KH - 1) & (dx + sx >= 0) & (dx + sx < SW + KW - 1):
                row = (first + sy * TW + sx).to(tl.int64)
                value = tl.load(x + row * channels + channel, mask=here, other=0).to(PRECISE)
                for oy in tl.static_range(SH):
                    for ox in tl.static_range(SW):
                        if (dy + sy >= oy) & (dy + sy < oy + KH) & (dx + sx >= ox) & (dx + sx < ox + KW):
                            if BY_TAP:
                                sums = _with(
                                    sums,
                                    (dy + sy - oy) * KW + dx + sx - ox,
                                    sums[(dy + sy - oy) * KW + dx + sx - ox] + factors[oy * SW + ox] * value,
                                )
                            else:
                                sums = _with(
                                    sums,
                                    oy * SW + ox,
                                    sums[oy * SW + ox] + factors[(dy + sy - oy) * KW + dx + sx - ox] * value,
                                )
    return sums


@triton.jit
def _convolve(x, weight, bias, around, out, channels, SHAPE: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
              TURNED: tl.constexpr, PRECISE: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """One block by some channels; `x`, `out` (cells, channels), `weight` (taps, channels)."""
    TT: tl.constexpr = SHAPE[0]
    TH: tl.constexpr = SHAPE[1]
    TW: tl.constexpr = SHAPE[2]
    SH: tl.constexpr = SHAPE[3]
    SW: tl.constexpr = SHAPE[4]
    KT: tl.constexpr = SHAPE[5]
    KH: tl.constexpr = SHAPE[6]
    KW: tl.constexpr = SHAPE[7]
    BH: tl.constexpr = (KH // 2 + SH - 1) // SH
    BW: tl.constexpr = (KW // 2 + SW - 1) // SW
    tile, t, y, xx = _place(tl.program_id(0), TT, TH, TW, SH, SW)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < channels if not EVEN else tl.full((CHANNELS,), 1, tl.int1)
    start = tl.zeros((CHANNELS,), dtype=PRECISE)
    if BIASED:
        start += tl.load(bias + channel, mask=here, other=0).to(PRECISE)
    sums = ()
    for _ in tl.static_range(SH * SW):
        sums = sums + (start,)
    for it in range(KT):
        taps = ()
        for tap in tl.static_range(KH * KW):
            number = it * KH * KW + tap
            if TURNED:
                number = KT * KH * KW - 1 - number
            taps = taps + (tl.load(weight + number * channels + channel, mask=here, other=0).to(PRECISE),)
        for by in tl.static_range(2 * BH + 1):
            for bx in tl.static_range(2 * BW + 1):
                first = _block_there(tile, t + it - KT // 2, y + by - BH, xx + bx - BW, around, SHAPE, MASKED)
                if first >= 0:
                    sums = _add(sums, taps, x, first, channels, channel, here, (by - BH) * SH + KH // 2,
                                (bx - BW) * SW + KW // 2, SHAPE, PRECISE, False)  # fmt: skip
    first = ((tile * TT + t) * TH + y * SH) * TW + xx * SW
    for oy in tl.static_range(SH):
        for ox in tl.static_range(SW):
            row = (first + oy * TW + ox).to(tl.int64)
            tl.store(out + row * channels + channel, sums[oy * SW + ox].to(out.dtype.element_ty), mask=here)


@triton.jit
def _weight_gradient(x, gradient, around, out, channels, blocks, per_part, SHAPE: tl.constexpr, MASKED: tl.constexpr,
                     PRECISE: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """One leading tap's share of the sum over one part of the blocks; `out` (parts, taps, channels)."""
    TT: tl.constexpr = SHAPE[0]
    TH: tl.constexpr = SHAPE[1]
    TW: tl.constexpr = SHAPE[2]
    SH: tl.constexpr = SHAPE[3]
    SW: tl.constexpr = SHAPE[4]
    KT: tl.constexpr = SHAPE[5]
    KH: tl.constexpr = SHAPE[6]
    KW: tl.constexpr = SHAPE[7]
    BH: tl.constexpr = (KH // 2 + SH - 1) // SH
    BW: tl.constexpr = (KW // 2 + SW - 1) // SW
    part, it = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < channels if not EVEN else tl.full((CHANNELS,), 1, tl.int1)
    sums = ()
    for _ in tl.static_range(KH * KW):
        sums = sums + (tl.zeros((CHANNELS,), dtype=PRECISE),)
    for number in range(part * per_part, tl.minimum((part + 1) * per_part, blocks)):
        tile, t, y, xx = _place(number, TT, TH, TW, SH, SW)
        own = ((tile * TT + t) * TH + y * SH) * TW + xx * SW
        slopes = ()
        for oy in tl.static_range(SH):
            for ox in tl.static_range(SW):
                row = (own + oy * TW + ox).to(tl.int64)
                slopes = slopes + (tl.load(gradient + row * channels + channel, mask=here, other=0).to(PRECISE),)
        for by in tl.static_range(2 * BH + 1):
            for bx in tl.static_range(2 * BW + 1):
                first = _block_there(tile, t + it - KT // 2, y + by - BH, xx + bx - BW, around, SHAPE, MASKED)
                if first >= 0:
                    sums = _add(sums, slopes, x, first, channels, channel, here, (by - BH) * SH + KH // 2,
                                (bx - BW) * SW + KW // 2, SHAPE, PRECISE, True)  # fmt: skip
    for tap in tl.static_range(KH * KW):
        place = ((part * KT + it) * (KH * KW) + tap) * channels + channel
        tl.store(out + place, sums[tap], mask=here)


class _Layout(NamedTuple):
    """What a launch needs to know of the shapes.

    shape: tile (3), block (2), kernel (3) and reach (3), ones and zeros where there are only two axes.
    """

    shape: tuple[int, ...]
    channels: int
    blocks: int

    @staticmethod
    def of(x: Tensor, weight: Tensor) -> _Layout:
        """`x (R, V, *tile, C)`, weight `(C, 1, *kernel)`."""
        fill = (1,) * (3 - (x.ndim - 3))
        tile, kernel = (*fill, *x.shape[2:-1]), (*fill, *weight.shape[2:])
        reach = (-(-(k // 2) // t) for k, t in zip(kernel, tile, strict=True))
        block = [max(side for side in range(1, SIDE + 1) if length % side == 0) for length in tile[1:]]
        cells = x.numel() // x.shape[-1]
        return _Layout((*tile, *block, *kernel, *reach), x.shape[-1], cells // math.prod(block))


CHANNELS, CHANNELS_OF_GRADIENT = 128, 64
"""Channels of a program; a thread takes two. Tuned on an H100, see benchmarks/README.md."""

PROGRAMS = 2048
"""How many programs share the sum of a weight's gradient; more would write more partial sums than they save time."""


def _at_once(channels: int, most: int) -> tuple[int, int]:
    """Channels of a program, and its warps."""
    count = min(triton.next_power_of_2(channels), most)
    return count, max(1, count // 64)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, around: Tensor | None, turned: bool) -> Tensor:
    """See `tile_convolution`; `turned` takes the kernel point-reflected."""
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    around = None if around is None else around.contiguous()
    out = torch.empty_like(x)
    layout = _Layout.of(x, weight)
    at_once, warps = _at_once(layout.channels, CHANNELS)
    if layout.blocks:
        with torch.cuda.device_of(x):  # kernels go to the current device
            _convolve[layout.blocks, triton.cdiv(layout.channels, at_once)](
                x, weight.flatten(1).t().contiguous(), bias, around, out, layout.channels, layout.shape,
                around is not None, bias is not None, turned, _precise(x), at_once, layout.channels % at_once == 0,
                num_warps=warps,
            )  # fmt: skip
    return out


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, around: Tensor | None) -> Tensor:
    """Sums over parts of the blocks, added up in a second step: no atomic additions."""
    x, gradient = x.contiguous(), gradient.contiguous()
    around = None if around is None else around.contiguous()
    layout = _Layout.of(x, weight)
    at_once, warps = _at_once(layout.channels, CHANNELS_OF_GRADIENT)
    lead, taps = layout.shape[5], math.prod(layout.shape[5:8])
    programs = triton.cdiv(layout.channels, at_once) * lead
    parts = max(1, min(triton.cdiv(PROGRAMS, programs), layout.blocks))
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty(parts, taps, layout.channels, device=x.device, dtype=precise)
    with torch.cuda.device_of(x):
        _weight_gradient[parts, triton.cdiv(layout.channels, at_once), lead](
            x, gradient, around, sums, layout.channels, layout.blocks, triton.cdiv(layout.blocks, parts), layout.shape,
            around is not None, _precise(x), at_once, layout.channels % at_once == 0,
            num_warps=warps,
        )  # fmt: skip
    return sums.sum(0).t().reshape(weight.shape).to(weight.dtype).contiguous()


def _precise(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
