"""Kills a run with SIGKILL at random moments, every third time while a checkpoint is being written, until it is done.

    python tests/killing.py FOLDER [--kills 20] [--seed 0]

The same run is also done without being killed; then weights, optimiser and metrics of both are compared, and what was
left behind is counted. Prints one line of JSON. Children are forked from a process that has everything imported, so
that a life is seconds: the moments are spread over start, steps, checkpoints, pictures and the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  what a run imports late
import torch
import torch.utils.tensorboard
from runs import Noise, TinyRun, tiny

from convmae import checkpoint
from convmae.files import lines
from convmae.training import Pretrain, fit

FAMILY = "CONVMAE_KILLED_FAMILY"


def the_run(folder: Path) -> Pretrain:
    """Steps of a few dozen milliseconds, each with a checkpoint of megabytes, a loader process, and pictures."""
    model = tiny().decode(dim=256, depth=1, heads=2)
    data = Noise(count=24, bad=(3,))
    changes = {"epochs": 16, "batch_size": 4, "workers": 1, "log_every": 3, "pictures": 3, "keep_every": 10}
    return replace(TinyRun(folder=folder, data=data).run(), model=model, **changes)  # type: ignore[arg-type]


def start(run: Pretrain) -> int:
    """A process that carries out the run, in a process group of its own; its pid."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        log = os.open(run.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        fit(run)
        os._exit(0)
    finally:
        os._exit(1)


def newest(run: Pretrain) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.stem[5:]) for path in run.folder.glob("checkpoints/step-*.pt")), default=-1)


def moved_on(run: Pretrain, pid: int, steps: int) -> None:
    """Wait until it is so many steps further, or has ended."""
    goal = newest(run) + steps
    while newest(run) < goal and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.01)


def writing(run: Pretrain, pid: int) -> bool:
    """Wait until a checkpoint is being written; false where the process ended before."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if next((run.folder / "checkpoints").glob(".*.tmp"), None) is not None:
            return True
    return False


def alive(family: str) -> list[int]:
    """Processes that carry the family's name in their environment, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = f"{FAMILY}={family}".encode() in (folder / "environ").read_bytes().split(b"\0")
            ended = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if named and not ended and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def told(folder: Path) -> list[dict[str, object]]:
    """The lines of metrics without what depends on the clock."""
    timed = ("seconds", "time", "samples_per_second", "data_wait")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines(folder)]


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, whatever it is made of."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.equal(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def pictures(folder: Path) -> dict[str, bytes]:
    """By name."""
    return {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance, family = random.Random(given.seed), str(os.getpid())
    if os.environ.get(FAMILY) is None:  # a process's environment is the one that it was started with
        os.environ[FAMILY] = family
        os.execv(sys.executable, [sys.executable, *sys.argv])
    family = os.environ[FAMILY]

    whole = the_run(given.folder / "whole")
    whole.folder.mkdir(parents=True)
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(whole), 0)[1]) == 0
    length = time.monotonic() - began

    run = the_run(given.folder / "killed")
    run.folder.mkdir()
    reached: list[int] = []
    in_writing = orphans = 0
    while len(reached) < given.kills:
        pid = start(run)
        if len(reached) % 3 == 2:  # at its start, or wherever it has come to
            time.sleep(chance.uniform(0, 2))
        else:
            moved_on(run, pid, chance.randint(0, 6))
            if len(reached) % 3 == 0:
                in_writing += writing(run, pid)
            else:
                time.sleep(chance.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.2)
        orphans += len(alive(family))
        reached.append(newest(run))
    lives = 0
    while os.waitstatus_to_exitcode(os.waitpid(start(run), 0)[1]) != 0:
        lives += 1
        assert lives < 3, run.folder.with_suffix(".log").read_text()[-3000:]

    one, other = (checkpoint.read(folder / "last.pt") for folder in (whole.folder, run.folder))
    result = {
        "seconds_alone": round(length, 1),
        "kills": len(reached),
        "while_writing": in_writing,
        "steps_reached": reached,
        "weights_equal": same(one["weights"], other["weights"]),
        "optimiser_equal": same(one["optimiser"], other["optimiser"]),
        "metrics_equal": told(whole.folder / "metrics.jsonl") == told(run.folder / "metrics.jsonl"),
        "skipped_equal": told(whole.folder / "skipped.jsonl") == told(run.folder / "skipped.jsonl"),
        "lines": len(told(run.folder / "metrics.jsonl")),
        "checkpoints": sorted(path.name for path in run.folder.glob("checkpoints/*")),
        "pictures_equal": pictures(whole.folder) == pictures(run.folder),
        "temporary_files": [str(path) for path in given.folder.rglob(".*.tmp")],
        "orphans": orphans,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
