"""Look at every file of a data set before training on it, and write down what is in it.

    python -m video.scan /data/kinetics400/train          # writes /data/kinetics400/train/manifest.jsonl
    python -m video.scan train.csv --manifest /scratch/train.jsonl --workers 32
    python -m video.scan /data/imagenet/train --images

Every frame is decoded (`--quick`: three of each video). Each verdict is written down when it is known, so the same
command goes on where it was stopped, and later looks at new and changed files alone. Training takes the manifest, where
there is one, and leaves out what is unusable.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmae import manifest
from convmae.images import IMAGE_SUFFIXES
from convmae.listing import listing
from convmae.manifest import Entry
from video.examine import examine, examine_image
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
    tell: Callable[[int, int, Entry | None], None] = lambda done, total, entry: None,
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
        tell: called with the number of files known, of all, and what was found out last.

    Raises:
        ValueError: there are no such files, the manifest cannot be read or written, or another scan writes it.
        KeyboardInterrupt: by Ctrl-C; what was found out until then is kept.
    """
    names, base = _files(root, pictures)
    path = path or manifest.beside(root)
    with _held(path) as descriptor:
        known = {} if again else manifest.load(path)
        entries = {name: known[name] for name in names if name in known and _unchanged(known[name], base)}
        missing = [name for name in names if name not in entries]
        tell(len(entries), len(names), None)
        look = examine_image if pictures else examine
        for entry in _examined(look, base, missing, workers or usable_cpus(), quick, seconds):
            manifest.append(descriptor, entry)
            entries[entry.file] = entry
            tell(len(entries), len(names), entry)
        manifest.write(path, entries.values())
    return Found(path=path, entries=entries, looked_at=len(missing))


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _examined(
    look: Callable[..., Entry], base: str, names: Sequence[str], workers: int, quick: bool, seconds: float
) -> Iterator[Entry]:
    """What was found out about each of the files, in the order in which they were begun."""
    from pebble import ProcessPool

    if not names:
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPool(min(workers, len(names)), initializer=_hush, context=context)
    under_way: deque[tuple[str, Any]] = deque()
    try:
        for name in names:
            given = {"name": name, "quick": quick}
            under_way.append((name, pool.schedule(look, (os.path.join(base, name),), given, timeout=seconds)))
            if len(under_way) >= 8 * workers:
                yield _verdict(*under_way.popleft(), base, seconds)
        while under_way:
            yield _verdict(*under_way.popleft(), base, seconds)
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _hush() -> None:
    """Nothing on the terminal from decoders: what they say of a damaged file, its entry says."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _verdict(name: str, future: Any, base: str, seconds: float) -> Entry:
    """The result, or what became of the process that should have given it."""
    from pebble import ProcessExpired

    try:
        entry: Entry = future.result()
    except TimeoutError:
        return _given_up(name, base, f"took more than {seconds:g} s to look at")
    except ProcessExpired as problem:
        code = problem.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _given_up(name, base, f"ended the process that looked at it ({how})")
    except OSError as problem:
        reason = "no such file" if isinstance(problem, FileNotFoundError) else f"cannot be read ({problem.strerror})"
        return _given_up(name, base, reason)
    return entry


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


class _Display:
    """A progress bar on a terminal; a line every half minute elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=None, said="")
        self.quiet, self.printed = not console.is_terminal, time.monotonic()
        self.began, self.first, self.unusable = time.monotonic(), 0, 0

    def __call__(self, done: int, total: int, entry: Entry | None) -> None:
        if entry is None:
            self.first = done
            if done:
                print(f"{done} of {total} files are known already", flush=True)
        elif not entry.usable:
            self.unusable += 1
        rate = (done - self.first) / max(time.monotonic() - self.began, 1e-9)
        said = f"{rate:.1f} files/s, {self.unusable} unusable"
        self.bar.update(self.task, completed=done, total=total, said=said)
        if self.quiet and time.monotonic() - self.printed > 30:
            self.printed = time.monotonic()
            print(f"{done} of {total} files, {said}, {(total - done) / max(rate, 1e-9):.0f} s left", flush=True)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Scan, and say what was found; the exit code: 1 if nothing is usable, 2 if it cannot be done, 130 if stopped."""
    import tyro

    options = tyro.cli(
        _Options,
        args=arguments,
        prog="python -m video.scan",
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    display = _Display()
    try:
        if options.workers is not None and options.workers < 1:
            raise ValueError(f"--workers {options.workers} is below 1")
        if options.seconds <= 0:
            raise ValueError(f"--seconds {options.seconds:g} is not positive")
        with display.bar:
            found = scan(
                options.root,
                workers=options.workers,
                quick=options.quick,
                again=options.again,
                seconds=options.seconds,
                path=options.manifest,
                pictures=options.images,
                tell=display,
            )
    except ValueError as problem:
        print(f"python -m video.scan: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for line in summary(found):
        print(line)
    return 0 if any(entry.usable for entry in found.entries.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
