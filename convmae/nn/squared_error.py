"""The squared error of a patch, without keeping the target for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over a patch's values of the squared error, in the target's precision: `(R, N, values) -> (R, N)`.

    The gradient needs the difference alone. It is kept in the precision of the prediction, in which its gradient is
    taken up anyway: in bfloat16 half of what the difference takes. There is no second derivative.
    """
    if target.requires_grad:
        return (prediction.to(target.dtype) - target).square().mean(-1)
    out: Tensor = _SquaredError.apply(prediction, target)
    return out


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction.to(target.dtype) - target
        ctx.save_for_backward(difference.to(prediction.dtype))
        return difference.square().mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        factor = (2 / difference.shape[-1]) * gradient.unsqueeze(-1)
        return (difference.to(gradient.dtype) * factor).to(difference.dtype), None
