"""Masked pretraining of hierarchical image and video backbones."""

from . import checkpoint, masking, official, targets
from .builders import MAE, AttentionStage, Backbone, Classifier, ConvMAE, ConvStage, backbone_of

__version__ = "0.1.0"

__all__ = [
    "MAE",
    "AttentionStage",
    "Backbone",
    "Classifier",
    "ConvMAE",
    "ConvStage",
    "backbone_of",
    "checkpoint",
    "masking",
    "official",
    "targets",
]
