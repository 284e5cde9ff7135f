"""A run's folder: its checkpoints, the lock of the process that trains in it, its events, and what failed.

checkpoints/step-00001000.pt   whole files; `last.pt` is a link to the newest
events.jsonl                   what happened to the run, by step and time
failures/rank-00003.json       the last words of a process
.lock                          held while a process trains here
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from . import checkpoint
from .files import append_line, sweep, write_whole

_log = logging.getLogger(__name__)

LAST, CHECKPOINTS, FAILURES, SLURM, LOCK = "last.pt", "checkpoints", "failures", "slurm", ".lock"
METRICS, SCORES, SKIPPED, EVENTS = "metrics.jsonl", "scores.jsonl", "skipped.jsonl", "events.jsonl"


class InUseError(ValueError):
    """Another process trains in the folder."""


class Checkpoints:
    """The checkpoints of a run, one a step: the last few are kept, and those at every so many steps.

    Args:
        folder: of the run.
        last: how many of the newest are kept.
        every: steps; checkpoints at its multiples are kept for good. None: none are.
    """

    def __init__(self, folder: Path, *, last: int, every: int | None) -> None:
        self.folder, self.last, self.every = folder, last, every

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Write a step's checkpoint, point `last.pt` at it, and only then remove what is no longer to be kept.

        Raises OSError where it cannot be written: all the others stay.
        """
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, content)
        link = self.folder / f".{LAST}.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(path.relative_to(self.folder))
        link.replace(self.folder / LAST)
        done = [known for known in self.steps() if known <= step]  # a later one was damaged: it is not counted
        for old in done[: -self.last]:
            if not (self.every and old and old % self.every == 0):
                self._path(old).unlink(missing_ok=True)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its content; a logged line for each that cannot.

        Raises:
            ValueError: there are checkpoints, and none of them can be read.
            OSError: the disk or network fails in reading.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                content = checkpoint.read(path)
            except ValueError as problem:
                _log.warning("%s; trying the checkpoint before it", problem)
                damaged.append(str(problem))
                continue
            return path, content
        if damaged:
            raise ValueError(
                f"none of the checkpoints in {self.folder / CHECKPOINTS} can be read:"
                + "".join(f"\n  - {problem}" for problem in damaged)
                + "\nRemove them to begin the run anew, or give another folder with --folder."
            )
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        paths = (path for path in (self.folder / CHECKPOINTS).glob("step-*.pt") if path.is_file())
        found = (path.stem.removeprefix("step-") for path in paths)
        return sorted(int(step) for step in found if step.isdecimal())

    def sweep(self) -> None:
        """Remove what processes that were killed in the middle of writing left behind; the lock must be held."""
        for folder in (self.folder, self.folder / CHECKPOINTS, self.folder / "pictures"):
            sweep(folder)

    def _path(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / f"step-{step:08d}.pt"


def kept_in(place: Path, what: Literal["run", "builder"]) -> Any:
    """The plain form of what a checkpoint, or a folder's `last.pt`, keeps, without reading its weights; or None.

    A damaged file is none, too: whether an earlier checkpoint serves is found when the run goes on.
    """
    try:
        path = place / LAST if place.is_dir() else place
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[what]
    except Exception:  # torch raises half a dozen kinds for a damaged file
        return None


@contextmanager
def occupied(folder: Path, *, patience: float = 5) -> Iterator[None]:
    """Hold the lock of a run's folder, so that no second process trains in it.

    Args:
        folder: of the run; it exists.
        patience: seconds to wait for a process that is just ending.

    Raises:
        InUseError: another process holds it; the message says which.
    """
    with (folder / LOCK).open("a+") as file:
        until = time.monotonic() + patience
        while not _take(file, fcntl.LOCK_EX):
            if time.monotonic() > until:
                job = _holder(folder).get("job")
                if job is None or job != job_id():
                    raise InUseError(in_use(folder) or f"{folder} is in use")
                # A job runs once at a time: what holds on is the network file system, for a node that is dead.
                _log.warning("%s is still locked by this job's last attempt, which is over", folder)
                break
            time.sleep(0.2)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job_id(), "since": time.time()}
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield


def _take(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:  # some network file systems have none
        _log.warning("%s cannot be locked (%s): see to it that one job at a time trains there", file.name, problem)
    return True


def _holder(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def in_use(folder: Path) -> str | None:
    """A message that names the process that trains in a folder; None where there is none."""
    try:
        with (folder / LOCK).open("r") as file:
            if _take(file, fcntl.LOCK_SH):
                return None
    except OSError:
        return None
    holder = _holder(folder)
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    who = f"process {holder.get('pid')} on {holder.get('host')}{job}"
    return f"{folder} is in use: {who}, trains there. Wait for it or end it, or give another folder with --folder."


def job_id() -> str | None:
    """The SLURM job that this process belongs to, an array's element as 123_4."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array else os.environ.get("SLURM_JOB_ID")


def note(folder: Path, event: str, step: int | None, text: str) -> None:
    """Add to what happened to the run."""
    append_line(folder / EVENTS, {"time": round(time.time(), 2), "step": step, "event": event, "text": text})


def record_failure(folder: Path, error: BaseException | str, *, step: int | None = None) -> None:
    """Leave a process's last words in the run's folder, where other nodes and the batch script find them.

    A failure is *final* where the same would happen again: the run cannot be carried out, or learns nothing.
    """
    if isinstance(error, BaseException):
        told, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        final = isinstance(error, (ValueError, FloatingPointError))
    else:
        told, trace, final = error, "", False
    rank = int(os.environ.get("RANK", 0))
    words = {"time": time.time(), "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "job": job_id()}
    with suppress(OSError):  # the disk may be what failed
        where = folder / FAILURES / f"rank-{rank:05d}.json"
        write_whole(where, json.dumps({**words, "step": step, "final": final, "error": told, "traceback": trace}))


def failures(folder: Path) -> list[dict[str, Any]]:
    """The last words of processes that failed, the first one first."""
    found = []
    for path in (folder / FAILURES).glob("rank-*.json"):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return sorted(found, key=lambda words: float(words["time"]))


def forget_failures(folder: Path) -> None:
    """Remove them, told or overcome."""
    for path in (folder / FAILURES).glob("*"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        (folder / FAILURES).rmdir()
