"""The optimiser's parameter groups, and the learning rate as a pure function of progress."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import nn

from .nn.trunk import AttentionStage, Trunk

UNDECAYED = ("positions", "mask_token", "class_token")


def parameter_groups(model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The trained parameters in groups: norms, biases, positions and tokens without weight decay, the rest with it.

    The weights of a BatchNorm, which the heads of CMAE have, decay as in its code.

    With a layer decay, the learning rate of each layer is that of the next, times it (ELECTRA, BEiT; MAE, appendix
    A.2): a group's `scale` is `layer_decay ** (layers - layer)`, with the layers of `layer_of`.

    Args:
        model: for a layer decay below 1, one with a `trunk`.
        weight_decay: of the parameters that decay.
        layer_decay: in (0, 1]; 1 trains all parameters at one rate, and gives two groups.
    """
    last = layers(model) if layer_decay < 1 else 0
    scales = {id(module.weight) for module in model.modules() if isinstance(module, nn.BatchNorm1d)}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.rpartition(".")[2] in UNDECAYED
            plain = plain and id(parameter) not in scales
            groups.setdefault((layer_of(model, name) if last else 0, plain), []).append(parameter)
    wanted = [(layer, plain) for layer in range(last + 1) for plain in (False, True)]
    return [
        {
            "params": groups[layer, plain],
            "weight_decay": 0.0 if plain else weight_decay,
            "scale": layer_decay ** (last - layer),
        }
        for layer, plain in wanted
        if (layer, plain) in groups
    ]


def layers(model: nn.Module) -> int:
    """The number of the last layer: that of what comes after the trunk, by `layer_of`."""
    return len(_blocks(model)) + 1


def layer_of(model: nn.Module, name: str) -> int:
    """The layer of a parameter, for layer decay: 0 is what comes before the first transformer block, then one a block.

    So ConvMAE's embeddings, convolution stages and the Linear before its last stage are one layer 0 (its finetuning
    code), and a ViT's embedding, positions and class token (MAE's). Between blocks, what is no block counts with the
    one that follows. What comes after the trunk, norm and head, is the last layer.
    """
    if not name.startswith("trunk."):
        return layers(model)
    blocks = _blocks(model)
    for number, block in enumerate(blocks, 1):
        if name.startswith(f"{block}."):
            return number
    stage = ".".join(name.split(".")[:3])  # trunk.stages.N
    before = [block for block in blocks if _place(block) < _place(stage)]
    return len(before) + 1 if before else 0


def _blocks(model: nn.Module) -> list[str]:
    """The names of the trunk's blocks from its first attention stage on, in order."""
    trunk = model.get_submodule("trunk")
    assert isinstance(trunk, Trunk)
    attention = [isinstance(stage, AttentionStage) for stage in trunk.stages]
    first = attention.index(True) if True in attention else len(attention)
    return [
        f"trunk.stages.{number}.blocks.{block}"
        for number, stage in enumerate(trunk.stages)
        if number >= first
        for block in range(len(stage.get_submodule("blocks")._modules))
    ]


def _place(name: str) -> int:
    """The number of the stage that a name lies in."""
    return int(name.split(".")[2])


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its learning rates are set before every step from `learning_rate`.

    Its state is there from the start: torch would make it by a step with zero gradients when a checkpoint asks for it,
    and so count one step too many.
    """
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
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
