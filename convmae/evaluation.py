"""The test of a classifier: every sample once, on all of its views, with the same result on any number of processes.

A view is what a source gives of a sample when a test looks at it (`as_test`): a picture's centre, or clips and crops of
a video. The probabilities of a sample are the mean over its views of the softmax, as VideoMAE and others test.

Ties: of classes with equal probability, the one of the lower number comes first.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from . import confusion
from .data import UNLABELLED, Batch, Samples, StartMethod, Stream, repeats
from .distributed import World
from .files import write_whole, writing
from .folder import Unusable
from .listing import Names
from .targets import normalize

SHOWN = 5  # classes of a prediction, or names in an error
EVERY = 30.0
"""Seconds between two lines that say how far a test is, where there is no terminal."""


# ---- what a test looks at --------------------------------------------------------------------------------------------


def as_tested(source: Any) -> Any:
    """A source as a test looks at it: `as_test()` of one that draws samples at random; others are as they should be."""
    return source.as_test() if getattr(source, "draws", False) else source


def glanced(source: Any) -> Any:
    """A source as a quick test looks at it: one view of each sample, in which nothing is drawn.

    That is `as_test()`, where there is one, but of a source that says itself that it draws nothing, and has no views.
    """
    ready = not getattr(source, "draws", True) and getattr(source, "views", None) is None
    return source if ready or not hasattr(source, "as_test") else source.as_test()


# ---- what a test has found -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Scores:
    """What a test has found out, of N samples and K classes; the same on all processes.

    All accuracies and the loss are of the samples that could be loaded; those `_of_all` count the others as wrong.

    Args:
        classes: their names.
        files: the names of the samples that could be loaded, in the order of the listing.
        labels: their classes, int64 `(N)`.
        probabilities: float32 `(N, K)`, the mean over a sample's views.
        likelihoods: the logarithm of the right class's probability, float64 `(N)`.
        unusable: the samples that could not be loaded, or that a manifest has left out.
        views: how many were looked at of each sample.
    """

    classes: tuple[str, ...]
    files: Names
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    likelihoods: NDArray[np.float64]
    unusable: tuple[Unusable, ...]
    views: int

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Scores({', '.join(f'{name}={value}' for name, value in self.figures().items())})"

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """How many classes come before the right one, int64 `(N)`: 0 where the prediction is right."""
        right = np.take_along_axis(self.probabilities, self.labels[:, None], 1)
        before = np.arange(len(self.classes)) < self.labels[:, None]
        ranks: NDArray[np.int64] = ((self.probabilities > right) | ((self.probabilities == right) & before)).sum(1)
        return ranks

    @cached_property
    def best(self) -> NDArray[np.int64]:
        """The most probable classes, the best first, int64 `(N, 5)`, or as many as there are."""
        best: NDArray[np.int64] = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :SHOWN]
        return best

    def accuracy(self, k: int) -> float:
        """The part of the samples whose class is among the k most probable ones."""
        return int((self.ranks < k).sum()) / len(self)

    @property
    def top1(self) -> float:
        """The part of the samples whose class is the most probable one."""
        return self.accuracy(1)

    @property
    def top5(self) -> float | None:
        """The part of the samples whose class is among the five most probable; None with less than five classes."""
        return self.accuracy(5) if len(self.classes) >= 5 else None

    @property
    def top1_of_all(self) -> float:
        """`top1` with the unusable samples counted as wrong."""
        return self.top1 * self._usable

    @property
    def top5_of_all(self) -> float | None:
        """`top5` with the unusable samples counted as wrong."""
        return None if self.top5 is None else self.top5 * self._usable

    @property
    def _usable(self) -> float:
        return len(self) / (len(self) + len(self.unusable))

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Samples by class and prediction, int64 `(K, K)`: a row for each class, a column for each prediction."""
        count = len(self.classes)
        pairs = np.bincount(self.labels * count + self.best[:, 0], minlength=count * count)
        return pairs.reshape(count, count).astype(np.int64)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each class, int64 `(K)`."""
        counts: NDArray[np.int64] = self.confusion.sum(1)
        return counts

    @property
    def correct(self) -> NDArray[np.int64]:
        """Samples of each class that were taken for what they are, int64 `(K)`."""
        return self.confusion.diagonal()

    @property
    def mean_class(self) -> float:
        """The mean of the classes' accuracies; classes without a sample do not count."""
        there = self.counts > 0
        return float((self.correct[there] / self.counts[there]).mean())

    @property
    def loss(self) -> float:
        """The mean of -log of the right class's probability, which is the mean over views."""
        return -math.fsum(self.likelihoods) / len(self)

    def figures(self) -> dict[str, float | int | None]:
        """All that is one number, by name; None for what there is not."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "loss": self.loss,
            "samples": len(self),
            "views": self.views,
            "unusable": len(self.unusable),
            "top1_of_all": self.top1_of_all,
            "top5_of_all": self.top5_of_all,
            "classes": len(self.classes),
        }


# ---- the test --------------------------------------------------------------------------------------------------------


def evaluate(
    network: nn.Module,
    samples: Samples,
    *,
    size: tuple[int, ...],
    classes: int,
    names: Sequence[str] = (),
    world: World,
    batch_size: int,
    workers: int = 0,
    autocast: AbstractContextManager[Any] | None = None,
    seconds: float = math.inf,
    method: StartMethod | None = None,
    unusable: Literal["error", "count"] = "count",
    sharded: bool = False,
    shown: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> Scores:
    """Test a network on every sample once; all processes call it, and all get the same scores.

    Each forward pass of each process is of the same shape, filled up with zeros where samples are lacking: so with the
    same `batch_size`, a sample is computed alike on any number of processes, whatever else is in its batch. The
    network, the processes' random state and its training mode are left as they were.

    Args:
        network: ImageNet-normalised `x (B, 3, *size)` to logits `(B, classes)`; where DDP shares it, the one inside is
            called.
        samples: labelled ones, of a source's `as_test()`: each gives `repeats` views.
        size: of the input, `(H, W)` or `(T, H, W)` pixels.
        classes: how many.
        names: those of the classes that the network was trained with; empty where they are not known.
        world: the processes, each with a share of the samples.
        batch_size: most views in a forward pass of each process.
        workers: loader processes of each process.
        autocast: the precision of the forward pass; None: as it is. The softmax is taken in float64.
        seconds: the longest time for loading one sample; see `convmae.data.Stream.batches`.
        method: how loader processes are started.
        unusable: what becomes of a sample that cannot be loaded: an "error", or it is a "count" in the scores.
        sharded: each forward pass needs all processes, so those without samples take part; implied by FSDP.
        shown: show how far it is, by the first process: a bar on a terminal, else a line every 30 seconds.
        beat: called after every batch.

    Raises:
        ValueError: samples are unlabelled, have a label that is no class, or classes of other names; the network has
            another number of classes; a sample is unusable and that is an error; or none can be used.
        FloatingPointError: a logit is not finite.
    """
    named = check(samples, classes, names)
    left_out: tuple[Unusable, ...] = tuple(getattr(samples, "left_out", ()))
    if unusable == "error" and left_out:
        raise _refused(left_out[0])
    views = repeats(samples)
    taken = max(1, batch_size // views)  # samples of a process at a time
    stream = Stream(samples, size, 0, world.size * taken * views, rank=world.rank, world=world.size, once=True)
    tester = _Tester(
        network=network.module if isinstance(network, DistributedDataParallel) else network,
        classes=classes,
        world=world,
        views=views,
        most=taken * views,
        at_once=min(batch_size, taken * views),
        autocast=autocast or nullcontext(),
        sharded=sharded or isinstance(network, FSDPModule),
    )
    found = _Found()
    batches = stream.batches(
        0,
        stream.steps_in(1),
        workers=workers,
        pin_memory=world.device.type == "cuda",
        seconds=seconds,
        method=method,
    )
    with at_rest(tester.network), _progress(len(samples), shown and world.first) as see, closing(batches) as arriving:
        for step, [batch] in enumerate(arriving):
            skipped = _skipped(samples, batch, stream.share(step)[0])
            problem = tester.take(batch, samples, found)
            if problem is None and skipped and unusable == "error":
                problem = _refused(skipped[0])
            found.unusable += skipped
            see(*_agreed(world, problem, len(batch.labels) // views, len(skipped)))
            beat()
    return _together(found, samples, world, named, left_out, views)


def _refused(problem: Unusable) -> ValueError:
    return ValueError(
        f"{problem.name}: {problem.reason}. A test with unusable='error' takes whole data only: mend the file, or "
        "count it with unusable='count'"
    )


@dataclass
class _Found:
    """What this process has found: which samples, their labels, probabilities and likelihoods, and those unusable."""

    indices: list[NDArray[np.int64]] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    probabilities: list[NDArray[np.float32]] = field(default_factory=list)
    likelihoods: list[NDArray[np.float64]] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Tester:
    """Runs the network on batches, in forward passes of one shape.

    Args:
        most: views in a batch, at most.
        at_once: views in a forward pass.
    """

    network: nn.Module
    classes: int
    world: World
    views: int
    most: int
    at_once: int
    autocast: AbstractContextManager[Any]
    sharded: bool

    def take(self, batch: Batch, samples: Samples, found: _Found) -> Exception | None:
        """Judge a batch's samples; gives what is wrong with them, to be raised by all processes together."""
        logits = self._logits(batch.pixels)
        labels, indices = batch.labels[:: self.views], batch.indices[:: self.views]
        if not len(labels):
            return None
        name = samples.name
        if logits.shape[1] != self.classes:
            return ValueError(f"the network gives {logits.shape[1]} logits, but classes={self.classes}")
        if wrong := [(name(int(at)), int(label)) for at, label in zip(indices, labels, strict=True) if self._no(label)]:
            return _mislabelled(wrong, self.classes)
        logs = logits.log_softmax(1).reshape(len(labels), self.views, self.classes)
        mean = logs.logsumexp(1) - math.log(self.views)
        if bad := [name(int(at)) for at, row in zip(indices, mean, strict=True) if not row.isfinite().all()]:
            return FloatingPointError(f"the network's output is not finite for {bad[0]}")
        found.indices.append(indices.numpy())
        found.labels.append(labels.numpy())
        found.probabilities.append(mean.exp().float().numpy())
        found.likelihoods.append(mean.gather(1, labels[:, None])[:, 0].numpy())
        return None

    def _no(self, label: Tensor) -> bool:
        """Whether it is not one of the classes."""
        return not 0 <= int(label) < self.classes

    def _logits(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 `(n, 3, *size)` to logits float64 `(n, classes)` on the CPU; n may be 0."""
        logits = [torch.empty(0, self.classes, dtype=torch.float64)] if not len(pixels) else []
        for at in range(0, self.most if self.sharded else len(pixels), self.at_once):
            part = pixels[at : at + self.at_once]
            count, lacking = len(part), self.at_once - len(part)
            if lacking:
                part = torch.cat([part, part.new_zeros(lacking, *part.shape[1:])])
            x = normalize(part.to(self.world.device, non_blocking=True))
            with self.autocast:
                out = self.network(x)
            if count:
                logits.append(out[:count].cpu().double())
        return torch.cat(logits)


def _skipped(samples: Samples, batch: Batch, numbers: Sequence[int]) -> list[Unusable]:
    """The samples of a share that could not be loaded, with their labels where the listing has them."""
    if not batch.skipped:
        return []
    loaded = set(batch.indices.tolist())
    missing = [number for number in numbers if number not in loaded]
    labels = _labels(samples)
    return [
        Unusable(problem.name, problem.reason, UNLABELLED if labels is None else int(labels[index]))
        for index, problem in zip(missing, batch.skipped, strict=True)
    ]


def _agreed(world: World, problem: Exception | None, seen: int, skipped: int) -> tuple[int, int]:
    """Samples seen and skipped by all processes in this step; raises what any of them has met."""
    mine = torch.tensor([seen, skipped, problem is not None], dtype=torch.float64, device=world.device)
    all_seen, all_skipped, problems = world.sum(mine).tolist()
    if problems:
        raise world.gather([] if problem is None else [problem])[0]
    return int(all_seen), int(all_skipped)


def _together(
    found: _Found,
    samples: Samples,
    world: World,
    classes: tuple[str, ...],
    left_out: tuple[Unusable, ...],
    views: int,
) -> Scores:
    """The scores of what all processes have found, in the order of the listing."""
    parts = world.gather([found])
    unusable = [problem for part in parts for problem in part.unusable]
    indices = np.concatenate([np.empty(0, np.int64), *(one for part in parts for one in part.indices)])
    if not len(indices):
        first = f", the first is {unusable[0].name}: {unusable[0].reason}" if unusable else ""
        raise ValueError(f"there is nothing to test on: none of {len(samples)} samples can be used{first}")
    assert len(indices) + len(unusable) == len(samples)
    order = np.argsort(indices)
    assert (np.diff(indices[order]) > 0).all(), "a sample was taken twice"
    return Scores(
        classes=classes,
        files=Names.of(samples.name(int(index)) for index in indices[order]),
        labels=np.concatenate([one for part in parts for one in part.labels])[order],
        probabilities=np.concatenate([one for part in parts for one in part.probabilities])[order],
        likelihoods=np.concatenate([one for part in parts for one in part.likelihoods])[order],
        unusable=(*left_out, *sorted(unusable)),
        views=views,
    )


# ---- labels and names ------------------------------------------------------------------------------------------------


def check(samples: Samples, classes: int, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the classes, where samples suit a network with so many, which was trained with these names, if any.

    Raises ValueError where classes have other names, and where a listing has labels that are no classes, or none.
    """
    named = _named(samples, classes, names)
    _check_labels(samples, classes)
    return named


def _labels(samples: Samples) -> NDArray[np.integer[Any]] | None:
    """The labels of all samples, where a listing has them."""
    for owner in (getattr(samples, "listing", None), getattr(samples, "members", None)):
        if owner is not None:
            labels: NDArray[np.integer[Any]] = owner.labels
            return labels
    return None


def _check_labels(samples: Samples, classes: int) -> None:
    """Refuse labels that are no classes before anything is loaded, where a listing has them."""
    labels = _labels(samples)
    if labels is None:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise _mislabelled(
            [(samples.name(int(index)), int(labels[index])) for index in wrong[:SHOWN]], classes, len(wrong)
        )


def _mislabelled(wrong: Sequence[tuple[str, int]], classes: int, count: int | None = None) -> ValueError:
    count = len(wrong) if count is None else count
    shown = ", ".join(f"{name} ({'no label' if label < 0 else label})" for name, label in wrong[:SHOWN])
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return ValueError(
        f"a test needs labels from 0 to {classes - 1}, one for each of the classes={classes}; not so: {shown}{more}"
    )


def _named(samples: Samples, classes: int, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes: the network's, the data's, or their numbers.

    Raises ValueError where the network's are not those of the data. Lists that number classes have no names to compare.
    """
    if names and len(names) != classes:
        raise ValueError(f"there are {len(names)} names of classes={classes}")
    theirs: tuple[str, ...] = tuple(getattr(samples, "classes", ()))
    if renumbered(names, theirs):
        raise ValueError(_differing(names, theirs))
    numbered = tuple(map(str, range(classes)))
    if theirs == numbered[: len(theirs)]:  # none, or numbers
        return tuple(names) or numbered
    if names and tuple(names) != numbered and tuple(names) != theirs:
        raise ValueError(_differing(names, theirs))
    if len(theirs) > classes:
        raise ValueError(f"the data have {len(theirs)} classes, but classes={classes}")
    return theirs if len(theirs) == classes else tuple(names) or (*theirs, *numbered[len(theirs) :])


def renumbered(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether names that are all numbers stand for other classes: folders 0, 1, 10, 2 as against a list's 0, 1, 2."""
    if not all(name.isdecimal() for name in (*names, *others)):
        return False
    return any(int(name) != int(other) for name, other in zip(names, others, strict=False))


def _differing(names: Sequence[str], theirs: Sequence[str]) -> str:
    """How the classes that the network was trained with and those of the data differ, in words."""
    lacking, strange = (sorted(set(one) - set(other)) for one, other in ((names, theirs), (theirs, names)))
    parts = [
        f"{len(some)} only {where}: {', '.join(some[:SHOWN])}"
        for some, where in ((lacking, "there"), (strange, "here"))
        if some
    ] or ["the same ones, in another order"]
    return (
        f"the network was trained with {len(names)} classes, and these data have {len(theirs)} others ("
        f"{'; '.join(parts)}). Where folders of splits lie side by side, give the folder above them and split='val': "
        "classes are then numbered over all splits"
    )


# ---- the network at rest, and how far it is --------------------------------------------------------------------------


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, without gradients; then every part of it in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows on the error stream how far it is; is told of samples seen and skipped since."""
    if not shown:
        yield lambda seen, skipped: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[unusable]} unusable"))
    began = said = time.monotonic()
    done = unusable = 0

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("test", total=total, unusable=0)

        def see(seen: int, skipped: int) -> None:
            nonlocal done, unusable, said
            done, unusable = done + seen + skipped, unusable + skipped
            bar.update(task, completed=done, unusable=unusable)
            now = time.monotonic()
            if not console.is_terminal and now - said > EVERY:
                said = now
                minutes = (total - done) * (now - began) / max(done, 1) / 60
                words = f"test: {done} of {total} samples, {unusable} unusable, {minutes:.0f} min left"
                print(words, file=sys.stderr, flush=True)

        yield see


# ---- files -----------------------------------------------------------------------------------------------------------


def write(scores: Scores, folder: Path, *, probabilities: bool = False) -> list[Path]:
    """Write a test's results into a folder, which is made; every file is there as a whole or not at all.

    - `scores.json`: `Scores.figures`, and how many samples were unusable for which reason.
    - `predictions.csv`: a line for each sample: path, class, the place of this class among all by probability (1 where
      the prediction is right), and the five most probable classes with their probabilities; unusable ones at the end,
      with the reason.
    - `classes.csv`: a line for each class: samples, how many of them were unusable and right, and the accuracy.
    - `confusion.png`.
    - with `probabilities`, `probabilities.npz`: `files (N)`, `labels (N)` and `probabilities (N, K)`.

    Returns where they are.
    """
    reasons = Counter(problem.reason for problem in scores.unusable)
    about = {**scores.figures(), "reasons": dict(reasons.most_common())}
    files = [
        write_whole(folder / "predictions.csv", _csv(_predictions(scores))),
        write_whole(folder / "classes.csv", _csv(_per_class(scores))),
        write_whole(folder / "confusion.png", confusion.draw(scores.confusion, scores.classes)),
    ]
    if probabilities:
        files.append(folder / "probabilities.npz")
        with writing(files[-1]) as file:
            np.savez(file, files=list(scores.files), labels=scores.labels, probabilities=scores.probabilities)
    return [write_whole(folder / "scores.json", json.dumps(about, indent=1) + "\n"), *files]


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # names of files need not be UTF-8


def _predictions(scores: Scores) -> Iterator[Sequence[object]]:
    names = scores.classes
    shown = [f"{what} {place + 1}" for place in range(scores.best.shape[1]) for what in ("class", "probability")]
    yield ["path", "class", "place", *shown, "unusable"]
    rows = zip(scores.files, scores.labels, scores.ranks, scores.best, scores.probabilities, strict=True)
    for file, label, rank, best, row in rows:
        pairs = [cell for which in best for cell in (names[which], f"{row[which]:.6g}")]
        yield [file, names[label], rank + 1, *pairs, ""]
    for name, reason, label in scores.unusable:
        known = names[label] if 0 <= label < len(names) else ""
        yield [name, known, "", *[""] * len(shown), reason]


def _per_class(scores: Scores) -> Iterator[Sequence[object]]:
    lost = Counter(problem.label for problem in scores.unusable)
    yield ["number", "class", "samples", "unusable", "correct", "accuracy"]
    for number, (name, count, correct) in enumerate(zip(scores.classes, scores.counts, scores.correct, strict=True)):
        yield [number, name, count, lost[number], correct, f"{correct / count:.6g}" if count else ""]
