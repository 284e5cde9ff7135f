"""The demo's motions as a source that decodes nothing: drawn once, and read from memory by all processes.

Decoding a small clip takes about as long as training on it does, for small models on CPUs. What is cut out of the
frames, and how, is as for files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from convmae import demo
from convmae.data import Sample
from video.readers import Track
from video.videos import Clips

COUNTS = {"train": 100, "val": 50}
"""Clips of each motion: more than in the usual demo set, so that one can tell."""
FRAMES, SIDE = 32, 48


@dataclass(frozen=True, kw_only=True)
class Motions(Clips):
    """Clips of the demo's motions, of 32 frames of 48 pixels; its classes are the motions."""

    split: str = "train"

    def open(self, size: tuple[int, ...]) -> MotionSamples:
        """Draw them, where that was not done before; takes and raises what other sources of clips do."""
        self.check(size)
        return MotionSamples(source=self, size=(size[0], size[1], size[2]), folder=drawn())


@dataclass(frozen=True, kw_only=True, eq=False)
class MotionSamples:
    """The clips, motion by motion."""

    source: Motions
    size: tuple[int, int, int]
    folder: Path

    classes = demo.MOTIONS

    @property
    def repeats(self) -> int:
        return self.source.given

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(len(self)) // COUNTS[self.source.split]

    def __len__(self) -> int:
        return len(self.classes) * COUNTS[self.source.split]

    def __repr__(self) -> str:
        return f"{len(self)} clips of the demo's motions as clips of {self.size}"

    def name(self, index: int) -> str:
        label, number = divmod(index, COUNTS[self.source.split])
        return f"{self.source.split}/{self.classes[label]}/{number:03}"

    def load(self, index: int, generator: torch.Generator) -> Sample:
        choose = self.source.choosing(self.size[0], generator)
        frames = frames_in(self.folder / f"{self.source.split}.npy")[index, choose(Track(FRAMES, 16.0, SIDE, SIDE))]
        return Sample(self.source.cut(frames, self.size, generator), int(self.labels[index]))


@cache
def frames_in(path: Path) -> NDArray[np.uint8]:
    """Frames `(N, T, H, W, 3)`; the processes of a machine share them."""
    frames: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return frames


def drawn() -> Path:
    """The folder with the frames of all clips, which are drawn on first use, in a minute; 350 MB."""
    return demo.cached("demo-motions-48", _draw)


def _draw(folder: Path) -> None:
    for split, (name, count) in enumerate(COUNTS.items()):
        shape = (len(demo.MOTIONS) * count, FRAMES, SIDE, SIDE, 3)
        frames = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, shape)
        for index in range(len(frames)):
            label, number = divmod(index, count)
            random = np.random.default_rng([demo.SEED, split, label, number])
            frames[index] = demo.clip(demo.MOTIONS[label], random, frames=FRAMES, size=SIDE)
        frames.flush()
