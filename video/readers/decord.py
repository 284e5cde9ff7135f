"""decord: what users of this field have. It is refused where it would return other frames than asked for."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from convmae.data import Packed

from .protocol import Frames, RefusedError, Size, Track, Video, is_avi, one_line

log = logging.getLogger(__name__)


class Decord:
    """A decord reader for every look, as an idle one goes on decoding into memory.

    It gives frames in their own size: what that is, it tells with a frame alone, and to scale, it would have to be
    opened again, which costs more than it saves for all but large files.
    """

    name = "decord"

    @contextmanager
    def open(self, video: Video) -> Iterator[Opened]:
        """Look into a file; raises `RefusedError` for one whose beginning is cut off by an edit list."""
        source = io.BytesIO(video.data) if isinstance(video, Packed) else video
        # Without a tolerance, decord silently gives the nearest frame for one that it could not decode.
        reader = module().VideoReader(source, num_threads=1, fault_tol=1e-9)
        # Frames that an edit list cuts off have negative times, and decord counts them. (-4e17: no times at all.)
        if -1e9 < reader.get_frame_timestamp([0])[0, 0] < 0:
            raise RefusedError("it counts frames that an edit list cuts off")
        yield Opened(video, reader, Track(len(reader), float(reader.get_avg_fps()), 0, 0))


class Opened(NamedTuple):
    """A file that decord has read the packets of."""

    video: Video
    reader: Any
    track: Track

    def take(self, indices: Sequence[int], size: Size | None) -> Frames:
        """Decode frames at rising indices, in their own size; raises DECORDError where one cannot be decoded.

        Raises `RefusedError` for the last frame of an AVI: with B-frames, decord at times gives the one before.
        """
        if indices[-1] == self.track.frames - 1 and is_avi(self.video):
            raise RefusedError("it may give the frame before the last of an AVI for the last")
        frames: Frames = self.reader.get_batch(list(indices)).asnumpy()
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
