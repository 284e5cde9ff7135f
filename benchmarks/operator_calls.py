"""What single calls of the tile convolution cost, at the shapes of the compared models.

    python benchmarks/operator_calls.py                     on the GPU if there is one
    python benchmarks/operator_calls.py --device cpu --json calls.json
    python benchmarks/operator_calls.py --quick             tiny shapes, to see that it runs

Over shown tiles, the operator beside plain torch; on the CPU it is plain torch. Over whole maps, as in finetuning,
beside torch's own depthwise convolution with channels first and last in memory. Median microseconds of a call, with
triton.testing.do_bench on a GPU and torch.utils.benchmark on the CPU. The operator's weights are in float32, as
autocast leaves them; torch's are in the dtype of the maps, and their cast is not counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from dense_masked import CONVOLUTION
from measure import Step, be_fair
from pretrain_step import aligned
from rich.table import Table
from scaling import console_pair, headline
from sides import base, tiny
from torch import Tensor
from torch.utils.benchmark import Timer

from convmae.builders import MAE
from convmae.grids import Grid, product
from convmae.nn import tile_planes
from convmae.nn.tile_convolution import reach, tile_convolution
from convmae.nn.trunk import ConvolutionStage

WHOLE = 4  # of so many times fewer samples: maps of images have four times the cells of what is shown

Timed = tuple[str, str, Callable[[], object], int]  # form, pass, the call, bytes of its map


@dataclass(frozen=True, kw_only=True)
class Options:
    """What single calls of the tile convolution cost: over shown tiles, and over whole maps."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the maps. Default float32 on the CPU, bfloat16 on the GPU."""
    batch_size: int | None = None
    """Clips of a call over shown tiles; there are as many images for every two frames, and a quarter of each over whole
    maps. Default 1 on the CPU, 32 on the GPU."""
    seconds: float = 1.0
    """On the CPU, how long a call is repeated at least."""
    quick: bool = False
    """Tiny shapes, to see that it runs: the figures mean nothing."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A depthwise convolution of a stage.

    Args:
        family: clips or images.
        stage: its place in the trunk, from 0.
        builder: the model's.
        tile: cells of a shown token, along each axis.
        channels: width.
        kernel: along each axis.
        samples: of the call over shown tiles.
    """

    family: Literal["video", "image"]
    stage: int
    builder: MAE
    tile: Grid
    channels: int
    kernel: Grid
    samples: int

    @property
    def cells(self) -> Grid:
        """Of the whole map."""
        return product(self.builder.grid, self.tile)

    @property
    def whole(self) -> int:
        """Samples of the call over whole maps."""
        return max(1, self.samples // WHOLE)

    def title(self, cells: Grid) -> str:
        """What a row says of it, over these cells."""
        shape, taps = (" x ".join(map(str, numbers)) for numbers in ((*cells, self.channels), self.kernel))
        return f"{self.family}, stage {self.stage + 1}: {shape}, kernel {taps}"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call's cost: of what, by which form, in which pass; median seconds, and bytes of the map."""

    of: str
    form: str
    does: str
    seconds: float
    map_bytes: int


def cases(builder: MAE, family: Literal["video", "image"], samples: int) -> Iterator[Case]:
    """The depthwise convolutions of a model, a stage each."""
    with torch.device("meta"):
        trunk = builder.build_trunk()
    for number, stage in enumerate(trunk.stages):
        if isinstance(stage, ConvolutionStage):
            yield Case(
                family=family,
                stage=number,
                builder=builder,
                tile=trunk.tile(number),
                channels=trunk.dims[number],
                kernel=stage.kernel,
                samples=samples,
            )


def median(step: Step, call: Callable[[], object], least: float) -> float:
    """Seconds of a call, the median of many."""
    if step.device == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(call, return_mode="median")
        return milliseconds / 1000
    timer = Timer("call()", globals={"call": call}, num_threads=step.threads)
    seconds: float = timer.blocked_autorange(min_run_time=least).median
    return seconds


def over_tiles(case: Case, step: Step) -> Iterator[Timed]:
    """The calls over shown tiles."""
    make = partial(torch.randn, device=step.device)
    mask = case.builder.masking(case.samples, case.builder.grid, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        trunk = case.builder.build_trunk()
    shown = trunk.shown(mask, device=torch.device(step.device))
    around = shown.around(reach(case.tile, case.kernel))
    x, slope = (make(len(mask), shown.count, *case.tile, case.channels, dtype=step.dtype) for _ in range(2))
    weight, bias = make(case.channels, 1, *case.kernel), make(case.channels)
    size = x.numel() * x.itemsize
    if step.device == "cuda":
        gradient = torch.ops.convmae.tile_convolution_weight_gradient
        yield "operator", "forward", partial(tile_convolution, x, weight, bias, around), size
        yield "operator", "weight gradient", partial(gradient, x, slope, weight, around), size
    yield "plain torch", "forward", partial(tile_planes.convolve, x, weight, bias, around, False), size
    yield "plain torch", "weight gradient", partial(tile_planes.weight_gradient, x, slope, weight, around), size


def over_maps(case: Case, step: Step) -> Iterator[Timed]:
    """The calls over whole maps; a backward is for input and weight."""
    make = partial(torch.randn, device=step.device)
    x = make(case.whole, 1, *case.cells, case.channels, dtype=step.dtype).requires_grad_()
    weight, bias = make(case.channels, 1, *case.kernel).requires_grad_(), make(case.channels)
    size = x.numel() * x.itemsize
    yield "operator", "forward", partial(tile_convolution, x.detach(), weight.detach(), bias, None), size
    out = tile_convolution(x, weight, bias, None)
    yield "operator", "backward", backward(out, x, weight), size
    last = x.detach().squeeze(1).movedim(-1, 1)  # channels are last in memory
    layouts = (("channels first", last.contiguous()), ("channels last", last))
    of_torch, bias = weight.detach().to(step.dtype).requires_grad_(), bias.to(step.dtype)
    for form, volume in layouts:
        volume.requires_grad_()
        convolve = partial(
            CONVOLUTION[len(case.cells)],
            bias=bias,
            padding=tuple(side // 2 for side in case.kernel),
            groups=case.channels,
        )
        yield form, "forward", partial(convolve, volume.detach(), of_torch.detach()), size
        yield form, "backward", backward(convolve(volume, of_torch), volume, of_torch), size


def backward(out: Tensor, x: Tensor, weight: Tensor) -> Callable[[], object]:
    """The gradients of input and weight, as often as one likes; the slope lies in memory as the output does."""
    return partial(torch.autograd.grad, out, (x, weight), torch.randn_like(out), retain_graph=True)


def table(title: str, calls: Sequence[Call]) -> Table:
    """A row for each map, a column for each form and pass."""
    columns = list(dict.fromkeys((call.form, call.does) for call in calls))
    out = aligned(f"{title}, microseconds", "cells and channels", "MB", *(f"{form},\n{does}" for form, does in columns))
    for of in dict.fromkeys(call.of for call in calls):
        own = {(call.form, call.does): call for call in calls if call.of == of}
        size = next(iter(own.values())).map_bytes
        out.add_row(of, f"{size / 1e6:.3g}", *(f"{1e6 * own[column].seconds:.0f}" for column in columns))
    return out


def main(options: Options) -> list[Call]:
    """Time every call, and print the tables."""
    console, progress = console_pair()
    if not console.is_terminal:
        console.width = 200
    be_fair()
    step = Step.on(options.device, options.dtype, compiled=False)
    models = tiny() if options.quick else base()
    clips = options.batch_size or (1 if step.device == "cpu" else 32)
    images = clips * models.clips.size[0] // 2
    found = [*cases(models.clips, "video", clips), *cases(models.images, "image", images)]
    console.print(*headline(step.device, str(step.dtype).removeprefix("torch.")), sep="\n", markup=False)
    calls = []
    for title, over in (("Over shown tiles", over_tiles), ("Over whole maps", over_maps)):
        own, whole = [], over is over_maps
        for case in found:
            of = case.title(case.cells if whole else case.tile)
            for form, does, call, size in over(case, step):
                seconds = median(step, call, 0.01 if options.quick else options.seconds)
                own.append(Call(of=of, form=form, does=does, seconds=seconds, map_bytes=size))
                progress.print(f"{of}: {form}, {does}: {1e6 * seconds:.0f} microseconds", soft_wrap=True)
        counts = (max(1, count // WHOLE) if whole else count for count in (clips, images))
        console.print(table("{}, {} clips or {} images".format(title, *counts), own))
        calls += own
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(call) for call in calls], indent=1) + "\n")
    return calls


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as problem:
        sys.exit(str(problem))
