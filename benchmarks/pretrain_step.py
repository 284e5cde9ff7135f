"""What a pretraining step costs: ours, the published dense-masked form, and the plain ViT's, in one run.

    python benchmarks/pretrain_step.py                            Base, on the GPU if there is one
    python benchmarks/pretrain_step.py --device cpu --only image
    python benchmarks/pretrain_step.py --quick                    tiny models, to see that it runs

See benchmarks/README.md for what is measured, and how.
"""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal

import torch
import tyro
from dense_masked import DenseMasked, disagreement
from measure import Step, Work, batch, count_work, peak_memory, ratio, rounds
from rich.console import Console
from rich.table import Table
from sides import TRANSFORMERS, Family, Pretraining, Side, base, sides, tiny

import convmae

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-4  # of the dense-masked form in float32: it sums in another order
PEERS: dict[Family, str] = {"video": "videomae", "image": "mae"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a pretraining step costs: ours, the published dense-masked form, and the plain ViT's, in one run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU if there is one."""
    batch_size: int | None = None
    """Clips of a step; a step on images has one for every two frames. Default 1 on the CPU, 16 on the GPU."""
    rounds: int = 5
    """Timed rounds; in each, every side runs once."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Autocast of the forward; float32 is none. Default float32 on the CPU, bfloat16 on the GPU."""
    compile: bool = False
    """Compile every side with torch.compile."""
    only: Family | None = None
    """Only the sides on clips, or on images."""
    sides: tuple[str, ...] = ()
    """Only these sides, by name: videoconvmae-k3 videoconvmae-dense-k3 videomae convmae ..."""
    quick: bool = False
    """Tiny models, to see that it runs: the figures mean nothing."""

    def step(self) -> Step:
        """How a step is run."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype or ("float32" if device == "cpu" else "bfloat16")
        return Step(device=device, dtype=DTYPES[dtype], compiled=self.compile, threads=torch.get_num_threads())

    def known(self) -> list[Side]:
        """All sides there are."""
        return sides(tiny() if self.quick else base())

    def selected(self) -> list[Side]:
        """The sides asked for, those of transformers included whether it is installed or not.

        Raises:
            ValueError: a name is unknown, or no side is left.
        """
        known = self.known()
        unknown = sorted(set(self.sides) - {side.name for side in known})
        if unknown:
            names = ", ".join(side.name for side in known)
            raise ValueError(f"--sides {' '.join(unknown)}: no such side; there are {names}")
        named = [side for side in known if not self.sides or side.name in self.sides]
        chosen = [side for side in named if self.only in (None, side.family)]
        if not chosen:
            raise ValueError(f"--sides {' '.join(self.sides)} --only {self.only}: no side is left")
        return chosen


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A ratio of two sides' times, and the bound that the project sets itself for it."""

    text: str
    numerator: str
    denominator: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        return f"at most {self.at_most:.2f}" if self.at_least is None else f"at least {self.at_least:.2f}"

    def met(self, value: float) -> bool:
        """Whether the ratio keeps the bound."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


DEMANDS = (
    Demand(
        text="VideoConvMAE, kernel 3 / VideoMAE",
        numerator="videoconvmae-k3",
        denominator="videomae",
        at_most=1.25,
    ),
    Demand(
        text="dense-masked, kernel 3 / VideoConvMAE, kernel 3",
        numerator="videoconvmae-dense-k3",
        denominator="videoconvmae-k3",
        at_least=4.0,
    ),
    Demand(
        text="dense-masked ConvMAE / ConvMAE",
        numerator="convmae-dense",
        denominator="convmae",
        at_least=1.4,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a side: samples of its step, seconds of each round, bytes at the peak, and its work."""

    side: Side
    samples: int
    seconds: list[float]
    memory: int
    work: Work


def headline(step: Step, clips: int, images: int) -> Iterator[str]:
    """What a reader needs to compare this run with another."""
    yield (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; convmae {convmae.__version__}, torch {torch.__version__}, "
        f"transformers {version('transformers') if TRANSFORMERS else 'missing'}, Python {platform.python_version()}"
    )
    if step.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        device = f"{platform.machine()} with {instructions}, {step.threads} threads"
    yield (
        f"{step.device}: {device}; {str(step.dtype).removeprefix('torch.')}, "
        f"{'compiled' if step.compiled else 'not compiled'}; {clips} clips or {images} images a step"
    )


def agreement(chosen: Sequence[Side], device: str) -> Iterator[str]:
    """Compare every dense-masked side with the model whose weights it shares, in float32 without autocast.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    for side in chosen:
        module = side.build()
        if isinstance(module, Pretraining) and isinstance(module.model, DenseMasked):
            latent, loss = disagreement(module.model.to(device), *batch(side.source, 1, device))
            line = f"{side.name}: latent within {latent:.0e}, loss within {loss:.0e} of the sparse form"
            if max(latent, loss) > TOLERANCE:
                raise SystemExit(f"{line}: it must be within {TOLERANCE:.0e}")
            yield line


def measure(chosen: Sequence[Side], clips: int, step: Step, *, count: int, progress: Console) -> list[Measured]:
    """Work, then peak memory, side by side; then the time of all sides, round by round."""
    samples = [clips * side.per_clip for side in chosen]
    work, memory = [], []
    for side, size in zip(chosen, samples, strict=True):
        work.append(count_work(side, step.device))
        memory.append(peak_memory(side, size, step))
        progress.print(f"{side.name}: {work[-1].forward / 1e9:.2f} GMAC, peak {memory[-1] / 2**20:.0f} MiB")
    inputs = [batch(side.source, size, step.device) for side, size in zip(chosen, samples, strict=True)]
    timed = []
    for seconds in rounds([step.prepare(side) for side in chosen], inputs, step, count=count):
        timed.append(seconds)
        progress.print(f"round {len(timed)} of {count}: {sum(seconds):.1f} s")
    return [
        Measured(side=side, samples=size, seconds=list(seconds), memory=peak, work=counted)
        for side, size, seconds, peak, counted in zip(
            chosen, samples, zip(*timed, strict=True), memory, work, strict=True
        )
    ]


def aligned(title: str, *columns: str) -> Table:
    """An empty table: the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def costs(results: Sequence[Measured]) -> Table:
    """Time and peak memory; ratios to the plain ViT of the same family, where it was measured."""
    table = aligned(
        "Forward and backward",
        *("side", "median s", "min .. max s", "samples/s", "time / peer", "peak MiB", "peak / peer"),
    )
    by_name = {result.side.name: result for result in results}
    for result in results:
        median = statistics.median(result.seconds)
        peer = by_name.get(PEERS[result.side.family])
        table.add_row(
            result.side.title,
            f"{median:.3f}",
            f"{min(result.seconds):.3f} .. {max(result.seconds):.3f}",
            f"{result.samples / median:.2f}",
            f"{ratio(result.seconds, peer.seconds):.2f}" if peer else "-",
            f"{result.memory / 2**20:.0f}",
            f"{result.memory / peer.memory:.2f}" if peer else "-",
        )
    return table


def works(results: Sequence[Measured]) -> Table:
    """Multiply-accumulates and parameters."""
    table = aligned(
        "One sample's forward (fvcore), and parameters", "side", "GMAC", "without decoder", "million parameters"
    )
    for result in results:
        numbers = result.work.forward / 1e9, result.work.encoder / 1e9, result.work.parameters / 1e6
        table.add_row(result.side.title, *(f"{number:.2f}" for number in numbers))
    return table


def verdicts(results: Sequence[Measured], *, quick: bool) -> Table:
    """The closing block: the ratios that the project demands of itself, on two CPU cores in float32."""
    table = aligned("To reach on 2 CPU cores, float32, Base", "ratio of times", "measured", "bound", "verdict")
    seconds = {result.side.name: result.seconds for result in results}
    for demand in DEMANDS:
        if demand.numerator not in seconds or demand.denominator not in seconds:
            table.add_row(demand.text, "-", str(demand), "not measured")
            continue
        value = ratio(seconds[demand.numerator], seconds[demand.denominator])
        verdict = "none: tiny models" if quick else "met" if demand.met(value) else "not met"
        table.add_row(demand.text, f"{value:.2f}", str(demand), verdict)
    return table


def available(chosen: Sequence[Side], console: Console) -> list[Side]:
    """The sides that can run: without transformers its own are left out, and that is said."""
    missing = [side.name for side in chosen if side.needs_transformers and not TRANSFORMERS]
    if missing:
        line = f'{", ".join(missing)} left out: transformers is not installed; pip install -e ".[bench]" brings it'
        console.print(line, markup=False)
    return [side for side in chosen if side.name not in missing]


def main(options: Options) -> None:
    """Measure what was asked for, and print it.

    Raises:
        ValueError: `--sides` has an unknown name, or no side is left.
    """
    console, progress = Console(highlight=False), Console(stderr=True, style="dim", highlight=False)
    if not console.is_terminal:
        console.width = 120
    step = options.step()
    if step.device == "cuda":  # fair to all sides: no TF32 in what is called float32, cuDNN's fastest convolutions
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    clips = options.batch_size or (1 if step.device == "cpu" else 16)
    chosen = available(options.selected(), console)
    for line in headline(step, clips, clips * max(side.per_clip for side in options.known())):
        console.print(line)
    for line in agreement(chosen, step.device):
        console.print(line)
    results = measure(chosen, clips, step, count=options.rounds, progress=progress)
    console.print(costs(results), works(results), verdicts(results, quick=options.quick), sep="\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as problem:
        sys.exit(str(problem))
