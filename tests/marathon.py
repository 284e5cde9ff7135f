"""Recipes for the cluster's tests: a tiny model on samples that take their time, so that a run can be struck midway."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from convmae import AttentionStage, ConvMAE, ConvStage
from convmae.data import Sample, Samples
from convmae.files import append_line
from convmae.training import Pretrain


@dataclass(frozen=True, kw_only=True)
class Runners:
    """Random pictures, each after so many seconds.

    With `record`, every process writes the index and digest of what it loads, in order, to a file in this folder. With
    `trouble`, the process of rank 1 raises the error of this name when it has loaded three.
    """

    seconds: float = 0.0
    record: Path | None = None
    trouble: str = ""

    def open(self, size: tuple[int, ...]) -> Samples:
        """The pictures."""
        return Course(self, size)


class Course:
    """The opened pictures."""

    def __init__(self, runners: Runners, size: tuple[int, ...]) -> None:
        self.runners, self.size, self.loaded = runners, size, 0

    def __len__(self) -> int:
        return 40

    def name(self, index: int) -> str:
        """A picture's."""
        return f"runner-{index}"

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """A picture, from the generator alone."""
        self.loaded += 1
        time.sleep(self.runners.seconds)
        if self.runners.trouble and self.loaded > 3 and os.environ["RANK"] == "1":
            raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[self.runners.trouble](
                "rank one has had enough"
            )
        pixels = torch.randint(256, (3, *self.size), generator=generator, dtype=torch.uint8)
        if self.runners.record is not None:
            path = self.runners.record / f"rank-{os.environ.get('RANK', '0')}.jsonl"
            append_line(path, {"index": index, "digest": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()})
        return Sample(pixels)


def marathon() -> Pretrain:
    """About twenty seconds on four processes, with a checkpoint every five steps."""
    model = (
        ConvMAE()
        .input(32)
        .stages(
            ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
            AttentionStage(dim=32, depth=2, stride=(2, 2), heads=2),
        )
        .decode(dim=32, depth=1, heads=2)
    )
    return Pretrain(
        model=model,
        data=Runners(seconds=0.15),
        epochs=12,
        batch_size=8,
        base_lr=1e-2,
        warmup_epochs=2,
        workers=0,
        log_every=1,
        pictures=2,
        checkpoint_steps=5,
        folder=Path("runs/marathon"),
    )


def stroll() -> Pretrain:
    """The same at a slow pace: longer than SLURM's shortest time limit leaves it."""
    return replace(marathon(), data=Runners(seconds=0.6))


def sprint() -> Pretrain:
    """Ten steps, whose samples are written down beside the run's folder."""
    return replace(marathon(), data=Runners(record=Path(os.environ["RECORD"])), epochs=2, warmup_epochs=0.5, pictures=0)


def unlucky() -> Pretrain:
    """It fails by chance, so to say."""
    return replace(marathon(), data=Runners(trouble="RuntimeError"))


def mistaken() -> Pretrain:
    """It would always fail."""
    return replace(marathon(), data=Runners(trouble="ValueError"))
