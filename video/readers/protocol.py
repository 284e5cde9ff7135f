"""What a reader of videos is, and the words that all readers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from convmae.data import Packed

Frames = NDArray[np.uint8]
"""RGB `(T, H, W, 3)`, or one of them `(H, W, 3)`."""

Size = tuple[int, int]
"""Height and width, in pixels."""

Video = str | Packed
"""The path of a file or of a folder of frames, or the bytes of a file."""


class Track(NamedTuple):
    """What there is to choose from: frames, how many of them make a second, and their size as stored; 0: not known."""

    frames: int
    fps: float
    height: int
    width: int


Choose = Callable[[Track], Sequence[int]]


class Opened(Protocol):
    """A video that a reader has looked into."""

    @property
    def track(self) -> Track:
        """What there is, or is said to be: `take` may find less."""
        ...

    def take(self, indices: Sequence[int], size: Size | None) -> Frames:
        """Decode the frames at rising indices, upright `(T, H, W, 3)`; of `size`, as stored, if it can.

        Raises `OverpromisedError` where the video is shorter, `RefusedError` where this reader would be wrong, and
        whatever its library raises.
        """
        ...


class Reader(Protocol):
    """A way to read videos: in this thread alone, with nothing left open afterwards."""

    name: str

    def open(self, video: Video) -> AbstractContextManager[Opened]:
        """Look into a video; raises as `Opened.take` does."""
        ...


class RefusedError(Exception):
    """A reader is known to be wrong on a video."""


class OverpromisedError(Exception):
    """A video has only so many frames, less than its header promises."""

    def __init__(self, frames: int) -> None:
        super().__init__(frames)
        self.frames = frames


def name_of(video: Video) -> str:
    """What the log should call a video."""
    return video.name if isinstance(video, Packed) else video


def is_avi(video: Video) -> bool:
    """Whether a video is an AVI file, whose frames have no times of their own."""
    if isinstance(video, Packed):
        return video.data[8:12] == b"AVI "
    with open(video, "rb") as file:
        return file.read(12)[8:] == b"AVI "


def one_line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
