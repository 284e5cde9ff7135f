"""What is in a file: every frame is decoded, and the damage is found that codecs conceal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from convmae import images
from convmae.data import UnusableFileError
from convmae.manifest import Entry
from video import readers
from video.readers.pyav import Index as PacketIndex

_SHORTER = 0.05  # of its duration that a stream may lack without being called cut short
_CUT = "File ended prematurely"  # what FFmpeg says of Matroska whose end is missing


def examine(path: str, *, name: str | None = None, quick: bool = False) -> Entry:
    """Look at a video, a file or a folder of frames; what is unusable is no error, but said in the entry.

    All frames are decoded, and a codec is told to report what it would conceal. Frames are damaged from where something
    does not decode until frames begin anew; the longest run without damage is `intact`. At least two such frames make a
    file usable. Three frames tell whether decord sees the same ones.

    Args:
        path: of the file or folder.
        name: what the entry shall call it; None: its path.
        quick: decode three frames alone, at the beginning, in the middle and at the end, which finds files that are cut
            short or cannot be opened, but not what is damaged in between.
    """
    status = os.stat(path)
    found = Entry(file=name or path, bytes=status.st_size, modified=status.st_mtime, usable=False, quick=quick)
    try:
        return _of_folder(path, found) if os.path.isdir(path) else _of_file(path, found, quick)
    except UnusableFileError as problem:
        return replace(found, reason=problem.reason)


def examine_image(path: str, *, name: str | None = None, quick: bool = False) -> Entry:
    """Look at a picture: it is read, whole, as training does."""
    status = os.stat(path)
    found = Entry(file=name or path, bytes=status.st_size, modified=status.st_mtime, usable=False)
    try:
        height, width = images.read(path).shape[-2:]
    except UnusableFileError as problem:
        return replace(found, reason=problem.reason)
    return replace(found, usable=True, frames=1, intact=(0, 1), height=height, width=width)


def _of_folder(path: str, found: Entry) -> Entry:
    """A folder of frames: every picture is read."""
    sound = []
    with readers.FrameFolder().open(path) as opened:
        _, _, height, width = opened.track
        for index in range(opened.track.frames):
            try:
                opened.take([index], None)
                sound.append(True)
            except UnusableFileError as problem:
                found = found if found.reason else replace(found, reason=problem.reason)
                sound.append(False)
    return _judged(replace(found, height=height, width=width, codec="pictures"), sound)


def _of_file(path: str, found: Entry, quick: bool) -> Entry:
    at_ends = readers.read(path, _ends)  # raises what training would meet
    found = replace(found, height=at_ends.shape[1], width=at_ends.shape[2])
    decoded, promised, exact = _Decoded(), 0.0, False
    av.logging.set_level(av.logging.WARNING)
    with av.logging.Capture() as said:
        try:
            with av.open(path, "r") as container:
                stream = container.streams.best("video")
                assert isinstance(stream, VideoStream)
                stream.codec_context.thread_count = 1
                fps = float(stream.average_rate or stream.guessed_rate or 0)
                found = replace(found, codec=stream.codec_context.name, fps=round(fps, 4))
                if quick:
                    decoded.count(container, stream)
                else:
                    stream.codec_context.options = {"err_detect": "explode"}
                    decoded.decode(container, stream)
                promised, exact = _promised(container, stream), stream.duration is not None
        except Exception as problem:  # of whatever kind decoders have
            decoded.damage(f"cannot be read on ({' '.join(str(problem).split())[:100]})")
    av.logging.set_level(None)
    lacking = decoded.seconds < (1 - _SHORTER) * promised - 0.5
    if any(_CUT in message for *_, message in said) or (lacking and exact):
        decoded.notes.append(f"cut short: it ends after {decoded.seconds:.1f} of {promised:.1f} s")
    found = replace(found, reason="; ".join(dict.fromkeys(decoded.notes)), seconds=round(decoded.seconds, 3))
    found = _judged(found, _as_readers_count(path, decoded) if decoded.notes and not quick else decoded.sound)
    return found if quick or not found.usable else replace(found, reader=_reader(path, found))


def _ends(track: readers.Track) -> Sequence[int]:
    return [0, track.frames // 2, track.frames - 1]


def _promised(container: InputContainer, stream: VideoStream) -> float:
    """Seconds that the header promises: of the video, or where it does not say, as in Matroska, of the whole file."""
    if stream.duration is None or stream.time_base is None:
        return (container.duration or 0) / av.time_base
    return float(stream.duration * stream.time_base)


@dataclass
class _Decoded:
    """What decoding came to: of each frame whether it is sound, what is wrong, and the times of first and last."""

    sound: list[bool] = field(default_factory=list)
    times: list[int | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0
    rate: float = 0.0
    broken: bool = False

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        if self.first is None:
            return 0.0
        return self.last - self.first + (1 / self.rate if self.rate else 0.0)

    def damage(self, note: str) -> None:
        """Frames from here on cannot be trusted."""
        self.notes.append(note)
        self.broken = True

    def decode(self, container: InputContainer, stream: VideoStream) -> None:
        """Decode all packets, whatever becomes of single ones."""
        self.rate = float(stream.average_rate or 0)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                self.damage(f"damaged from frame {len(self.sound)} on")
            try:
                for frame in packet.decode():
                    self._take(frame)
            except av.error.FFmpegError:
                self.damage(f"damaged from frame {len(self.sound)} on")

    def count(self, container: InputContainer, stream: VideoStream) -> None:
        """Count packets, as if each were a sound frame."""
        self.rate = float(stream.average_rate or 0)
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                self.sound.append(not packet.is_corrupt)
                self._at(None if packet.pts is None else float(packet.pts * packet.time_base))

    def _take(self, frame: VideoFrame) -> None:
        if frame.key_frame and not frame.is_corrupt:
            self.broken = False
        if frame.is_corrupt and not self.broken:
            self.damage(f"damaged from frame {len(self.sound)} on")
        self.sound.append(not self.broken)
        self.times.append(frame.pts)
        self._at(frame.time)

    def _at(self, time: float | None) -> None:
        if time is not None:
            self.first = time if self.first is None else min(self.first, time)
            self.last = max(self.last, time)


def _as_readers_count(path: str, decoded: _Decoded) -> list[bool]:
    """Of each frame that packets promise whether it is sound: a frame that cannot be decoded has an index, too.

    Where packets have no times, readers count what they decode, and come to the first damage, no further.
    """
    with av.open(path, "r") as container:
        stream = container.streams.best("video")
        assert isinstance(stream, VideoStream)
        times = PacketIndex.of(container, stream).times
    if times is None:
        first = decoded.sound.index(False) if False in decoded.sound else len(decoded.sound)
        return decoded.sound[:first]
    sound = dict(zip(decoded.times, decoded.sound, strict=True))
    return [sound.get(time, False) for time in times]


def _judged(found: Entry, sound: list[bool]) -> Entry:
    """The verdict: the longest run of sound frames decides."""
    first, stop = _longest(sound)
    usable = stop - first > 1
    if not usable and not found.reason:
        found = replace(found, reason="no two frames in a row can be decoded")
    return replace(found, usable=usable, frames=len(sound), intact=(first, stop))


def _longest(sound: list[bool]) -> tuple[int, int]:
    """First and stop of the longest run of true values, the first of equal ones."""
    edges = np.flatnonzero(np.diff(np.array([False, *sound, False], np.int8)))
    runs = edges.reshape(-1, 2)
    if not len(runs):
        return 0, 0
    first, stop = runs[np.argmax(runs[:, 1] - runs[:, 0])]
    return int(first), int(stop)


def _reader(path: str, found: Entry) -> str:
    """PyAV, where the reader that comes first does not give the frames that PyAV gives; else nothing."""
    first, stop = found.intact
    try:
        in_turn = readers.readers()
        chosen = sorted({first, (first + stop) // 2, stop - 1})
        with in_turn[0].open(path) as one, in_turn[-1].open(path) as other:
            same_count = one.track.frames == other.track.frames
            frames, others = one.take(chosen, None), other.take(chosen, None)
    except Exception:  # of whatever kind its library has: it is not for this file
        return "pyav"
    same = frames.shape == others.shape and np.abs(frames.astype(np.int16) - others).mean(axis=(1, 2, 3)).max() < 4
    return "" if same and same_count else "pyav"
