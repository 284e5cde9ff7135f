"""How the papers initialise: one rule for pretraining, one for finetuning; both start from torch's defaults."""

from __future__ import annotations

from torch import nn

from .classifier import Classifier
from .layers import Pointwise
from .masked_autoencoder import Decoder
from .trunk import AttentionStage, Trunk


def for_pretraining(model: nn.Module) -> None:
    """MAE's rule, as ConvMAE's code has it.

    Linear layers are Xavier uniform with zero bias, qkv as one matrix. Of the convolutions only the embedding of an
    attention stage is Xavier, on its flattened weight; the others, and all convolution biases, keep torch's
    defaults. Mask and class tokens are N(0, 0.02).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Pointwise):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, AttentionStage):
            nn.init.xavier_uniform_(module.embedding.weight.data.flatten(1))
            if module.class_token is not None:
                nn.init.normal_(module.class_token, std=0.02)
    for module in model.modules():
        if isinstance(module, Decoder):
            nn.init.normal_(module.mask_token, std=0.02)


def for_finetuning(model: Classifier, *, head_std: float) -> None:
    """ConvMAE's rule: linear layers and positions truncated normal 0.02, the head `head_std`; positions are trained."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Pointwise):
            nn.init.trunc_normal_(module.weight, std=head_std if module is model.head else 0.02)
            nn.init.zeros_(module.bias)
    train_positions(model.trunk)


def train_positions(trunk: Trunk) -> None:
    """Make the positions parameters that are trained, from a truncated normal 0.02."""
    for stage in trunk.stages:
        if isinstance(stage, AttentionStage):
            nn.init.trunc_normal_(stage.positions.requires_grad_(True), std=0.02)
            if stage.class_token is not None:
                nn.init.trunc_normal_(stage.class_token, std=0.02)
