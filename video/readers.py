"""Reading frames of a video: decord where it can be trusted with the file, PyAV for all others.

Nothing stays open between two reads: an idle decord reader goes on decoding into memory, and a reader carried
into a forked worker returns wrong frames or hangs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from convmae.data import UnusableFileError

Frames = NDArray[np.uint8]
Choose = Callable[[int], Sequence[int]]

log = logging.getLogger(__name__)


def read(path: str | Path, choose: Choose, *, short_side: int | None = None) -> Frames:
    """Read frames of a video, RGB uint8 `(T, H, W, 3)`, upright as the file's rotation says.

    `choose` is given the number of frames in the file and returns the indices to read, in any order, repeats
    allowed. A file whose short side is at least twice `short_side`, in pixels, is scaled down to `short_side`
    while decoding; others come in their own size.

    decord reads the file unless it is not installed, fails, or would return another frame than asked for (a cut
    by edit list, a frame lost to damage). Then PyAV decodes from the start, and where the file breaks off or is
    damaged, it counts as ending there. `choose` may so be called again with a smaller number. No reader notices
    damage that the codec conceals.

    Raises `UnusableFileError`, with a reason in one line, for whatever cannot be read, and for a file of a single
    frame: that is a picture, not a video.
    """
    path = str(path)
    refused = None
    # Decoders raise almost anything on damaged data (MemoryError too), and one file must not end a run.
    try:
        if (decord := _decord()) is not None:
            return _read_by_decord(decord, path, choose, short_side)
    except UnusableFileError:
        raise
    except Exception as error:
        refused = error
    try:
        frames = _read_by_pyav(path, choose, short_side)
    except UnusableFileError:
        raise
    except Exception as error:
        raise UnusableFileError(path, _reason(path, error)) from error
    if refused is not None:
        log.debug("%s is read by PyAV, because decord says: %s", path, _one_line(refused))
        _say_once(logging.INFO, f"decord cannot read every file here ({path} is one): PyAV reads those, slower")
    return frames


@functools.cache
def _say_once(level: int, message: str) -> None:
    log.log(level, message)
