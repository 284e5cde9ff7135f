"""decord: what users of this field have. It is refused where it would return other frames than asked for."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from convmae.data import Packed

from .protocol import Frames, RefusedError, Size, Track, Video, one_line

log = logging.getLogger(__name__)


class Decord:
    """A decord reader for every look, as an idle one goes on decoding into memory."""

    name = "decord"

    @contextmanager
    def open(self, video: Video) -> Iterator[Opened]:
        """Look into a file; raises `RefusedError` for one whose beginning is cut off by an edit list."""
        reader = _open(video)
        # Frames that an edit list cuts off have negative times, and decord counts them. (-4e17: no times at all.)
        if -1e9 < reader.get_frame_timestamp([0])[0, 0] < 0:
            raise RefusedError("it counts frames that an edit list cuts off")
        # The first frame alone tells the size as it is after rotation, at the price of one frame.
        height, width, _ = reader[0].shape
        yield Opened(video, reader, Track(len(reader), float(reader.get_avg_fps()), height, width))


class Opened(NamedTuple):
    """A file that decord has read the packets of."""

    video: Video
    reader: Any
    track: Track

    def take(self, indices: Sequence[int], size: Size | None) -> Frames:
        """Decode frames at rising indices; raises DECORDError where one cannot be decoded."""
        reader = self.reader if size is None else _open(self.video, height=size[0], width=size[1])
        frames: Frames = reader.get_batch(list(indices)).asnumpy()
        return frames


@functools.cache
def module() -> Any:
    """The library, or None: a wheel exists for x86-64 Linux alone, and it may lack a system library."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("decord is not there (%s): PyAV reads the videos", one_line(error))
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _open(video: Video, **size: int) -> Any:
    source = io.BytesIO(video.data) if isinstance(video, Packed) else video
    # Without a tolerance, decord silently gives the nearest frame for one that it could not decode.
    return module().VideoReader(source, num_threads=1, fault_tol=1e-9, **size)
