"""From a source of samples to batches: the seam every kind of data plugs into.

A *source* (an image folder, a video folder, your own frozen dataclass) says where samples are; opened for the
model's input size it gives *samples*, which load one at a time. `Stream` turns samples into batches.

What is drawn never depends on the number of processes, of loader workers, or on what was drawn before: the order of
an epoch follows from (seed, epoch), a sample's augmentation and mask from (seed, epoch, sample index), alone. So a run
may stop and go on anywhere, and its global batches are the same on any number of nodes.

Decoders crash and hang on some files. A loader process that dies, or takes too long, over a sample is replaced, and the
sample counts as one that cannot be loaded.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

_log = logging.getLogger(__name__)

UNLABELLED = -1
StartMethod = Literal["fork", "forkserver", "spawn"]


class UnusableFileError(Exception):
    """A sample that cannot be loaded: `name` is the file, `reason` one line on what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Packed(NamedTuple):
    """A file that lies inside another, as in a shard: what the log should call it, and its bytes."""

    name: str
    data: bytes


class Sample(NamedTuple):
    """One loaded sample: pixels uint8 `(3, *size)` in RGB, and its class, or `UNLABELLED`.

    Where a sample gives several clips at once, pixels are `(repeats, 3, *size)`. Of samples that give two views, second
    is the other one, as the first in kind and shape (`convmae.two_views`).
    """

    pixels: Tensor
    label: int = UNLABELLED
    second: Tensor | None = None


class Samples(Protocol):
    """An opened source. It must pickle (loader workers get a copy) and hold no open file.

    It may also have a number `repeats`, of clips that each of its samples gives; a number `views`, 2 where each comes
    with a second view; and a method `order(generator)` that returns the order of an epoch, a permutation of all indices
    as an int64 tensor, without which they are shuffled uniformly.
    """

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file of a sample, as the log should call it."""
        ...

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load and augment one sample; all randomness comes from the generator.

        Raises `UnusableFileError` for a file that cannot be used: it is reported and skipped.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Where samples are. A frozen dataclass, so that a run prints, compares and pickles.

    A source with a field `root`, or made of a `source` that has one, can be pointed elsewhere: `--data` and
    `$CONVMAE_DATA` replace it.
    """

    def open(self, size: tuple[int, ...]) -> Samples:
        """List the samples, to be loaded at `size`, `(H, W)` or `(T, H, W)` pixels.

        Raises ValueError where the location does not exist or holds nothing usable.
        """
        ...


class Batch(NamedTuple):
    """What the loader gives: n usable samples, and those that were not.

    pixels uint8 `(n, 3, *size)`; labels `(n)`; mask, as it was drawn, `(n * groups, *grid)`, or None; skipped: the
    errors of samples that could not be loaded; indices `(n)`, which of the samples each is; second, the other view of
    each, as pixels, or None. n can be 0: then what is there is empty in its first axis.
    """

    pixels: Tensor
    labels: Tensor
    mask: Tensor | None
    skipped: list[UnusableFileError]
    indices: Tensor
    second: Tensor | None = None


def generator(*key: int) -> torch.Generator:
    """A generator whose numbers follow from the key alone; different keys give independent numbers."""
    high, low = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(high ^ low) & (2**63 - 1))


def repeats(samples: Samples) -> int:
    """How many clips each of the samples gives."""
    return int(getattr(samples, "repeats", 1))


def views(samples: Samples) -> int:
    """How many views each sample comes in, 1 or 2."""
    return int(getattr(samples, "views", 1))


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Stream:
    """The samples of a run in order: number n is the `n mod len`-th of epoch `n // len`, shuffled anew each epoch.

    Where each sample gives `repeats` clips, a batch holds all of them: batch_size counts clips, and an epoch is a pass
    over the samples, of `len * repeats` clips.

    Args:
        samples: the opened source.
        size: of the input in pixels, `(H, W)` or `(T, H, W)`.
        seed: of the run.
        batch_size: of a step over all processes.
        rank, world: this process and how many share a step; every step's samples are dealt out to them in turn.
        micro_batch: the most that a process takes at once, of a share that is cut evenly; None = the whole of it.
        draw_mask: draws a mask from a generator, `(1, *grid)`, or `(groups, *grid)`; None draws none.
        detour: another number is another order, and other augmentation and masks, of the same samples.
        once: take every sample once, in the order that they are listed in, as a test does; the last step may be short,
            and shares of it empty.
        blamed: samples over which a loader process was lost, and how; not tried again, in one epoch or at all (None).

    Raises:
        ValueError: batch_size or micro_batch is not a multiple of the samples' repeats.
    """

    samples: Samples
    size: tuple[int, ...]
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    micro_batch: int | None = None
    draw_mask: Callable[[torch.Generator], Tensor] | None = None
    detour: int = 0
    once: bool = False
    blamed: dict[tuple[int | None, int], str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        times = repeats(self.samples)
        for name, number in (("batch_size", self.batch_size), ("micro_batch", self.micro_batch or times)):
            if number % times:
                raise ValueError(f"{name}={number} is not a multiple of the data's repeats={times}: clips of a sample")

    @property
    def drawn(self) -> int:
        """Samples drawn for a step, each of which gives `repeats` of its batch."""
        return self.batch_size // repeats(self.samples)

    @property
    def most(self) -> int:
        """The rows of the largest micro-batch, the same for all processes."""
        return self._cuts()[1] * repeats(self.samples)

    def _cuts(self) -> list[int]:
        """Where a share is cut into micro-batches, whose numbers of samples differ by one at most.

        A last one of what is left over could be a sample alone, which a contrast would compare with nothing.
        """
        share = -(-self.drawn // self.world)
        pieces = -(-share // (self.micro_batch // repeats(self.samples))) if self.micro_batch else 1
        return [-(-share * at // pieces) for at in range(pieces + 1)]

    def steps_in(self, epochs: float) -> int:
        """Steps in so many passes over the samples, at least one."""
        if self.once:
            return math.ceil(len(self.samples) / self.drawn)
        return max(1, round(epochs * len(self.samples) / self.drawn))

    def share(self, step: int) -> list[list[int]]:
        """The sample numbers this process takes in a step, by micro-batch.

        All processes have equally many micro-batches, as sharded models need; so the last of some may be empty.
        """
        first = step * self.drawn
        stop = min(first + self.drawn, len(self.samples)) if self.once else first + self.drawn
        own = range(first + self.rank, stop, self.world)
        return [list(own[start:end]) for start, end in pairwise(self._cuts())]

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch, by index, as they are taken."""
        if self.once:
            return torch.arange(len(self.samples))
        random = generator(self.seed, 0, epoch, self.detour)
        if hasattr(self.samples, "order"):
            order: Tensor = self.samples.order(random)
            return order
        return torch.randperm(len(self.samples), generator=random)

    def named(self, numbers: Iterable[int]) -> list[str]:
        """The samples behind sample numbers, by name."""
        length, names, epoch, order = len(self.samples), [], -1, torch.empty(0)
        for number in numbers:
            if number // length != epoch:
                epoch = number // length
                order = self.order(epoch)
            names.append(self.samples.name(int(order[number % length])))
        return names

    def batches(
        self,
        start: int,
        stop: int,
        *,
        workers: int,
        pin_memory: bool = False,
        seconds: float = math.inf,
        method: StartMethod | None = None,
    ) -> Generator[list[Batch], None, None]:
        """For each step from start to stop, its micro-batches, loaded ahead by so many processes (0: in this one).

        A loader process that dies over a sample, or takes longer for it than so many seconds, is replaced, and the
        sample is among `skipped`: for good where the process died, in this epoch where it was late, as storage may have
        been. Loading in this process knows no such limit. The thread that takes the first batch must outlive the last:
        loader processes end with it.

        Args:
            start, stop: the first step, counted from 0, and the one after the last.
            workers: loader processes.
            pin_memory: put batches where a GPU fetches them from faster.
            seconds: the longest time for one sample.
            method: how loader processes are started; None: as Python does on this system.

        Raises:
            RuntimeError: a loader process died over no sample, or too many have died.
        """
        deaths = 0
        while start < stop:
            with _Crew(self, start, stop, workers, pin_memory, seconds, method) as crew:
                for batches in crew.arriving():
                    start += 1
                    yield batches
                if not crew.lost:
                    continue
                deaths += sum(death.crashed for death in crew.lost)
                for death in crew.lost:
                    self.blamed[None if death.crashed else death.epoch, death.sample] = death.how
                    _log.warning("%s: %s; its loader process is replaced", self.samples.name(death.sample), death.how)
            if deaths > MOST_DEATHS:
                raise RuntimeError(
                    f"{deaths} loader processes have died; the last over {self.samples.name(death.sample)}, which "
                    f"{death.how}. Is memory short (fewer --workers), or a decoder broken (another reader)?"
                )


MOST_DEATHS = 20
"""Loader processes that may die in a run: damaged files are rare, and so many deaths have another cause."""


class _Death(NamedTuple):
    """A loader process that died over a sample."""

    epoch: int
    sample: int
    how: str
    crashed: bool


class _Crew:
    """Loader processes for some steps, and what they are busy with; a context manager that ends them."""

    def __init__(
        self,
        stream: Stream,
        start: int,
        stop: int,
        workers: int,
        pin_memory: bool,
        seconds: float,
        method: StartMethod | None,
    ) -> None:
        self.stream, self.steps, self.seconds = stream, range(start, stop), seconds
        self.desks: Tensor = torch.full((workers, 3), -1, dtype=torch.float64).share_memory_()  # type: ignore[no-untyped-call]
        self.lost: list[_Death] = []
        self.late: dict[int, tuple[int, int]] = {}
        self.closed = threading.Event()
        loader: DataLoader[Any] = DataLoader(
            _Numbered(stream, self.desks),
            batch_sampler=_Numbers(stream, start, stop),
            num_workers=workers,
            collate_fn=_Collate(stream),
            pin_memory=pin_memory,
            worker_init_fn=_as_a_worker if workers else None,
            multiprocessing_context=method if workers else None,
        )
        alarm = signal.getsignal(signal.SIGCHLD)
        self.iterator: Any = iter(loader)
        self.workers: list[Any] = getattr(self.iterator, "_workers", [])
        if workers and threading.current_thread() is threading.main_thread():
            # torch would raise from a signal handler, in the middle of whatever goes on, when a worker dies
            signal.signal(signal.SIGCHLD, alarm or signal.SIG_DFL)
        if workers and seconds < math.inf:
            threading.Thread(target=self._end_the_late, daemon=True).start()

    def arriving(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step, until all have come, or a loader process was lost over a sample."""
        for step in self.steps:
            try:
                batches = [next(self.iterator) for _ in self.stream.share(step)]
            except RuntimeError:
                self.lost = [death for worker in range(len(self.workers)) if (death := self._death(worker))]
                if not self.lost:
                    raise
                return
            yield batches

    def _death(self, worker: int) -> _Death | None:
        """How a loader process died over a sample, if it did."""
        if worker in self.late:
            return _Death(*self.late[worker], f"took more than {self.seconds:g} s to load", crashed=False)
        index, epoch, _ = self.desks[worker].tolist()
        code = self.workers[worker].exitcode
        if index < 0 or code is None:
            return None
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Death(int(epoch), int(index), f"ended the process that loaded it ({how})", crashed=True)

    def _end_the_late(self) -> None:
        """End processes that are too long over a sample; time in which all were suspended is not held against them."""
        tick, last = min(1.0, self.seconds / 4), time.monotonic()
        before, spent = self.desks.tolist(), [0.0] * len(self.workers)
        while not self.closed.wait(tick):
            passed, last = min(time.monotonic() - last, 2 * tick), time.monotonic()
            desks = self.desks.tolist()
            for worker, desk in enumerate(desks):
                spent[worker] = spent[worker] + passed if desk == before[worker] else 0.0
                if desk[0] >= 0 and spent[worker] > self.seconds and self.workers[worker].exitcode is None:
                    self.late[worker] = int(desk[1]), int(desk[0])
                    self.workers[worker].kill()
            before = desks

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        for worker in self.workers:  # asked kindly, they would not hear it; one may be stuck in a file
            worker.kill()
        if self.workers:
            # A killed process may hold the lock of the event by which torch asks them to end, and would for ever.
            self.iterator._workers_done_event = threading.Event()
            # An error's traceback would keep them alive, and Python waits for them before it ends.
            self.iterator._shutdown_workers()


class _Numbers(Sampler[list[tuple[int, int]]]):
    """(epoch, index into the samples) for every micro-batch, from a step to a step."""

    def __init__(self, stream: Stream, start: int, stop: int) -> None:
        self.stream, self.start, self.stop = stream, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        length, order, shuffled = len(self.stream.samples), torch.empty(0), -1
        for step in range(self.start, self.stop):
            for numbers in self.stream.share(step):
                pairs = []
                for number in numbers:
                    epoch, place = divmod(number, length)
                    if epoch != shuffled:
                        order, shuffled = self.stream.order(epoch), epoch
                    pairs.append((epoch, int(order[place])))
                yield pairs


class _Loaded(NamedTuple):
    """A sample, its mask, and which of the samples it is."""

    sample: Sample
    mask: Tensor | None
    which: int


class _Numbered(Dataset[Any]):
    """Loads a sample with the randomness of its epoch, and says meanwhile at which it is."""

    def __init__(self, stream: Stream, desks: Tensor) -> None:
        self.stream, self.desks = stream, desks

    def __getitem__(self, pair: tuple[int, int]) -> _Loaded | UnusableFileError:
        epoch, index = pair
        blamed = self.stream.blamed
        if how := blamed.get((None, index)) or blamed.get((epoch, index)):
            return UnusableFileError(self.stream.samples.name(index), how)
        worker = get_worker_info()
        if worker is None:
            return self._load(epoch, index)
        desk = self.desks[worker.id]
        desk[1], desk[2] = epoch, time.monotonic()
        desk[0] = index
        try:
            return self._load(epoch, index)
        finally:
            desk[0] = -1

    def _load(self, epoch: int, index: int) -> _Loaded | UnusableFileError:
        stream = self.stream
        random = generator(stream.seed, 1, epoch, index, stream.detour)
        draw, count = stream.draw_mask, repeats(stream.samples)
        mask = None if draw is None else torch.cat([draw(random) for _ in range(count)])
        try:
            return _Loaded(stream.samples.load(index, random), mask, index)
        except UnusableFileError as problem:
            return problem


class _Collate:
    """Stacks what could be loaded, and keeps apart what could not."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __call__(self, loaded: list[_Loaded | UnusableFileError]) -> Batch:
        skipped = [item for item in loaded if isinstance(item, UnusableFileError)]
        usable = [item for item in loaded if not isinstance(item, UnusableFileError)]
        shape, count = (-1, 3, *self.stream.size), repeats(self.stream.samples)
        masks = [one.mask for one in usable if one.mask is not None]
        others = [one.sample.second for one in usable if one.sample.second is not None]
        second = torch.stack(others).reshape(shape) if others else None
        if usable:
            pixels = torch.stack([one.sample.pixels for one in usable]).reshape(shape)
            mask = torch.cat(masks) if masks else None
        else:
            pixels = torch.empty(0, *shape[1:], dtype=torch.uint8)
            drawn = None if self.stream.draw_mask is None else self.stream.draw_mask(generator(0))
            mask = None if drawn is None else drawn[:0]
            second = pixels if views(self.stream.samples) == 2 else None
        labels = torch.tensor([one.sample.label for one in usable], dtype=torch.long).repeat_interleave(count)
        indices = torch.tensor([one.which for one in usable], dtype=torch.long).repeat_interleave(count)
        return Batch(pixels, labels, mask, skipped, indices, second)


def _as_a_worker(worker: int) -> None:
    """Leave Ctrl-C and the cluster's signals, which reach every process of the group, to the parent; die with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
