"""VideoConvMAE and what it trains on: video readers, clips, folders and recipes."""

from .builders import VideoConvMAE

__all__ = ["VideoConvMAE"]
