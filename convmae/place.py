"""The place where a run is carried out, and what is checked, made ready and said before, wherever that is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from .run import Task
from .run_folder import SLURM

T = TypeVar("T", bound=Task)

SWEEPS = f".{SLURM}"
"""The folder of a sweep's logs, beside those of its runs; hidden, as it is no run: `runs/*` leaves it out."""

PATIENT = ("OMP_WAIT_POLICY", "PASSIVE")
"""A variable for processes on CPUs, from their start: threads that wait for each other sleep.

Where processes share CPUs, spinning cost 18 times the work.
"""


class LaunchError(ValueError):
    """What was asked for cannot be done; the message says what was given, what there is, and what to change."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What carries the run out, why, and with how many GPUs and processes on each of its nodes."""

    cluster: Literal["slurm", "local", "debug"]
    why: str
    nodes: int = 1
    gpus: int
    tasks: int


def say(label: str, text: object) -> None:
    """Print a line of what is being done, in the first process alone: torchrun starts launchers, too."""
    if _first():
        print(f"{label:<9}{text}", flush=True)


def _first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def closest(given: str, names: Sequence[str], question: str) -> str:
    """A question after the name that was perhaps meant; nothing where none is like it."""
    found = difflib.get_close_matches(given, names, n=1)
    return " " + question.format(found[0]) if found else ""


def require_folder(folder: Path, given: str) -> None:
    """Refuse a folder that is not there and cannot be made, or cannot be written to."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise LaunchError(f"{given}: {there} is not a folder that can be written to")


def require_gpus(given: int, there: bool, what: str) -> None:
    """Refuse GPUs that are not there."""
    if not there:
        raise LaunchError(f"--gpus-per-node {given}: {what}. 0 is for CPUs alone.")


def count_tasks(gpus: int, tasks_per_node: int | None) -> int:
    """The processes of a node: one a GPU; on CPUs as many as are asked for, or one."""
    if gpus and tasks_per_node not in (None, gpus):
        given = f"--tasks-per-node {tasks_per_node}"
        raise LaunchError(f"{given}: with {gpus} GPUs there are {gpus}. Leave it out, or add --gpus-per-node 0.")
    return gpus or tasks_per_node or 1


def suited(run: T, gpus: int) -> T:
    """The run as it is carried out with so many GPUs on each node.

    Raises:
        LaunchError: it would fail: its model cannot be built, its device is not there, its folder cannot be written
            to, is in use, or holds another run.
    """
    if gpus == 0 and run.device == "auto":
        run = replace(run, device="cpu")
    try:
        run.check()
    except ValueError as error:
        raise LaunchError(str(error)) from error
    if run.device.startswith("cuda") and gpus == 0:
        raise LaunchError(f"--device {run.device}: there is no GPU. Use --device cpu or auto.")
    require_folder(run.folder, f"--folder {run.folder}")
    if _first() and (why := run.refusal()):  # the others may find the first one training there already
        raise LaunchError(why)
    return run


def made_ready(task: T) -> T:
    """The task as any process can carry it out: its folder absolute, and the demo set made, if it is the data.

    Raises:
        LaunchError: the demo set cannot be written.
    """
    try:
        task.ready()
    except ValueError as error:
        raise LaunchError(str(error)) from error
    return replace(task, folder=task.folder.absolute())


def logs(runs: Sequence[Task]) -> Path:
    """Where submitit keeps what was submitted and what it printed, by job; of several runs, above their folders."""
    if len(runs) == 1:
        return runs[0].folder / SLURM / "%j"
    return Path(os.path.commonpath([run.folder for run in runs])) / SWEEPS / "%j"
