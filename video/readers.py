"""Reading frames of a video: decord where it can be trusted with the file, PyAV for all others.

Nothing stays open between two reads: an idle decord reader goes on decoding into memory, and a reader carried
into a forked worker returns wrong frames or hangs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
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

    decord reads the file unless it is not installed, fails, or would return another frame than asked for (a
    cut by edit list, a frame lost to damage). Then PyAV decodes from the start, and where the file breaks off
    or is damaged, it counts as ending there; so `choose` may be called again, and must answer equal numbers
    equally. Damage that the codec conceals goes unnoticed with either.

    Raises `UnusableFileError`, with a reason in one line, for whatever cannot be read, and for a file of a
    single frame: that is a picture, not a video.
    """
    path = str(path)
    decord = _decord()
    # Decoders raise almost anything on damaged data, MemoryError included, and one file must not end a run.
    try:
        if os.stat(path).st_size == 0:
            raise UnusableFileError(path, "empty file")
        if decord is not None:
            try:
                return _read_by_decord(decord, path, choose, short_side)
            except UnusableFileError:
                raise
            except Exception as error:
                log.debug("%s: decord gives up (%s), trying PyAV", path, _one_line(error))
        frames = _read_by_pyav(path, choose, short_side)
    except UnusableFileError:
        raise
    except Exception as error:
        raise UnusableFileError(path, _reason(path, error)) from error
    if decord is not None:
        _say_that_pyav_helps()
    return frames


@functools.cache
def _decord() -> Any:
    """The module, or None: a wheel exists for x86-64 Linux alone, and it may lack a system library."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("decord is not there (%s): PyAV reads the videos, more slowly", _one_line(error))
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


@functools.cache
def _say_that_pyav_helps() -> None:
    log.info("decord cannot read some of the files: PyAV reads those, more slowly (debug messages name them)")


def _read_by_decord(decord: Any, path: str, choose: Choose, short_side: int | None) -> Frames:
    def open_reader(**size: int) -> Any:
        # Without a tolerance, decord silently gives the nearest frame for one that it could not decode.
        return decord.VideoReader(path, num_threads=1, fault_tol=1e-9, **size)

    reader = open_reader()
    # Frames that an edit list cuts off have negative times, and decord counts them. (-4e17: no times at all.)
    if -1e9 < reader.get_frame_timestamp([0])[0, 0] < 0:
        raise ValueError("it counts frames that an edit list cuts off")
    indices, places = _distinct(path, choose, len(reader))
    # The first frame alone tells the size as it is after rotation, at the price of one frame.
    height, width, _ = reader[0].shape
    if (shrunk := _shrunk(height, width, short_side)) is not None:
        reader = open_reader(height=shrunk[0], width=shrunk[1])
    frames: Frames = reader.get_batch(indices).asnumpy()
    return frames[places]


def _read_by_pyav(path: str, choose: Choose, short_side: int | None) -> Frames:
    with _opened(path) as (container, stream):
        count = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    while count:
        indices, places = _distinct(path, choose, count)
        with _opened(path) as (container, stream):
            shrunk = _shrunk(stream.height, stream.width, short_side)
            frames, end = _decode(container, stream, indices, shrunk)
        if len(frames) == len(indices):
            return np.stack(frames)[places]
        log.debug("%s: %d frames can be decoded, not %d", path, end, count)
        count = end
    raise UnusableFileError(path, "no frame can be decoded: the file is cut short or damaged")


@contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    with av.open(path) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise UnusableFileError(path, "no video stream in it")
        stream.codec_context.thread_count = 1
        yield container, stream


def _decode(
    container: InputContainer, stream: VideoStream, indices: Sequence[int], size: tuple[int, int] | None
) -> tuple[list[Frames], int]:
    """The frames at rising indices as far as the file goes, and the number of frames decoded."""
    wanted, found, end = set(indices), [], 0
    try:
        for frame in container.decode(stream):
            if end in wanted:
                found.append(_upright(frame, size))
            end += 1
            if len(found) == len(indices):
                break
    except av.error.FFmpegError as error:
        log.debug("%s breaks off after frame %d: %s", container.name, end, _one_line(error))
    return found, end


def _upright(frame: VideoFrame, size: tuple[int, int] | None) -> Frames:
    height, width = size or (frame.height, frame.width)
    pixels = frame.to_ndarray(format="rgb24", height=height, width=width, interpolation="BICUBIC")
    turns: int = round(getattr(frame, "rotation", 0) / 90)  # PyAV before 14 does not tell the rotation
    return np.ascontiguousarray(np.rot90(pixels, turns))


def _distinct(path: str, choose: Choose, count: int) -> tuple[list[int], NDArray[np.intp]]:
    """The chosen indices, rising and each once, and where in them each chosen one is."""
    if count == 1:
        raise UnusableFileError(path, "holds a single frame: a picture, not a video")
    indices, places = np.unique(np.asarray(choose(count)), return_inverse=True)
    assert 0 <= indices[0] <= indices[-1] < count, f"{indices} of {count} frames"
    return indices.tolist(), places


def _shrunk(height: int, width: int, short_side: int | None) -> tuple[int, int] | None:
    """Size to decode to; None to keep it: below twice the need, opening again costs what scaling saves."""
    if short_side is None or min(height, width) < 2 * short_side:
        return None
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, av.error.InvalidDataError | MemoryError):
        return "not a video, or its header is lost or damaged (a file cut short?)"
    return f"cannot be read ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
