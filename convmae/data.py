"""From a source of samples to batches: the seam every kind of data plugs into.

A *source* (an image folder, a video folder, your own frozen dataclass) says where samples are; opened for the
model's input size it gives *samples*, which load one at a time. `Stream` turns samples into batches.

What is drawn never depends on the number of processes, of loader workers, or on what was drawn before: the n-th
sample of a run, its augmentation and its mask follow from (seed, n) alone. So a run may stop and go on anywhere,
and its global batches are the same on any number of nodes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
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
    """Where samples are. A frozen dataclass, so that a run prints, compares and pickles."""

    def open(self, size: tuple[int, ...]) -> Samples:
        """List the samples, to be loaded at `size`, `(H, W)` or `(T, H, W)` pixels.

        Raises ValueError where the location does not exist or holds nothing usable.
        """
        ...
