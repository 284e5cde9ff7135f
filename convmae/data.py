"""From a source of samples to batches: the seam every kind of data plugs into.

A *source* (an image folder, a video folder, your own frozen dataclass) says where samples are; opened for the
model's input size it gives *samples*, which load one at a time. `Stream` turns samples into batches.

What is drawn never depends on the number of processes, of loader workers, or on what was drawn before: the order of
an epoch follows from (seed, epoch), a sample's augmentation and mask from (seed, epoch, sample index), alone. So a run
may stop and go on anywhere, and its global batches are the same on any number of nodes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

UNLABELLED = -1


class UnusableFileError(Exception):
    """A sample that cannot be loaded: `name` is the file, `reason` one line on what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Sample(NamedTuple):
    """One loaded sample: pixels uint8 `(3, *size)` in RGB, and its class, or `UNLABELLED`."""

    pixels: Tensor
    label: int = UNLABELLED


class Samples(Protocol):
    """An opened source. It must pickle (loader workers get a copy) and hold no open file."""

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

    A source with a field `root` can be pointed elsewhere: `--data` and `$CONVMAE_DATA` replace it.
    """

    def open(self, size: tuple[int, ...]) -> Samples:
        """List the samples, to be loaded at `size`, `(H, W)` or `(T, H, W)` pixels.

        Raises ValueError where the location does not exist or holds nothing usable.
        """
        ...


class Batch(NamedTuple):
    """What the loader gives: n usable samples, and those that were not.

    pixels uint8 `(n, 3, *size)`; labels `(n)`; mask, as it was drawn, `(n * groups, *grid)`, or None; skipped: the
    errors of samples that could not be loaded. n can be 0: then pixels and mask are empty in their first axis.
    """

    pixels: Tensor
    labels: Tensor
    mask: Tensor | None
    skipped: list[UnusableFileError]


def generator(*key: int) -> torch.Generator:
    """A generator whose numbers follow from the key alone; different keys give independent numbers."""
    high, low = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(high ^ low) & (2**63 - 1))


@dataclass(frozen=True)
class Stream:
    """The samples of a run in order: number n is the `n mod len`-th of epoch `n // len`, shuffled anew each epoch.

    Args:
        samples: the opened source.
        size: of the input in pixels, `(H, W)` or `(T, H, W)`.
        seed: of the run.
        batch_size: samples of a step over all processes.
        rank, world: this process and how many share a step; every step's samples are dealt out to them in turn.
        micro_batch: the most samples a process takes at once; None = its whole share of a step.
        draw_mask: draws a sample's mask from a generator, `(1, *grid)`, or `(groups, *grid)`; None draws none.
        detour: another number is another order, and other augmentation and masks, of the same samples.
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

    def steps_in(self, epochs: float) -> int:
        """Steps in so many passes over the samples, at least one."""
        return max(1, round(epochs * len(self.samples) / self.batch_size))

    def share(self, step: int) -> list[list[int]]:
        """The sample numbers this process takes in a step, by micro-batch.

        All processes have equally many micro-batches, as sharded models need; so the last of some may be empty.
        """
        first = step * self.batch_size
        own = range(first + self.rank, first + self.batch_size, self.world)
        most = -(-self.batch_size // self.world)
        size = self.micro_batch or most
        return [list(own[at : at + size]) for at in range(0, most, size)]

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch, by index, as they are taken."""
        return torch.randperm(len(self.samples), generator=generator(self.seed, 0, epoch, self.detour))

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
        self, start: int, stop: int, *, workers: int, pin_memory: bool = False
    ) -> Generator[list[Batch], None, None]:
        """For each step from start to stop, its micro-batches, loaded ahead by so many processes (0: in this one)."""
        loader: DataLoader[Any] = DataLoader(
            _Numbered(self),
            batch_sampler=_Numbers(self, start, stop),
            num_workers=workers,
            collate_fn=_Collate(self),
            pin_memory=pin_memory,
            worker_init_fn=_as_a_worker if workers else None,
            persistent_workers=False,
        )
        others = set(multiprocessing.active_children())
        arriving: Any = iter(loader)
        ours = set(multiprocessing.active_children()) - others
        try:
            for step in range(start, stop):
                yield [next(arriving) for _ in self.share(step)]
        finally:
            if ours:
                # An error's traceback would keep them alive, and Python waits for them before it ends.
                arriving._shutdown_workers()
            for worker in ours:  # asked kindly, they would not hear it; one may be stuck in a file
                worker.kill()


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


class _Numbered(Dataset[Any]):
    """Loads a sample with the randomness of its epoch."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Sample, Tensor | None] | UnusableFileError:
        epoch, index = pair
        random = generator(self.stream.seed, 1, epoch, index, self.stream.detour)
        mask = None if self.stream.draw_mask is None else self.stream.draw_mask(random)
        try:
            return self.stream.samples.load(index, random), mask
        except UnusableFileError as problem:
            return problem


class _Collate:
    """Stacks what could be loaded, and keeps apart what could not."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __call__(self, loaded: list[tuple[Sample, Tensor | None] | UnusableFileError]) -> Batch:
        skipped = [item for item in loaded if isinstance(item, UnusableFileError)]
        usable = [item for item in loaded if not isinstance(item, UnusableFileError)]
        pixels = [sample.pixels for sample, _ in usable]
        masks = [mask for _, mask in usable if mask is not None]
        if usable:
            stacked, mask = torch.stack(pixels), torch.cat(masks) if masks else None
        else:
            stacked = torch.empty(0, 3, *self.stream.size, dtype=torch.uint8)
            drawn = None if self.stream.draw_mask is None else self.stream.draw_mask(generator(0))
            mask = None if drawn is None else drawn[:0]
        return Batch(stacked, torch.tensor([sample.label for sample, _ in usable], dtype=torch.long), mask, skipped)


def _as_a_worker(worker: int) -> None:
    """Leave Ctrl-C and the cluster's signals, which reach every process of the group, to the parent; die with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
