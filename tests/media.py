"""The real videos that tests look at, what is wrong with the broken ones, and videos that are made for a test."""

from pathlib import Path

import numpy as np
import pytest

from video.demo import encode

MEDIA = Path(__file__).parents[2] / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason=f"the real videos are not in {MEDIA}")
CLIPS = sorted(path for path in (MEDIA / "clips").glob("*") if path.suffix != ".json")
BAD = sorted(path for path in (MEDIA / "bad").glob("*") if path.suffix != ".json")

UNUSABLE = {  # of BAD, and a part of the reason
    "audio_only.mp4": "no video stream",
    "corrupt_first_gop.mp4": "no frame can be decoded",
    "corrupt_moov.mp4": "header is lost or damaged",
    "header_only.mp4": "no frame can be decoded",
    "one_frame.mp4": "a single frame",
    "random.mp4": "not a video",
    "text.mp4": "not a video",
    "trunc_moov_lost.mp4": "header is lost",
    "zero_bytes.mp4": "empty file",
}
BEST_STREAM = {"nasa_multistream.mp4": (390, 270, 480)}
"""Frames, height and width where index.json describes another stream than the best."""


def counting(path: Path, frames: int = 40, height: int = 48, width: int = 64) -> Path:
    """A video whose n-th frame is as bright as 6 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (6 * np.arange(frames)).astype(np.uint8)[:, None, None, None]
    encode(path, np.broadcast_to(levels, (frames, height, width, 3)).copy())
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `counting` these are."""
    return [round(float(frame.mean()) / 6) for frame in frames]
