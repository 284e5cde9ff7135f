"""Reading frames of a video: the same indices give the same frames, whichever reader serves them.

A reader is asked for the frames that make a clip, and gives these or refuses; what it refuses goes to the next:

- decord, first where it is installed. Not for: frames cut off by an edit list, which it counts; AV1; mp4 files cut
  short. Damage that it meets makes it give up, too.
- PyAV, for all others, and for all where it is chosen. It finds frames by the times of their packets; in AVI, which has
  none, it counts from the start. Where a file breaks off or is damaged, the video counts as ending there.
- torchcodec, where it is chosen. Not for: AVI, on which it can be off by one.
- folders of frames.

Nothing stays open between two reads, and all decode in one thread: an idle decord reader goes on decoding into memory,
and a reader carried into a forked worker returns wrong frames, or hangs. Damage that the codec conceals goes unnoticed
with any of them; `python -m video.scan` finds it.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

from convmae.data import Packed, UnusableFileError

from . import decord, torchcodec
from .decord import Decord
from .frame_folder import FrameFolder
from .protocol import Choose, Frames, Opened, OverpromisedError, Reader, Size, Track, Video, name_of, one_line
from .pyav import PyAV
from .torchcodec import TorchCodec

__all__ = [
    "Choice",
    "Choose",
    "Decord",
    "FrameFolder",
    "Frames",
    "Opened",
    "Reader",
    "Size",
    "Track",
    "Video",
    "in_turn",
    "installed",
    "read",
]

Choice = Literal["auto", "decord", "pyav", "torchcodec"]

log = logging.getLogger(__name__)


def installed() -> list[Choice]:
    """The readers that are there, as one may choose them."""
    there: dict[Choice, bool] = {
        "decord": decord.module() is not None,
        "pyav": True,
        "torchcodec": torchcodec.module() is not None,
    }
    return [choice for choice, is_there in there.items() if is_there]


def in_turn(choice: Choice = "auto") -> list[Reader]:
    """The readers that are asked in turn for the videos of files.

    Raises ValueError for one that is not there.
    """
    there = installed()
    if choice not in ("auto", *there):
        raise ValueError(f"reader={choice!r} is not known or not installed; there are {', '.join(['auto', *there])}")
    asked: list[Reader] = [PyAV()]
    if choice == "torchcodec":
        asked.insert(0, TorchCodec())
    elif choice != "pyav" and "decord" in there:
        asked.insert(0, Decord())
    return asked


def read(
    video: str | Path | Packed, choose: Choose, *, short_side: int | None = None, reader: Choice = "auto"
) -> Frames:
    """Read frames of a video, RGB uint8 `(T, H, W, 3)`, upright as the file's rotation says.

    `choose` is given the `Track` and returns the indices to read, in any order, repeats allowed. Where a reader gives
    up, or the video turns out to be shorter than its header promised, it is called again, and must answer equal tracks
    equally. A file whose short side is at least twice `short_side`, in pixels, may be scaled down to `short_side` while
    decoding (by all readers but decord); others come in their own size.

    Raises `UnusableFileError`, with a reason in one line, for whatever cannot be read, and for a video of a single
    frame: that is a picture. Raises ValueError for a reader that is not installed.
    """
    video = str(video) if isinstance(video, Path) else video
    asked = in_turn(reader)
    # Decoders raise almost anything on damaged data, MemoryError included, and one file must not end a run.
    try:
        if isinstance(video, str) and os.path.isdir(video):
            asked = [FrameFolder()]
        elif (len(video.data) if isinstance(video, Packed) else _regular(video).st_size) == 0:
            raise UnusableFileError(name_of(video), "empty file")
        for one in asked:
            try:
                return _read(one, video, choose, short_side)
            except UnusableFileError:
                raise
            except Exception as error:
                if one is asked[-1]:
                    raise
                log.debug("%s: %s gives up (%s), trying PyAV", name_of(video), one.name, one_line(error))
                _say_that_pyav_helps(one.name)
    except UnusableFileError:
        raise
    except Exception as error:
        raise UnusableFileError(name_of(video), _reason(error)) from error
    raise AssertionError("the last reader returns or raises")


def _regular(path: str) -> os.stat_result:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError(path, "not a file, but a pipe, socket or device")
    return status


def _read(reader: Reader, video: Video, choose: Choose, short_side: int | None) -> Frames:
    with reader.open(video) as opened:
        track = opened.track
        while track.frames > 1:
            indices, places = _distinct(choose(track), track.frames)
            try:
                frames = opened.take(indices, _shrunk(track.height, track.width, short_side))
                return frames if np.array_equal(places, np.arange(len(frames))) else frames[places]
            except OverpromisedError as found:
                track = track._replace(frames=min(found.frames, track.frames - 1))
    if track.frames:
        raise UnusableFileError(name_of(video), "holds a single frame: a picture, not a video")
    raise UnusableFileError(name_of(video), "no frame can be decoded: the file is cut short or damaged")


@functools.cache
def _say_that_pyav_helps(reader: str) -> None:
    log.info("%s cannot read some of the files: PyAV reads those (debug messages name them)", reader)


def _distinct(chosen: Sequence[int], count: int) -> tuple[list[int], NDArray[np.intp]]:
    """The chosen indices, rising and each once, and where in them each chosen one is."""
    indices, places = np.unique(np.asarray(chosen), return_inverse=True)
    assert 0 <= indices[0] <= indices[-1] < count, f"{indices} of {count} frames"
    return indices.tolist(), places


def _shrunk(height: int, width: int, short_side: int | None) -> Size | None:
    """Size to decode to; None to keep it: below twice the need, scaling saves nothing, and blurs."""
    if short_side is None or min(height, width) < 2 * short_side:
        return None
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, av.error.InvalidDataError | MemoryError):
        return "not a video, or its header is lost or damaged (a file cut short?)"
    return f"cannot be read ({one_line(error)})"
