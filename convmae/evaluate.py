"""The test of a classifier as a task of its own, on one process or many: what `launchers/slurm_evaluate.py` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from . import weights
from .data import Source, usable_cpus
from .distributed import join
from .evaluation import SHOWN, Scores, as_tested, evaluate, write
from .files import write_whole
from .journal import console_log
from .location import located
from .nn.classifier import Classifier
from .plain import from_plain
from .run import Task, autocast
from .run_folder import forget_failures, kept_in, occupied, record_failure
from .watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Evaluate(Task):
    """A test of a classifier; its scores, predictions and confusion go to the folder.

    There are at most as many `workers` as CPUs.

    Args:
        checkpoint: the classifier: a finetuning run's folder, or a file that `convmae.weights.load` reads.
        data: what it is tested on; None: what the run that made it tests on.
        root: where these data are, if elsewhere.
        clips: of each video; None: as the data have it.
        crops: of each clip, 1 or 3; None: as the data have it.
        average: test the averaged weights that the run kept.
        batch_size: most views in a forward pass of each process.
        unusable: whether a file that cannot be used ends the test, or is counted.
    """

    checkpoint: Path | None = None
    data: Source | None = None
    root: Path | str | None = None
    clips: int | None = None
    crops: Literal[1, 3] | None = None
    average: bool = False
    batch_size: int = 64
    unusable: Literal["count", "error"] = "count"

    @property
    def kind(self) -> str:
        """In one word."""
        return "test"

    def demands(self) -> list[tuple[str, str, bool]]:
        """What the fields must be."""
        return [
            *super().demands(),
            ("clips", "1 or more, or None", self.clips is None or self.clips >= 1),
            ("crops", "1, 3 or None", self.crops in (1, 3, None)),
            ("batch_size", "1 or more", self.batch_size >= 1),
            ("unusable", "count or error", self.unusable in ("count", "error")),
        ]

    def check(self) -> None:
        """Refuse now what would fail later; raises ValueError."""
        super().check()
        if self.checkpoint is None:
            raise ValueError("there is no classifier to test: give --checkpoint, a finetuning run's folder or a file")

    def source(self) -> Source:
        """What is tested on, with all its views.

        Raises ValueError where the data are not given, nor kept by the checkpoint, or have no such fields.
        """
        data = self.data
        if data is None:
            kept = None if self.checkpoint is None else kept_in(self.checkpoint, "run")
            data = None if kept is None else getattr(from_plain(kept), "test", None)
        if data is None:
            raise ValueError(
                f"{self.checkpoint} does not say what it is to be tested on: give a recipe that does, a function that "
                "returns Evaluate(data=..., folder=...), with --recipe"
            )
        placed = data if self.root is None else located(data, self.root)
        found: Source = _viewed(as_tested(placed), self.clips, self.crops)
        return found


def _viewed(data: Any, clips: int | None, crops: int | None) -> Any:
    """The source with so many views of each sample."""
    if clips is None and crops is None:
        return data
    if getattr(data, "views", None) is None:
        raise ValueError(f"--clips and --crops are for videos with views; the data are {type(data).__name__}")
    wanted = {name: count for name, count in (("clips", clips), ("crops", crops)) if count is not None}
    return replace(data, views=replace(data.views, **wanted))


def _classifier(checkpoint: Path, *, average: bool) -> Classifier:
    try:
        model = weights.load(checkpoint, average=average)
    except FileNotFoundError as missing:  # which would come again, however often a job is queued
        raise ValueError(f"--checkpoint {checkpoint}: {missing}") from missing
    if not isinstance(model, Classifier):
        raise ValueError(f"{checkpoint} is no classifier, but a {type(model).__name__}: finetune it first")
    return model


def test(task: Evaluate) -> bool:
    """Carry out a test here and now, with the processes that RANK and WORLD_SIZE name; True, as it is then finished.

    Raises:
        ValueError: there is no classifier or nothing to test on, or they do not suit each other.
        FloatingPointError: an output is not finite.
    """
    task.check()
    assert task.checkpoint is not None
    watchdog = Watchdog(task.hang_minutes, lambda error: record_failure(task.folder, error, step=None))
    with console_log() as console, watchdog, join(task.device, minutes=task.hang_minutes) as world:
        try:
            model = _classifier(task.checkpoint, average=task.average)
            source = world.tell(task.source)
            samples = world.tell(lambda: source.open(model.trunk.size))
            model.to(world.device)
            with ExitStack() as stack:
                world.tell(lambda: stack.enter_context(_in_folder(task.folder)))
                scores = evaluate(
                    model,
                    samples,
                    size=model.trunk.size,
                    classes=model.head.out_features,
                    names=model.builder.names,
                    world=world,
                    batch_size=task.batch_size,
                    workers=min(task.workers, usable_cpus()),
                    autocast=autocast(task, world.device),
                    seconds=task.sample_seconds,
                    method=task.worker_start,
                    unusable=task.unusable,
                    beat=watchdog.beat,
                )
                if world.first:
                    _tell(scores, task, source, console)
        except Exception as error:
            record_failure(task.folder, error, step=None)
            raise
    return True


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, and held."""
    folder.mkdir(parents=True, exist_ok=True)
    with occupied(folder):
        forget_failures(folder)
        yield


def _tell(scores: Scores, task: Evaluate, source: Source, console: Console) -> None:
    """Write the results, and say them."""
    files = write(scores, task.folder)
    write_whole(task.folder / "test.txt", f"{task!r}\ntested on {source!r}\n")

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"{len(scores)} samples, {scores.views} views of each, {len(scores.unusable)} unusable")
    shown = {"top-1": scores.top1, "top-5": scores.top5, "mean over classes": scores.mean_class}
    say(", ".join(f"{name} {value:.2%}" for name, value in shown.items() if value is not None))
    if scores.unusable:
        say(f"with the unusable ones counted as wrong: top-1 {scores.top1_of_all:.2%}")
        for problem in scores.unusable[:SHOWN]:
            say(f"  {problem.name}: {problem.reason}")
    for path in files:
        say(f"  {path}")
