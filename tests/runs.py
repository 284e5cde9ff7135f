"""Tiny runs, importable by name from other processes, for the tests of training."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from convmae import AttentionStage, ConvMAE, ConvStage
from convmae.builders import MAE
from convmae.data import Sample, Samples, UnusableFileError
from convmae.training import Pretrain, steps


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Random pictures; those numbered in `bad` cannot be loaded."""

    count: int = 20
    bad: tuple[int, ...] = ()

    def open(self, size: tuple[int, ...]) -> Samples:
        return NoiseSamples(source=self, size=size)


@dataclass(frozen=True, kw_only=True)
class NoiseSamples:
    source: Noise
    size: tuple[int, ...]

    def __len__(self) -> int:
        return self.source.count

    def name(self, index: int) -> str:
        return f"noise-{index}"

    def load(self, index: int, generator: torch.Generator) -> Sample:
        if index in self.source.bad:
            raise UnusableFileError(self.name(index), "it is bad")
        return Sample(torch.randint(256, (3, *self.size), generator=generator, dtype=torch.uint8))


@dataclass(frozen=True, kw_only=True)
class Exploding:
    """A target that is not a number from some batch on."""

    def values(self, pixels: int, channels: int) -> int:
        return 1

    def __call__(self, patches: Tensor) -> Tensor:
        mean = patches.mean((2, 3), keepdim=True).flatten(2)
        return mean * float("nan") if len(patches) > 3 else mean  # `build` tries it on two samples


def tiny() -> MAE:
    return (
        ConvMAE()
        .input(32)
        .stages(
            ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
            AttentionStage(dim=16, depth=1, stride=(2, 2), heads=2),
        )
        .decode(dim=16, depth=1, heads=2)
        .drop_path(0.2)
    )


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    folder: Path
    data: Noise = field(default_factory=Noise)

    def run(self) -> Pretrain:
        return Pretrain(
            model=tiny(),
            data=self.data,
            epochs=2,
            batch_size=5,
            folder=self.folder,
            base_lr=1e-2,
            warmup_epochs=0.5,
            workers=0,
            log_every=1,
            pictures=2,
            checkpoint_minutes=0,
        )


if __name__ == "__main__":  # a process of a run: losses to a file, one a rank
    folder = Path(sys.argv[1])
    run = replace(TinyRun(folder=folder, data=Noise(bad=(3, 4))).run(), model=tiny().drop_path(0))
    losses = [step.loss for step in steps(run)]
    (folder / f"losses-{os.environ.get('RANK', '0')}").write_text(repr(losses))
