"""LARS, the optimiser of linear probes: torch has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum, whose steps are scaled by layer (You et al., 2017; arXiv 1708.03888), as MoCo v3's and MAE's.

    With u = gradient + weight_decay * w, a parameter w of several axes takes u * trust * |w| / |u| into its momentum,
    or u itself where one of the norms is 0. For parameters of one axis (biases) it is the gradient, without decay.

    Args:
        params: tensors or groups, as torch's optimisers take them.
        lr: learning rate.
        momentum: of the steps.
        weight_decay: of parameters of several axes.
        trust: the trust coefficient.

    Raises ValueError for a negative number.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        if wrong := [f"{name}={number}" for name, number in given.items() if not number >= 0]:
            raise ValueError(f"LARS: {', '.join(wrong)}: must be 0 or more")
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    norms = [torch.linalg.vector_norm(tensor) for tensor in (parameter, update)]
                    ratio = group["trust"] * norms[0] / norms[1]
                    update = update * torch.where((norms[0] > 0) & (norms[1] > 0), ratio, torch.ones_like(ratio))
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum"], alpha=-group["lr"])
        return loss
