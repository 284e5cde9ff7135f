"""Masked pretraining of hierarchical image and video backbones."""

from . import masking, targets
from .builders import MAE, AttentionStage, Classifier, ConvMAE, ConvStage

__version__ = "0.1.0"

__all__ = [
    "MAE",
    "AttentionStage",
    "Classifier",
    "ConvMAE",
    "ConvStage",
    "masking",
    "targets",
]
