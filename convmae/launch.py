"""The command line of a run: flags made from a recipe's fields, and the run carried out on SLURM or on this machine.

`main` is the whole of a launcher. What it cannot do it says before anything is queued, with exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import math
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple

import torch

from .training import Pretrain, fit

DATA = "CONVMAE_DATA"
_ENDLESS = 10 * 365 * 24 * 60  # minutes: a run on this machine has no time limit
_FLAGS = (bool, int, float, str, Path, tuple, NoneType)  # what a field may hold to be a flag
_METAVARS = {
    "recipe": "MODULE:FUNCTION",
    "partition": "NAME",
    "time": "TIME",
    "mem": "SIZE",
    "exclude": "NODES",
    "account": "NAME",
    "qos": "NAME",
    "constraint": "FEATURES",
    "job_name": "NAME",
    "comment": "TEXT",
    int | None: "INT",
    float | None: "FLOAT",
    str | None: "STR",
    Path | None: "PATH",
}


class LaunchError(Exception):
    """What was asked for cannot be done; the message says what was given, what there is, and what to change."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where the run is carried out.

    Args:
        recipe: the function that returns the run.
        cluster: auto: slurm where it answers; else this machine: debug is this process, local a process a GPU.
        nodes: machines; more than one on SLURM only.
        gpus_per_node: GPUs of a node, each with a process; 0: CPUs alone. (default: all that a node has)
        tasks_per_node: processes of a node on CPUs alone. (default: 1)
        dry_run: only say what would be done.
    """

    recipe: str
    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    dry_run: bool = False


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


@dataclass(frozen=True)
class Job:
    """What every process of a submitted run calls. It holds no state: a run goes on from its own folder."""

    run: Pretrain

    def __call__(self) -> None:
        """Meet the other processes of the job and carry out the run."""
        from submitit.helpers import TorchDistributedEnvironment

        tasks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if tasks.world_size == tasks.local_world_size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # one machine's own name need not resolve
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if len(visible) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[tasks.local_rank]
        if "OMP_NUM_THREADS" not in os.environ:
            share = max(1, (os.cpu_count() or 1) // tasks.local_world_size)
            torch.set_num_threads(min(torch.get_num_threads(), share))
        if os.environ["SUBMITIT_EXECUTOR"] == "local":
            # Ctrl-C in the terminal is for the launcher, which then asks every process to stop by SIGTERM.
            os.setpgrp()
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training itself listens
        fit(self.run)

    def checkpoint(self) -> Any:
        """What submitit queues again when the job is interrupted: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.run))


def main(recipe: str) -> None:
    """Carry out the run that the command line describes; ends the program.

    Args:
        recipe: `module:function` of the run without --recipe; the function takes nothing and returns a `Pretrain`.

    Exit codes: 0 done, or queued on SLURM; 1 the run failed; 2 it cannot be done as asked; 130 interrupted.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        sys.exit(_launch(recipe, sys.argv[1:]))
    except LaunchError as refusal:
        print(f"{_program()}: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _launch(recipe: str, arguments: list[str]) -> int:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?")
    name = first.parse_known_args(arguments)[0].recipe or recipe
    launch, slurm, run, data = _parse(name, *find_recipe(name), arguments)
    _say("recipe", name)
    run = _with_data(run, data)
    place = _choose(launch, slurm, run)
    _say("cluster", f"{place.cluster}: {place.why}")
    if place.gpus == 0 and run.device == "auto":
        run = replace(run, device="cpu")
    _check(run, place)
    if place.gpus == 0:
        # Threads that wait for each other sleep: where processes share CPUs, spinning cost 18 times the work.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if place.partition is not None:
        return _on_slurm(run, _request(launch, slurm, run, place, place.partition), dry_run=launch.dry_run)
    if launch.dry_run:
        _say("dry run", f"{run.folder} would hold the run; nothing is done")
        return 0
    return _in_this_process(run) if place.cluster == "debug" else _on_this_machine(run, place)


def _program() -> str:
    name = Path(sys.argv[0]).name
    return name if name != "launch.py" else "python -m convmae.launch"


def _say(label: str, text: object) -> None:
    if int(os.environ.get("RANK", 0)) == 0:  # torchrun starts launchers, too
        print(f"{label:<9}{text}", flush=True)


# ---- recipe and flags ------------------------------------------------------------------------------------------------


def find_recipe(name: str) -> tuple[Pretrain, str]:
    """The run of the recipe `module:function`, and what its docstring says of it.

    Raises:
        LaunchError: there is no such module or function, or it does not return a run.
    """
    module_name, _, function_name = name.partition(":")
    module = _import(name, module_name)
    recipes = _recipes_of(module)
    there = f"Recipes in {module_name}: {', '.join(recipes)}." if recipes else f"{module_name} has no recipes."
    if not function_name:
        raise LaunchError(f"--recipe {name} names no function: write module:function. {there}")
    function = getattr(module, function_name, None)
    if function is None:
        closest = _closest(function_name, recipes, "Did you mean --recipe " + module_name + ":{}?")
        raise LaunchError(f"--recipe {name}: {module_name} has no {function_name!r}. {there}{closest}")
    if not callable(function) or _needs_arguments(function):
        raise LaunchError(f"--recipe {name} is not a recipe, a function of no arguments that returns a run. {there}")
    try:
        run = function()
    except ValueError as error:
        raise LaunchError(f"--recipe {name}: {error}") from error
    if not isinstance(run, Pretrain):
        raise LaunchError(f"--recipe {name} returned a {type(run).__name__}, not a Pretrain. {there}")
    return run, inspect.getdoc(function) or ""


def _import(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, SyntaxError, ValueError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and (module + ".").startswith(missing + "."):
            parent, _, last = missing.rpartition(".")
            path = importlib.import_module(parent).__path__ if parent else None
            beside = [found.name for found in pkgutil.iter_modules(path)]
            closest = _closest(last, beside, "Did you mean " + (f"{parent}." if parent else "") + "{}?")
            where = f"in {parent}" if parent else f"in {os.getcwd()} or among the installed packages"
            raise LaunchError(f"--recipe {name}: there is no module {missing!r} {where}.{closest}") from error
        at = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{at.filename}, line {at.lineno}: {type(error).__name__}: {error}"
        raise LaunchError(f"--recipe {name}: importing {module} failed at\n  {line}") from error


def _closest(given: str, names: Sequence[str], question: str) -> str:
    found = difflib.get_close_matches(given, names, n=1)
    return " " + question.format(found[0]) if found else ""


def _recipes_of(module: Any) -> list[str]:
    """The functions of a module that say that they return a run."""
    names = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        returns = function.__annotations__.get("return", "")
        returns = returns if isinstance(returns, str) else getattr(returns, "__name__", "")
        if returns.rpartition(".")[2] == Pretrain.__name__ and not _needs_arguments(function):
            names.append(name)
    return names


def _needs_arguments(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(one.default is one.empty and one.kind not in variable for one in parameters)


def _parse(name: str, run: Pretrain, about: str, arguments: list[str]) -> tuple[Launch, Slurm, Pretrain, Path | None]:
    """Read the flags; tyro prints help and mistakes and ends the program."""
    import tyro

    about_data = f"where the data are. (default: ${DATA}, else the recipe's own, else the demo set)"
    data = Annotated[Path | None, _flag("data", Path | None, None, about_data)]
    groups = [
        ("launch", _options(Launch(recipe=name))),
        ("slurm", _options(Slurm())),
        ("run", _options(run, ("data", data, dataclasses.field(default=None)))),
    ]
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Flags", groups),
        args=arguments,
        prog=_program(),
        description=f"{name}: {about}\n\nThe same command goes on from the run's folder.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    values = {field.name: getattr(parsed.run, field.name) for field in dataclasses.fields(parsed.run)}
    root_given = values.pop("data")
    launch, slurm = Launch(**vars(parsed.launch)), Slurm(**vars(parsed.slurm))
    try:
        return launch, slurm, replace(run, **values), root_given
    except ValueError as error:
        raise LaunchError(f"{error}\nEach of them is a flag; see --help.") from error


def _options(owner: Any, *before: Any) -> type:
    """A dataclass of the fields that a command line can give, with the owner's values as defaults, for tyro."""
    hints, fields = typing.get_type_hints(type(owner)), list(before)
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if field.name != "data" and isinstance(value, _FLAGS):
            hint = hints[field.name]
            annotation: Any = Annotated[hint, _flag(field.name, hint, value)]
            fields.append((field.name, annotation, dataclasses.field(default=value)))
    return dataclasses.make_dataclass(type(owner).__name__, fields, namespace={"__doc__": type(owner).__doc__})


def _flag(name: str, hint: Any, value: object, about: str | None = None) -> Any:
    import tyro

    metavar = _METAVARS.get(name) or (_METAVARS.get(hint) if value is None else None)
    default = "" if value is None or value is False else None
    return tyro.conf.arg(metavar=metavar, help=about, help_behavior_hint=default)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _with_data(run: Pretrain, given: Path | None) -> Pretrain:
    """The run on the data of --data, $CONVMAE_DATA or the recipe, in this order, saying which."""
    source: Any = run.data
    fields = [field.name for field in dataclasses.fields(source)] if dataclasses.is_dataclass(source) else []
    variable = os.environ.get(DATA)
    if "root" not in fields:
        if given is not None:
            there = f"it has {', '.join(fields)}" if fields else "it has no fields"
            message = f"the recipe's data, {type(source).__name__}, have no field `root` to replace ({there})"
            raise LaunchError(f"--data {given}: {message}. Leave --data out, or change the recipe.")
        _say("data", f"{type(source).__name__}, as the recipe has it")
        return run
    flag = f"--data {given}" if given is not None else f"${DATA}={variable}"
    if given is not None or variable:
        root = Path(given or variable or "").expanduser().absolute()
        if not root.exists():
            raise LaunchError(f"{flag}: there is no {root}")
        _say("data", root if given is not None else f"{root}, from ${DATA}")
    elif source.root is None:
        _say("data", f"the built-in demo set, as neither --data nor ${DATA} says where others are")
        return run
    else:
        root = Path(source.root).expanduser().absolute()
        _say("data", f"{root}, from the recipe")
    return replace(run, data=replace(source, root=root))


def _check(run: Pretrain, place: Place) -> None:
    """Refuse what would fail later: a model that cannot be built, a device that is not there, an unwritable folder."""
    try:
        run.model.check()
    except ValueError as error:
        raise LaunchError(str(error)) from error
    if run.device.startswith("cuda") and place.gpus == 0:
        raise LaunchError(f"--device {run.device}: there is no GPU. Use --device cpu or auto.")
    folder = run.folder.absolute()
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise LaunchError(f"--folder {run.folder}: {parent} is not a folder that can be written to")


# ---- the place -------------------------------------------------------------------------------------------------------


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
class Place:
    """What carries the run out, why, and with how many GPUs and processes on each node."""

    cluster: Literal["slurm", "local", "debug"]
    why: str
    gpus: int
    tasks: int
    partition: Partition | None = None


def _choose(launch: Launch, slurm: Slurm, run: Pretrain) -> Place:
    counts = {"nodes": launch.nodes, "tasks-per-node": launch.tasks_per_node, "cpus-per-task": slurm.cpus_per_task}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise LaunchError(f"--{name} {count}: it is 1 or more")
    if "WORLD_SIZE" in os.environ:
        if launch.cluster not in ("auto", "debug"):
            raise LaunchError(f"--cluster {launch.cluster}: WORLD_SIZE is set, so the processes are started already")
        why = f"in this process, one of {os.environ['WORLD_SIZE']} that are started already, as WORLD_SIZE says"
        return Place(cluster="debug", why=why, gpus=_gpus_here(run), tasks=1)
    why = f"--cluster {launch.cluster} was given"
    if launch.cluster in ("auto", "slurm"):
        partitions, why = query_slurm()
        if partitions:
            return _slurm_place(launch, run, _partition(slurm, partitions))
        if launch.cluster == "slurm":
            raise LaunchError(f"--cluster slurm: {why}. Leave it out, or use local or debug, for this machine.")
    return _local_place(launch, slurm, run, why)


def _gpus_here(run: Pretrain) -> int:
    return 0 if run.device == "cpu" else torch.cuda.device_count()


def _local_place(launch: Launch, slurm: Slurm, run: Pretrain, why: str) -> Place:
    """This machine: this process, or one a GPU if there are several."""
    if launch.nodes > 1:
        raise LaunchError(f"--nodes {launch.nodes} needs SLURM, but {why}: local and debug have one node, this machine")
    if idle := [field.name for field in dataclasses.fields(slurm) if getattr(slurm, field.name) is not None]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise LaunchError(f"{flags}: for SLURM alone, but the run is for this machine, as {why}. Leave it out.")
    here = _gpus_here(run)
    gpus = launch.gpus_per_node
    if gpus is None:
        gpus = 0 if launch.tasks_per_node else min(here, 1) if launch.cluster == "debug" else here
    _require_gpus(gpus, 0 <= gpus <= here, f"this machine has {here}")
    tasks = _tasks(launch, gpus)
    with_ = f"{gpus} of {here} GPUs" if gpus else "no GPU"
    if tasks == 1 and launch.cluster != "local":
        return Place(cluster="debug", why=f"in this process, with {with_}, as {why}", gpus=gpus, tasks=1)
    if launch.cluster == "debug":
        raise LaunchError(f"--cluster debug is this process alone, not {tasks}: use --cluster local")
    return Place(
        cluster="local", why=f"processes on this machine: {tasks}, with {with_}, as {why}", gpus=gpus, tasks=tasks
    )


def _slurm_place(launch: Launch, run: Pretrain, partition: Partition) -> Place:
    nodes, name = launch.nodes, partition.name
    if nodes > sum(alike.number for alike in partition.nodes):
        raise LaunchError(f"--nodes {nodes}: partition {name} has {sum(alike.number for alike in partition.nodes)}")
    gpus = launch.gpus_per_node
    if gpus is None:
        on_cpu = run.device == "cpu" or launch.tasks_per_node
        enough = [alike.gpus for alike in partition.nodes if partition.count(alike.gpus) >= nodes]
        gpus = 0 if on_cpu else max(enough)
    kinds = ", ".join(f"{alike.number} nodes with {alike.gpus}" for alike in partition.nodes)
    _require_gpus(gpus, gpus >= 0 and partition.count(gpus) >= nodes, f"partition {name} has {kinds}")
    has = f"with {gpus} GPUs each" if gpus else "without GPUs"
    why = f"it answers; {nodes} of partition {name}'s nodes, {has}"
    return Place(cluster="slurm", why=why, gpus=gpus, tasks=_tasks(launch, gpus), partition=partition)


def _require_gpus(given: int, there: bool, what: str) -> None:
    if not there:
        raise LaunchError(f"--gpus-per-node {given}: {what}. 0 is for CPUs alone.")


def _tasks(launch: Launch, gpus: int) -> int:
    if gpus and launch.tasks_per_node not in (None, gpus):
        given = f"--tasks-per-node {launch.tasks_per_node}"
        raise LaunchError(f"{given}: with {gpus} GPUs there are {gpus}. Leave it out, or add --gpus-per-node 0.")
    return gpus or launch.tasks_per_node or 1


# ---- SLURM -----------------------------------------------------------------------------------------------------------


def query_slurm() -> tuple[list[Partition], str]:
    """The partitions of the SLURM that this machine belongs to; none, and the reason, where none answers in 15 s."""
    if shutil.which("sbatch") is None:
        return [], "there is no sbatch on the PATH"
    command = ["sinfo", "--all", "--exact", "--noconvert", "--noheader", "--format=%P|%D|%c|%m|%l|%G"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return [], "SLURM's controller does not answer (sinfo took over 15 s)"
    except OSError as error:
        return [], f"sinfo cannot be started ({error})"
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        return [], f"SLURM's controller does not answer ({reason})"
    partitions = parse_partitions(asked.stdout)
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


def _partition(slurm: Slurm, partitions: list[Partition]) -> Partition:
    """The one asked for, or the default; of several, by commas, what the first one has is asked for."""
    found = {one.name: one for one in partitions}
    default = next((one.name for one in partitions if one.default), "")
    wanted = slurm.partition or os.environ.get("SBATCH_PARTITION") or default
    if not wanted:
        raise LaunchError(f"the cluster has no default partition: give --partition, one of {', '.join(found)}")
    for name in wanted.split(","):
        if name not in found:
            closest = _closest(name, list(found), "Did you mean {}?")
            raise LaunchError(f"--partition {wanted}: there is no {name!r}, but {', '.join(found)}.{closest}")
    return replace(found[wanted.split(",")[0]], name=wanted)


def _request(launch: Launch, slurm: Slurm, run: Pretrain, place: Place, partition: Partition) -> dict[str, Any]:
    """What submitit is to ask of SLURM."""
    usable = partition.having(place.gpus)
    fair = min(alike.cpus * (place.gpus / alike.gpus if place.gpus else 1) for alike in usable)
    cpus = slurm.cpus_per_task or max(1, int(fair) // place.tasks)
    most = max(alike.cpus for alike in usable)
    if cpus * place.tasks > most:
        asked = f"--cpus-per-task {cpus}, {place.tasks} processes a node"
        raise LaunchError(f"{asked}: the nodes of partition {partition.name} have {most} CPUs")
    return {
        "name": slurm.job_name or run.folder.absolute().name,
        "nodes": launch.nodes,
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
        # Preempted, or with a node lost, the job goes on whatever the site's default.
        "slurm_additional_parameters": {"requeue": True},
        # A dead process ends the others; srun does not take over sbatch's CPUs.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
    }


def _memory(usable: list[Nodes], place: Place, cpus: int) -> str:
    """All of the node's memory (SLURM's 0) with all its GPUs or CPUs, else the same share."""
    shares = [max(place.gpus / max(n.gpus, 1), place.tasks * cpus / n.cpus) for n in usable]
    if min(shares) >= 1:
        return "0"
    return f"{int(min(n.memory * min(share, 1) for n, share in zip(usable, shares, strict=True)))}M"


def _time(slurm: Slurm, partition: Partition) -> int:
    """Minutes: as asked for, or a day at most; the job is queued again when they are over."""
    longest = partition.limit or _ENDLESS
    if slurm.time is None:
        return min(24 * 60, longest)
    asked = _minutes(slurm.time)
    if asked is None:
        raise LaunchError(f"--time {slurm.time}: write minutes, as 90, or hours:minutes:seconds, or 1-12:00:00")
    if not 5 <= asked <= longest:
        limit = f"the {longest} minutes of partition {partition.name}"
        raise LaunchError(f"--time {slurm.time} is {asked} minutes; it can be 5 minutes to {limit}")
    return asked


def _on_slurm(run: Pretrain, request: dict[str, Any], *, dry_run: bool) -> int:
    run = replace(run, folder=run.folder.absolute())
    if dry_run:
        _say("dry run", "nothing is queued; SLURM would be asked for")
        for name, value in request.items():
            if value is not None:
                shown = " ".join(value) if isinstance(value, list | dict) else value
                print(f"         {name.removeprefix('slurm_').replace('_', '-'):<23}{shown}")
        return 0
    _ready_demo(run)
    job = _submit_to_slurm(run, request)
    log = shlex.quote(str(job.paths.stdout))
    _say("job", job.job_id)
    _say("run", run.folder)
    _say("log", log)
    _say("follow", f"tail -F {log}")
    _say("queue", f"squeue -j {job.job_id}")
    _say("cancel", f"scancel {job.job_id}")
    return 0


def _submit_to_slurm(run: Pretrain, request: dict[str, Any]) -> Any:
    import submitit

    if "SLURM_JOB_ID" in os.environ:  # what describes the job that we are in is not for the new one
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF":
                del os.environ[name]
    # The signal before a time limit or preemption would kill a Python that is still starting; submitit then listens.
    python = f"""sh -c 'trap "" USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""
    try:
        executor = submitit.AutoExecutor(
            folder=_logs(run), cluster="slurm", slurm_max_num_timeout=100, slurm_python=python
        )
        executor.update_parameters(**request)
        return executor.submit(Job(run))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise LaunchError(f"SLURM did not take the job: {error}") from error


def _logs(run: Pretrain) -> Path:
    """Where submitit keeps what was submitted and what it printed, by job."""
    return run.folder / "slurm" / "%j"


def _ready_demo(run: Pretrain) -> None:
    """Make the demo set now, if it is the data: the processes of a job would each begin to."""
    if getattr(run.data, "root", "") is None:
        try:
            run.data.open(run.model.size)
        except ValueError as error:
            raise LaunchError(str(error)) from error


# ---- this machine ----------------------------------------------------------------------------------------------------


def _in_this_process(run: Pretrain) -> int:
    try:
        finished = fit(run)
    except FloatingPointError as error:
        print(f"{_program()}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in ("convmae", "video"):
            raise  # not said to the user, but a mistake somewhere
        raise LaunchError(str(error)) from error
    return 0 if finished else 130


def _on_this_machine(run: Pretrain, place: Place) -> int:
    """Start a process a GPU through submitit, show what the first one prints, and wait until all have ended."""
    from submitit import LocalExecutor

    run = replace(run, folder=run.folder.absolute())
    _ready_demo(run)
    executor = LocalExecutor(folder=_logs(run))
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not all(gpu.isdigit() for gpu in visible):
        raise LaunchError(f"--cluster local takes GPUs by number, not as CUDA_VISIBLE_DEVICES={','.join(visible)}")
    executor.update_parameters(
        tasks_per_node=place.tasks,
        gpus_per_node=place.gpus,
        visible_gpus=tuple(int(gpu) for gpu in visible) if place.gpus else (),
        timeout_min=_ENDLESS,
        stderr_to_stdout=True,
    )
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal's: for the launcher, not for what it starts
        signal.signal(number, signal.SIG_IGN)
    following = _Following(executor.submit(Job(run)))
    _say("run", run.folder)
    _say("logs", f"{following.job.paths.folder}; the first process says:")
    return following.to_the_end()


class _Following:
    """Shows the first process's log; passes Ctrl-C on; ends the others where one has failed."""

    def __init__(self, job: Any) -> None:
        self.job, self.controller = job, int(job.job_id)
        self.shown = 0
        self.interrupts = 0
        self.failing = math.inf
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._interrupt)

    def to_the_end(self) -> int:
        while not self.job.done():
            self._show()
            if self._failed():
                self.failing = min(self.failing, time.monotonic())
            if time.monotonic() - self.failing > 10:
                self._kill()
            time.sleep(0.2)
        self._show()
        with contextlib.suppress(OSError):  # submitit also makes a folder of the unfilled name
            (self.job.paths.folder.parent / "%j").rmdir()
        if self.interrupts:
            return 130
        failed = self._failed(ended=True)
        for rank, said in failed.items():
            print(said if rank else "", end="", file=sys.stderr)
            print(f"{_program()}: process {rank} failed: {self.job.task(rank).paths.stdout}", file=sys.stderr)
        return 1 if failed else 0

    def _interrupt(self, number: int, frame: object) -> None:
        self.interrupts += 1
        if self.interrupts > 1:
            self._kill()
            return
        os.kill(self.controller, signal.SIGTERM)
        print("\nstopping after the step at hand; Ctrl-C again to stop at once", flush=True)

    def _kill(self) -> None:
        children = Path(f"/proc/{self.controller}/task/{self.controller}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)

    def _show(self) -> None:
        with contextlib.suppress(FileNotFoundError), self.job.paths.stdout.open("rb") as log:
            log.seek(self.shown)
            text = log.read()
            self.shown += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()

    def _failed(self, *, ended: bool = False) -> dict[int, str]:
        """What processes that failed said; once all have ended, a process without result has failed, too."""
        from submitit.core.utils import pickle_load

        failed = {}
        for rank in range(self.job.num_tasks):
            path = self.job.task(rank).paths.result_pickle
            outcome, said = pickle_load(path) if path.exists() else ("error" if ended else "", "")
            if outcome == "error":
                failed[rank] = said
        return failed


if __name__ == "__main__":
    # The class that is submitted must be found by name, so not as __main__'s.
    importlib.import_module("convmae.launch").main(recipe="convmae.recipes:demo")
