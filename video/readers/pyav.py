"""PyAV: reads every format, shows what is damaged, and has the last word on which frames there are."""

from __future__ import annotations

import bisect
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from convmae.data import Packed, UnusableFileError

from .protocol import Frames, OverpromisedError, Size, Track, Video, name_of, one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """When frames are shown, rising, and which of them begin anew; None where only counting tells frames apart."""

    frames: int
    times: list[int] | None
    keys: list[int]

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream) -> Index:
        """Read the packets, of which an edit list discards some; nothing is decoded."""
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        known = sorted(packet.pts for packet in packets if packet.pts is not None)
        # AVI has no times of its own, and what is made up for it is wrong where frames are stored out of order
        trusted = "avi" not in container.format.name and len(set(known)) == len(packets)
        keys = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        return cls(len(packets), known if trusted else None, keys)

    def key_before(self, time: int) -> int:
        """The last time, not after this one, at which frames begin anew; the first of all where none is known."""
        assert self.times is not None
        place = bisect.bisect_right(self.keys, time)
        return self.keys[place - 1] if place else self.times[0]


class PyAV:
    """Seeks by the times of the packets where they can be trusted, and decodes from the start where they cannot."""

    name = "pyav"

    @contextmanager
    def open(self, video: Video) -> Iterator[Opened]:
        """The best video stream of a file, decoded in this thread alone."""
        with container_of(video) as container:
            stream = best_stream(container, video)
            index = Index.of(container, stream)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            yield Opened(video, container, stream, index, Track(index.frames, fps, stream.height, stream.width))


class Opened(NamedTuple):
    """A file whose packets have been read, to its end."""

    video: Video
    container: InputContainer
    stream: VideoStream
    packets: Index
    track: Track

    def take(self, indices: Sequence[int], size: Size | None) -> Frames:
        """Decode frames at rising indices; raises `OverpromisedError` where the file ends before."""
        found = None
        try:
            found = self._by_time(indices, size)
        except av.error.FFmpegError as error:
            log.debug("%s: %s", name_of(self.video), one_line(error))
        return np.stack(found or self._by_count(indices, size))

    def _by_time(self, indices: Sequence[int], size: Size | None) -> list[Frames] | None:
        """The frames, found by their times; None where one does not come."""
        if self.packets.times is None:
            return None
        frames: Iterator[VideoFrame] = iter(())
        found, now = [], None
        for time in (self.packets.times[index] for index in indices):
            key = self.packets.key_before(time)
            if now is None or key > now:
                self.container.seek(key, stream=self.stream)
                frames = self.container.decode(self.stream)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
            if frame is None or frame.pts != time:
                return None
            now = time
            found.append(_upright(frame, size))
        return found

    def _by_count(self, indices: Sequence[int], size: Size | None) -> list[Frames]:
        """The frames, counted from the start as far as the file goes."""
        wanted, found, end = set(indices), [], 0
        with container_of(self.video) as container:
            try:
                for frame in container.decode(best_stream(container, self.video)):
                    if end in wanted:
                        found.append(_upright(frame, size))
                    end += 1
                    if len(found) == len(indices):
                        return found
            except av.error.FFmpegError as error:
                log.debug("%s breaks off after frame %d: %s", name_of(self.video), end, one_line(error))
        raise OverpromisedError(end)


def container_of(video: Video) -> InputContainer:
    """The file, open; a title in another encoding than UTF-8 is no damage."""
    source = io.BytesIO(video.data) if isinstance(video, Packed) else video
    return av.open(source, "r", metadata_errors="replace")


def best_stream(container: InputContainer, video: Video) -> VideoStream:
    """The stream of pictures that FFmpeg thinks best, decoded in this thread alone.

    Raises `UnusableFileError` where there is none.
    """
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise UnusableFileError(name_of(video), "no video stream in it")
    stream.codec_context.thread_count = 1
    return stream


def _upright(frame: VideoFrame, size: Size | None) -> Frames:
    height, width = size or (frame.height, frame.width)
    pixels = frame.to_ndarray(format="rgb24", height=height, width=width, interpolation="BICUBIC")
    turns: int = round(getattr(frame, "rotation", 0) / 90)  # PyAV before 14 does not tell the rotation
    return np.ascontiguousarray(np.rot90(pixels, turns))
