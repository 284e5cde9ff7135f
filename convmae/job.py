"""What runs on the nodes: the submitted job, and what its batch script calls when a process has failed.

A run goes on from its own folder, so a job that is started again, whatever ended it, goes on. SLURM itself starts a
preempted job again, or one that lost a node; `Job` asks for it when it was told to stop and has saved, and `ended`
when a process has crashed. A cancelled job is never started again.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .evaluate import Evaluate, test
from .files import write_whole
from .run import Run, Task
from .run_folder import FAILURES, LAST, SLURM, failures, job_id, note
from .training import fit

CRASHES = 3
"""How many crashes in a row, without a newer checkpoint, start a job again; the next one does not."""

CRASHES_IN_ALL = 20
"""How many crashes start a job again however far it gets between them; the next one does not."""

LAUNCHER = "CONVMAE_LAUNCHER"
"""The variable with the process that started a job on this machine."""

_PATIENCE = 600  # seconds that a process waits for SLURM to end it
_LINES = 8  # of a traceback


@dataclass(frozen=True)
class Job:
    """What every process of a submitted run calls. It holds no state: a run goes on from its own folder."""

    run: Task

    def __call__(self) -> None:
        """Meet the other processes of the job and carry out the run; told to stop, ask SLURM for another time."""
        from submitit.helpers import TorchDistributedEnvironment

        tasks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if tasks.world_size == tasks.local_world_size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # one machine's own name need not resolve
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if len(visible) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[tasks.local_rank]
        local = os.environ["SUBMITIT_EXECUTOR"] == "local"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_threads(tasks.local_world_size, local=local))
        if local:
            # Ctrl-C in the terminal is for the launcher, which then asks every process to stop by SIGTERM.
            os.setpgrp()
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training itself listens
            _stop_after(int(os.environ[LAUNCHER]))
        if not carry_out(self.run) and not local:
            _stand_aside(self.run.folder, first=tasks.rank == 0)

    def checkpoint(self) -> Any:
        """What submitit queues again where the job is told to stop before training listens: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.run))


def carry_out(task: Task) -> bool:
    """Do it here and now: whether it is finished, which it is not where it was asked to stop before."""
    if isinstance(task, Evaluate):
        return test(task)
    assert isinstance(task, Run), task
    return fit(task)


def ended(folder: Path, code: int) -> None:
    """Say which processes of this job failed and why, and queue it again unless that would be of no use.

    It is of no use where a failure is final, after `CRASHES` crashes without a newer checkpoint, and after
    `CRASHES_IN_ALL`. Another job's words in the folder are left alone.

    Args:
        folder: the run's.
        code: with which srun ended.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # queued again, the batch script is ended with all it has started
    job = _job()
    if not _goes_on(job):
        return
    told = [words for words in failures(folder) if words.get("job") == job]
    failed = told + _failed_outside_training(folder, job, {words["rank"] for words in told})
    failed += _silent({words["rank"] for words in failed}, code)
    for at, words in enumerate(failed):
        line = _line(words)
        trace = words["traceback"].rstrip().splitlines()[-_LINES:] if at == 0 else []
        print(line, *trace, sep="\n    ", flush=True)
        note(folder, "failed", words.get("step"), line)
    for words in told:
        (folder / FAILURES / f"rank-{words['rank']:05d}.json").unlink(missing_ok=True)
    crashes, in_all = _count_crash(folder, job)
    if any(words["final"] for words in failed):
        useless = "it would fail again in the same way"
    elif crashes > CRASHES:
        useless = f"it has crashed {crashes} times without a newer checkpoint"
    elif in_all > CRASHES_IN_ALL:
        useless = f"it has crashed {in_all} times"
    else:
        useless = _requeue(folder, job, f"after a crash, {crashes} of {CRASHES} without a newer checkpoint")
    if useless:
        print(f"job {job} is not queued again: {useless}. The same command goes on from {folder}", flush=True)


def ask(*command: str, seconds: float = 60) -> tuple[bool, str]:
    """Run a command of SLURM's: whether it could do it, and what it printed, or the last line of its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"{command[0]} took over {seconds:g} s"
    except OSError as error:
        return False, f"{command[0]} cannot be started ({error})"
    if done.returncode:
        return False, (done.stderr.strip().splitlines() or [f"{command[0]}: exit code {done.returncode}"])[-1]
    return True, done.stdout.strip()


def _threads(processes: int, *, local: bool) -> int:
    """Threads of one of a node's processes: its CPUs as asked of SLURM, else its share of those that it may run on.

    What was asked for is the same on a node of another size, and so are the bits of the result.
    """
    here = len(os.sched_getaffinity(0))
    asked = "" if local else os.environ.get("SLURM_CPUS_PER_TASK")
    return min(int(asked), here) if asked else max(1, min(torch.get_num_threads(), here // processes))


def _stop_after(launcher: int) -> None:
    """Have this process stop, and so save, once the launcher is gone: killed, it cannot ask for it."""

    def wait() -> None:
        while os.path.exists(f"/proc/{launcher}"):
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _job() -> str:
    job = job_id()
    assert job is not None, "not in a job of SLURM's"
    return job


def _stand_aside(folder: Path, *, first: bool) -> None:
    """Stopped and saved: the first process sees to it that the job goes on, and all wait for SLURM to end them."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if first:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        job = _job()
        if not _goes_on(job):
            print(f"SLURM ends job {job}: cancelled, or queued again already", flush=True)
        elif refusal := _requeue(folder, job, "stopped and saved"):
            sys.exit(f"job {job} is not queued again: {refusal}. The same command goes on from {folder}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_PATIENCE)
    sys.exit(f"SLURM has not ended this process in {_PATIENCE} s. The same command goes on from {folder}")


def _goes_on(job: str) -> bool:
    """Whether SLURM is not ending the job already: a cancelled one would come back to life where it is queued again.

    A job over its time limit is being ended, but has to be queued again; so is one that is preempted where
    PreemptMode=CANCEL, which its PreemptTime tells from a cancelled one. Where SLURM does not answer, the job goes on.
    """
    answered, said = ask("scontrol", "--oneliner", "show", "job", job)
    found = dict(re.findall(r"\b(JobState|Reason|PreemptTime)=(\S+)", said))
    state, preempted = found.get("JobState", ""), found.get("PreemptTime", "None") != "None"
    ended_too_early = state == "COMPLETING" and (found.get("Reason") == "TimeLimit" or preempted)
    return not answered or state in ("RUNNING", "SIGNALING") or ended_too_early


def _requeue(folder: Path, job: str, why: str) -> str:
    """Have SLURM queue this job again: nothing, or what it said against it."""
    print(f"job {job} is queued again: {why}", flush=True)
    note(folder, "requeued", None, why)  # first, as we may not live to see the answer
    done, said = ask("scontrol", "requeue", job)
    if done or "pending" in said:  # it is queued already: an operator, or SLURM, was faster
        return ""
    note(folder, "failed", None, f"SLURM did not queue job {job} again: {said}")
    return said


def _failed_outside_training(folder: Path, job: str, told: set[int]) -> list[dict[str, Any]]:
    """What submitit kept of processes that failed, of those that left no word by themselves."""
    found = []
    for path in (folder / SLURM / job).glob(f"{job}_*_result.pkl"):
        rank = int(path.name.removeprefix(f"{job}_").removesuffix("_result.pkl"))
        outcome, said = pickle.loads(path.read_bytes())
        if outcome == "error" and rank not in told:
            error = said.rstrip().rpartition("\n")[2]
            found.append({"rank": rank, "error": error, "traceback": said, "final": False})
    return found


def _silent(told: set[int], code: int) -> list[dict[str, Any]]:
    """The processes that left no word, as one that failed: one of them may have taken the others along."""
    silent = [str(rank) for rank in range(int(os.environ.get("SLURM_NTASKS", 1))) if rank not in told]
    if not silent:
        return []
    ranks = ", ".join(silent[:8]) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
    signals = {128 + number: f", {number.name}" for number in signal.Signals}
    error = f"killed, or ended without a word; srun's exit code is {code}{signals.get(code, '')}"
    return [{"rank": ranks, "error": error, "traceback": "", "final": False}]


def _line(words: dict[str, Any]) -> str:
    """Which process failed, where and when, as far as is known, and why."""
    where = f" on {words['host']}" if "host" in words else ""
    at = f" after step {words['step']}" if words.get("step") is not None else ""
    return f"process {words['rank']}{where} failed{at}: {words['error']}"


def _count_crash(folder: Path, job: str) -> tuple[int, int]:
    """How many crashes of the job there are now without a newer checkpoint since the first of them, and in all."""
    path, last = folder / SLURM / job / "crashes.json", folder / LAST
    checkpoint = os.readlink(last) if last.is_symlink() else None
    before = json.loads(path.read_text()) if path.exists() else {}
    crashes = 1 + (before["crashes"] if before.get("checkpoint", "") == checkpoint else 0)
    in_all = 1 + before.get("in_all", 0)
    write_whole(path, json.dumps({"checkpoint": checkpoint, "crashes": crashes, "in_all": in_all}))
    return crashes, in_all


if __name__ == "__main__":
    ended(Path(sys.argv[1]), int(sys.argv[2]))
