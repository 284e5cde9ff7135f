"""Look at every file of a data set before training on it, and write down what is in it.

    python -m video.scan /data/kinetics400/train          # writes /data/kinetics400/train/manifest.jsonl
    python -m video.scan train.csv --manifest /scratch/train.jsonl --workers 32
    python -m video.scan /data/imagenet/train --images

Every frame is decoded (`--quick`: three of each video). Each verdict is written down when it is known, so the same
command goes on where it was stopped, and later looks at new and changed files alone. Training on videos takes the
manifest, where there is one, and leaves out what is unusable.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convmae import command, manifest
from convmae.data import usable_cpus
from convmae.images import IMAGE_SUFFIXES
from convmae.listing import listing
from convmae.manifest import Entry
from video.examine import examine, examine_image
from video.in_parallel import LostError, Shown, in_processes
from video.videos import Videos

SECONDS = 120.0
SHOWN = 20  # files of a kind that are named


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a scan has found.

    Args:
        path: of the manifest.
        entries: of all files, by name.
        looked_at: files that were looked at this time.
    """

    path: Path
    entries: Mapping[str, Entry]
    looked_at: int


def scan(
    root: Path,
    *,
    workers: int | None = None,
    quick: bool = False,
    again: bool = False,
    seconds: float = SECONDS,
    path: Path | None = None,
    pictures: bool = False,
    shown: Shown | None = None,
) -> Found:
    """Look at all files of a folder or a list, in parallel, and keep the manifest.

    Args:
        root: the folder, or the list file.
        workers: processes; None: as many as CPUs that this one may use.
        quick: as `examine` has it.
        again: look also at files that the manifest knows and that have not changed.
        seconds: after which a file is given up, and the process that looks at it ended.
        path: of the manifest; None: beside the root.
        pictures: the files are images, not videos.
        shown: where progress is shown.

    Raises:
        ValueError: there are no such files, the manifest cannot be read or written, or another scan writes it.
        KeyboardInterrupt: by Ctrl-C; what was found out until then is kept.
    """
    names, base = _files(root, pictures)
    path = path or manifest.beside(root)
    with _held(path) as descriptor:
        known = {} if again else manifest.load(path)
        sound = {name: entry for name, entry in known.items() if quick or not entry.quick}
        entries = {name: sound[name] for name in names if name in sound and _unchanged(sound[name], base)}
        missing = [name for name in names if name not in entries]
        if shown is not None:
            shown.begin(len(names), before=len(entries))
        for entry in _examined(missing, base, _Look(base, pictures, quick), workers or usable_cpus(), seconds):
            manifest.append(descriptor, entry)
            entries[entry.file] = entry
            if shown is not None:
                shown.see(failed=not entry.usable)
        manifest.write(path, entries.values())
    return Found(path=path, entries=entries, looked_at=len(missing))


def _files(root: Path, pictures: bool) -> tuple[Sequence[str], str]:
    if pictures:
        return listing(root, IMAGE_SUFFIXES).files, str(root)
    source = Videos(root=root)
    return source.listing().files, str(source.base)


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """The manifest, open to append to, for this scan alone; a line that a kill cut off is removed before."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as problem:
        raise ValueError(
            f"the manifest cannot be written: {problem}. Choose another place with --manifest"
        ) from problem
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise ValueError(f"another scan is writing {path}: wait for it, or choose another --manifest") from problem
        text = path.read_bytes()
        os.ftruncate(descriptor, text.rfind(b"\n") + 1)
        yield descriptor
    finally:
        os.close(descriptor)


def _unchanged(entry: Entry, base: str) -> bool:
    try:
        status = os.stat(os.path.join(base, entry.file))
    except OSError:
        return False
    return (status.st_size, status.st_mtime) == (entry.bytes, entry.modified)


def _examined(names: Sequence[str], base: str, look: _Look, workers: int, seconds: float) -> Iterator[Entry]:
    """What was found out about each of the files, as they are done."""
    for name, result in in_processes(look, names, workers=workers, seconds=seconds):
        if isinstance(result, FileNotFoundError):
            yield _given_up(name, base, "no such file")
        elif isinstance(result, OSError):
            yield _given_up(name, base, f"cannot be read ({result.strerror})")
        elif isinstance(result, LostError):
            yield _given_up(name, base, str(result))
        elif isinstance(result, Exception):
            raise result
        else:
            yield result


@dataclass(frozen=True)
class _Look:
    """Looks at a file, in another process."""

    base: str
    pictures: bool
    quick: bool

    def __call__(self, name: str) -> Entry:
        look = examine_image if self.pictures else examine
        return look(os.path.join(self.base, name), name=name, quick=self.quick)


def _given_up(name: str, base: str, reason: str) -> Entry:
    try:
        status = os.stat(os.path.join(base, name))
    except OSError:
        return Entry(file=name, bytes=-1, modified=0.0, usable=False, reason=reason)
    return Entry(file=name, bytes=status.st_size, modified=status.st_mtime, usable=False, reason=reason)


# ---- what is said of it ----------------------------------------------------------------------------------------------


def summary(found: Found) -> Iterator[str]:
    """Lines that say what there is, what is damaged, and what is unusable and why."""
    entries = list(found.entries.values())
    whole = [entry for entry in entries if entry.usable and not entry.partly]
    partly = [entry for entry in entries if entry.partly]
    unusable = [entry for entry in entries if not entry.usable]
    yield f"{len(entries)} files: {len(whole)} usable, {len(partly)} partly, {len(unusable)} not"
    usable = [*whole, *partly]
    if any(entry.seconds for entry in usable):
        hours = sum(entry.seconds for entry in usable) / 3600
        yield f"  {hours:.2f} hours, {_range(entry.frames for entry in usable)} frames, " + (
            f"{_range(round(entry.fps, 2) for entry in usable)} a second, "
            f"short side {_range(min(entry.height, entry.width) for entry in usable)} pixels"
        )
    for entry in partly[:SHOWN]:
        first, stop = entry.intact
        yield f"  partly: {entry.file}: frames {first} to {stop - 1} of {entry.frames} are intact; {entry.reason}"
    if len(partly) > SHOWN:
        yield f"  and {len(partly) - SHOWN} more"
    for reason, count in Counter(entry.reason for entry in unusable).most_common():
        named = [entry.file for entry in unusable if entry.reason == reason]
        more = f" and {count - 3} more" if count > 3 else ""
        yield f"  {count} x {reason}: {', '.join(named[:3])}{more}"
    yield f"manifest: {found.path}"


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return f"{middle:g}" if low == high else f"{low:g} to {high:g} (median {middle:g})"


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Look at every file of a data set, and write what is in it to a manifest, which training takes.

    Args:
        root: a folder of videos, or a list of them.
        workers: processes. (default: as many as CPUs)
        quick: decode three frames of each video, not all.
        again: look also at files that are known and have not changed.
        seconds: after which a file is given up.
        manifest: another place for it. (default: manifest.jsonl in the folder, or beside the list)
        images: the files are images.
    """

    root: Path
    workers: int | None = None
    quick: bool = False
    again: bool = False
    seconds: float = SECONDS
    manifest: Path | None = None
    images: bool = False


def _scan(options: _Options) -> int:
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers} is below 1")
    if options.seconds <= 0:
        raise ValueError(f"--seconds {options.seconds:g} is not positive")
    try:
        with Shown() as shown:
            found = scan(
                options.root,
                workers=options.workers,
                quick=options.quick,
                again=options.again,
                seconds=options.seconds,
                path=options.manifest,
                pictures=options.images,
                shown=shown,
            )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if found.looked_at < len(found.entries):
        print(f"{len(found.entries) - found.looked_at} of {len(found.entries)} files were known already")
    for line in summary(found):
        print(line)
    return 0 if any(entry.usable for entry in found.entries.values()) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Scan, and say what was found; the exit code: 1 if nothing is usable, 2 if it cannot be done, 130 if stopped."""
    return command.run(_Options, "video.scan", _scan, arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
