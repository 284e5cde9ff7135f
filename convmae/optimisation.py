"""The optimiser's parameter groups, and the learning rate as a pure function of progress."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import nn

UNDECAYED = ("positions", "mask_token", "class_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trained parameters: norms, biases, positions and tokens without decay, the rest with it."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.rpartition(".")[2] in UNDECAYED
            (undecayed if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its learning rate is set before every step from `learning_rate`.

    Its state is there from the start: torch would make it by a step with zero gradients when a checkpoint asks for it,
    and so count one step too many.
    """
    optimiser = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=betas, fused=True)
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimiser


def learning_rate(progress: float, *, peak: float, floor: float, warmup: float) -> float:
    """Linear warm-up from 0 to the peak, then a cosine to the floor (MAE's schedule), at a progress in [0, 1).

    Args:
        progress: the share of the run that is done.
        peak: the highest learning rate, of the global batch.
        floor: the learning rate at the end.
        warmup: the share of the run that is warm-up, in [0, 1).
    """
    cosine = CosineParamScheduler(peak, floor)
    if warmup <= 0:
        return float(cosine(progress))
    schedule = CompositeParamScheduler(
        schedulers=[LinearParamScheduler(0.0, peak), cosine],
        lengths=[warmup, 1 - warmup],
        interval_scaling=["rescaled", "rescaled"],
    )
    return float(schedule(progress))
