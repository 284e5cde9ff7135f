"""The training step: one graph for the compiler, nothing that a GPU is waited for, and a loss that keeps little."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cmae
import torch
import torch.nn.functional as F
from test_laws import CLIP, IMAGE, assert_near, build, gradients, sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from convmae import CMAE, MAE, ConvMAE, masking, targets
from convmae.grids import Shown
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.squared_error import squared_error
from convmae.targets import normalize

KINDS: dict[str, ConvMAE] = {
    "image": IMAGE,
    "clip": CLIP,
    "complementary": IMAGE.input((64, 32)).mask(masking.complementary(4)),
    "part": CLIP.reconstruct_part(masking.running_cells(0.5)),
    "drop path": IMAGE.drop_path(0.3),
}
each = pytest.mark.parametrize("builder", KINDS.values(), ids=KINDS.keys())
STEPS: dict[str, tuple[MAE | CMAE, tuple[str, ...]]] = {
    **{name: (builder, ()) for name, builder in KINDS.items()},
    **{f"CMAE of {name}": (builder, ("second",)) for name, builder in test_cmae.CASES.items()},
    **{f"CMAE of {name}, some rows": (builder, ("second", "valid")) for name, builder in test_cmae.CASES.items()},
}
every = pytest.mark.parametrize(("builder", "names"), STEPS.values(), ids=STEPS.keys())
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="whether a GPU is waited for needs a CUDA GPU")


def step(builder: MAE | CMAE, device: str = "cpu") -> tuple[MaskedAutoencoder, Tensor, Tensor, Shown]:
    """A model in training, uint8 pixels, a mask on the CPU, and what that shows, worked out."""
    model = test_cmae.build(builder) if isinstance(builder, CMAE) else build(builder)
    model = model.float().to(device).train()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (2, 3, *builder.size), dtype=torch.uint8, generator=generator).to(device)
    mask = model.draw_masks(2, generator)
    return model, pixels, mask, model.trunk.shown(mask, device=pixels.device)


def beside(names: tuple[str, ...], pixels: Tensor) -> dict[str, Tensor]:
    """What a contrastive model takes beside pixels and mask, where they are: another view, and which rows count."""
    found = {"second": pixels.flip(0), "valid": torch.arange(len(pixels), device=pixels.device) > 0}
    return {name: found[name] for name in names}


# --- one graph --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each
def test_forward_and_backward_are_one_graph_without_a_break(builder: ConvMAE) -> None:
    model, pixels, _, shown = step(builder)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    torch.manual_seed(0)
    out = compiled(pixels, mask=shown)
    torch.autograd.backward(out["loss"])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert counter.frame_count == 1
    assert dict(torch._dynamo.utils.counters["stats"])["unique_graphs"] == 1
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_einops_has_its_backend_before_anything_is_compiled() -> None:
    """Found in the first compiled step, it would make the second one compile everything anew."""
    code = "import torch, convmae, einops; assert torch.Tensor in einops._backends._type2backend"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=300)


@pytest.mark.slow
def test_another_mask_of_as_many_tokens_compiles_nothing_again() -> None:
    model, pixels, mask, _ = step(IMAGE)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    other = model.draw_masks(2, torch.Generator().manual_seed(2))
    assert not other.equal(mask)
    for hidden in (mask, other):
        compiled(pixels, mask=model.trunk.shown(hidden, device=pixels.device))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_mask_that_is_not_worked_out_breaks_the_graph() -> None:
    """So the test above can fail."""
    model, pixels, mask, _ = step(IMAGE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="aot_eager")(pixels, mask=mask)
    assert torch._dynamo.utils.counters["graph_break"]


# --- nothing waits for a GPU ------------------------------------------------------------------------------------


class Waited(Exception):
    """Something whose shape or value the host must read off the device."""


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operator whose result the host, or the shape of a result, depends on."""

    READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.READS or name.startswith(("unique", "_unique", "nonzero")):
            raise Waited(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise Waited(f"{name} by a mask")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None and isinstance(args[-1], Tensor):
            raise Waited(name)
        return func(*args, **(kwargs or {}))


@every
def test_no_operator_of_the_step_reads_a_value_off_the_device(builder: MAE | CMAE, names: tuple[str, ...]) -> None:
    model, pixels, _, shown = step(builder)
    more = beside(names, pixels)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    with NoWaiting():
        out = model(pixels, mask=shown, **more)
        torch.autograd.backward(out["loss"])
        optimiser.step()
        optimiser.zero_grad()
    assert out["loss"].isfinite()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_target_follows_without_a_value_read_off_the_device(momentum: float) -> None:
    model = test_cmae.build(test_cmae.CLIP)
    with NoWaiting():
        model.update_target(momentum)


@pytest.mark.parametrize(
    "target",
    [
        targets.pixels(),
        targets.pixels(unit=True),
        targets.normalized_pixels(),
        targets.normalized_pixels(per_channel=True),
    ],
    ids=str,
)
def test_no_target_reads_a_value_off_the_device(target: targets.Target) -> None:
    model, pixels, _, shown = step(IMAGE.predict(target))
    with NoWaiting():
        torch.autograd.backward(model(pixels, mask=shown)["loss"])


@each
def test_a_mask_that_is_not_worked_out_would_be_waited_for(builder: ConvMAE) -> None:
    """So the tests above can fail."""
    model, pixels, mask, _ = step(builder)
    with pytest.raises(Waited, match=r"nonzero|_local_scalar_dense|is_nonzero"), NoWaiting():
        model(pixels, mask=mask)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.argsort().nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])),
    ],
)
def test_the_watch_sees_every_way_to_read_a_value(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(Waited), NoWaiting():
        read(torch.arange(3.0))


class NoCrossing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every copy between host and device, and every tensor that is made on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                raise Waited(f"{func} on {tensor.device}")
        return out


class Pretended:
    """A model and a batch on a GPU that is only pretended: no value there can be read. Use in a FakeTensorMode."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        self.model = model
        own = [*model.named_parameters(), *model.named_buffers()]
        self.state = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda", requires_grad=value.requires_grad)
            for name, value in own
        }
        rows, few = 2 * getattr(model.masking, "groups", 1), max(1, model.trunk.length // 4)
        index, decoded = (torch.empty(rows, few, dtype=torch.long, device="cuda") for _ in range(2))
        self.shown = Shown(model.trunk.grid, index, None if model.part is None else decoded)
        self.pixels = torch.empty(2, 3, *model.trunk.size, dtype=torch.uint8, device="cuda")

    def __call__(self, mask: Tensor | Shown, **more: Tensor) -> dict[str, Tensor]:
        given = {"mask": mask, **more}
        out: dict[str, Tensor] = torch.func.functional_call(self.model, self.state, self.pixels, given)
        return out


@every
def test_everything_of_the_step_is_made_on_the_device(builder: MAE | CMAE, names: tuple[str, ...]) -> None:
    """On a pretended GPU the step goes the way that is a GPU's alone."""
    model = builder.build().train()
    with FakeTensorMode():
        there = Pretended(model)
        more = beside(names, there.pixels)
        with NoCrossing():
            out = there(there.shown, **more)
    assert out["loss"].device.type == "cuda"
    assert there.shown.index is not None
    assert out["prediction"].shape[0] == len(there.shown.index)


def test_a_mask_on_the_device_or_indices_off_it_cannot_pass() -> None:
    """So the test above can fail."""
    model = IMAGE.build().train()
    with FakeTensorMode():
        there = Pretended(model)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            there(torch.zeros(2, *IMAGE.grid, dtype=torch.bool, device="cuda"))
        with pytest.raises(Waited), NoCrossing():
            torch.zeros(2).to("cuda", non_blocking=True) + torch.zeros(2)


@on_gpu
@every
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_the_step_is_queued_without_a_wait(
    builder: MAE | CMAE, names: tuple[str, ...], autocast: bool
) -> None:
    model, pixels, _, shown = step(builder, "cuda")
    more = beside(names, pixels)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)

    def once() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss: Tensor = model(pixels, mask=shown, **more)["loss"]
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        return loss

    once()  # kernels are built, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@on_gpu
def test_on_a_gpu_a_mask_there_is_waited_for() -> None:
    """So the test above can fail."""
    model, pixels, mask, _ = step(IMAGE, "cuda")
    there = mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchron"):
            model(pixels, mask=there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_on_a_gpu_a_mask_on_the_cpu_is_brought_there_without_a_wait() -> None:
    model, pixels, mask, shown = step(IMAGE, "cuda")
    model(pixels, mask=mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(pixels, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out["loss"].equal(model(pixels, mask=shown)["loss"])


# --- the squared error ------------------------------------------------------------------------------------------


def drawn(*shape: int, precision: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(precision)


@pytest.mark.parametrize("target_is_trained", [False, True])
def test_the_squared_error_and_its_gradients_are_torchs(target_is_trained: bool) -> None:
    prediction = drawn(3, 5, 7).requires_grad_()
    target = drawn(3, 5, 7, seed=1).requires_grad_(target_is_trained)
    weight = drawn(3, 5, seed=2)
    leaves = [prediction, target] if target_is_trained else [prediction]
    ours, theirs = squared_error(prediction, target), F.mse_loss(prediction, target, reduction="none").mean(-1)
    assert_near(ours, theirs)
    found = torch.autograd.grad((ours * weight).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad((theirs * weight).sum(), leaves), strict=True):
        assert_near(one, other)
    assert torch.autograd.gradcheck(squared_error, (prediction, target))


def test_a_target_that_is_not_trained_gets_no_gradient() -> None:
    prediction, target = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1)
    torch.autograd.backward(squared_error(prediction, target).sum())
    assert prediction.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_of_a_rounded_prediction_the_squared_error_is_exact_and_the_gradient_rounded(precision: torch.dtype) -> None:
    prediction = drawn(4, 6, 48, precision=precision).requires_grad_()
    target = drawn(4, 6, 48, precision=torch.float32, seed=1)
    weight = drawn(4, 6, seed=2)
    ours = squared_error(prediction, target)
    (slope,) = torch.autograd.grad((ours * weight.float()).sum(), prediction)
    leaf = prediction.detach().double().requires_grad_()
    true = F.mse_loss(leaf, target.double(), reduction="none").mean(-1)
    (expected,) = torch.autograd.grad((true * weight).sum(), leaf)
    assert ours.dtype == torch.float32
    assert slope.dtype == precision
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)
    # the difference is rounded once, and its product once more
    smallest = torch.finfo(precision).smallest_normal
    torch.testing.assert_close(slope.double(), expected, rtol=2.1 * torch.finfo(precision).eps, atol=smallest)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_the_squared_error_keeps_the_difference_alone_in_the_precision_of_the_prediction(
    precision: torch.dtype,
) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    prediction = drawn(2, 3, 8, precision=precision).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        squared_error(prediction, drawn(2, 3, 8, precision=torch.float32, seed=1))
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [(prediction.shape, precision)]


# --- pixels -----------------------------------------------------------------------------------------------------


@each
def test_uint8_pixels_are_the_normalised_floats_bit_for_bit(builder: ConvMAE) -> None:
    model, pixels, mask, shown = step(builder.drop_path(0))
    rounded, floats = model(pixels, mask=shown), model(normalize(pixels), mask=mask)
    assert rounded["loss"].equal(floats["loss"])
    assert rounded["prediction"].equal(floats["prediction"])
    assert rounded["mask"].equal(floats["mask"])
    expected = gradients(model, floats["loss"])
    for name, gradient in gradients(model, rounded["loss"]).items():
        assert gradient.equal(expected[name]), name


def test_normalising_is_imagenets_mean_and_deviation() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    true = (pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert float((normalize(pixels).double() - true).abs().max()) < 1e-6


def test_uint8_pixels_reconstruct_as_the_normalised_floats() -> None:
    model, pixels, mask, _ = step(IMAGE)
    out = model(pixels, mask=mask)
    floats = model.reconstruct(normalize(pixels), out["prediction"], out["mask"])
    assert model.reconstruct(pixels, out["prediction"], out["mask"]).equal(floats)


def test_a_shown_worked_out_before_is_the_mask() -> None:
    model = build(CLIP)
    x, mask = sample(model)
    before = model.trunk.shown(mask, device=x.device)
    assert model(x, mask=before)["prediction"].equal(model(x, mask=mask)["prediction"])
    assert model(x, mask=before)["mask"].equal(mask)
