"""The classifier: a dense trunk, pooled tokens, a norm and a linear head."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from .layers import ATTENTION_EPS
from .trunk import Trunk

Pooling = Literal["mean", "token"]


class Classifier(nn.Module):
    """The finetuning network (ConvMAE, section 4.1): no fusion; LayerNorm after pooling.

    Pooling "mean" averages the tokens; "token" takes the class token, or where there is none the first token, as
    the authors' code does.
    """

    builder: Any = None
    """The builder that made it, if one did: what a checkpoint keeps to build it again."""

    def __init__(self, trunk: Trunk, classes: int, *, pooling: Pooling, dropout: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.pooling = pooling
        self.norm = nn.LayerNorm(trunk.dims[-1], eps=ATTENTION_EPS)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(trunk.dims[-1], classes)

    def pool(self, x: Tensor) -> Tensor:
        """`x (B, C, *size) -> (B, D)`, pooled and normalised: what the head sees."""
        features = self.trunk(self.trunk.normalized(x))
        if self.pooling == "mean":
            pooled = features.tokens.mean(1)
        else:
            pooled = (features.tokens if features.class_token is None else features.class_token)[:, 0]
        out: Tensor = self.norm(pooled)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, *size)`, ImageNet-normalised floats, or uint8 pixels, `-> (B, classes)`, logits."""
        out: Tensor = self.head(self.dropout(self.pool(x)))
        return out
