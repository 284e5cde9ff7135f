"""How a training step's cost grows with shown tokens, frames and resolution: VideoConvMAE-B beside VideoMAE-B.

    python benchmarks/scaling.py --plot scaling.png --json scaling.json     all three, eager
    python benchmarks/scaling.py --panels shown --compile                   compiled, each point anew
    python benchmarks/scaling.py --quick                                    tiny models, to see that it runs

VideoMAE-B is our plain ViT with the input, masking, decoder and target of VideoConvMAE-B. A step is forward and
backward. The batch differs from point to point, so that a step has about as many tokens everywhere; costs are given for
one clip. The exponent of a row is that between it and the row before: 1 is a cost in proportion to the tokens.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
import tyro
from measure import Step
from pretrain_step import aligned
from rich.console import Console
from rich.table import Table
from sides import Models, Pretraining, base, tiny

import convmae
from convmae import masking
from convmae.builders import MAE
from convmae.micro_batch import ran_out

OUT_OF_MEMORY = "out of memory"
Panel = Literal["shown", "frames", "resolution"]
AXES: dict[Panel, tuple[str, str]] = {
    "shown": ("mask ratio", "shown tokens of a clip"),
    "frames": ("frames", "tokens of a clip"),
    "resolution": ("pixels a side", "tokens of a clip"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a training step's cost grows with shown tokens, frames and resolution: VideoConvMAE-B beside VideoMAE-B."""

    panels: tuple[Panel, ...] = ("shown", "frames", "resolution")
    """What is varied; the rest stays as published."""
    ratios: tuple[float, ...] = ()
    """Mask ratios of the tubes. Default .95 .9 .8 .6 .4"""
    frames: tuple[int, ...] = ()
    """Frames of a clip. Default 8 16 32 64"""
    resolutions: tuple[int, ...] = ()
    """Pixels a side. Default 112 160 224 288 352 448"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Autocast of the forward; float32 is none. Default float32 on the CPU, bfloat16 on the GPU."""
    batch_size: int | None = None
    """Clips of a step at the published input and mask ratio. Default 1 on the CPU, 32 on the GPU."""
    rounds: int = 5
    """Timed steps of a point, after two that are not counted."""
    compile: bool = False
    """Compile each point's model for its own shapes."""
    quick: bool = False
    """Tiny models, to see that it runs: the figures mean nothing."""
    json: Path | None = None
    """Write the figures to this file."""
    plot: Path | None = None
    """Draw a figure into this file."""

    def step(self) -> Step:
        """How a step is run."""
        return Step.on(self.device, self.dtype, compiled=self.compile)


@dataclass(frozen=True, kw_only=True)
class Point:
    """The cost of a model at an input and mask.

    Args:
        panel: what is varied.
        value: of what is varied.
        model: the model's name.
        tokens: of a clip, as the panel counts them: shown ones, or all.
        batch: clips of the step.
        seconds: of each timed step.
        memory: bytes at the peak beyond the built model and its input; None on the CPU.
        failure: why there are no figures, where there are none.
    """

    panel: Panel
    value: float
    model: str
    tokens: int
    batch: int = 0
    seconds: tuple[float, ...] = ()
    memory: int | None = None
    failure: str | None = None

    @property
    def per_clip(self) -> float:
        """Seconds of a clip, by the median step."""
        return statistics.median(self.seconds) / self.batch


def console_pair() -> tuple[Console, Console]:
    """Where results go, and where progress does; as wide as the tables are where nobody looks."""
    console, progress = Console(highlight=False), Console(stderr=True, style="dim", highlight=False)
    if not console.is_terminal:
        console.width = 140
    return console, progress


def headline(device: str, *more: str) -> Iterator[str]:
    """What a reader needs to compare this run with another."""
    yield (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; convmae {convmae.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    yield "; ".join([f"{device}: {name}", *more])


def first_line(error: BaseException) -> str:
    """What a table says of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:100] if lines else type(error).__name__


def explained(table: Table, failure: str) -> str:
    """What a cell says of a failure; all of it goes under the table."""
    if failure == OUT_OF_MEMORY:
        return failure
    said = str(table.caption or "failed:")
    table.caption = said if failure in said else f"{said}\n{failure}"
    table.caption_justify = "left"
    return "failed"


def varied(options: Options, models: Models, panel: Panel) -> Iterator[tuple[float, str, MAE]]:
    """The values of a panel, with each model at it: value, name, builder."""
    kinds = {f"VideoConvMAE-{models.size}": models.clips, f"VideoMAE-{models.size}": models.plain_clips}
    frames, *_, side = models.clips.size
    quick = models.size == "tiny"
    values: Iterable[float]
    if panel == "shown":
        values = options.ratios or ((0.9, 0.5) if quick else (0.95, 0.9, 0.8, 0.6, 0.4))
    elif panel == "frames":
        values = options.frames or ((frames, 2 * frames) if quick else (8, 16, 32, 64))
    else:
        values = options.resolutions or ((side, side + side // 2) if quick else (112, 160, 224, 288, 352, 448))
    for value in values:
        for name, builder in kinds.items():
            if panel == "shown":
                yield value, name, builder.mask(masking.tube(value))
            elif panel == "frames":
                yield value, name, builder.input((int(value), *builder.size[1:]))
            else:
                yield value, name, builder.input(int(value))


def counts(builder: MAE) -> tuple[int, int]:
    """Tokens of a clip: shown, all."""
    mask = builder.masking(1, builder.grid, torch.Generator().manual_seed(0))
    return int((~mask).sum()), mask.numel()


def measure(point: Point, builder: MAE, step: Step, *, count: int) -> Point:
    """The figures of a point; where its batch does not fit, of half of it, and so on down to one clip."""
    size = point.batch
    while size:
        try:
            return _measured(replace(point, batch=size), builder, step, count=count)
        except Exception as error:  # a row of its own: the others go on
            failure = OUT_OF_MEMORY if ran_out(error) else first_line(error)
        _free(step.device)
        size = size // 2 if failure == OUT_OF_MEMORY else 0
    return replace(point, failure=failure)


def _measured(point: Point, builder: MAE, step: Step, *, count: int) -> Point:
    with torch.device(step.device):
        module = Pretraining(builder.build())
    if step.compiled:
        torch.compiler.reset()
        module.compile(dynamic=False)
    generator = torch.Generator().manual_seed(0)
    mask = builder.masking(point.batch, builder.grid, generator)  # on the CPU, as a loader draws it
    x = torch.randn(point.batch, builder.channels, *builder.size, device=step.device)
    held = 0
    for _ in range(2):  # they compile, choose algorithms and fill memory pools
        step.seconds(module, x, mask)
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    seconds = tuple(step.seconds(module, x, mask) for _ in range(count))
    memory = torch.cuda.max_memory_allocated() - held if step.device == "cuda" else None
    return replace(point, seconds=seconds, memory=memory)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(options: Options, step: Step, progress: Console) -> Iterator[Point]:
    """All points, one after the other; those that panels share are measured once."""
    models = tiny() if options.quick else base()
    published = counts(models.clips)
    clips = options.batch_size or (1 if step.device == "cpu" else 32)
    done: dict[MAE, Point] = {}
    for panel in options.panels:
        for value, name, builder in varied(options, models, panel):
            point = Point(panel=panel, value=value, model=name, tokens=0)
            try:
                shown, whole = counts(builder)
                builder.check()
            except ValueError as error:
                yield replace(point, failure=first_line(error))
                continue
            by = published[0] / shown if panel == "shown" else published[1] / whole
            point = replace(point, tokens=shown if panel == "shown" else whole, batch=max(1, round(clips * by)))
            if builder not in done:
                done[builder] = measure(point, builder, step, count=options.rounds)
                _free(step.device)
            point = replace(done[builder], panel=panel, value=value, tokens=point.tokens)
            cost = point.failure or f"{1000 * point.per_clip:.2f} ms a clip"
            progress.print(f"{panel} {value:g}, {name}: {cost}")
            yield point


def exponents(points: Sequence[Point]) -> list[float | None]:
    """For each of a model's points, d log seconds / d log tokens from the one before; None where there is none."""
    found: list[float | None] = []
    for number, point in enumerate(points):
        before = points[number - 1] if number else None
        if before is None or before.failure or point.failure or point.tokens == before.tokens:
            found.append(None)
        else:
            found.append(math.log(point.per_clip / before.per_clip) / math.log(point.tokens / before.tokens))
    return found


def table(panel: Panel, points: Sequence[Point]) -> Table:
    """A panel's figures, model by model."""
    label, tokens = AXES[panel]
    out = aligned(
        f"Forward and backward, by {label}",
        *("model", label, tokens, "batch", "ms a clip", "peak MiB a clip", "peak GiB", "exponent"),
    )
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model]
        for point, exponent in zip(own, exponents(own), strict=True):
            if point.failure:
                out.add_row(model, f"{point.value:g}", str(point.tokens or "-"), explained(out, point.failure))
                continue
            memory = ("-", "-")
            if point.memory is not None:
                memory = f"{point.memory / point.batch / 2**20:.0f}", f"{point.memory / 2**30:.2f}"
            out.add_row(
                model,
                f"{point.value:g}",
                str(point.tokens),
                str(point.batch),
                f"{1000 * point.per_clip:.2f}",
                *memory,
                "-" if exponent is None else f"{exponent:.2f}",
            )
    return out


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """A panel for each of what was varied: milliseconds of a clip against tokens, both logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels = list(dict.fromkeys(point.panel for point in points))
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        good = [point for point in points if point.panel == panel and not point.failure]
        for number, model in enumerate(dict.fromkeys(point.model for point in good)):
            own = sorted((point for point in good if point.model == model), key=lambda point: point.tokens)
            xs, ys = [point.tokens for point in own], [1000 * point.per_clip for point in own]
            axes.plot(xs, ys, marker="os"[number % 2], color=f"C{number}", label=model)
            if number == 0:
                line = [ys[0] * x / xs[0] for x in xs]
                axes.plot(xs, line, linestyle="--", color="0.6", label="in proportion", zorder=0)
                ticks = dict(zip(xs, (f"{point.tokens}\n{point.value:g}" for point in own), strict=True))
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.set_xticks(list(ticks), list(ticks.values()), fontsize="small")
                axes.set_xticks([], minor=True)
        axes.set_xlabel(f"{AXES[panel][1]}; below, {AXES[panel][0]}")
        axes.grid(which="major", alpha=0.3)
        if good:
            axes.legend(fontsize="small")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    figure.supylabel("milliseconds a clip, forward and backward", fontsize="medium")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=150)


def main(options: Options) -> list[Point]:
    """Measure what was asked for, print it, and write or draw it where asked."""
    console, progress = console_pair()
    step = options.step()
    dtype = str(step.dtype).removeprefix("torch.")
    lines = list(headline(step.device, dtype, "compiled" if step.compiled else "not compiled"))
    console.print(*lines, sep="\n", markup=False)
    points = []
    for point in run(options, step, progress):
        points.append(point)
        if options.json is not None:  # after each, so that what a time limit ends is not lost
            options.json.write_text(json.dumps([asdict(each) for each in points], indent=1) + "\n")
    for panel in options.panels:
        console.print(table(panel, [point for point in points if point.panel == panel]))
    if options.plot is not None:
        draw(points, options.plot, lines[1])
    return points


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as problem:
        sys.exit(str(problem))
