"""The tile convolution as an operator: both its forms against a dense reference, and what torch does with it.

The Triton form runs in Triton's interpreter on the CPU, in a process of its own, and where there is a GPU on that.
"""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import Case, cases, drawn, errors, exact, interpreted, reference
from runs import tiny
from test_laws import CLIP, IMAGE, assert_near, build, gradients, sample
from torch import Tensor, nn

from convmae import MAE, ConvMAE, masking
from convmae.grids import Shown, show
from convmae.nn import tile_planes
from convmae.nn.layers import TileConvolution, recompute
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.tile_convolution import reach, tile_convolution

ROOT = Path(__file__).parents[1]
TRITON = importlib.util.find_spec("triton") is not None

both = pytest.mark.parametrize("builder", [IMAGE, CLIP], ids=["image", "clip"])
each = pytest.mark.parametrize("case", list(cases()), ids=str)
on_gpu = pytest.mark.skipif(
    not (TRITON and torch.cuda.is_available()), reason="the Triton form itself needs a CUDA GPU and Triton"
)

SHOWN = Case(grid=(3, 2), shown=3, tile=(2, 2), kernel=(5, 3), precision=torch.float64, weights=torch.float64)
SHOWN_IN_TIME = replace(SHOWN, grid=(2, 2, 2), tile=(1, 2, 1), kernel=(3, 3, 3), channels=2)
WHOLE = replace(SHOWN, shown=0, tile=(5, 4))


def form_of(case: Case, device: str = "cpu") -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """The public function of x, weight and bias, these as leaves, and the gradient to put in."""
    x, weight, bias, gradient = case.values()
    assert bias is not None
    around = case.around(device)
    leaves = tuple(value.to(device).requires_grad_() for value in (x, weight, bias))
    return lambda x, weight, bias: tile_convolution(x, weight, bias, around), leaves, gradient.to(device)


def rounding(case: Case) -> float:
    """The relative precision of the torch form's sums: several of them are taken in the precision of the tiles."""
    eps = torch.finfo(case.precision).eps
    return 4 * eps if case.precision in (torch.bfloat16, torch.float16) else 16 * eps


# --- against the dense reference --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_the_triton_form_in_the_interpreter_is_the_dense_reference() -> None:
    done = subprocess.run(
        [sys.executable, "interpreted.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.pop("case") for line in lines] == [str(case) for case in interpreted()]
    worst = {name: max(line[name] for line in lines) for name in ("out", "dx", "dw")}
    assert max(worst.values()) <= 1, lines


def test_the_cases_cover_both_numbers_of_axes_masks_and_precisions() -> None:
    tried = {(len(case.tile), case.shown > 0) for case in cases()}
    assert tried == set(itertools.product((2, 3), (True, False)))
    precisions = {case.precision for case in cases()}
    assert precisions == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert {case.weights == case.precision for case in cases()} == {True, False}
    assert any(case.channels > 128 and case.channels % 2 == 0 for case in cases())
    assert any(case.channels % 2 for case in cases())


def test_the_interpreter_is_given_masked_cases_drawn_at_random_too() -> None:
    random = [case for case in interpreted() if case not in list(cases())]
    assert {len(case.tile) for case in random if case.shown} == {2, 3}
    assert {case.precision for case in random} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert len({(case.tile, case.kernel, case.grid) for case in random}) == len(random) == 9


@each
def test_the_torch_form_is_the_dense_reference(case: Case) -> None:
    found = errors(tile_planes, case, sums=rounding(case))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("seed", range(40))
def test_the_torch_form_of_a_case_drawn_at_random_is_the_dense_reference(seed: int) -> None:
    case = drawn(seed)
    found = errors(tile_planes, case, sums=rounding(case))
    assert max(found.values()) <= 1, (case, found)


@pytest.mark.parametrize("case", [SHOWN, SHOWN_IN_TIME, WHOLE, replace(SHOWN, precision=torch.float32)], ids=str)
def test_autograd_through_the_operator_gives_the_gradients_of_the_dense_reference(case: Case) -> None:
    function, (x, weight, bias), gradient = form_of(case)
    out = function(x, weight, bias)
    dx, dw, db = torch.autograd.grad(out, (x, weight, bias), gradient)
    true = exact(x, weight, bias, case.mask(), gradient)
    near = 1e-12 if case.precision == torch.float64 else 1e-5
    for ours, theirs in zip((out, dx, dw), true, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=near, atol=near)
    torch.testing.assert_close(db.double(), gradient.double().flatten(0, -2).sum(0), rtol=near, atol=near)
    assert (dx.dtype, dw.dtype, db.dtype) == (x.dtype, weight.dtype, bias.dtype)


@pytest.mark.parametrize("case", [SHOWN, SHOWN_IN_TIME, WHOLE], ids=str)
def test_gradcheck_of_tiles_weight_and_bias(case: Case) -> None:
    function, leaves, _ = form_of(case)
    assert torch.autograd.gradcheck(function, leaves)


def test_the_reference_knows_a_kernel_that_is_turned_round() -> None:
    """The reference must not be blind to what the gradient's kernel is."""
    x, weight, bias, _ = SHOWN.values()
    here = reference(x, weight, bias, SHOWN.mask())
    assert not torch.allclose(here, reference(x, weight.flip(2, 3), bias, SHOWN.mask()))
    assert not torch.allclose(here, reference(x, weight, bias, ~SHOWN.mask()))


# --- as an operator of torch's ----------------------------------------------------------------------------------


def operator(name: str) -> Any:
    return getattr(torch.ops.convmae, name).default


@pytest.mark.parametrize("case", [SHOWN, SHOWN_IN_TIME, replace(SHOWN, bias=False)], ids=str)
def test_opcheck_passes_for_both_operators(case: Case) -> None:
    x, weight, bias, gradient = case.values()
    around = case.around()
    torch.library.opcheck(operator("tile_convolution"), (x, weight, bias, around, False))
    torch.library.opcheck(operator("tile_convolution"), (gradient, weight, None, around, True))
    torch.library.opcheck(operator("tile_convolution_weight_gradient"), (x, gradient, weight, around))
    trained = [value if value is None else value.clone().requires_grad_() for value in (x, weight, bias)]
    torch.library.opcheck(operator("tile_convolution"), (*trained, around, False))


def test_opcheck_passes_for_the_operator_over_whole_maps() -> None:
    x, weight, bias, gradient = WHOLE.values()
    torch.library.opcheck(operator("tile_convolution"), (x, weight, bias, None, False))
    torch.library.opcheck(operator("tile_convolution"), (gradient, weight, None, None, True))


def test_the_weight_gradient_over_whole_maps_is_an_operator_on_the_cpu_too() -> None:
    x, weight, _, gradient = WHOLE.values()
    (_, _, dw) = exact(x, weight, None, WHOLE.mask(), gradient)
    assert_near(operator("tile_convolution_weight_gradient")(x, gradient, weight, None), dw)


@pytest.mark.parametrize("case", [SHOWN, WHOLE], ids=["masked", "whole"])
@pytest.mark.parametrize(
    "precision",
    [torch.bfloat16, torch.float32],
    ids=str,
)
def test_autocast_leaves_the_operator_alone(case: Case, precision: torch.dtype) -> None:
    """What goes in decides the precision: bfloat16 tiles with float32 weights, as in a model, and float32 tiles."""
    function, leaves, _ = form_of(replace(case, precision=precision, weights=torch.float32))
    without = function(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        within = function(*leaves)
    assert within.dtype == precision
    assert within.equal(without)


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_gives_the_same_values_bit_for_bit(builder: ConvMAE, autocast: bool) -> None:
    model, again = (build(builder.drop_path(0.3)).float().train() for _ in range(2))
    recompute(again)
    x, mask = sample(model)
    found = []
    for one in (model, again):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = one(x.float(), mask=mask)
        found.append((out["loss"], out["prediction"], gradients(one, out["loss"])))
    assert found[0][0].equal(found[1][0])
    assert found[0][1].equal(found[1][1])
    for name, gradient in found[0][2].items():
        assert gradient.equal(found[1][2][name]), name


# --- what is hidden does not spread -----------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", [SHOWN, SHOWN_IN_TIME], ids=str)
def test_what_is_hidden_is_in_no_value_and_no_gradient(case: Case, poison: float) -> None:
    mask, axes = case.mask(), len(case.tile)
    shown = show(mask, case.grid)
    around = shown.around(reach(case.tile, case.kernel))
    _, weight, bias, gradient = case.values()
    hidden = mask
    for axis, side in enumerate(case.tile, 1):
        hidden = hidden.repeat_interleave(side, axis)
    volume = torch.randn(*hidden.shape, case.channels, dtype=torch.float64)

    def run(volume: Tensor) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (volume, weight, bias) if value is not None]
        out = tile_convolution(shown.take(leaves[0]), leaves[1], leaves[2], around)
        return [out, *torch.autograd.grad(out, leaves, gradient)]

    clean, poisoned = run(volume), run(volume.masked_fill(hidden.unsqueeze(-1), poison))
    assert hidden.ndim == 1 + axes
    assert all(one.equal(other) for one, other in zip(clean, poisoned, strict=True))
    assert clean[1][hidden].eq(0).all()


def check_spreading(case: Case, device: str) -> None:
    """A shown tile that is not a number reaches the cells under the kernel, and nothing else."""
    function, (x, weight, bias), _ = form_of(case, device)
    for sample_number, tile in itertools.product(range(len(x)), range(x.shape[1])):
        poisoned = x.detach().clone()
        poisoned[sample_number, tile] = math.nan
        marks = poisoned.isnan().double().cpu()
        touched = reference(marks, torch.ones_like(weight, device="cpu"), None, case.mask()) > 0
        before, after = function(x, weight, bias).cpu(), function(poisoned, weight, bias).cpu()
        assert after[touched].isnan().all()
        assert after[~touched].equal(before[~touched])


@pytest.mark.parametrize("case", [SHOWN, SHOWN_IN_TIME, replace(SHOWN, tile=(4, 1), kernel=(3, 5))], ids=str)
def test_a_shown_tile_that_is_not_a_number_reaches_its_neighbours_alone(case: Case) -> None:
    check_spreading(case, "cpu")


# --- which tiles are around -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "reach"),
    [
        ((3, 4), (1, 1)),
        ((3, 4), (0, 2)),
        ((2, 2), (3, 1)),
        ((1, 5), (1, 0)),
        ((2, 3, 2), (1, 1, 1)),
        ((3, 2, 2), (2, 0, 1)),
        ((2, 2, 3), (0, 0, 0)),
    ],
    ids=str,
)
def test_the_tiles_around_are_those_of_a_loop(grid: tuple[int, ...], reach: tuple[int, ...]) -> None:
    mask = masking.random(0.5)(3, grid, torch.Generator().manual_seed(0))
    tokens = [(row, *place) for row, *place in (~mask).nonzero().tolist()]
    number = {token: at for at, token in enumerate(tokens)}
    expected = [
        [
            number.get((row, *(p + step for p, step in zip(place, steps, strict=True))), -1)
            for steps in itertools.product(*(range(-r, r + 1) for r in reach))
        ]
        for row, *place in tokens
    ]
    around = show(mask, grid).around(reach)
    assert around is not None
    assert around.dtype == torch.int32
    assert around.tolist() == expected


def test_a_table_that_holds_other_numbers_is_worked_out_again() -> None:
    """Compiled code writes into memory that it has done with: the same tensor, another mask."""
    x, weight = torch.randn(1, 3, 2, 2, 4), torch.randn(4, 1, 3, 3)
    first, second = (Shown((2, 3), torch.tensor([index])).around((1, 1)) for index in ([0, 1, 2], [0, 2, 4]))
    assert first is not None
    assert second is not None
    expected = tile_convolution(x, weight, None, second)
    before = tile_convolution(x, weight, None, first)
    first.copy_(second)
    assert not before.equal(expected)
    assert tile_convolution(x, weight, None, first).equal(expected)


def test_nothing_is_around_where_nothing_is_masked() -> None:
    assert Shown((2, 3)).around((1, 1)) is None


def test_with_no_sample_there_are_no_tiles_around_and_no_values() -> None:
    shown = Shown((2, 3), torch.zeros(0, 3, dtype=torch.long))
    around = shown.around((1, 1))
    assert around is not None
    assert around.shape == (0, 9)
    x, weight = torch.zeros(0, 3, 2, 2, 4, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    out = tile_convolution(x, weight, None, around)
    assert out.shape == x.shape
    torch.autograd.backward(out.sum())
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


# --- compiled and exported --------------------------------------------------------------------------------------


class Step(nn.Module):
    """Loss and prediction from pixels and the indices of shown tokens: what can be exported, for tensors go in."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(x, Shown(self.model.trunk.grid, index))
        return out["loss"], out["prediction"]


def index_of(mask: Tensor) -> Tensor:
    index = show(mask, mask.shape[1:]).index
    assert index is not None
    return index


@both
def test_an_exported_masked_autoencoder_is_the_eager_one(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    exported = torch.export.export(Step(model), (x, index_of(mask)))
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    stages = sum(isinstance(module, TileConvolution) for module in model.modules())
    assert sum("convmae.tile_convolution" in call for call in calls) == stages
    other, another_mask = sample(model, seed=5)
    for given, hidden in ((x, mask), (other, another_mask)):
        loss, prediction = exported.module()(given, index_of(hidden))
        out = model(given, mask=hidden)
        assert_near(prediction, out["prediction"])
        assert_near(loss, out["loss"])


@both
def test_an_exported_classifier_is_the_eager_one(builder: ConvMAE) -> None:
    model = replace(builder.classifier(5), head_std=0.1).build().double().eval()
    x = torch.randn(2, 3, *builder.size, dtype=torch.float64)
    assert_near(torch.export.export(model, (x,)).module()(x), model(x))


def check_compiled(builder: MAE, device: str, *, classifier_by: str = "inductor") -> None:
    """Values and gradients, masked and over whole maps, in float64, of one graph each."""
    model = build(builder).to(device)
    x, mask = sample(model)
    x = x.to(device)
    shown = model.trunk.shown(mask, device=x.device)
    eager, compiled = model(x, mask=shown), torch.compile(model, fullgraph=True)(x, mask=shown)
    assert_near(compiled["prediction"], eager["prediction"])
    assert_near(compiled["loss"], eager["loss"])
    expected = gradients(model, eager["loss"])
    torch.autograd.backward(compiled["loss"])  # once: the compiler gives its buffers away
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_near(parameter.grad, expected.pop(name), name)
    assert not any(gradient.any() for gradient in expected.values()), list(expected)
    net = replace(builder.classifier(5), head_std=0.1).build().double().to(device).eval()
    assert_near(torch.compile(net, fullgraph=True, backend=classifier_by)(x), net(x))


@pytest.mark.slow
def test_the_compiled_models_are_the_eager_ones() -> None:
    check_compiled(tiny(), "cpu", classifier_by="aot_eager")


# --- on a GPU ---------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("case", [*cases(), *map(drawn, range(40))], ids=str)
def test_the_triton_form_on_a_gpu_is_the_dense_reference(case: Case) -> None:
    from convmae.nn import tile_kernels

    found = errors(tile_kernels, case, device="cuda")
    assert max(found.values()) <= 1, found


@on_gpu
@pytest.mark.parametrize("case", [SHOWN, SHOWN_IN_TIME, WHOLE], ids=str)
def test_on_a_gpu_gradcheck_opcheck_and_nothing_spreads(case: Case) -> None:
    function, leaves, gradient = form_of(case, "cuda")
    assert torch.autograd.gradcheck(function, leaves)
    torch.library.opcheck(operator("tile_convolution"), (*leaves, case.around("cuda"), False))
    x, weight = (leaf.detach() for leaf in leaves[:2])
    torch.library.opcheck(operator("tile_convolution_weight_gradient"), (x, gradient, weight, case.around("cuda")))
    if case.shown:
        check_spreading(case, "cuda")


@on_gpu
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_two_runs_are_the_same_bit_for_bit(precision: torch.dtype) -> None:
    case = Case(grid=(4, 14, 14), shown=160, tile=(1, 4, 4), kernel=(3, 5, 5), channels=64, precision=precision)
    function, leaves, gradient = form_of(replace(case, weights=torch.promote_types(precision, torch.float32)), "cuda")
    first, second = (
        [out, *torch.autograd.grad(out, leaves, gradient)] for out in (function(*leaves), function(*leaves))
    )
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@on_gpu
@both
def test_on_a_gpu_a_model_is_the_one_on_the_cpu(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    here = model(x, mask=mask)
    slopes = gradients(model, here["loss"])
    there = model.cuda()(x.cuda(), mask=mask)
    assert_near(there["prediction"].cpu(), here["prediction"])
    for name, gradient in gradients(model, there["loss"]).items():
        assert_near(gradient.cpu(), slopes[name], name)


@on_gpu
@both
def test_on_a_gpu_checkpointing_gives_the_same_values_bit_for_bit(builder: ConvMAE) -> None:
    model, again = (build(builder).float().cuda() for _ in range(2))
    recompute(again)
    x, mask = sample(model)
    with torch.autocast("cuda", torch.bfloat16):
        losses = [one(x.float().cuda(), mask=mask)["loss"] for one in (model, again)]
    assert losses[0].equal(losses[1])
    expected, found = gradients(model, losses[0]), gradients(again, losses[1])
    for name, gradient in expected.items():
        assert gradient.equal(found[name]), name


@on_gpu
@pytest.mark.slow
@both
def test_on_a_gpu_the_compiled_models_are_the_eager_ones(builder: ConvMAE) -> None:
    check_compiled(builder, "cuda")
