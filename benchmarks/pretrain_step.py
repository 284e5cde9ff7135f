"""What a pretraining step costs: ours, the published dense-masked form, and the plain ViT's, in one run.

    python benchmarks/pretrain_step.py                       Base, on the GPU if there is one
    python benchmarks/pretrain_step.py --device cpu --only image
    python benchmarks/pretrain_step.py --quick               tiny models, to see that it runs

See benchmarks/README.md for what is measured, and how.
"""

from __future__ import annotations

import platform
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import convmae
from dense_masked import DenseMasked, disagreement
from measure import Step, Work, batch, count_work, peak_memory, ratio, rounds
from sides import TRANSFORMERS, Pretraining, Side, base, sides, tiny

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-4  # float32; the two forms sum in different orders


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
    """Autocast of the forward. Default float32 on the CPU, bfloat16 on the GPU."""
    compile: bool = False
    """Compile every side with torch.compile."""
    only: Literal["video", "image"] | None = None
    """Only the sides on clips, or on images."""
    sides: tuple[str, ...] = ()
    """Only these sides, by name (videoconvmae-k3, videoconvmae-dense-k3, videomae, convmae, ...)."""
    quick: bool = False
    """Tiny models, one round: to see that it runs; its figures mean nothing."""

    def step(self) -> Step:
        """How a step is run."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype or ("float32" if device == "cpu" else "bfloat16")
        threads = torch.get_num_threads()
        return Step(device=device, dtype=DTYPES[dtype], compiled=self.compile, threads=threads)

    def selected(self) -> list[Side]:
        """The sides asked for, those of transformers included.

        Raises:
            ValueError: a side has an unknown name, or none is left.
        """
        known = list(sides(tiny() if self.quick else base()))
        unknown = set(self.sides) - {side.name for side in known}
        if unknown:
            names = ", ".join(side.name for side in known)
            raise ValueError(f"--sides {' '.join(sorted(unknown))}: the sides are {names}")
        chosen = [
            side
            for side in known
            if (not self.sides or side.name in self.sides) and self.only in (None, side.family)
        ]
        if not chosen:
            raise ValueError(f"no side is left of --sides {' '.join(self.sides)} with --only {self.only}")
        return chosen


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A ratio of two sides' times, and the bound that the project sets itself for it."""

    text: str
    numerator: str
    denominator: str
    bound: float
    at_most: bool

    def met(self, value: float) -> bool:
        """Whether the ratio keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


DEMANDS = (
    Demand(
        text="VideoConvMAE kernel 3 / VideoMAE",
        numerator="videoconvmae-k3",
        denominator="videomae",
        bound=1.25,
        at_most=True,
    ),
    Demand(
        text="dense-masked kernel 3 / VideoConvMAE kernel 3",
        numerator="videoconvmae-dense-k3",
        denominator="videoconvmae-k3",
        bound=4.0,
        at_most=False,
    ),
    Demand(
        text="dense-masked ConvMAE / ConvMAE",
        numerator="convmae-dense",
        denominator="convmae",
        bound=1.4,
        at_most=False,
    ),
)
PEERS = {"video": ("videomae", "videoconvmae-k3"), "image": ("mae", "convmae")}  # ratios are to the first measured


def header(options: Options, step: Step, clips: int) -> Sequence[str]:
    """What a reader needs to compare this run with another."""
    name = torch.cuda.get_device_name() if step.device == "cuda" else f"{platform.processor() or 'CPU'}"
    transformers = "not installed"
    if TRANSFORMERS:
        import transformers as package

        transformers = package.__version__
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; convmae {convmae.__version__}, torch "
        f"{torch.__version__}, transformers {transformers}, Python {platform.python_version()}",
        f"{step.device}: {name}, {step.threads} threads; {str(step.dtype).removeprefix('torch.')}, "
        f"{'compiled' if step.compiled else 'not compiled'}; {clips} clips or {images(options, clips)} images a step; "
        f"{options.rounds if not options.quick else 1} rounds",
    )


def images(options: Options, clips: int) -> int:
    """Images of a step: one for every two frames of the clips, as many tokens."""
    frames = (tiny() if options.quick else base()).clips.size[0]
    return clips * frames // 2


def check_references(chosen: Sequence[Side], device: str) -> list[str]:
    """Compare every dense-masked side with the model whose weights it shares, in float32, without autocast.

    Raises:
        SystemExit: they differ by more than rounding: then the reference is no reference.
    """
    lines = []
    for side in chosen:
        module = side.build()
        if not (isinstance(module, Pretraining) and isinstance(module.model, DenseMasked)):
            continue
        model = module.model.model.to(device)
        latent, loss = disagreement(model, *batch(side.source, 1, device))
        lines.append(f"{side.name}: latent within {latent:.0e}, loss within {loss:.0e} of the sparse model's")
        if max(latent, loss) > TOLERANCE:
            raise SystemExit(f"{lines[-1]}: more than rounding ({TOLERANCE:.0e})")
    return lines


def show_times(times: dict[str, list[float]], chosen: Sequence[Side], sizes: Sequence[int], memory: Sequence[int]) -> Table:
    """The table of times and peak memory."""
    table = Table(title="Forward and backward", title_justify="left")
    table.add_column("side", no_wrap=True)
    for column in ("median s", "min .. max s", "samples/s", "x of peer", "peak MiB", "x of peer"):
        table.add_column(column, justify="right", no_wrap=True)
    peaks = dict(zip(times, memory, strict=True))
    for side, size in zip(chosen, sizes, strict=True):
        seconds = times[side.name]
        median = statistics.median(seconds)
        peer = next((name for name in PEERS[side.family] if name in times), side.name)
        table.add_row(
            side.title,
            f"{median:.3f}",
            f"{min(seconds):.3f} .. {max(seconds):.3f}",
            f"{size / median:.2f}",
            f"{ratio(seconds, times[peer]):.2f}",
            f"{peaks[side.name] / 2**20:.0f}",
            f"{peaks[side.name] / peaks[peer]:.2f}",
        )
    return table


def show_work(chosen: Sequence[Side], work: Sequence[Work]) -> Table:
    """The table of multiply-accumulates and parameters."""
    table = Table(title="One sample's forward (fvcore), and parameters", title_justify="left")
    table.add_column("side", no_wrap=True)
    for column in ("GMAC", "encoder GMAC", "parameters M"):
        table.add_column(column, justify="right", no_wrap=True)
    for side, counted in zip(chosen, work, strict=True):
        table.add_row(
            side.title,
            f"{counted.forward / 1e9:.2f}",
            f"{counted.encoder / 1e9:.2f}",
            f"{counted.parameters / 1e6:.2f}",
        )
    return table


def show_demands(times: dict[str, list[float]], *, quick: bool) -> Table:
    """The closing block: the ratios that the project demands of itself on two CPU cores in float32."""
    table = Table(title="To reach on 2 CPU cores, float32", title_justify="left")
    for column in ("ratio of times", "measured", "bound", ""):
        table.add_column(column, no_wrap=True)
    for demand in DEMANDS:
        bound = f"{'at most' if demand.at_most else 'at least'} {demand.bound:.2f}"
        if demand.numerator not in times or demand.denominator not in times:
            table.add_row(demand.text, "-", bound, "not measured")
            continue
        value = ratio(times[demand.numerator], times[demand.denominator])
        verdict = "tiny models: no verdict" if quick else "met" if demand.met(value) else "not met"
        table.add_row(demand.text, f"{value:.2f}", bound, verdict)
    return table


def set_fairly(device: str) -> None:
    """Settings that hold for all sides: no TF32 in what is called float32, the fastest convolution of cuDNN's."""
    warnings.filterwarnings("ignore", message=".*torch.jit.*")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True


def main(options: Options) -> None:
    """Measure what was asked for, and print it.

    Raises:
        ValueError: `--sides` names an unknown side, or nothing is left to run.
    """
    console, progress = Console(), Console(stderr=True)
    chosen, step = options.selected(), options.step()
    if not console.is_terminal:
        console.width = 120
    if not TRANSFORMERS and any(side.needs_transformers for side in chosen):
        missing = ", ".join(side.name for side in chosen if side.needs_transformers)
        console.print(
            f'transformers is not installed: {missing} left out; install it by pip install -e ".\\[bench]"'
        )
        chosen = [side for side in chosen if not side.needs_transformers]
    set_fairly(step.device)
    clips = options.batch_size or (1 if step.device == "cpu" else 16)
    for line in header(options, step, clips):
        console.print(line, highlight=False)
    sizes = [clips if side.family == "video" else images(options, clips) for side in chosen]

    for line in check_references(chosen, step.device):
        console.print(line, highlight=False)
    memory = []
    for side, size in zip(chosen, sizes, strict=True):
        progress.print(f"peak memory: {side.name}", style="dim")
        memory.append(peak_memory(side, size, step))
    work = []
    for side in chosen:
        progress.print(f"multiply-accumulates: {side.name}", style="dim")
        work.append(count_work(side, step.device))
    modules = [step.prepare(side) for side in chosen]
    inputs = [batch(side.source, size, step.device) for side, size in zip(chosen, sizes, strict=True)]
    times: dict[str, list[float]] = {side.name: [] for side in chosen}
    count = 1 if options.quick else options.rounds
    for number, seconds in enumerate(rounds(modules, inputs, step, count=count), 1):
        progress.print(f"round {number} of {count}: {sum(seconds):.1f} s", style="dim")
        for side, elapsed in zip(chosen, seconds, strict=True):
            times[side.name].append(elapsed)

    console.print(show_times(times, chosen, sizes, memory))
    console.print(show_work(chosen, work))
    console.print(show_demands(times, quick=options.quick))


if __name__ == "__main__":
    main(tyro.cli(Options))
