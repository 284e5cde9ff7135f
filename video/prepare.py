"""Prepares videos for training: small and quick to decode, in files or packed into shards. Originals are only read.

    python -m video.prepare ROOT OUT
    python -m video.prepare ROOT OUT --shards-mb 1000

A video becomes H.264 in mp4, with a short side of at most 320 pixels, upright, and with a key frame at least every 32
frames, so that a clip is found by decoding few frames besides its own. Its frames are those that `video.readers` gives,
each at its own time: a variable rate stays one, and what an edit list cuts off is gone. A video that is like this
already is copied, byte for byte: mp4 or mov with one stream of H.264 in 4:2:0, small enough, not rotated, key frames
near enough, no edit list, and wholly decodable.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from convmae import command
from convmae.data import UNLABELLED, UnusableFileError, usable_cpus
from convmae.files import append_line, lines, write_whole, writing
from convmae.listing import Listing
from convmae.shards import INDEX, Index, Place, index_of, save_index, write_shard
from video import readers
from video.in_parallel import LostError, Shown, in_processes
from video.readers.protocol import one_line
from video.readers.pyav import Index as Packets
from video.readers.pyav import best_stream, container_of
from video.videos import Videos

KEYS = 32
"""Frames from one key frame to the next, at most."""
PRESET = "fast"
"""Of x264. At a short side of 320, slower ones save a few per cent of the size for twice the time."""
FAILED = "failed.jsonl"
SETTINGS = "prepare.json"
PARTS = ".parts"


# ---- one video -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How videos are encoded.

    Args:
        short_side: in pixels; smaller videos keep their size.
        crf: x264's quality, lower is better and larger.
        keep_audio: keep the sound, as AAC.
    """

    short_side: int = 320
    crf: float = 23
    keep_audio: bool = False


class Task(NamedTuple):
    """A video, where it goes, and how; without a target, it is only looked into."""

    number: int
    source: str
    target: str | None
    encoding: Encoding


class Made(NamedTuple):
    """What became of a video: a note where a part of it was lost."""

    note: str = ""


def work(task: Task) -> Made:
    """Do what a task says. Raises `UnusableFileError`, and OSError where the disk is full."""
    try:
        if os.path.isdir(task.source):
            raise UnusableFileError(task.source, "a folder of frames: there is nothing to re-encode")
        if task.target is None:
            readers.read(task.source, lambda track: [0], reader="pyav")
            return Made()
        return encode(task.source, Path(task.target), task.encoding)
    except UnusableFileError:
        raise
    except Exception as problem:  # decoders raise almost anything on damaged data
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(errno.ENOSPC, "no space left") from problem
        raise UnusableFileError(task.source, f"cannot be re-encoded ({one_line(problem)})") from problem


def encode(source: str, target: Path, encoding: Encoding) -> Made:
    """Write a video anew, or copy it where it is good as it is; the target is there as a whole or not at all.

    Where a video breaks off, the frames before are kept, and the note says so. Raises `UnusableFileError` for one of
    less than two frames, and whatever PyAV does.
    """
    readers.read(source, lambda track: [0], reader="pyav")  # says in one line what is wrong with it, if anything is
    with container_of(source) as given:
        packets = Packets.of(given, best_stream(given, source))
        good = _is_good(given, best_stream(given, source), packets, encoding)
    target.parent.mkdir(parents=True, exist_ok=True)
    if good and _is_whole(source, packets.frames):
        with writing(target) as file, open(source, "rb") as original:
            shutil.copyfileobj(original, file)
        return Made()
    with writing(target) as file, container_of(source) as given:
        stream = best_stream(given, source)
        with av.open(file.name, "w", format="mp4", options={"movflags": "+faststart"}) as made:
            frames, problem = _write(made, given, stream, packets, encoding)
        if frames < 2:
            raise UnusableFileError(source, "holds a single frame that can be decoded: a picture, not a video")
    if problem or frames < packets.frames:
        why = f" ({problem})" if problem else ""
        return Made(f"{frames} of {packets.frames} frames could be decoded{why}; these were kept")
    return Made()


def _is_good(container: InputContainer, stream: VideoStream, packets: Packets, encoding: Encoding) -> bool:
    """Whether a file says that there is nothing to gain: its frames are not looked at."""
    times = packets.times
    if times is None or "mp4" not in container.format.name or len(container.streams.video) != 1:
        return False
    keys = [*(times.index(key) for key in packets.keys), packets.frames]
    return (
        stream.codec_context.name == "h264"
        and stream.pix_fmt in ("yuv420p", "yuvj420p")
        and min(stream.height, stream.width) <= encoding.short_side
        and stream.frames == packets.frames  # an edit list leaves packets out
        and keys[0] == 0
        and max(after - key for key, after in pairwise(keys)) <= KEYS
        and (encoding.keep_audio or not container.streams.audio)
    )


def _is_whole(source: str, frames: int) -> bool:
    """Whether all frames can be decoded, and are upright."""
    with container_of(source) as container:
        try:
            upright = [
                not frame.rotation and not frame.is_corrupt
                for frame in container.decode(best_stream(container, source))
            ]
        except av.error.FFmpegError:
            return False
    return all(upright) and len(upright) == frames


def _write(
    made: OutputContainer, given: InputContainer, stream: VideoStream, packets: Packets, encoding: Encoding
) -> tuple[int, str]:
    """Encode the frames up to where the file breaks off; gives their number, and what is wrong there."""
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    # A container without times has a rate; what FFmpeg makes up for its packets may not even rise.
    base = cast(Fraction, stream.time_base) if packets.times is not None else 1 / rate
    out = sound = None
    frames, first, last, problem = 0, 0, -1, ""
    decoded = given.decode(stream)
    while True:
        try:
            frame = next(decoded, None)
        except av.error.FFmpegError as error:
            frame, problem = None, str(error.strerror or type(error).__name__)
        if frame is None:
            break
        if out is None:
            height, width, turns = _size(frame, encoding.short_side)
            out = _stream(made, frame, (width, height) if turns % 2 else (height, width), rate, base, encoding)
            if encoding.keep_audio and given.streams.audio:
                sound = made.add_stream("aac", rate=given.streams.audio[0].rate)
            first = frame.pts or 0
        time = frames if packets.times is None or frame.pts is None else frame.pts - first
        last = max(time, last + 1)
        picture = frame.reformat(width=width, height=height, format="yuv420p", interpolation="BICUBIC")
        picture = _turned(picture, turns) if turns else picture
        # The encoder would take the old types of frames for orders.
        picture.pict_type, picture.pts, picture.time_base = PictureType.NONE, last, base
        made.mux(out.encode(picture))
        frames += 1
    if out is not None:
        made.mux(out.encode())
    if sound is not None:
        _write_audio(made, sound, given.name, first * cast(Fraction, stream.time_base))
    return frames, problem


def _size(frame: VideoFrame, short_side: int) -> tuple[int, int, int]:
    """Height and width to scale to, even numbers, not yet upright; and quarter turns that make it so."""
    scale = min(short_side / min(frame.height, frame.width), 1)
    # An odd side loses a pixel; nothing is enlarged.
    height, width = (max(2 * round(side * scale / 2 - 0.01), 2) for side in (frame.height, frame.width))
    return height, width, round(frame.rotation / 90) % 4


def _stream(
    made: OutputContainer, frame: VideoFrame, size: tuple[int, int], rate: Fraction, base: Fraction, encoding: Encoding
) -> VideoStream:
    options = {"crf": str(encoding.crf), "preset": PRESET, "g": str(KEYS)}
    out = made.add_stream("libx264", rate=rate, options=options)
    assert isinstance(out, VideoStream)
    out.height, out.width = size
    out.pix_fmt, out.time_base = "yuv420p", base
    context = out.codec_context
    context.thread_count, context.time_base = 1, base
    # Else readers would take the colours for others than they are.
    context.colorspace, context.color_range = frame.colorspace, frame.color_range
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    return out


def _turned(frame: VideoFrame, turns: int) -> VideoFrame:
    """A 4:2:0 frame of even size, turned counter-clockwise by quarters."""
    height, width = frame.height, frame.width
    planes = frame.to_ndarray()
    colours = planes[height:].reshape(2, height // 2, width // 2)
    turned = [np.rot90(plane, turns) for plane in (planes[:height], *colours)]
    flat = np.concatenate([plane.ravel() for plane in turned])
    return VideoFrame.from_ndarray(flat.reshape(-1, turned[0].shape[1]), format="yuv420p")


def _write_audio(made: OutputContainer, out: AudioStream, source: str, begins: Fraction) -> None:
    """Encode the sound, as far as it can be decoded; the pictures begin at so many seconds."""
    with container_of(source) as given:
        time = None
        for frame in _heard(given):
            if time is None:
                time = round(((frame.pts or 0) * (frame.time_base or 0) - begins) * frame.sample_rate)
            # counted in samples: the times of some containers are coarser than that
            frame.pts, frame.time_base = time, Fraction(1, frame.sample_rate)
            time += frame.samples
            made.mux(out.encode(frame))
        made.mux(out.encode())


def _heard(given: InputContainer) -> Iterator[AudioFrame]:
    with suppress(av.error.FFmpegError):  # models see the pictures
        yield from given.decode(given.streams.audio[0])


# ---- many videos -----------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """What `prepare` did: how many videos are there now, how many of them were before, and which are not, and why."""

    videos: int
    before: int
    failed: tuple[UnusableFileError, ...]
    notes: tuple[UnusableFileError, ...]
    """Videos of which a part was lost."""


@dataclass(frozen=True)
class _Job:
    """The videos of a data set, and where they go."""

    out: Path
    listing: Listing
    sources: Sequence[str]
    names: Sequence[str]
    """Of the results, without an ending; relative to `out`."""
    encoding: Encoding
    workers: int
    seconds: float
    shown: Shown

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Made | UnusableFileError]]:
        """Do tasks, show them and keep what went wrong; gives their numbers and results, as they finish."""
        for task, found in in_processes(work, tasks, workers=self.workers, seconds=self.seconds):
            result = UnusableFileError(task.source, str(found)) if isinstance(found, LostError) else found
            if not isinstance(result, Made | UnusableFileError):
                raise result
            self.shown.see(failed=isinstance(result, UnusableFileError))
            self.note(result, task.number)
            yield task.number, result

    def note(self, result: Made | UnusableFileError, number: int) -> None:
        """Keep what went wrong, for those who look later and for a run that goes on."""
        reason = result.note if isinstance(result, Made) else result.reason
        if reason:
            kept = isinstance(result, Made)
            append_line(self.out / FAILED, {"file": self.sources[number], "kept": kept, "reason": reason})

    def forget(self, numbers: Iterable[int]) -> None:
        """Forget what went wrong with videos that are tried again."""
        again = {self.sources[number] for number in numbers}
        kept = [line for line in lines(self.out / FAILED) if line["file"] not in again]
        write_whole(self.out / FAILED, "".join(json.dumps(line) + "\n" for line in kept))


def prepare(
    root: Path,
    out: Path,
    *,
    encoding: Encoding = Encoding(),
    shards_mb: float | None = None,
    copy: bool = False,
    workers: int | None = None,
    seconds_per_file: float = 600,
) -> Summary:
    """Re-encode the videos of a folder or a list into another folder, or pack them into shards there.

    What is there already, from a run that was interrupted, is kept. Files keep their names, but for the ending, and
    `list.csv` lists them with their classes. Shards hold them in an order shuffled once, so that each has videos of all
    classes; interrupted or not, it is the same order. Videos that cannot be read are in `failed.jsonl`; those that
    were not packed or written then are tried again by the next run.

    Args:
        root: what `video.videos.Videos` takes: a folder, or a list.
        out: a folder that is not in `root`.
        encoding: how videos are encoded.
        shards_mb: pack into shards of about so many megabytes.
        copy: pack the videos as they are.
        workers: processes; None: as many as there are CPUs to use.
        seconds_per_file: a video that takes longer is given up.

    Raises:
        ValueError: there are no videos, `out` holds something else or is in `root`, another run writes there, libx264
            is missing, or the disk is full.
    """
    if copy and shards_mb is None:
        raise ValueError("copy packs videos as they are: it takes shards_mb, too")
    numbers = {"shards_mb": shards_mb, "workers": workers, "seconds_per_file": seconds_per_file}
    if wrong := {name: number for name, number in numbers.items() if number is not None and not number > 0}:
        raise ValueError(", ".join(f"{name}={number} is not above 0" for name, number in wrong.items()))
    if encoding.short_side < 2:
        raise ValueError(f"short_side={encoding.short_side} is below 2")
    if not copy and "libx264" not in av.codecs_available:
        raise ValueError(
            "this build of PyAV has no libx264 to encode with: install a wheel, `pip install --upgrade av`"
        )
    videos = Videos(root=Path(root))
    listing = videos.listing()
    sources = [os.path.join(videos.base, name) for name in listing.files]
    _check_apart(Path(root), out, sources)
    names = _names(sources, str(videos.base), keys=shards_mb is not None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out), Shown() as shown:
            _settle(out, _settings(root, sources, encoding, shards_mb, copy))
            job = _Job(out, listing, sources, names, encoding, workers or usable_cpus(), seconds_per_file, shown)
            _sweep(out)
            try:
                return _into_files(job) if shards_mb is None else _into_shards(job, shards_mb * 1e6, copy)
            finally:
                _sweep(out)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{out} cannot be written: {problem}") from problem
        raise ValueError(f"{out}: the disk is full; make room, and the same command goes on") from problem


def _into_files(job: _Job) -> Summary:
    targets = [job.out / f"{name}.mp4" for name in job.names]
    todo = [number for number, target in enumerate(targets) if not target.exists()]
    job.forget(todo)
    before = len(targets) - len(todo)
    job.shown.begin(len(targets), before=before)
    for _ in job.run(Task(number, job.sources[number], str(targets[number]), job.encoding) for number in todo):
        pass
    there = [number for number, target in enumerate(targets) if target.exists()]
    _write_list(job, there)
    return _summary(job, len(there), before)


def _write_list(job: _Job, numbers: Sequence[int]) -> None:
    """List the videos that are there; with their classes, where all have one."""
    import csv
    import io

    labels, classes = job.listing.labels, job.listing.classes
    with_class = len(numbers) > 0 and all(labels[number] != UNLABELLED for number in numbers)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    for number in numbers:
        file = f"{job.names[number]}.mp4"
        table.writerow([file, classes[labels[number]]] if with_class else [file])
    write_whole(job.out / "list.csv", text.getvalue())


def _into_shards(job: _Job, size: float, copy: bool) -> Summary:
    order = list(range(len(job.sources)))
    random.Random(0).shuffle(order)
    place = Place(str(job.out), None)
    done = sorted(job.out.glob("shard-*.tar"))
    packed = _packed(index_of(place)) if done else set()
    start = max((place + 1 for place, number in enumerate(order) if job.names[number] in packed), default=0)
    parts = {number: job.out / PARTS / f"{place:08}.mp4" for place, number in enumerate(order)}
    for number in order[:start]:
        parts[number].unlink(missing_ok=True)
    ready = set() if copy else {number for number in order[start:] if parts[number].exists()}
    job.forget(number for number in order[start:] if number not in ready)
    job.shown.begin(len(job.sources), before=start + len(ready))
    results = job.run(
        Task(number, job.sources[number], None if copy else str(parts[number]), job.encoding)
        for number in order[start:]
        if number not in ready
    )
    count, bytes_, members = len(done), 0, list[tuple[int, Path]]()
    for number in _in_turn(order[start:], ready, results):
        path = Path(job.sources[number]) if copy else parts[number]
        members.append((number, path))
        bytes_ += path.stat().st_size
        if bytes_ >= size:
            _pack(job, count, members, copy)
            count, bytes_, members = count + 1, 0, []
    if members:
        _pack(job, count, members, copy)
    shutil.rmtree(job.out / PARTS, ignore_errors=True)
    if not list(job.out.glob("shard-*.tar")):
        return _summary(job, 0, 0)
    index = index_of(place)
    save_index(place.path(INDEX), Index(index.shards, job.listing.classes))
    return _summary(job, len(_packed(index)), len(packed) + len(ready))


def _packed(index: Index) -> set[str]:
    """The keys of videos that are in shards."""
    return {os.path.splitext(member.name)[0] for shard in index.shards.values() for member in shard.members}


def _in_turn(
    order: Sequence[int], ready: set[int], results: Iterator[tuple[int, Made | UnusableFileError]]
) -> Iterator[int]:
    """The videos that can be packed, in this order, as soon as those before are done."""
    done = dict.fromkeys(ready, True)
    for number in order:
        while number not in done:
            finished, result = next(results)
            done[finished] = isinstance(result, Made)
        if done.pop(number):
            yield number


def _pack(job: _Job, count: int, videos: Sequence[tuple[int, Path]], copy: bool) -> None:
    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for number, path in videos:
            members = {path.suffix[1:].lower(): path.read_bytes()}
            if job.listing.labels[number] != UNLABELLED:
                members["cls"] = str(int(job.listing.labels[number])).encode()
            yield job.names[number], members

    write_shard(job.out / f"shard-{count:06}.tar", samples())
    if not copy:
        for _, path in videos:
            path.unlink(missing_ok=True)


def _summary(job: _Job, videos: int, before: int) -> Summary:
    own = set(job.sources)
    found = [line for line in lines(job.out / FAILED) if line["file"] in own]
    failed = [UnusableFileError(line["file"], line["reason"]) for line in found if not line["kept"]]
    notes = [UnusableFileError(line["file"], line["reason"]) for line in found if line["kept"]]
    if not failed and not notes:
        (job.out / FAILED).unlink(missing_ok=True)
    return Summary(videos, before, tuple(failed), tuple(notes))


# ---- the folder that is written to -----------------------------------------------------------------------------------


def _check_apart(root: Path, out: Path, sources: Sequence[str]) -> None:
    """Refuse to write among the originals."""
    there, below = out.resolve(), f"{out.resolve()}{os.sep}"
    if root.is_dir() and there.is_relative_to(root.resolve()):
        raise ValueError(f"{out} is in {root}, or the same: the originals stay alone; choose another folder")
    if inside := [source for source in sources if os.path.abspath(source).startswith(below)]:
        raise ValueError(f"{out} holds originals, {inside[0]} for one: choose another folder")


def _names(sources: Sequence[str], base: str, *, keys: bool) -> list[str]:
    """Names for the results: the originals' without ending, relative to what they have in common.

    Of those that differ in their ending only, each has its ending added. Keys have no dots in their last part.
    """
    paths = [os.path.abspath(source) for source in sources]
    base = os.path.abspath(base)
    if any(not path.startswith(base + os.sep) for path in paths):
        base = os.path.commonpath([os.path.dirname(path) for path in paths])
    parts = [os.path.splitext(os.path.relpath(path, base)) for path in paths]
    plain = [f"{folder}/{name}" if folder else name for folder, name in (os.path.split(stem) for stem, _ in parts)]
    if keys:
        plain = [f"{name.rpartition('/')[0]}/{name.rpartition('/')[2].replace('.', '_')}".lstrip("/") for name in plain]
    times = Counter(plain)
    names = [
        name if times[name] == 1 else f"{name}-{ending[1:].lower()}"
        for name, (_, ending) in zip(plain, parts, strict=True)
    ]
    times = Counter(names)
    if again := [source for source, name in zip(sources, names, strict=True) if times[name] > 1]:
        raise ValueError(f"{again[0]} and {again[1]} would get the same name: rename one of them")
    return names


def _settings(
    root: Path, sources: Sequence[str], encoding: Encoding, shards_mb: float | None, copy: bool
) -> dict[str, Any]:
    settings: dict[str, Any] = {"root": str(Path(root).absolute()), **asdict(encoding), "shards_mb": shards_mb}
    if shards_mb is not None:  # a video more, and the order would be another
        settings |= {
            "copy": copy,
            "videos": hashlib.sha256("\0".join(sources).encode(errors="surrogateescape")).hexdigest(),
        }
    return settings


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Begin with these settings, or go on with them; raises ValueError where others were begun with."""
    path = out / SETTINGS
    if not path.exists():
        if others := [other.name for other in out.iterdir()]:
            raise ValueError(f"{out} holds {others[0]!r} and was not begun by this command: choose a new folder")
        write_whole(path, json.dumps(settings, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    if begun != settings:
        names = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        changed = ", ".join(f"{name} was {begun.get(name)!r}, now {settings.get(name)!r}" for name in names)
        raise ValueError(f"{out} was begun with other settings ({changed}): choose a new folder, or those settings")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raises ValueError where another process prepares videos there."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process writes to {out}: wait for it, or end it") from None
    finally:
        os.close(folder)


def _sweep(out: Path) -> None:
    """Remove what ended processes left half written."""
    for left in out.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Make videos small and quick to decode, or pack them into shards; originals are only read.

    Interrupted, the same command goes on.

    Args:
        root: a folder of videos, or a list of them.
        out: a new folder.
        short_side: in pixels; smaller videos keep their size.
        shards_mb: pack into shards of about so many megabytes.
        workers: processes. (default: as many as CPUs)
        crf: x264's quality, lower is better and larger.
        keep_audio: keep the sound.
        seconds_per_file: a video that takes longer is given up.
        copy: pack videos as they are.
    """

    root: Path
    out: Path
    short_side: int = 320
    shards_mb: float | None = None
    workers: int | None = None
    crf: float = 23
    keep_audio: bool = False
    seconds_per_file: float = 600
    copy: bool = False


def _prepare(options: _Options) -> int:
    try:
        summary = prepare(
            options.root,
            options.out,
            encoding=Encoding(short_side=options.short_side, crf=options.crf, keep_audio=options.keep_audio),
            shards_mb=options.shards_mb,
            copy=options.copy,
            workers=options.workers,
            seconds_per_file=options.seconds_per_file,
        )
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    print(f"{options.out}: {summary.videos} videos, {summary.before} of which were there before")
    for what, found in (("could not be used", summary.failed), ("lost a part", summary.notes)):
        if found:
            print(f"{len(found)} {what}; all are in {options.out / FAILED}")
            for problem in found[:10]:
                print(f"  {problem}")
    return 0 if summary.videos else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare videos as the command line says; the exit code, 1 where no video could be, 2 where it cannot be done."""
    return command.run(_Options, "video.prepare", _prepare, arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
