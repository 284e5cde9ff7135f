"""What the memory of a GPU holds: parameters, a training step's peak, and the largest micro-batch, of every size.

    python benchmarks/memory.py                                      all sizes, images and clips
    python benchmarks/memory.py --models VideoConvMAE --sizes large huge --input 16 224 224
    python benchmarks/memory.py --quick                              tiny models, which fill a small budget

Without a GPU tensors are counted that are only pretended: nothing is computed, and what libraries take is not seen.
A step is what `convmae.micro_batch` takes: two micro-batches forward and backward, so that gradients are there beside
activations, and fused AdamW; in bfloat16 where the GPU has it. The largest micro-batch is foretold by a straight line
through the peaks at two small ones, then tried; where it does not fit, smaller ones are, by bisection.
"""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pretrain_step import aligned
from rich.table import Table
from scaling import OUT_OF_MEMORY, console_pair, explained, first_line, headline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convmae import ConvMAE, ConvStage
from convmae.builders import MAE
from convmae.micro_batch import MARGIN, Rehearsal, Trial, confined, predicted, ran_out, release, search, usable
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.training import Pretrain
from video import VideoConvMAE

Model = Literal["ConvMAE", "VideoConvMAE"]
Recompute = Literal["nothing", "convolutions", "all"]
Size = Literal["small", "base", "large", "huge"]
CLASSES: dict[Model, type[MAE]] = {"ConvMAE": ConvMAE, "VideoConvMAE": VideoConvMAE}
BYTES_PER_PARAMETER = 16  # float32: weight, gradient and AdamW's two moments


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a GPU's memory holds: parameters, a training step's peak, and the largest micro-batch, of every size."""

    models: tuple[Model, ...] = ("ConvMAE", "VideoConvMAE")
    """Which models."""
    sizes: tuple[Size, ...] = ("small", "base", "large", "huge")
    """Which sizes."""
    recompute: tuple[Recompute, ...] = ("nothing", "convolutions", "all")
    """What is computed again in the backward pass."""
    input: tuple[int, ...] = ()
    """Another input size in pixels, of models with as many axes. Default: 224 x 224, and 16 frames of it."""
    micro_batch: int | None = None
    """Samples whose step's peak is printed; the straight line is through this and half of it. Default 32 images, 8
    clips; tiny models 4."""
    compile: bool = False
    """Compile the whole step, as runs with --compile on one GPU do; each trial compiles, which takes minutes in all."""
    budget_gib: float | None = None
    """Memory that a step may take. Default: what is free on the GPU less 5 %; on the CPU 76, for tiny models 0.03."""
    verify: bool = True
    """Take a step at the largest micro-batch foretold; where tensors are counted, of tiny models alone."""
    seconds: float = 80
    """After so many, the largest micro-batches of the rows left are foretold alone."""
    quick: bool = False
    """Tiny models, to see that it runs."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of a model.

    Args:
        model: its name and size.
        recompute: the stages whose activations are computed again in the backward pass.
        parameters: trained ones.
        state_bytes: of weights, gradients and AdamW's moments.
        micro_batch: samples of the step measured.
        peak_bytes: of that step; None: memory ran out.
        foretold: largest micro-batch by the straight line; None: there was none.
        largest: the largest that was tried and fits; None: not tried.
        largest_bytes: its peak.
        failure: the first line of the error, where there was one.
    """

    model: str
    recompute: Recompute
    parameters: int = 0
    state_bytes: int = 0
    micro_batch: int = 0
    peak_bytes: int | None = None
    foretold: int | None = None
    largest: int | None = None
    largest_bytes: int | None = None
    failure: str | None = None


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operators made and somebody still holds; `peak` is the most there were.

    Each storage counts once, while it lives. Workspaces within an operator are not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf)
        return out

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, self._freed, key, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def counted_peak(run: Pretrain, model: MaskedAutoencoder) -> Callable[[int], int]:
    """A step's peak anywhere, by counting tensors without memory: a function of the samples. The model becomes such."""
    pretended = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    setattr(module, name, pretended.from_tensor(tensor))
    with pretended:
        rehearsal = Rehearsal(run, torch.device("cpu"), model=model)

    def peak(samples: int) -> int:
        inputs = rehearsal.inputs(samples)
        with pretended, LiveBytes() as counter:
            for parameter in rehearsal.model.parameters():
                counter.hold(parameter)
            for moments in rehearsal.optimiser.state.values():
                for moment in moments.values():
                    counter.hold(moment)
            rehearsal.take(inputs)
            rehearsal.clear()
        most: int = counter.peak
        return most

    return peak


def builders(options: Options) -> Iterator[tuple[str, MAE]]:
    """The models asked for, by name."""
    if options.quick:
        from sides import tiny

        models = tiny()
        named: dict[Model, MAE] = {"ConvMAE": models.images, "VideoConvMAE": models.clips}
        yield from ((f"{name}-tiny", named[name]) for name in options.models)
        return
    for name in options.models:
        for size in options.sizes:
            builder: MAE = getattr(CLASSES[name], size)()
            fits = len(options.input) == len(builder.size)
            yield f"{name}-{size}", builder.input(options.input) if fits else builder


def trained(model: torch.nn.Module) -> int:
    """How many parameters are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure(
    name: str, run: Pretrain, recompute: Recompute, options: Options, device: torch.device, deadline: float
) -> Row:
    """The row of a model; a failure is in it."""
    row = Row(model=name, recompute=recompute)
    count = options.micro_batch or (4 if options.quick else 32 if len(run.model.size) == 2 else 8)
    try:
        limit = int(options.budget_gib * 2**30) if options.budget_gib is not None else usable(device, MARGIN)
        with confined(device, limit) if device.type == "cuda" else nullcontext():
            with device:
                model = run.model.build()
            parameters = trained(model)
            row = replace(row, parameters=parameters, state_bytes=BYTES_PER_PARAMETER * parameters, micro_batch=count)
            peak = Rehearsal(run, device, model=model).peak if device.type == "cuda" else counted_peak(run, model)
            peak(1)  # libraries' workspaces are there before anything is measured
            small = [Trial(samples=samples, peak_bytes=peak(samples)) for samples in (max(1, count // 2), count)]
            row = replace(row, peak_bytes=small[-1].peak_bytes, foretold=predicted(small, limit))
            if options.verify and time.monotonic() < deadline:
                found = largest_from(small, peak, limit)
                if found is not None:
                    row = replace(row, largest=found.samples, largest_bytes=found.peak_bytes)
    except Exception as error:  # a row of its own: the others go on
        row = replace(row, failure=OUT_OF_MEMORY if ran_out(error) else first_line(error))
    return row


def largest_from(small: Sequence[Trial], peak: Callable[[int], int | None], limit: int) -> Trial | None:
    """Try what the small trials foretell; where it does not fit, bisect below it. None: none fits."""

    def fits(trial: Trial) -> bool:
        return trial.peak_bytes is not None and trial.peak_bytes <= limit

    foretold = predicted(small, limit)
    if not foretold:
        tried = search(peak, limit=limit, at_most=max(1, small[-1].samples - 1))
    else:
        tried = [Trial(samples=foretold, peak_bytes=peak(foretold))]
        if not fits(tried[0]) and foretold > 1:
            below = math.floor(0.95 * foretold) or 1  # the line is seldom far off
            tried = search(peak, limit=limit, at_most=foretold - 1, first=below)
    return max(filter(fits, [*small, *tried]), key=lambda trial: trial.samples, default=None)


def table(rows: Sequence[Row], where: str) -> Table:
    """All figures."""
    out = aligned(
        f"Memory of a training step, and the largest micro-batch in {where}",
        *("model", "recomputed", "million parameters", "state GiB", "micro-batch", "at GiB"),
        *("foretold", "tried, fits", "at GiB"),
    )
    for row in rows:
        if row.failure is not None:
            out.add_row(row.model, row.recompute, explained(out, row.failure))
            continue
        out.add_row(
            row.model,
            row.recompute,
            f"{row.parameters / 1e6:.1f}",
            _gib(row.state_bytes),
            str(row.micro_batch),
            OUT_OF_MEMORY if row.peak_bytes is None else _gib(row.peak_bytes),
            "-" if row.foretold is None else str(row.foretold),
            "-" if row.largest is None else str(row.largest),
            "-" if row.largest_bytes is None else _gib(row.largest_bytes),
        )
    return out


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}" if size < 2**30 else f"{size / 2**30:.2f}"


class Nothing:
    """A source of nothing: the pixels of these steps are random."""

    def open(self, size: tuple[int, ...]) -> Any:
        raise ValueError("nothing is loaded here")


def main(options: Options) -> list[Row]:
    """Measure what was asked for, and print it."""
    console, progress = console_pair()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        gib = options.budget_gib or (0.03 if options.quick else 76)
        options = replace(options, budget_gib=gib, compile=False, verify=options.verify and options.quick)
    console.print(*headline(device.type), sep="\n", markup=False)
    deadline = time.monotonic() + options.seconds
    rows = []
    for name, builder in builders(options):
        convolutions = tuple(place for place, stage in enumerate(builder.trunk) if isinstance(stage, ConvStage))
        for recompute in options.recompute:
            run = Pretrain(
                model=builder,
                data=Nothing(),
                epochs=1,
                warmup_epochs=0,
                batch_size=1,
                folder=Path("nowhere"),
                recompute=recompute == "all",
                recompute_stages=convolutions if recompute == "convolutions" else (),
                compile=options.compile,
                precision="auto" if device.type == "cuda" else "bfloat16",
            )
            rows.append(measure(name, run, recompute, options, device, deadline))
            if device.type == "cuda":
                release()
            taken = rows[-1].peak_bytes
            progress.print(f"{name}, recomputed {recompute}: {rows[-1].failure or (taken and _gib(taken))}")
    budget = "all that is free, less 5 %" if options.budget_gib is None else f"a budget of {options.budget_gib:g} GiB"
    console.print(table(rows, budget))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
