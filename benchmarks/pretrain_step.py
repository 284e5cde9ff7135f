"""What a pretraining step costs: ours, the published dense-masked form, and peers', in one run.

    python benchmarks/pretrain_step.py                            Base, on the GPU if there is one
    python benchmarks/pretrain_step.py --device cpu --only image
    python benchmarks/pretrain_step.py --compile --batch-sizes 8 32 64 --json step.json      again: goes on
    python benchmarks/pretrain_step.py --sides convmae convmae-cmae --optimiser              a contrastive step
    python benchmarks/pretrain_step.py --sides convmae-finetune convmae-finetune-dense       a finetuning step
    python benchmarks/pretrain_step.py --quick                    tiny models, to see that it runs

See benchmarks/README.md for what is measured, and how.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measure import Result, Step, Work, be_fair, count_works, measure, peak_flops, ratio, reason, utilisation
from rich.console import Console
from rich.table import Table
from sides import Family, Side, base, installed, sides, tiny

import convmae
from convmae.files import write_whole

LIBRARIES = ("transformers", "timm", "triton")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a pretraining step costs: ours, the published dense-masked form, and peers', in one run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU if there is one."""
    batch_sizes: tuple[int, ...] = ()
    """Clips of a step, one size or several; a step on images has one for every two frames. Default 1 on the CPU, 16 on
    the GPU."""
    rounds: int = 5
    """Timed rounds; in each, every side runs once."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Autocast of the forward; float32 is none. Default float32 on the CPU, bfloat16 on the GPU."""
    compile: bool = False
    """Compile every side with torch.compile, for each batch size anew."""
    cuda_graphs: bool = False
    """Replay what is compiled as CUDA graphs, so that the processor cannot hold the GPU up. Peak memory means little
    then: graphs keep theirs."""
    optimiser: bool = False
    """Time a step of fused AdamW too."""
    only: Family | None = None
    """Only the sides on clips, or on images."""
    sides: tuple[str, ...] = ()
    """Only these sides, by name: videoconvmae-k3 videoconvmae-dense-k3 videomae convmae ... Contrastive steps (-cmae),
    finetuning (-finetune, -finetune-dense, -finetune-dense-last) and videoconvmae-tube75 are taken only so."""
    peak_tflops: float | None = None
    """The device's peak TFLOP/s in the dtype, for the share of it that is used. Known for some GPUs in bfloat16."""
    limit: float = 300.0
    """Seconds that a side may take at a batch size on the GPU, compilation included, before it is given up."""
    json: Path | None = None
    """Write all figures here, after each that is new. What it holds already of a run of the same kind is taken over,
    and only the rest is measured: so a run that was ended goes on."""
    quick: bool = False
    """Tiny models, to see that it runs: the figures mean nothing."""

    def step(self) -> Step:
        """How a step is run."""
        return Step.on(
            self.device,
            self.dtype,
            compiled=self.compile or self.cuda_graphs,
            graphs=self.cuda_graphs,
            optimised=self.optimiser,
        )

    def sizes(self, device: str) -> tuple[int, ...]:
        """The batch sizes, ascending.

        Raises:
            ValueError: one is not positive.
        """
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"--batch-sizes {' '.join(map(str, self.batch_sizes))}: they are positive")
        return tuple(sorted(set(self.batch_sizes))) or ((1,) if device == "cpu" else (16,))

    def peak(self, step: Step) -> float | None:
        """The device's peak FLOP/s, as given or as known."""
        if self.peak_tflops:
            return self.peak_tflops * 1e12
        return peak_flops(torch.cuda.get_device_name(), step.dtype) if step.device == "cuda" else None

    def known(self) -> list[Side]:
        """All sides there are."""
        return sides(tiny() if self.quick else base())

    def selected(self) -> list[Side]:
        """The sides asked for, those of optional libraries included; without `--sides` all but those by name only.

        Raises:
            ValueError: a name is unknown, or no side is left.
        """
        known = self.known()
        unknown = sorted(set(self.sides) - {side.name for side in known})
        if unknown:
            names = ", ".join(side.name for side in known)
            raise ValueError(f"--sides {' '.join(unknown)}: no such side; there are {names}")
        named = [side for side in known if (side.name in self.sides if self.sides else not side.by_name)]
        chosen = [side for side in named if self.only in (None, side.family)]
        if not chosen:
            raise ValueError(f"--sides {' '.join(self.sides)} --only {self.only}: no side is left")
        return chosen

    def kind(self, step: Step) -> dict[str, Any]:
        """What runs must have in common for their figures to stand in one table."""
        return {
            "device": device_name(step),
            "dtype": str(step.dtype).removeprefix("torch."),
            "compiled": step.compiled,
            "cuda_graphs": step.graphs,
            "optimiser": step.optimised,
            "rounds": self.rounds,
            "quick": self.quick,
            "torch": torch.__version__,
        }


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A figure, and the bound that the project sets itself for it.

    Args:
        text: what it is.
        of: a side's time or peak memory over another's, or its share of the device's peak FLOP/s.
        side: the side.
        over: the other side.
        at_most: the bound, or
        at_least: the bound.
    """

    text: str
    of: Literal["time", "memory", "utilisation"]
    side: str
    over: str | None = None
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        return (
            f"at most {self._show(self.at_most)}" if self.at_least is None else f"at least {self._show(self.at_least)}"
        )

    def _show(self, value: float | None) -> str:
        assert value is not None
        return f"{value:.0%}" if self.of == "utilisation" else f"{value:.2f}"

    def met(self, value: float) -> bool:
        """Whether the figure keeps the bound."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def value(self, results: Mapping[str, Result], shares: Mapping[str, float]) -> float | None:
        """The figure, of the results and utilisations of one batch size by the side's name; None: not measured."""
        if self.of == "utilisation":
            return shares.get(self.side)
        result, other = results.get(self.side), results.get(self.over or "")
        if result is None or other is None:
            return None
        return ratio(result.seconds, other.seconds) if self.of == "time" else result.memory / other.memory

    def row(self, value: float | None, *, unsuited: str) -> tuple[str, ...]:
        """The figure's row in the closing block."""
        if value is None:
            return self.text, "-", str(self), "not measured"
        verdict = f"none: {unsuited}" if unsuited else "met" if self.met(value) else "not met"
        return self.text, self._show(value), str(self), verdict


ON_CPU = (
    Demand(
        text="time: VideoConvMAE, kernel 3 / VideoMAE",
        of="time",
        side="videoconvmae-k3",
        over="videomae",
        at_most=1.25,
    ),
    Demand(
        text="time: dense-masked, kernel 3 / VideoConvMAE, kernel 3",
        of="time",
        side="videoconvmae-dense-k3",
        over="videoconvmae-k3",
        at_least=4.0,
    ),
    Demand(
        text="time: dense-masked ConvMAE / ConvMAE",
        of="time",
        side="convmae-dense",
        over="convmae",
        at_least=1.4,
    ),
)

ON_GPU = (
    Demand(
        text="time: VideoConvMAE, kernel 3 / VideoMAE",
        of="time",
        side="videoconvmae-k3",
        over="videomae",
        at_most=1.1,
    ),
    Demand(
        text="time: VideoConvMAE, half decoded / VideoMAE",
        of="time",
        side="videoconvmae-half",
        over="videomae",
        at_most=0.85,
    ),
    Demand(
        text="time: dense-masked ConvMAE / ConvMAE",
        of="time",
        side="convmae-dense",
        over="convmae",
        at_least=2.5,
    ),
    Demand(
        text="peak memory: ConvMAE / dense-masked ConvMAE",
        of="memory",
        side="convmae",
        over="convmae-dense",
        at_most=0.4,
    ),
    Demand(text="MFU: VideoConvMAE, kernel 3", of="utilisation", side="videoconvmae-k3", at_least=0.45),
    Demand(text="MFU: ConvMAE", of="utilisation", side="convmae", at_least=0.45),
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run has measured so far.

    Args:
        sides: in the order of the tables.
        step: how a step was run.
        peak: the device's peak FLOP/s, if known.
        works: of the sides whose work could be counted, by name.
        results: by side and batch size, in the order in which they came.
        quick: whether the models are tiny.
    """

    sides: Sequence[Side]
    step: Step
    peak: float | None
    works: Mapping[str, Work]
    results: Sequence[Result]
    quick: bool

    @property
    def sizes(self) -> list[int]:
        """The batch sizes there are results for."""
        return sorted({result.clips for result in self.results})

    def at(self, clips: int) -> list[tuple[Side, Result]]:
        """The results of a batch size, in the order of the sides."""
        found = {result.name: result for result in self.results if result.clips == clips}
        return [(side, found[side.name]) for side in self.sides if side.name in found]

    def measured(self, clips: int) -> dict[str, Result]:
        """The results of a batch size that have figures, by the side's name."""
        return {side.name: result for side, result in self.at(clips) if result.failure is None}

    def utilisation(self, result: Result) -> float | None:
        """A side's share of the device's peak; None where that or its work is not known, or it failed."""
        work = self.works.get(result.name)
        if result.failure is not None or work is None or self.peak is None:
            return None
        return utilisation(work, result.samples, result.median, self.peak)

    def judged(self) -> int | None:
        """The largest batch size that all sides took, but for those that took none; None where there is none."""
        took = [set(self.measured(clips)) for clips in self.sizes]
        able = set().union(*took)
        whole = [clips for clips, names in zip(self.sizes, took, strict=True) if able and names == able]
        return max(whole, default=None)

    def demands(self) -> list[tuple[Demand, float | None]]:
        """What the project demands of itself on this device, and what was measured."""
        clips = self.judged()
        results = {} if clips is None else self.measured(clips)
        shares = {name: share for name, result in results.items() if (share := self.utilisation(result)) is not None}
        return [(demand, demand.value(results, shares)) for demand in (ON_CPU if self.step.device == "cpu" else ON_GPU)]

    def costs(self, clips: int) -> Table:
        """Time and peak memory at a batch size; ratios to each side's peer, where that was measured."""
        sizes = " or ".join(f"{clips * per_clip} {unit}" for unit, per_clip in self._units().items())
        what = "Forward, backward and AdamW" if self.step.optimised else "Forward and backward"
        table = aligned(
            f"{what}, {sizes} a step",
            *("side", "median s", "min .. max s", "samples/s", "time / peer", "peak MiB", "peak / peer"),
            *("peer", "MFU", "graph breaks"),
        )
        measured = self.measured(clips)
        for side, result in self.at(clips):
            if result.failure is not None:
                table.add_row(side.title, result.failure.partition(":")[0], *["-"] * 8)
                continue
            peer, share = measured.get(side.peer), self.utilisation(result)
            table.add_row(
                side.title,
                f"{result.median:.4f}",
                f"{min(result.seconds):.4f} .. {max(result.seconds):.4f}",
                f"{result.samples / result.median:.2f}",
                f"{ratio(result.seconds, peer.seconds):.2f}" if peer else "-",
                f"{result.memory / 2**20:.0f}",
                f"{result.memory / peer.memory:.2f}" if peer else "-",
                side.peer if peer else "-",
                "-" if share is None else f"{share:.1%}",
                "-" if result.graph_breaks is None else str(result.graph_breaks),
            )
        return table

    def _units(self) -> dict[str, int]:
        return {"clips" if side.family == "video" else "images": side.per_clip for side in self.sides}

    def counts(self) -> Table:
        """Multiply-accumulates and parameters."""
        table = aligned(
            "One sample's forward (fvcore), and parameters", "side", "GMAC", "without decoder", "million parameters"
        )
        for side in self.sides:
            if work := self.works.get(side.name):
                numbers = work.forward / 1e9, work.encoder / 1e9, work.parameters / 1e6
                table.add_row(side.title, *(f"{number:.2f}" for number in numbers))
            else:
                table.add_row(side.title, "-", "-", "-")
        return table

    def failures(self) -> Table:
        """What could not be measured, and why."""
        table = aligned("Not measured", "side", "clips", "why")
        for result in self.results:
            if result.failure is not None:
                table.add_row(result.name, str(result.clips), result.failure)
        return table

    def unsuited(self) -> str:
        """Why the demands cannot be judged by this run; empty: they can."""
        if self.quick:
            return "tiny models"
        if self.step.device == "cuda" and self.step.dtype != torch.bfloat16:
            return "not bfloat16"
        if self.step.device == "cuda" and not self.step.compiled:
            return "not compiled"
        return "with the optimiser" if self.step.optimised else ""

    def verdicts(self) -> Table:
        """The closing block: the figures that the project demands of itself, at the largest batch that all took."""
        where = "2 CPU cores, float32" if self.step.device == "cpu" else "one GPU, bfloat16, compiled"
        clips = self.judged()
        at = "" if clips is None or len(self.sizes) < 2 else f"; judged at {clips} clips"
        table = aligned(f"To reach on {where}, Base{at}", "figure", "measured", "bound", "verdict")
        for demand, value in self.demands():
            table.add_row(*demand.row(value, unsuited=self.unsuited()))
        return table

    def tables(self) -> Iterator[Table]:
        """All that is printed."""
        for clips in self.sizes:
            yield self.costs(clips)
        yield self.counts()
        if any(result.failure is not None for result in self.results):
            yield self.failures()
        yield self.verdicts()

    def figures(self, header: Sequence[str], kind: Mapping[str, Any]) -> dict[str, Any]:
        """All figures, as plain data: seconds, bytes, multiply-accumulates; kind: see `Options.kind`."""
        by_name = {side.name: side for side in self.sides}
        return {
            "header": list(header),
            **kind,
            "peak_flops": self.peak,
            "work": {name: asdict(work) for name, work in self.works.items()},
            "results": [
                {
                    **asdict(result),
                    "title": by_name[result.name].title.strip(),
                    "family": by_name[result.name].family,
                    "peer": by_name[result.name].peer,
                    "median": result.median if result.seconds else None,
                    "samples_per_second": result.samples / result.median if result.seconds else None,
                    "utilisation": self.utilisation(result),
                }
                for result in self.results
            ],
            "judged_at": self.judged(),
            "demands": [
                {"text": demand.text, "bound": str(demand), "measured": value, "met": value and demand.met(value)}
                for demand, value in self.demands()
            ],
            "unsuited": self.unsuited(),
        }


def device_name(step: Step) -> str:
    """What a step runs on."""
    if step.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {step.threads} threads"


def headline(step: Step, peak: float | None) -> Iterator[str]:
    """What a reader needs to compare this run with another."""
    libraries = ", ".join(f"{name} {version(name) if installed(name) else 'missing'}" for name in LIBRARIES)
    yield (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; convmae {convmae.__version__}, torch {torch.__version__}, "
        f"{libraries}, Python {platform.python_version()}"
    )
    yield (
        f"{step.device}: {device_name(step)}; {str(step.dtype).removeprefix('torch.')}, "
        f"{'compiled' if step.compiled else 'not compiled'}; "
        f"{f'MFU of {peak / 1e12:.1f} TFLOP/s' if peak else 'peak FLOP/s not known'}"
    )


def aligned(title: str, *columns: str) -> Table:
    """An empty table: the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "why", overflow="fold")
    return table


def told(result: Result) -> Iterator[str]:
    """A result as it comes, in lines."""
    if result.agreement:
        latent, loss = result.agreement
        yield f"{result.name}: latent within {latent:.0e}, loss within {loss:.0e} of our form"
    figures = result.failure or f"{result.median:.4f} s, peak {result.memory / 2**20:.0f} MiB"
    yield f"{result.name}, {result.clips} clips: {figures}"


def available(chosen: Sequence[Side], console: Console) -> list[Side]:
    """The sides that can run: those whose library is missing are left out, and that is said."""
    missing = [side for side in chosen if not installed(side.needs)]
    if missing:
        names, libraries = ", ".join(side.name for side in missing), sorted({str(side.needs) for side in missing})
        line = f'{names} left out: without {" and ".join(libraries)}; pip install -e ".[bench]" brings what is missing'
        console.print(line, markup=False)
    return [side for side in chosen if side not in missing]


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What a file holds of a run that was ended: its header, works and results; of failures nothing."""

    header: tuple[str, ...] = ()
    works: Mapping[str, Work]
    results: tuple[Result, ...] = ()


def earlier(path: Path | None, kind: Mapping[str, Any], known: Sequence[Side]) -> Earlier:
    """Read what `--json` wrote before; nothing where there is no file.

    Raises:
        ValueError: the file is not of a run of this kind.
    """
    if path is None or not path.exists():
        return Earlier(works={})
    found = json.loads(path.read_text())
    if other := [name for name, value in kind.items() if found.get(name) != value]:
        theirs = ", ".join(f"{name} {found.get(name)}, not {kind[name]}" for name in other)
        raise ValueError(f"--json {path}: holds a run of another kind ({theirs}); give another file, or remove it")
    names = {side.name for side in known}
    return Earlier(
        header=tuple(found["header"]),
        works={name: Work(**work) for name, work in found["work"].items() if name in names},
        results=tuple(restored(row) for row in found["results"] if row["name"] in names and row["failure"] is None),
    )


def restored(row: Mapping[str, Any]) -> Result:
    """A result as it was before it was written."""
    own = {field.name: row[field.name] for field in fields(Result)}
    return Result(**own | {name: own[name] and tuple(own[name]) for name in ("seconds", "agreement")})


def missing(
    chosen: Sequence[Side], sizes: Sequence[int], results: Sequence[Result]
) -> Iterator[tuple[list[Side], list[int]]]:
    """The sides that lack results, with the batch sizes at which they do: together where these are the same."""
    done = {(result.name, result.clips) for result in results}
    lacking: dict[tuple[int, ...], list[Side]] = defaultdict(list)
    for side in chosen:
        lacking[tuple(size for size in sizes if (side.name, size) not in done)].append(side)
    yield from ((group, list(owed)) for owed, group in lacking.items() if owed)


def main(options: Options) -> None:
    """Measure what was asked for, and print it.

    Raises:
        ValueError: `--sides` has an unknown name, no side is left, a batch size is not positive, or `--json` is a file
            of a run of another kind.
    """
    console, progress = Console(highlight=False), Console(stderr=True, style="dim", highlight=False)
    if not console.is_terminal:
        console.width = 170
    be_fair()
    step = options.step()
    sizes, peak = options.sizes(step.device), options.peak(step)
    chosen = available(options.selected(), console)
    kind, known = options.kind(step), options.known()
    before = earlier(options.json, kind, known)
    header = list(headline(step, peak))
    console.print(*header, sep="\n")
    if before.results:
        console.print(f"{len(before.results)} results are taken over from {options.json}", markup=False)
    works: dict[str, Work] = dict(before.works)
    results: list[Result] = list(before.results)
    asked = {side.name for side in chosen} | {result.name for result in results}

    def report() -> Report:
        return Report(
            sides=[side for side in known if side.name in asked],
            step=step,
            peak=peak,
            works=works,
            results=results,
            quick=options.quick,
        )

    def write() -> None:
        if options.json:
            figures = report().figures([*before.header, *header], kind)
            write_whole(options.json, json.dumps(figures, indent=1) + "\n")  # a time limit may end this as well

    for name, future in count_works([side for side in chosen if side.name not in works]).items():
        try:
            works[name] = future.result(options.limit)
            progress.print(f"{name}: {works[name].forward / 1e9:.2f} GMAC")
        except Exception as problem:  # a side without its work still has its time
            progress.print(f"{name}: its work was not counted: {reason(problem)}", markup=False)
        write()
    for group, owed in missing(chosen, sizes, results):
        for result in measure(group, owed, step, count=options.rounds, limit=options.limit):
            results.append(result)
            progress.print(*told(result), sep="\n", markup=False)
            write()
    write()
    console.print(*report().tables(), sep="\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as problem:
        sys.exit(str(problem))
