"""Masked pretraining of hierarchical image and video backbones."""

from . import checkpoint, masking, official, targets
from .builders import MAE, AttentionStage, Classifier, ConvMAE, ConvStage

__version__ = "0.1.0"

__all__ = [
    "MAE",
    "AttentionStage",
    "Classifier",
    "ConvMAE",
    "ConvStage",
    "checkpoint",
    "masking",
    "official",
    "targets",
]
