"""The depthwise convolution over scattered tiles: the one operator that looks beyond a tile.

The published form multiplies a dense map by the mask and convolves all of it. Here the map exists only as the tiles
of shown tokens, `(R, V, *tile, C)`, and a cell sees its neighbours in its own tile and in other shown tiles, zeros
elsewhere: exactly the published values, at the cost of the shown cells.

It is one operator of torch's, `convmae::tile_convolution`, so that torch.compile, torch.export, autocast, activation
checkpointing and sharding see it whole. Two forms carry it out: `tile_kernels` (Triton, on GPUs) and `tile_planes`
(plain torch, anywhere). Its input's gradient is the same operator with the kernel turned round, for a shown cell is
its neighbour's neighbour; its weight's is a second operator. On CPUs and by Triton neither adds up in an order that
changes from run to run.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import tile_planes

TRITON = importlib.util.find_spec("triton") is not None and torch.__version__ >= "2.8"
"""Whether there is a Triton that the kernels can be written in: 3.4, which torch 2.8 brings, knows tuples."""


def tile_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, around: Tensor | None) -> Tensor:
    """Depthwise convolution, stride 1, zeros beyond the border and where tokens are hidden.

    Args:
        x: shown tiles `(R, V, *tile, C)`.
        weight: `(C, 1, *kernel)`, odd kernels, as many axes as the tile, two or more. It may be more precise than x: by
            Triton sums are in float32 or better, in plain torch weights and sums are rounded as x is.
        bias: `(C)` or None.
        around: `Shown.around(reach(tile, kernel))`; None where nothing is masked: then each tile is a whole map.

    Returns:
        `(R, V, *tile, C)`, in the precision of x.

    Raises:
        RuntimeError: a second derivative was asked for; there is none.
    """
    if around is None and not _by_triton(x):
        if x.is_meta:  # which knows no autocast
            return torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            return tile_planes.dense(x, weight, bias)
    out: Tensor = _convolve(x, weight, bias, around, False)
    return out


def reach(tile: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """How many tiles away a kernel sees, along each axis."""
    return tuple(-(-(k // 2) // t) for k, t in zip(kernel, tile, strict=True))


def _by_triton(x: Tensor) -> bool:
    return TRITON and x.is_cuda and x.ndim <= 6


def _form(x: Tensor) -> ModuleType:
    if _by_triton(x):
        from . import tile_kernels

        return tile_kernels
    return tile_planes


@torch.library.custom_op("convmae::tile_convolution", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, around: Tensor | None, turned: bool) -> Tensor:
    """`turned` takes the kernel point-reflected: what the input's gradient needs."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _form(x).convolve(x, weight, bias, around, turned)
    return out


@torch.library.custom_op("convmae::tile_convolution_weight_gradient", mutates_args=())
def _weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, around: Tensor | None) -> Tensor:
    """The gradient of `weight`, in its precision."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _form(x).weight_gradient(x, gradient, weight, around)
    return out


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, around: Tensor | None, turned: bool) -> Tensor:
    return x.new_empty(x.shape)


@_weight_gradient.register_fake
def _(x: Tensor, gradient: Tensor, weight: Tensor, around: Tensor | None) -> Tensor:
    return weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, around, turned = inputs
    ctx.biased, ctx.turned = bias is not None, turned
    ctx.save_for_backward(x, weight, around)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, around = ctx.saved_tensors
    if ctx.turned:
        raise RuntimeError("the tile convolution has no second derivative")
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    dx = _convolve(gradient, weight, None, around, True) if for_x else None
    dw = _weight_gradient(x, gradient, weight, around) if for_weight else None
    db = None
    if ctx.biased and for_bias:
        precise = torch.promote_types(gradient.dtype, torch.float32)
        db = gradient.flatten(0, -2).sum(0, dtype=precise).to(weight.dtype)
    return dx, dw, db, None, None


_convolve.register_autograd(_backward, setup_context=_keep)
