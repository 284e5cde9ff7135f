"""The command line of a run: flags made from a recipe's fields, and the run carried out on SLURM or on this machine.

`main` is the whole of a launcher. What it cannot do it says before anything is queued, with exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import math
import os
import pkgutil
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

import torch

from .command import flag
from .evaluate import Evaluate
from .finetune import Finetune
from .job import LAUNCHER, Job, carry_out
from .location import has_root, located, same, whole
from .place import PATIENT, LaunchError, Place, closest, count_tasks, logs, made_ready, require_gpus, say, suited
from .run import Run, Task
from .run_folder import kept_in
from .slurm import ENDLESS, Allocation, Slurm, choose_nodes, query_slurm, request, show, submit

DATA = "CONVMAE_DATA"
_FLAGS = (bool, int, float, str, Path, NoneType)  # what a field may hold to be a flag, or several
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
    "after": "JOBS",
}


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


def main(recipe: str) -> None:
    """Carry out the run that the command line describes; ends the program.

    Args:
        recipe: `module:function` of the run without --recipe; the function takes nothing and returns a run.

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
    launch, slurm, task, data, test = _parse(name, *find_recipe(name), arguments)
    say("recipe", name)
    run: Task = _with_data(task, data, test) if isinstance(task, Run) else _tested_at(task, data)
    if isinstance(run, Finetune | Evaluate):
        run = _from_checkpoint(run, later=slurm.after is not None)
    place = _choose(launch, slurm, run)
    say("cluster", f"{place.cluster}: {place.why}")
    run = suited(run, place.gpus)
    if isinstance(place, Allocation):
        asked = request(slurm, place, run.folder.absolute().name)
        show(asked) if launch.dry_run else submit([run], asked)
        return 0
    if launch.dry_run:
        say("dry run", f"{run.folder} would hold the run; nothing is done")
        return 0
    return _in_this_process(run) if place.cluster == "debug" else _on_this_machine(run, place)


def _program() -> str:
    name = Path(sys.argv[0]).name
    return name if name != "launch.py" else "python -m convmae.launch"


# ---- recipe and flags ------------------------------------------------------------------------------------------------


def find_recipe(name: str) -> tuple[Task, str]:
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
        meant = closest(function_name, recipes, "Did you mean --recipe " + module_name + ":{}?")
        raise LaunchError(f"--recipe {name}: {module_name} has no {function_name!r}. {there}{meant}")
    if not callable(function) or _needs_arguments(function):
        raise LaunchError(f"--recipe {name} is not a recipe, a function of no arguments that returns a run. {there}")
    try:
        run = function()
    except ValueError as error:
        raise LaunchError(f"--recipe {name}: {error}") from error
    if not isinstance(run, Task):
        raise LaunchError(f"--recipe {name} returned a {type(run).__name__}, not a run, such as Pretrain. {there}")
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
            meant = closest(last, beside, "Did you mean " + (f"{parent}." if parent else "") + "{}?")
            where = f"in {parent}" if parent else f"in {os.getcwd()} or among the installed packages"
            raise LaunchError(f"--recipe {name}: there is no module {missing!r} {where}.{meant}") from error
        at = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{at.filename}, line {at.lineno}: {type(error).__name__}: {error}"
        raise LaunchError(f"--recipe {name}: importing {module} failed at\n  {line}") from error


def _recipes_of(module: Any) -> list[str]:
    """The functions of a module that say that they return a run."""
    names, kinds = [], {"Task", *_below(Task)}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        returns = function.__annotations__.get("return", "")
        returns = returns if isinstance(returns, str) else getattr(returns, "__name__", "")
        if returns.rpartition(".")[2] in kinds and not _needs_arguments(function):
            names.append(name)
    return names


def _below(kind: type) -> set[str]:
    """The names of the classes derived from one."""
    below: list[type] = type.__subclasses__(kind)
    return {name for own in below for name in (own.__name__, *_below(own))}


def _needs_arguments(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(one.default is one.empty and one.kind not in variable for one in parameters)


def _parse(
    name: str, run: Task, about: str, arguments: list[str]
) -> tuple[Launch, Slurm, Task, str | None, str | None]:
    """Read the flags; tyro prints help and mistakes and ends the program."""
    import tyro

    places = [("data", f"where the data are. (default: ${DATA}, else the recipe's own, else the demo set)")]
    if isinstance(run, Finetune) and run.test is not None:
        places.append(("test", "where the samples for tests are. (default: with the others, as the recipe has it)"))
    places_ = [
        (field, Annotated[str | None, flag(Path | None, None, about=told)], dataclasses.field(default=None))
        for field, told in places
    ]
    groups = [
        ("launch", _options(Launch(recipe=name))),
        ("slurm", _options(Slurm())),
        ("run", _options(run, *places_)),
    ]
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Flags", groups),
        args=arguments,
        prog=_program(),
        description=f"{name}: {about}\n\nThe same command goes on from the run's folder.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    values = {field.name: getattr(parsed.run, field.name) for field in dataclasses.fields(parsed.run)}
    data, test = (values.pop(field, None) for field in ("data", "test"))
    launch, slurm = Launch(**vars(parsed.launch)), Slurm(**vars(parsed.slurm))
    try:
        return launch, slurm, replace(run, **values), data, test
    except ValueError as error:
        raise LaunchError(f"{error}\nEach of them is a flag; see --help.") from error


def _options(owner: Any, *before: Any) -> type:
    """A dataclass of the fields that a command line can give, with the owner's values as defaults, for tyro."""
    hints, fields, about = typing.get_type_hints(type(owner)), list(before), _about_fields(type(owner))
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        hint = hints[field.name]
        if field.name not in ("data", "test", "root") and _is_flag(hint):
            metavar = _METAVARS.get(field.name)
            annotation: Any = Annotated[hint, flag(hint, value, metavar=metavar, about=about.get(field.name))]
            fields.append((field.name, annotation, dataclasses.field(default=value)))
    return dataclasses.make_dataclass(type(owner).__name__, fields, namespace={"__doc__": type(owner).__doc__})


def _is_flag(hint: Any) -> bool:
    """Whether a command line can give a value of this type: a number, a word, a path, several of them, or none."""
    origin = typing.get_origin(hint)
    if origin in (Union, UnionType):
        return all(map(_is_flag, typing.get_args(hint)))
    return origin in (Literal, tuple) or hint in _FLAGS


def _about_fields(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of those it derives from say of each field."""
    from docstring_parser import parse

    told: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        for parameter in parse(owner.__doc__ or "").params:
            told[parameter.arg_name] = " ".join((parameter.description or "").split())
    return told


# ---- checks ----------------------------------------------------------------------------------------------------------


def _with_data(run: Run, given: str | None, test: str | None) -> Run:
    """The run on the data of --data, $CONVMAE_DATA or the recipe, in this order, saying which; and so its tests."""
    variable = os.environ.get(DATA) or None
    where, flag, origin = variable, f"${DATA}={variable}", f", from ${DATA}" if variable else ", from the recipe"
    if given is not None:
        where, flag, origin = given, f"--data {given}", ""
    data = _at(run.data, where, flag) if given is not None or has_root(run.data) else run.data
    say("data", _told(data, origin))
    run = replace(run, data=data)
    if not isinstance(run, Finetune) or run.test is None:
        return run
    if test is not None:
        tested, origin = _at(whole(run.test), test, f"--test {test}"), ""
    else:
        tested = _at(run.test, where, flag) if has_root(run.test) else run.test
        if where is not None and same(data, tested):
            raise LaunchError(
                f"{flag}: the run would be tested on what it is trained on; say where to test with --test"
            )
    say("test", _told(tested, origin))
    return replace(run, test=tested)


def _at(source: Any, where: str | None, flag: str) -> Any:
    """The source at a place given by a flag or a variable, or at its own, made absolute."""
    try:
        return located(source, where)
    except ValueError as problem:
        raise LaunchError(f"{flag}: {problem}") from problem


def _told(source: Any, origin: str) -> str:
    """What a source is called before anything is opened, and where that was said."""
    if not has_root(source):
        return f"{type(source).__name__}, as the recipe has it"
    part = f", {source.split}" if getattr(source, "split", None) else ""
    if source.root is not None:
        return f"{source.root}{part}{origin}"
    ours = type(source).__module__.startswith(("convmae.", "video."))
    there = f"the built-in demo set{part}" if ours else "the recipe's"
    return f"{there}, as neither --data nor ${DATA} says where others are"


def _tested_at(task: Task, given: str | None) -> Task:
    """A test with the data of --data or $CONVMAE_DATA, or those that it has, or that its checkpoint's run tests on."""
    assert isinstance(task, Evaluate)
    variable = os.environ.get(DATA) if task.data else None  # a checkpoint's run knows what it tests on
    where = given if given is not None else variable or None
    if where is None:
        say("data", _told(task.data, ", from the recipe") if task.data else "those that the checkpoint's run tests on")
        return task
    if not ("://" in where or "{" in where):
        path = Path(where).expanduser().absolute()
        if not path.exists():
            raise LaunchError(f"{'--data' if given is not None else f'${DATA}'} {where}: there is no {path}")
        where = str(path)
    say("data", where if given is not None else f"{where}, from ${DATA}")
    return replace(task, root=where)


def _from_checkpoint(run: Finetune | Evaluate, *, later: bool) -> Finetune | Evaluate:
    """The run with its checkpoint's path made absolute; it is there, unless another job makes it or the run goes on."""
    if run.checkpoint is None:
        if isinstance(run, Finetune):
            say("weights", "none: from scratch, as there is no --checkpoint")
        return run
    path = run.checkpoint.expanduser().absolute()
    begun = isinstance(run, Finetune) and kept_in(run.folder, "builder") is not None  # needs it no more
    if not path.exists() and not later and not begun:
        told = f"--checkpoint {run.checkpoint}: there is no {path}"
        raise LaunchError(f"{told}. One that a job is still to make is for --after JOB.")
    if begun and not path.exists():
        say("weights", f"those of {run.folder}, which goes on")
    else:
        say("weights", path if path.exists() else f"{path}, which is to be made first")
    return replace(run, checkpoint=path)


# ---- the place -------------------------------------------------------------------------------------------------------


def _choose(launch: Launch, slurm: Slurm, run: Task) -> Place:
    counts = {"nodes": launch.nodes, "tasks-per-node": launch.tasks_per_node, "cpus-per-task": slurm.cpus_per_task}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise LaunchError(f"--{name} {count}: it is 1 or more")
    if "WORLD_SIZE" in os.environ:
        besides = ("recipe", "dry_run", *(["cluster"] if launch.cluster == "debug" else []))
        if flags := _given(launch, slurm, besides=besides):
            raise LaunchError(f"{flags}: the processes are started already, as WORLD_SIZE says. Leave it out.")
        why = f"in this process, one of {os.environ['WORLD_SIZE']} that are started already, as WORLD_SIZE says"
        return Place(cluster="debug", why=why, gpus=_gpus_here(run), tasks=1)
    why = f"--cluster {launch.cluster} was given"
    if launch.cluster in ("auto", "slurm"):
        partitions, why = query_slurm()
        if partitions:
            return choose_nodes(
                slurm,
                partitions,
                nodes=launch.nodes,
                gpus_per_node=launch.gpus_per_node,
                tasks_per_node=launch.tasks_per_node,
                on_cpu=run.device == "cpu",
            )
        if launch.cluster == "slurm":
            raise LaunchError(f"--cluster slurm: {why}. Leave it out, or use local or debug, for this machine.")
    return _local_place(launch, slurm, run, why)


def _given(*groups: Launch | Slurm, besides: Sequence[str] = ()) -> str:
    """The flags that were given, that is, are not as by default."""
    fields = [(group, field) for group in groups for field in dataclasses.fields(group) if field.name not in besides]
    given = [field.name for group, field in fields if getattr(group, field.name) != field.default]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _gpus_here(run: Task) -> int:
    return 0 if run.device == "cpu" else torch.cuda.device_count()


def _local_place(launch: Launch, slurm: Slurm, run: Task, why: str) -> Place:
    """This machine: this process, or one a GPU if there are several."""
    if launch.nodes > 1:
        raise LaunchError(f"--nodes {launch.nodes} needs SLURM, but {why}: local and debug have one node, this machine")
    if flags := _given(slurm):
        raise LaunchError(f"{flags}: for SLURM alone, but the run is for this machine, as {why}. Leave it out.")
    here = _gpus_here(run)
    gpus = launch.gpus_per_node
    if gpus is None:
        gpus = 0 if launch.tasks_per_node else min(here, 1) if launch.cluster == "debug" else here
    require_gpus(gpus, 0 <= gpus <= here, f"this machine has {here}")
    tasks = count_tasks(gpus, launch.tasks_per_node)
    with_ = f"{gpus} of {here} GPUs" if gpus else "no GPU"
    if tasks == 1 and launch.cluster != "local":
        return Place(cluster="debug", why=f"in this process, with {with_}, as {why}", gpus=gpus, tasks=1)
    if launch.cluster == "debug":
        raise LaunchError(f"--cluster debug is this process alone, not {tasks}: use --cluster local")
    why = f"processes on this machine: {tasks}, with {with_}, as {why}"
    return Place(cluster="local", why=why, gpus=gpus, tasks=tasks)


# ---- this machine ----------------------------------------------------------------------------------------------------


def _in_this_process(run: Task) -> int:
    try:
        finished = carry_out(run)
    except (FloatingPointError, OSError) as error:
        print(f"{_program()}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in ("convmae", "video"):
            raise  # not said to the user, but a mistake somewhere
        raise LaunchError(str(error)) from error
    return 0 if finished else 130


def _on_this_machine(run: Task, place: Place) -> int:
    """Start a process a GPU through submitit, show what the first one prints, and wait until all have ended."""
    from submitit import LocalExecutor

    run = made_ready(run)
    executor = LocalExecutor(folder=logs([run]))
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu and place.gpus]
    if not all(gpu.isdigit() for gpu in visible):
        raise LaunchError(f"--cluster local takes GPUs by number, not as CUDA_VISIBLE_DEVICES={','.join(visible)}")
    executor.update_parameters(
        tasks_per_node=place.tasks,
        gpus_per_node=place.gpus,
        visible_gpus=tuple(int(gpu) for gpu in visible),
        timeout_min=ENDLESS,
        stderr_to_stdout=True,
    )
    if not place.gpus:
        os.environ.setdefault(*PATIENT)
    os.environ[LAUNCHER] = str(os.getpid())
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal's: for the launcher, not for what it starts
        signal.signal(number, signal.SIG_IGN)
    following = _Following(executor.submit(Job(run)))
    say("run", run.folder)
    say("logs", f"{following.job.paths.folder}; the first process says:")
    return following.to_the_end()


class _Following:
    """Shows the first process's log; passes Ctrl-C on; ends the others where one has failed."""

    def __init__(self, job: Any) -> None:
        self.job, self.controller = job, int(job.job_id)
        self.shown = self.interrupts = 0
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
            print(text.decode(errors="replace"), end="", flush=True)

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
