"""The tile convolution against a dense one in float64: what to try, the reference, and how far apart the two may lie.

TRITON_INTERPRET=1 python interpreted.py        the Triton form in Triton's interpreter; prints a JSON line a case
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae.grids import show
from convmae.nn.tile_convolution import reach


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tiles of two samples, some of the grid's; without `shown`, nothing is masked and a tile is a whole map."""

    tile: tuple[int, ...]
    kernel: tuple[int, ...]
    grid: tuple[int, ...] = ()
    shown: int = 0
    channels: int = 3
    bias: bool = True
    precision: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    seed: int = 0

    @property
    def whole(self) -> tuple[int, ...]:
        return self.grid if self.shown else (1,) * len(self.tile)

    def mask(self) -> Tensor:
        """`(2, *grid)`, True = hidden."""
        if not self.shown:
            return torch.zeros(2, *self.whole, dtype=torch.bool)
        noise = torch.rand(2, math.prod(self.grid), generator=torch.Generator().manual_seed(self.seed))
        return (noise.argsort(1).argsort(1) >= self.shown).view(2, *self.grid)

    def around(self, device: str = "cpu") -> Tensor | None:
        """For the operator."""
        if not self.shown:
            return None
        return show(self.mask(), self.grid).to(torch.device(device)).around(reach(self.tile, self.kernel))

    def values(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Tiles, weight, bias or None, and the gradient of the result, each in its precision."""
        generator = torch.Generator().manual_seed(self.seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tiles = (2, self.shown or 1, *self.tile, self.channels)
        x, gradient = normal(*tiles).to(self.precision), normal(*tiles).to(self.precision)
        weight = normal(self.channels, 1, *self.kernel).to(self.weights)
        return x, weight, normal(self.channels).to(self.weights) if self.bias else None, gradient


def cases() -> Iterator[Case]:
    """Both numbers of axes; tiles of one cell, of one block, of several blocks; kernels past the next tile."""
    shapes = [
        Case(grid=(2, 2), shown=2, tile=(2, 2), kernel=(3, 3)),
        Case(grid=(2, 3), shown=2, tile=(1, 1), kernel=(5, 3), channels=5),
        Case(grid=(2, 2), shown=2, tile=(4, 4), kernel=(5, 5), channels=7, bias=False),
        Case(grid=(1, 3), shown=2, tile=(3, 2), kernel=(7, 9), channels=1),
        Case(grid=(2, 2), shown=2, tile=(2, 1), kernel=(1, 3), channels=130),
        Case(grid=(2, 2), shown=1, tile=(8, 4), kernel=(3, 3)),
        Case(grid=(2, 2, 2), shown=2, tile=(1, 2, 2), kernel=(3, 3, 3)),
        Case(grid=(3, 1, 2), shown=2, tile=(2, 1, 1), kernel=(5, 1, 3), channels=5, bias=False),
        Case(grid=(2, 2, 1), shown=2, tile=(1, 2, 3), kernel=(1, 5, 3)),
        Case(tile=(6, 2), kernel=(3, 5), channels=5),
        Case(tile=(4, 4), kernel=(5, 5), bias=False),
        Case(tile=(2, 4, 2), kernel=(3, 3, 3)),
    ]
    for number, shape in enumerate(shapes):
        yield replace(shape, precision=torch.float64, weights=torch.float64, seed=10 * number)
    for number, shape in enumerate((shapes[0], shapes[5], shapes[8], shapes[10])):
        half = (torch.bfloat16, torch.float16)[number % 2]
        yield replace(shape, seed=100 * number)
        yield replace(shape, precision=half, weights=half, seed=100 * number + 20)
    yield replace(shapes[0], precision=torch.float16, seed=1000)
    yield replace(shapes[6], precision=torch.bfloat16, seed=1020)


def drawn(seed: int) -> Case:
    """A case drawn at random: axes, grid, how much of it is shown, tile, kernel, channels, precisions."""
    random = Random(seed)
    axes = random.choice((2, 3))
    grid = tuple(random.randint(1, 3) for _ in range(axes))
    tile = tuple(random.choice((1, 2, 3, 4, 6)) for _ in range(axes))
    precision = random.choice((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    return Case(
        grid=grid,
        shown=random.randint(1, math.prod(grid)) if random.random() < 0.8 else 0,
        tile=tile,
        kernel=tuple(random.choice((1, 3, 5, 7)) for _ in range(axes)),
        channels=random.choice((1, 3, 8, 13)),
        bias=random.random() < 0.5,
        precision=precision,
        weights=torch.float64 if precision == torch.float64 else random.choice((precision, torch.float32)),
        seed=seed,
    )


def interpreted() -> list[Case]:
    """What the interpreter is given, about a minute's work: all fixed cases, and some drawn at random."""
    return [*cases(), *map(drawn, range(18, 27))]  # in a row, of which none takes long


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Tiles put into a dense map of zeros, convolved as torch does it, and taken out again: `(R, V, *tile, C)`."""
    tile, places = x.shape[2:-1], [(~row).nonzero().tolist() for row in mask]
    windows = [
        [tuple(slice(at * side, (at + 1) * side) for at, side in zip(place, tile, strict=True)) for place in row]
        for row in places
    ]
    volume = x.new_zeros(len(x), *(side * t for side, t in zip(mask.shape[1:], tile, strict=True)), x.shape[-1])
    for row, shown in enumerate(windows):
        for number, window in enumerate(shown):
            volume[row][window] = x[row, number]
    convolve = F.conv2d if len(tile) == 2 else F.conv3d
    padding = [k // 2 for k in weight.shape[2:]]
    out = convolve(volume.movedim(-1, 1), weight, bias, padding=padding, groups=x.shape[-1]).movedim(1, -1)
    return torch.stack([torch.stack([out[row][window] for window in shown]) for row, shown in enumerate(windows)])


def exact(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the dense reference in float64: the result, the gradient of x and that of the weight."""
    x, weight = x.detach().cpu().double().requires_grad_(), weight.detach().cpu().double().requires_grad_()
    out = reference(x, weight, None if bias is None else bias.detach().cpu().double(), mask)
    dx, dw = torch.autograd.grad(out, (x, weight), gradient.detach().cpu().double())
    return out.detach(), dx, dw


def apart(ours: Tensor, true: Tensor, magnitude: Tensor, *, sums: float) -> float:
    """The largest error, over what rounding allows: a last place of the result, and `sums` of the sum of absolutes."""
    assert ours.shape == true.shape, (ours.shape, true.shape)
    allowed = torch.finfo(ours.dtype).eps * true.abs() + sums * magnitude + torch.finfo(ours.dtype).tiny
    return float(((ours.detach().cpu().double() - true).abs() / allowed).nan_to_num(math.inf).max())


def errors(form: ModuleType, case: Case, *, device: str = "cpu", sums: float | None = None) -> dict[str, float]:
    """How far a form lies from the reference, as a share of what rounding allows: result and both gradients.

    sums: the relative precision of its sums; float32's or float64's where not given.
    """
    values = case.values()
    x, weight, bias, gradient = (None if value is None else value.to(device) for value in values)
    assert x is not None
    assert weight is not None
    assert gradient is not None
    around = case.around(device)
    out = form.convolve(x, weight, bias, around, False)
    dx = form.convolve(gradient, weight, None, around, True)
    dw = form.weight_gradient(x, gradient, weight, around)
    assert out.dtype == dx.dtype == x.dtype
    assert dw.dtype == weight.dtype
    assert out.is_contiguous()
    absolute = [None if value is None else value.abs() for value in values]
    true = exact(*values[:3], case.mask(), values[3])
    largest = exact(absolute[0], absolute[1], absolute[2], case.mask(), absolute[3])  # type: ignore[arg-type]
    precise = torch.float64 if case.precision == torch.float64 else torch.float32
    sums = 16 * torch.finfo(precise).eps if sums is None else sums
    return {
        name: apart(ours, value, size, sums=sums)
        for name, ours, value, size in zip(("out", "dx", "dw"), (out, dx, dw), true, largest, strict=True)
    }


def main() -> None:
    from convmae.nn import tile_kernels  # needs Triton, which not every machine has

    torch.set_num_threads(1)
    for case in interpreted():
        print(json.dumps({"case": str(case), **errors(tile_kernels, case)}), flush=True)


if __name__ == "__main__":
    main()
