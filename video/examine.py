"""What is in a file: every frame is decoded, and the damage is found that codecs conceal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from convmae import images
from convmae.data import UnusableFileError
from convmae.manifest import Entry
from video import readers
from video.readers.protocol import one_line
from video.readers.pyav import Index as PacketIndex
from video.readers.pyav import best_stream, container_of

_SHORTER = 0.05  # of its duration that a stream may lack without being called cut short
_REORDERED = 16  # frames by which H.264 and HEVC may show one later than they decode it
_CUT = "File ended prematurely"  # what FFmpeg says of Matroska whose end is missing


def examine(path: str, *, name: str | None = None, quick: bool = False) -> Entry:
    """Look at a video, a file or a folder of frames; what is unusable is no error, but said in the entry.

    All frames are decoded, and a codec is told to report what it would conceal. Frames are damaged from where something
    does not decode until frames begin anew; the longest run without damage is `intact`. At least two such frames make a
    file usable. Three frames tell whether decord sees the same ones. Noise that a codec decodes without complaint, as
    HEVC does most, is not found.

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
    except Exception as problem:  # decoders raise almost anything on damaged data, and one file must not end a scan
        return replace(found, reason=f"cannot be read ({one_line(problem)})")


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
    tracks: list[readers.Track] = []

    def ends(track: readers.Track) -> Sequence[int]:
        tracks.append(track)
        return _three(0, track.frames)

    trouble, shape = None, (0, 0, 0, 0)
    try:
        shape = readers.read(path, ends).shape
    except UnusableFileError as problem:  # what training would meet without a manifest
        if quick or not tracks:
            raise
        trouble = problem  # damaged at its beginning, perhaps not all of it
    decoded = _Decoded()
    found = _looked_through(path, found, quick, decoded)
    wrong = decoded.damaged or decoded.notes
    sound = _as_readers_count(path, decoded) if wrong and not quick else decoded.sound
    found = _judged(replace(found, reason=_reason(sound, decoded)), sound)
    if trouble is not None:
        if not found.usable:
            raise trouble
        shape = readers.read(path, lambda track: _three(*found.intact)).shape
    found = replace(found, height=shape[1], width=shape[2])
    return found if quick or not found.usable else replace(found, reader=_reader(path, found))


def _looked_through(path: str, found: Entry, quick: bool, decoded: _Decoded) -> Entry:
    """Decode the file, or count its packets, and note where it is cut short or breaks off."""
    promised, exact = 0.0, False
    av.logging.set_level(av.logging.WARNING)
    with av.logging.Capture() as said:
        try:
            with container_of(path) as container:
                stream = best_stream(container, path)
                fps = float(stream.average_rate or stream.guessed_rate or 0)
                found = replace(found, codec=stream.codec_context.name, fps=round(fps, 4))
                if quick:
                    decoded.count(container, stream)
                else:
                    stream.codec_context.options = {"err_detect": "explode+crccheck"}
                    decoded.decode(container, stream)
                promised, exact = _promised(container, stream), stream.duration is not None
        except Exception as problem:  # of whatever kind decoders have
            decoded.damage()
            decoded.notes.append(f"cannot be read on ({one_line(problem)[:100]})")
    av.logging.set_level(None)
    lacking = decoded.seconds < (1 - _SHORTER) * promised - 0.5
    if any(_CUT in message for *_, message in said) or (lacking and exact):
        decoded.notes.append(f"cut short: it ends after {decoded.seconds:.1f} of {promised:.1f} s")
    return replace(found, seconds=round(decoded.seconds, 3))


def _three(first: int, stop: int) -> list[int]:
    """The first frame, one in the middle, and the last."""
    return [first, (first + stop) // 2, stop - 1]


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
    order: dict[int | None, int] = field(default_factory=dict)
    """Which packet, by number, holds the frame that is shown at a time."""
    notes: list[str] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0
    rate: float = 0.0
    damaged: bool = False
    broken: bool = False
    """Whether frames now come after damage and before frames begin anew."""
    anew: int | None = None
    """When the frame is shown that begins anew."""

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        if self.first is None:
            return 0.0
        return self.last - self.first + (1 / self.rate if self.rate else 0.0)

    def damage(self) -> None:
        """Frames from here on cannot be trusted."""
        self.damaged = self.broken = True
        self.anew = None

    def decode(self, container: InputContainer, stream: VideoStream) -> None:
        """Decode all packets, whatever becomes of single ones."""
        self.rate = float(stream.average_rate or 0)
        for packet in container.demux(stream):
            self._at(packet)
            self.order[packet.pts] = len(self.order)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self.damage()
                continue
            if packet.is_corrupt:
                self.damage()
            elif packet.is_keyframe:
                self.anew = packet.pts
            for frame in frames:
                self._take(frame)

    def count(self, container: InputContainer, stream: VideoStream) -> None:
        """Count packets, as if each were a sound frame."""
        self.rate = float(stream.average_rate or 0)
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                self.sound.append(not packet.is_corrupt)
                self._at(packet)

    def _take(self, frame: VideoFrame) -> None:
        # Frames come later than their packets: a key frame that was decoded before the damage does not end it.
        if frame.is_corrupt:
            self.damaged = self.broken = True
            self._distrust_what_was_decoded_after(frame)
        elif frame.key_frame and frame.pts is not None and frame.pts == self.anew:
            self.broken = False
        self.sound.append(not self.broken)
        self.times.append(frame.pts)
        self._at(frame)

    def _distrust_what_was_decoded_after(self, frame: VideoFrame) -> None:
        """Frames that are shown before a damaged one may have been made from it."""
        for place in range(max(len(self.sound) - _REORDERED, 0), len(self.sound)):
            if self.order.get(self.times[place], 0) > self.order.get(frame.pts, 0):
                self.sound[place] = False

    def _at(self, shown: Packet[VideoStream] | VideoFrame) -> None:
        """Note when it is shown, of packets too, as damage is no gap in time."""
        discarded = isinstance(shown, Packet) and shown.is_discard
        if shown.pts is not None and shown.time_base is not None and not discarded:
            time = float(shown.pts * shown.time_base)
            self.first = time if self.first is None else min(self.first, time)
            self.last = max(self.last, time)


def _as_readers_count(path: str, decoded: _Decoded) -> list[bool]:
    """Of each frame that packets promise whether it is sound: a frame that cannot be decoded has an index, too.

    Where packets have no times, or cannot be read to the end, readers count what they decode, and come to the first
    damage, no further.
    """
    try:
        with container_of(path) as container:
            times = PacketIndex.of(container, best_stream(container, path)).times
    except Exception:  # of whatever kind decoders have; it was noted when they were decoded
        times = None
    if times is None:
        first = decoded.sound.index(False) if False in decoded.sound else len(decoded.sound)
        return decoded.sound[:first]
    sound = dict(zip(decoded.times, decoded.sound, strict=True))
    return [sound.get(time, False) for time in times]


def _reason(sound: list[bool], decoded: _Decoded) -> str:
    """What is wrong with a file, first where it is damaged."""
    notes = list(decoded.notes)
    if decoded.damaged or False in sound:
        first = sound.index(False) if False in sound else len(sound)
        more = sum(was and not now for was, now in pairwise(sound[first:]))
        places = f" and in {more} more place{'s' * (more > 1)}" if more else ""
        notes.insert(0, f"damaged from frame {first} on{places}")
    return "; ".join(notes)


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
    in_turn, chosen = readers.in_turn(), sorted({*_three(*found.intact)})
    try:
        with in_turn[-1].open(path) as opened:
            count, frames = opened.track.frames, opened.take(chosen, None)
    except Exception:  # of whatever kind its library has: the other one has read the file
        return ""
    try:
        with in_turn[0].open(path) as opened:
            same_count, others = opened.track.frames == count, opened.take(chosen, None)
    except Exception:
        return "pyav"
    same = frames.shape == others.shape and np.abs(frames.astype(np.int16) - others).mean(axis=(1, 2, 3)).max() < 4
    return "" if same and same_count else "pyav"
