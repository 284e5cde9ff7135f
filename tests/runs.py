"""Tiny runs, importable by name from other processes, for the tests of training.

RANK=0 WORLD_SIZE=1 python runs.py FOLDER "dict(epochs=1)"        fit the tiny run, with these changes
"""

from __future__ import annotations

import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convmae import CMAE, AttentionStage, ConvMAE, ConvStage, masking, targets
from convmae.builders import MAE
from convmae.data import Sample, Samples, UnusableFileError
from convmae.files import append_line, lines
from convmae.images import ImageFolder, RandomResizedCrop
from convmae.probe import Probe
from convmae.training import Pretrain, fit


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Random pictures; those numbered in `bad` cannot be loaded, `white` ones are white, `stuck` ones never come.

    With `record`, every process writes down what it loads, in files of this folder: a line of index and digest each.
    """

    count: int = 20
    bad: tuple[int, ...] = ()
    white: tuple[int, ...] = ()
    stuck: tuple[int, ...] = ()
    record: Path | None = None
    root: Path = Path("noise")

    def open(self, size: tuple[int, ...]) -> Samples:
        return NoiseSamples(source=self, size=size)


@dataclass(frozen=True, kw_only=True)
class NoiseSamples:
    source: Noise
    size: tuple[int, ...]

    def __len__(self) -> int:
        return self.source.count - int(os.environ.get("NOISE_MISSING", 0))

    def name(self, index: int) -> str:
        return str(self.source.root / f"noise-{index}")

    def load(self, index: int, generator: torch.Generator) -> Sample:
        if index in self.source.bad:
            raise UnusableFileError(self.name(index), "it is bad")
        while index in self.source.stuck:
            time.sleep(1)
        pixels = torch.randint(256, (3, *self.size), generator=generator, dtype=torch.uint8)
        if index in self.source.white:
            pixels.fill_(255)
        if self.source.record is not None:
            digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
            append_line(self.source.record / f"rank-{os.environ.get('RANK', '0')}.jsonl", {"is": [index, digest]})
        return Sample(pixels)


@dataclass(frozen=True, kw_only=True)
class TwoNoises(Noise):
    """Random pictures, and beside each another one that is much like it."""

    def open(self, size: tuple[int, ...]) -> Samples:
        return TwoNoisesSamples(source=self, size=size)


@dataclass(frozen=True, kw_only=True)
class TwoNoisesSamples(NoiseSamples):
    views = 2

    def load(self, index: int, generator: torch.Generator) -> Sample:
        if index in self.source.bad:
            raise UnusableFileError(self.name(index), "it is bad")
        kind = torch.Generator().manual_seed(index)
        coarse = torch.randint(256, (3, *(side // 8 for side in self.size)), generator=kind, dtype=torch.uint8)
        for axis in range(1, coarse.ndim):
            coarse = coarse.repeat_interleave(8, dim=axis)
        change = torch.randint(0, 40, coarse.shape, generator=generator, dtype=torch.uint8)
        if index in self.source.white:
            coarse = torch.full_like(coarse, 255)
        return Sample(coarse, second=coarse // 2 + change)


@dataclass(frozen=True, kw_only=True)
class NotOfWhite:
    """A target that is not a number where a patch is white."""

    def values(self, pixels: int, channels: int) -> int:
        return 1

    def __call__(self, patches: Tensor) -> Tensor:
        mean = patches.mean((2, 3), keepdim=True).flatten(2)
        white = patches.amin((2, 3)).unsqueeze(2) > 2.2  # ImageNet-normalised
        return torch.where(white, float("nan"), mean)


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


def meeting(world: int) -> dict[str, str]:
    """The variables by which so many processes meet, at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def several(
    world: int,
    *words: str | Path,
    seconds: float = 600,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
) -> tuple[list[int], list[str]]:
    """Run Python with these words in so many processes that meet, from this folder: their exit codes and output.

    `meanwhile` is called with the last one, while they run.
    """
    ours = {**meeting(world), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **ours, "RANK": str(rank)},
            cwd=Path(__file__).parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        if meanwhile is not None:
            meanwhile(processes[-1])
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def together(
    folder: Path, world: int, *, interrupt_at: int | None = None, **changes: Any
) -> tuple[list[int], list[str]]:
    """Fit the tiny run in so many processes: their exit codes and output; interrupted once a step was reached."""

    def interrupt(process: subprocess.Popen[str]) -> None:  # any rank may be the one that is told
        until = time.monotonic() + 120
        while interrupt_at is not None and time.monotonic() < until:
            if any(line["step"] >= interrupt_at for line in lines(folder / "metrics.jsonl")):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)

    given = f"dict({', '.join(f'{name}={value!r}' for name, value in changes.items())})"
    return several(world, "runs.py", folder, given, meanwhile=interrupt)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "metrics.jsonl")]


def main() -> None:
    torch.set_num_threads(1)
    ours = {kind.__name__: kind for kind in (CMAE, Probe, ImageFolder, RandomResizedCrop)}
    names = {**ours, "PosixPath": Path, "masking": masking, "targets": targets}  # of what changes print as
    changes = eval(sys.argv[2], {**globals(), **names})
    fit(replace(TinyRun(folder=Path(sys.argv[1])).run(), **changes))


if __name__ == "__main__":  # classes in a checkpoint are found by name, so not as __main__'s
    importlib.import_module("runs").main()
