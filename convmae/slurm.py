"""SLURM: what the cluster has, what is asked of it, and runs submitted as jobs that go on by themselves."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import snapshot
from .job import Job, ask, carry_out
from .place import (
    PATIENT,
    LaunchError,
    Place,
    closest,
    count_tasks,
    logs,
    made_ready,
    require_folder,
    require_gpus,
    say,
    suited,
)
from .plain import to_plain
from .run import Task
from .run_folder import SLURM

ENDLESS = 10 * 365 * 24 * 60  # minutes: where there is no time limit
_NEVER = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What else is asked of SLURM.

    Args:
        partition: of the cluster, as sinfo lists them. (default: the cluster's)
        time: limit, in minutes or as 1-12:00:00; the job goes on by itself after it. (default: a day, or the
            partition's limit)
        cpus_per_task: CPUs of a process. (default: its share of the node's)
        mem: memory of a node, as 64G. (default: the share of its GPUs or CPUs)
        account: to charge.
        qos: quality of service.
        constraint: features that the nodes must have.
        exclude: nodes not to use.
        job_name: in the queue. (default: the last part of the run's folder)
        comment: on the job.
        after: jobs that must have succeeded before this one starts, by id or by the folder of their run, with commas.
    """

    partition: str | None = None
    time: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    job_name: str | None = None
    comment: str | None = None
    after: str | None = None


class Nodes(NamedTuple):
    """Nodes of a partition that are alike: how many, and what each has; memory in megabytes."""

    number: int
    gpus: int
    cpus: int
    memory: int


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster; `limit` is in minutes, None where there is none."""

    name: str
    default: bool
    limit: int | None
    nodes: tuple[Nodes, ...]

    def having(self, gpus: int) -> list[Nodes]:
        """The nodes with so many GPUs or more."""
        return [alike for alike in self.nodes if alike.gpus >= gpus]

    def count(self, gpus: int) -> int:
        """How many nodes have so many GPUs or more."""
        return sum(alike.number for alike in self.having(gpus))


@dataclass(frozen=True, kw_only=True)
class Allocation(Place):
    """A place on SLURM: nodes of a partition."""

    partition: Partition


# ---- what the cluster has --------------------------------------------------------------------------------------------


def query_slurm() -> tuple[list[Partition], str]:
    """The partitions of the SLURM that this machine belongs to; none, and the reason, where none answers in 15 s."""
    if shutil.which("sbatch") is None:
        return [], "there is no sbatch on the PATH"
    columns = "--format=%P|%D|%c|%m|%l|%G"
    answered, said = ask("sinfo", "--all", "--exact", "--noconvert", "--noheader", columns, seconds=15)
    if not answered:
        return [], f"SLURM's controller does not answer ({said})"
    partitions = parse_partitions(said)
    return partitions, "SLURM has no partitions" if not partitions else ""


def parse_partitions(lines: str) -> list[Partition]:
    """Read sinfo's `%P|%D|%c|%m|%l|%G`: a line for every kind of node in every partition."""
    found: dict[str, Partition] = {}
    for line in lines.splitlines():
        if line.count("|") < 5:
            continue
        name, count, cpus, memory, limit, gres = line.strip().split("|", 5)
        nodes = Nodes(int(count), count_gpus(gres), int(cpus.rstrip("+")), int(memory.rstrip("+")))
        default, name = name.endswith("*"), name.removesuffix("*")
        before = found[name].nodes if name in found else ()
        found[name] = Partition(name, default, _minutes(limit), (*before, nodes))
    return list(found.values())


def count_gpus(gres: str) -> int:
    """The GPUs in a node's generic resources, as `(null)`, `gpu:8`, `gpu:a100:4(S:0-1),nvme:1`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def _minutes(text: str) -> int | None:
    """A time of SLURM in minutes, rounded up: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None where it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = (None if part is None else int(part) for part in match.groups())
    parts = [part for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return (days or 0) * 1440 + hours * 60 + minutes + math.ceil(seconds / 60)


# ---- what is asked of it ---------------------------------------------------------------------------------------------


def choose_nodes(
    slurm: Slurm,
    partitions: list[Partition],
    *,
    nodes: int,
    gpus_per_node: int | None,
    tasks_per_node: int | None,
    on_cpu: bool,
) -> Allocation:
    """The nodes of the partition asked for, with as many GPUs as enough of them have where no number is given.

    Raises:
        LaunchError: the cluster has no such partition, or fewer nodes or GPUs.
    """
    partition = _partition(slurm, partitions)
    name, number = partition.name, partition.count(0)
    if nodes > number:
        raise LaunchError(f"--nodes {nodes}: partition {name} has {number}")
    gpus = gpus_per_node
    if gpus is None:
        enough = [alike.gpus for alike in partition.nodes if partition.count(alike.gpus) >= nodes]
        gpus = 0 if on_cpu or tasks_per_node else max(enough)
    kinds = ", ".join(f"{alike.number} nodes with {alike.gpus}" for alike in partition.nodes)
    require_gpus(gpus, gpus >= 0 and partition.count(gpus) >= nodes, f"partition {name} has {kinds}")
    has = f"with {gpus} GPUs each" if gpus else "without GPUs"
    why = f"it answers; {nodes} of partition {name}'s nodes, {has}"
    tasks = count_tasks(gpus, tasks_per_node)
    return Allocation(cluster="slurm", why=why, nodes=nodes, gpus=gpus, tasks=tasks, partition=partition)


def _partition(slurm: Slurm, partitions: list[Partition]) -> Partition:
    """The one asked for, or the default; of several, by commas, what the first one has is asked for."""
    found = {one.name: one for one in partitions}
    default = next((one.name for one in partitions if one.default), "")
    wanted = slurm.partition or os.environ.get("SBATCH_PARTITION") or default
    if not wanted:
        raise LaunchError(f"the cluster has no default partition: give --partition, one of {', '.join(found)}")
    for name in wanted.split(","):
        if name not in found:
            meant = closest(name, list(found), "Did you mean {}?")
            raise LaunchError(f"--partition {wanted}: there is no {name!r}, but {', '.join(found)}.{meant}")
    return replace(found[wanted.split(",")[0]], name=wanted)


def request(slurm: Slurm, place: Allocation, name: str) -> dict[str, Any]:
    """What submitit is to ask of SLURM for a run of this name.

    Raises:
        LaunchError: the nodes have fewer CPUs, the partition has a shorter limit, or the jobs to come after fail.
    """
    partition = place.partition
    usable = partition.having(place.gpus)
    fair = min(alike.cpus * (place.gpus / alike.gpus if place.gpus else 1) for alike in usable)
    cpus = slurm.cpus_per_task or max(1, int(fair) // place.tasks)
    most = max(alike.cpus for alike in usable)
    if cpus * place.tasks > most:
        asked = f"--cpus-per-task {cpus}, {place.tasks} processes a node"
        raise LaunchError(f"{asked}: the nodes of partition {partition.name} have {most} CPUs")
    return {
        "name": slurm.job_name or name,
        "nodes": place.nodes,
        "tasks_per_node": place.tasks,
        "gpus_per_node": place.gpus or None,
        "cpus_per_task": cpus,
        "timeout_min": _time(slurm, partition),
        "stderr_to_stdout": True,
        "slurm_mem": slurm.mem or _memory(usable, place, cpus),
        "slurm_partition": partition.name,
        "slurm_account": slurm.account,
        "slurm_qos": slurm.qos,
        "slurm_constraint": slurm.constraint,
        "slurm_exclude": slurm.exclude,
        "slurm_comment": slurm.comment,
        "slurm_signal_delay_s": 120,
        "slurm_dependency": None if slurm.after is None else _dependency(slurm.after),
        # Preempted, or with a node lost, the job goes on whatever the site's default. What it comes after may fail: it
        # would wait for ever.
        "slurm_additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
        # A dead process ends the others; srun does not take over sbatch's CPUs.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
    }


def _dependency(after: str) -> str:
    """SLURM's form of the jobs to come after; it takes those it does not know for done, so they are looked up."""
    jobs = [_job_of(job, after) for job in after.split(",")]
    for job in jobs:
        if not (states := _states(job)):
            raise LaunchError(f"--after {after}: SLURM knows no job {job}; squeue and sacct list those it knows")
        if bad := _NEVER.intersection(states):
            raise LaunchError(f"--after {after}: job {job} is {bad.pop()}, and this one would never start")
    return "afterok:" + ":".join(jobs)


def _job_of(given: str, after: str) -> str:
    """A job by its id, or the last one that was submitted for a run's folder."""
    if re.fullmatch(r"\d+(_\d+)?", given):
        return given
    jobs = [path for path in (Path(given).expanduser() / SLURM).glob("*") if re.fullmatch(r"\d+(_\d+)?", path.name)]
    if not jobs:
        forms = "write 123 or 123,124 or an array's 125_1, or the folder of a run that was submitted"
        raise LaunchError(f"--after {after}: {given!r} is not a job id; {forms}")
    return max(jobs, key=lambda path: path.lstat().st_mtime).name


def _states(job: str) -> list[str]:
    """A job's state, and those of an array's elements; none where SLURM does not know it."""
    for command in (
        ("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"),
        ("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State"),
    ):
        answered, said = ask(*command)
        if answered and said:
            return [line.split()[0] for line in said.splitlines()]  # sacct has CANCELLED by 1000
    return []


def _memory(usable: list[Nodes], place: Allocation, cpus: int) -> str:
    """All of the node's memory (SLURM's 0) with all its GPUs or CPUs, else the same share."""
    shares = [max(place.gpus / max(n.gpus, 1), place.tasks * cpus / n.cpus) for n in usable]
    if min(shares) >= 1:
        return "0"
    return f"{int(min(n.memory * min(share, 1) for n, share in zip(usable, shares, strict=True)))}M"


def _time(slurm: Slurm, partition: Partition) -> int:
    """Minutes: as asked for, or a day at most; the job is queued again two or three minutes before their end."""
    longest = partition.limit or ENDLESS
    if slurm.time is None:
        return min(24 * 60, longest)
    asked = _minutes(slurm.time)
    if asked is None:
        raise LaunchError(f"--time {slurm.time}: write minutes, as 90, or hours:minutes:seconds, or 1-12:00:00")
    if not 3 <= asked <= longest:
        limit = f"the {longest} minutes of partition {partition.name}"
        raise LaunchError(f"--time {slurm.time} is {asked} minutes; it can be 3 minutes to {limit}")
    return asked


# ---- submitting ------------------------------------------------------------------------------------------------------


def show(request: dict[str, Any]) -> None:
    """Print what SLURM would be asked for."""
    say("dry run", "nothing is queued; SLURM would be asked for")
    for name, value in request.items():
        if value is not None:
            shown = " ".join(value) if isinstance(value, list | dict) else value
            print(f"         {name.removeprefix('slurm_').replace('_', '-'):<23}{shown}")


def submit(runs: Sequence[Task], request: dict[str, Any]) -> list[str]:
    """Queue a run, or several as one job array, and say how to follow them: the ids of the jobs.

    Raises:
        LaunchError: SLURM refuses, or the demo set cannot be made.
    """
    runs = [made_ready(run) for run in runs]
    jobs = _queue(runs, request)
    ids = [str(job.job_id) for job in jobs]
    for run, job in zip(runs, jobs, strict=True):
        link = run.folder / SLURM / job.job_id
        if not link.exists():  # an array's logs are together, above the folders of its runs
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(job.paths.folder, link.parent))
    _tell(runs, jobs)
    return ids


def _queue(runs: list[Task], request: dict[str, Any]) -> list[Any]:
    import submitit

    if "SLURM_JOB_ID" in os.environ:  # what describes the job that we are in is not for the new one
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF":
                del os.environ[name]
    # The signal before a time limit or preemption would kill a Python that is still starting; submitit then listens.
    python = f"""sh -c 'trap "" USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""
    try:
        executor = submitit.AutoExecutor(
            folder=logs(runs), cluster="slurm", slurm_max_num_timeout=100, slurm_python=python
        )
        executor.update_parameters(**request, slurm_setup=_setup(runs, request), slurm_teardown=_TEARDOWN)
        with executor.batch():
            jobs = [executor.submit(Job(run)) for run in runs]
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise LaunchError(f"SLURM did not take the job: {error}") from error
    return jobs


def _setup(runs: list[Task], request: dict[str, Any]) -> list[str]:
    """What the batch script does first: find the run, remove what a killed attempt left, import the code submitted."""
    code = snapshot.take(runs[0].folder, _modules(tuple(map(to_plain, runs))))
    for run in runs[1:]:
        snapshot.copy(code, run.folder)
    name, value = PATIENT
    patient = [] if request["gpus_per_node"] else [f'export {name}="${{{name}:-{value}}}"']
    path = f'"$run/{snapshot.CODE}/{code.name}":{shlex.quote(os.getcwd())}'
    folders = " ".join(shlex.quote(str(run.folder)) for run in runs)
    return [
        f"runs=({folders})",
        'run="${runs[${SLURM_ARRAY_TASK_ID:-0}]}"',
        'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'job="${job:-$SLURM_JOB_ID}"',
        f'rm -f "$run/{SLURM}/$job"/*.save_tmp "$run/{SLURM}/$job"/*_result.pkl',
        *patient,
        "export PYTHONSAFEPATH=1",
        f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"',
    ]


def _modules(plain: Any) -> set[str]:
    """The modules of all classes in a plain form."""
    if isinstance(plain, tuple):
        return {name for part in plain for name in _modules(part)}
    if not isinstance(plain, dict) or "class" not in plain:
        return set()
    return {plain["class"].partition(":")[0], *_modules(tuple(plain["fields"].values()))}


_TEARDOWN = [
    "code=$?",
    f'if [ $code -ne 0 ]; then {shlex.quote(sys.executable)} -m convmae.job "$run" $code; fi',
    "exit $code",
]


def _tell(runs: list[Task], jobs: list[Any]) -> None:
    """How to follow and cancel what is queued."""
    first, number = jobs[0], jobs[0].job_id.partition("_")[0]
    several = len(jobs) > 1
    log = shlex.quote(str(first.paths.stdout))
    if several:
        log = f"{shlex.quote(str(first.paths.folder.parent))}/{number}_*/{number}_*_0_log.out"
    say("job", f"{number}, of {len(jobs)} runs" if several else number)
    for run, job in zip(runs, jobs, strict=True):
        say("run", f"{run.folder}, as {job.job_id}" if several else run.folder)
    say("log", log)
    say("follow", f"tail -F {log}")
    say("watch", f"python -m convmae.watch {' '.join(shlex.quote(str(run.folder)) for run in runs)}")
    say("queue", f"squeue -j {number}")
    say("cancel", f"scancel {number}" + (f", or one of them: scancel {first.job_id}" if several else ""))


def sweep(
    runs: Sequence[Task],
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    tasks_per_node: int | None = None,
    slurm: Slurm = Slurm(),
    at_once: int | None = None,
) -> list[str]:
    """Carry out several runs: as a job array on SLURM, each going on by itself; elsewhere in this process, in turn.

        sweep([replace(run, base_lr=lr, folder=Path(f"runs/lr-{lr:g}")) for lr in (1e-4, 2e-4)], nodes=2)

    Args:
        runs: in folders of their own.
        nodes: machines of each run; more than one on SLURM only.
        gpus_per_node: GPUs of a node, each with a process; 0: CPUs alone. None: all that a node has.
        tasks_per_node: processes of a node on CPUs alone. None: one.
        slurm: what else is asked of SLURM, for each run.
        at_once: runs at the same time; None: as many as there is room for.

    Returns the ids of the jobs, which `Slurm(after=",".join(ids))` waits for; none where there is no SLURM.

    Raises:
        ValueError: there are no runs, or some share a folder.
        LaunchError: one cannot be carried out as asked, or there is no folder above them all for their logs; nothing
            is queued.
    """
    runs = [replace(run, folder=run.folder.absolute()) for run in runs]
    folders = [run.folder for run in runs]
    shared = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if shared or not runs:
        raise ValueError(f"the runs of a sweep need a folder each; several have {', '.join(shared) or 'none'}")
    partitions, why = query_slurm()
    if partitions:
        place = choose_nodes(
            slurm,
            partitions,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            tasks_per_node=tasks_per_node,
            on_cpu=all(run.device == "cpu" for run in runs),
        )
        above = logs(runs).parents[1]
        if above == above.parent:
            what = f"the runs of a sweep have their logs in a folder above them all, but share nothing below {above}"
            raise LaunchError(f"{what}. Give them folders in one, as runs/a and runs/b.")
        require_folder(above, "the logs of a sweep go above the folders of its runs")
        runs = [suited(run, place.gpus) for run in runs]
        asked = request(slurm, place, above.name)
        return submit(runs, {**asked, "slurm_array_parallelism": at_once or len(runs)})
    if nodes > 1:
        raise LaunchError(f"nodes={nodes} needs SLURM, but {why}")
    for run in [suited(run, torch.cuda.device_count()) for run in runs]:
        say("run", run.folder)
        if not carry_out(run):
            break
    return []
