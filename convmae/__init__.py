"""Masked pretraining of hierarchical image and video backbones."""

from . import checkpoint, masking, official, targets
from .builders import MAE, AttentionStage, Backbone, Classifier, ConvMAE, ConvStage, backbone_of
from .cmae import CMAE

__version__ = "0.1.0"

__all__ = [
    "CMAE",
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
