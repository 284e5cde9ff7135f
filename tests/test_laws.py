"""Laws of the masked trunk, on two and three axes: nothing leaks, and sparse is dense-masked, to the last digits.

The reference here is the published form restated: dense maps, channels first, multiplied by the mask before the
depthwise convolution, with torch's own convolutions and an attention written out.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae import MAE, AttentionStage, ConvMAE, ConvStage, masking
from convmae.grids import Shown, show
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.tile_convolution import reach, tile_convolution
from convmae.targets import normalize
from video import VideoConvMAE

# --- tiny builders ----------------------------------------------------------------------------------------------

IMAGE = (
    ConvMAE()
    .input((32, 48))
    .stages(
        ConvStage(dim=6, depth=1, stride=(4, 4), kernel=(5, 5), mlp_ratio=2),
        ConvStage(dim=8, depth=2, stride=(2, 2), kernel=(5, 5), mlp_ratio=2),
        AttentionStage(dim=12, depth=2, stride=(2, 2), heads=3, mlp_ratio=2),
    )
    .mask(masking.random(0.5))
    .decode(dim=8, depth=1, heads=2, mlp_ratio=2)
)
CLIP = (
    VideoConvMAE()
    .input((8, 16, 24))
    .stages(
        ConvStage(dim=6, depth=1, stride=(2, 2, 2), kernel=(3, 5, 5), mlp_ratio=2),
        ConvStage(dim=8, depth=1, stride=(1, 2, 2), kernel=(3, 5, 5), mlp_ratio=2),
        AttentionStage(dim=12, depth=1, stride=(1, 2, 2), heads=2, mlp_ratio=2),
    )
    .mask(masking.tube(0.5))
    .decode(dim=12, depth=1, heads=2, mlp_ratio=2)
)


def stages(
    kernel: tuple[int, ...], *strides: tuple[int, ...], last: tuple[int, ...], depth: int = 1
) -> tuple[ConvStage | AttentionStage, ...]:
    convolutions = [
        ConvStage(dim=4 + 2 * number, depth=depth, stride=stride, kernel=kernel, mlp_ratio=2)
        for number, stride in enumerate(strides)
    ]
    return (*convolutions, AttentionStage(dim=12, depth=1, stride=last, heads=2, mlp_ratio=2))


def deep_tubelets(kernel: int) -> ConvMAE:
    """Tiles of more than one frame in both convolution stages: (2, 2, 2) cells, and (1, 2, 2) of them."""
    trunk = stages((kernel, 5, 5), (2, 2, 2), (2, 2, 2), last=(1, 2, 2))
    return CLIP.input((16, 16, 24)).stages(*trunk).mask(masking.random(0.6))


CASES: dict[str, ConvMAE] = {
    "image": IMAGE,
    "image, blocks": IMAGE.mask(masking.block(0.5, 2)).input((64, 32)),
    "image, kernel 3 x 7": IMAGE.stages(*stages((3, 7), (2, 4), (4, 2), last=(2, 2))).input((32, 64)),
    "image, kernel past the next tile": IMAGE.stages(*stages((7, 9), (4, 4), last=(2, 2))),
    "image, two stages": IMAGE.stages(*stages((5, 5), (4, 4), last=(4, 4))),
    "image, four stages": IMAGE.stages(*stages((5, 5), (2, 2), (2, 2), (2, 2), last=(2, 2))),
    "image, stride 1 last": IMAGE.stages(*stages((3, 3), (4, 4), (2, 2), last=(1, 1))),
    "image, convolutions after attention": IMAGE.stages(
        ConvStage(dim=6, depth=1, stride=(4, 4), kernel=(5, 5), mlp_ratio=2),
        AttentionStage(dim=8, depth=1, stride=(2, 2), heads=2, mlp_ratio=2),
        ConvStage(dim=10, depth=2, stride=(2, 2), kernel=(3, 3), mlp_ratio=2),
    ),
    "image, class token": IMAGE.with_class_token(),
    "image, no fusion": IMAGE.fuse(False),
    "clip, kernel 1": CLIP.stages(*stages((1, 5, 5), (2, 2, 2), (1, 2, 2), last=(1, 2, 2))),
    "clip, kernel 3": CLIP,
    "clip, kernel 5": CLIP.stages(*stages((5, 5, 5), (2, 2, 2), (1, 2, 2), last=(1, 2, 2))),
    "clip, random": CLIP.mask(masking.random(0.5)),
    "clip, tube blocks": CLIP.input((8, 32, 16)).mask(masking.tube_block(0.5, 2)),
    "clip, deep tubelets, kernel 1": deep_tubelets(1),
    "clip, deep tubelets, kernel 3": deep_tubelets(3),
    "clip, deep tubelets, kernel 5": deep_tubelets(5),
    "clip, time in the last stride": CLIP.stages(*stages((3, 3, 5), (1, 2, 2), (2, 4, 2), last=(2, 1, 2))),
    "clip, two stages": CLIP.stages(*stages((3, 5, 5), (2, 4, 4), last=(1, 2, 2))),
    "clip, four stages": CLIP.stages(*stages((3, 3, 3), (1, 2, 2), (2, 1, 2), (1, 2, 1), last=(2, 2, 2))),
    "clip, blocks in time": CLIP.mask(masking.block(0.5, (2, 1, 3))),
}
both = pytest.mark.parametrize("builder", [IMAGE, CLIP], ids=["image", "clip"])
each = pytest.mark.parametrize("name", CASES)


def build(builder: MAE, *, seed: int = 0) -> MaskedAutoencoder:
    """In float64, every parameter away from its initial zeros and ones, so that nothing is right by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = builder.build().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def sample(model: MaskedAutoencoder, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *model.trunk.size, generator=generator, dtype=torch.float64)
    mask = model.draw_masks(batch, generator)
    while mask[0].equal(mask[1]):  # few tokens: draw until samples differ
        mask = model.draw_masks(batch, generator)
    return x, mask


def upsample(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """`(B, *grid) -> (B, *size)`, every token's value over all its cells."""
    for axis, side in enumerate(size, 1):
        mask = mask.repeat_interleave(side // mask.shape[axis], axis)
    return mask


# --- the dense reference ----------------------------------------------------------------------------------------


class Dense:
    """A masked autoencoder in the published, dense form, reading the weights of ours."""

    def __init__(self, builder: MAE, model: MaskedAutoencoder) -> None:
        self.builder, self.axes = builder, len(builder.size)
        self.weights = dict(model.named_parameters())
        self.target = model.target

    def convolve(self, x: Tensor, name: str, **options: Any) -> Tensor:
        convolution: Callable[..., Tensor] = F.conv2d if self.axes == 2 else F.conv3d
        return convolution(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def pointwise(self, x: Tensor, name: str) -> Tensor:
        return self.linear(x.movedim(1, -1), name).movedim(-1, 1)

    def map_norm(self, x: Tensor, name: str) -> Tensor:
        return self.norm(x.movedim(1, -1), name, 1e-5).movedim(-1, 1)

    def attend(self, x: Tensor, name: str, heads: int) -> Tensor:
        h = self.norm(x, f"{name}.norm1", 1e-6)
        batch, length, dim = h.shape
        qkv = self.linear(h, f"{name}.attention.qkv").view(batch, length, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(dim // heads)).softmax(-1)
        x = x + self.linear((weights @ v).transpose(1, 2).reshape(x.shape), f"{name}.attention.out")
        return x + self.mlp(self.norm(x, f"{name}.norm2", 1e-6), name)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.mlp.0")), f"{name}.mlp.2")

    def block(self, x: Tensor, name: str, shown: Tensor) -> Tensor:
        h = self.pointwise(self.map_norm(x, f"{name}.norm1"), f"{name}.into") * shown
        kernel = self.weights[f"{name}.depthwise.weight"].shape[2:]
        h = self.convolve(h, f"{name}.depthwise", padding=[k // 2 for k in kernel], groups=h.shape[1])
        x = x + self.pointwise(h, f"{name}.out")
        h = self.map_norm(x, f"{name}.norm2").movedim(1, -1)
        return x + self.mlp(h, name).movedim(-1, 1)

    def attention_stage(self, x: Tensor, number: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention among the shown cells alone; the others come out as zeros."""
        stage, name = self.builder.trunk[number], f"trunk.stages.{number}"
        assert isinstance(stage, AttentionStage)
        if stage.hybrid:
            x = self.pointwise(F.gelu(self.map_norm(x, f"{name}.norm")), f"{name}.linear")
        x = x + self.weights[f"{name}.positions"].movedim(-1, 0)
        tokens = x.flatten(2).transpose(1, 2)
        shown = ~upsample(hidden, tuple(x.shape[2:])).flatten(1)
        kept = tokens[shown].view(len(x), -1, tokens.shape[-1])
        class_token: Tensor | None = self.weights.get(f"{name}.class_token")
        if class_token is not None:
            kept = torch.cat([class_token.expand(len(x), -1, -1), kept], 1)
        for block in range(stage.depth):
            kept = self.attend(kept, f"{name}.blocks.{block}", stage.heads)
        if class_token is not None:
            class_token, kept = kept[:, :1], kept[:, 1:]
        out = torch.zeros_like(tokens).masked_scatter(shown[..., None].expand_as(tokens), kept)
        return out.transpose(1, 2).view(x.shape), class_token

    def maps(self, x: Tensor, hidden: Tensor) -> tuple[list[Tensor], Tensor | None]:
        maps: list[Tensor] = []
        class_token = None
        for number, stage in enumerate(self.builder.trunk):
            name = f"trunk.stages.{number}"
            x = self.convolve(x, f"{name}.embedding", stride=stage.stride)
            if isinstance(stage, AttentionStage):
                x, class_token = self.attention_stage(x, number, hidden)
            else:
                x = F.gelu(self.map_norm(x, f"{name}.norm"))
                shown = (~upsample(hidden, tuple(x.shape[2:]))).unsqueeze(1).to(x.dtype)
                for block in range(stage.depth):
                    x = self.block(x, f"{name}.blocks.{block}", shown)
            maps.append(x)
        return maps, class_token

    def __call__(self, x: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        maps, class_token = self.maps(x, hidden)
        fused = maps[-1]
        if self.builder.fusion:
            for number, finer in enumerate(maps[:-1]):
                ratio = [a // b for a, b in zip(finer.shape[2:], fused.shape[2:], strict=True)]
                fused = fused + self.convolve(finer, f"fusion.{number}", stride=ratio)
        tokens = self.norm(fused.flatten(2).transpose(1, 2), "norm", 1e-6)
        shown = ~hidden.flatten(1)
        latent = tokens[shown].view(len(x), -1, tokens.shape[-1])
        full = torch.where(
            shown[..., None], self.linear(tokens, "decoder.embedding"), self.weights["decoder.mask_token"]
        )
        full = full + self.weights["decoder.positions"].flatten(0, -2)
        if class_token is not None:
            class_token = self.norm(class_token, "norm", 1e-6)
            full = torch.cat([self.linear(class_token, "decoder.embedding"), full], 1)
        for block in range(self.builder.decoder.depth):
            full = self.attend(full, f"decoder.blocks.{block}", self.builder.decoder.heads)
        full = full[:, -tokens.shape[1] :]
        prediction = self.linear(self.norm(full, "decoder.norm", 1e-6), "decoder.head")
        target = self.target(pixel_rows(x, self.builder.stride))
        error = (prediction - target).square().mean(-1)
        loss = error[hidden.flatten(1)].mean()
        return {"latent": latent, "prediction": prediction, "loss": loss}


def pixel_rows(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """`(B, C, *size) -> (B, L, P, C)` by plain slicing."""
    grid = [side // step for side, step in zip(x.shape[2:], patch, strict=True)]
    rows = []
    for number in range(math.prod(grid)):
        place = [int(i) for i in torch.unravel_index(torch.tensor(number), grid)]
        window = x[:, :, *(slice(i * step, (i + 1) * step) for i, step in zip(place, patch, strict=True))]
        rows.append(window.flatten(2).transpose(1, 2))
    return torch.stack(rows, 1)


def gradients(model: MaskedAutoencoder, scalar: Tensor) -> dict[str, Tensor]:
    """Of every trained parameter; those that play no part get zeros."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }


def assert_near(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """To 1e-12 of the largest value, or of one."""
    assert ours.shape == theirs.shape
    apart = float((ours - theirs).detach().abs().max())
    assert apart <= 1e-12 * max(1.0, float(theirs.detach().abs().max())), (what, apart)


@each
def test_sparse_is_dense_masked_in_every_value_and_gradient(name: str) -> None:
    builder = CASES[name]
    model = build(builder)
    x, mask = sample(model)
    dense = Dense(builder, model)(x, mask)
    shown = model.trunk.shown(mask, device=x.device)
    latent, _ = model.encode(x, shown)
    out = model(x, mask=mask)

    assert_near(latent, dense["latent"], "latent")
    assert_near(out["prediction"], dense["prediction"], "prediction")
    assert_near(out["loss"], dense["loss"], "loss")
    ours, theirs = gradients(model, out["loss"]), gradients(model, dense["loss"])
    for parameter, gradient in theirs.items():
        assert_near(ours[parameter], gradient, parameter)
    # a plain sum over a latent sees the encoder's gradients at full size, not after a decoder
    weight = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = gradients(model, (latent * weight).sum())
    theirs = gradients(model, (dense["latent"] * weight).sum())
    for parameter, gradient in theirs.items():
        assert_near(ours[parameter], gradient, parameter)


@pytest.mark.parametrize("name", ["image", "clip, kernel 3", "clip, deep tubelets, kernel 3", "image, four stages"])
def test_sparse_maps_are_the_dense_maps_at_shown_cells(name: str) -> None:
    builder = CASES[name]
    model = build(builder)
    x, mask = sample(model)
    shown = model.trunk.shown(mask, device=x.device)
    dense, _ = Dense(builder, model).maps(x, mask)
    for stage, (ours, theirs) in enumerate(zip(model.trunk(x, shown).maps, dense, strict=True)):
        expected = shown.take(theirs.movedim(1, -1))
        assert ours.shape[2:-1] == model.trunk.tile(stage)
        assert_near(ours, expected, f"stage {stage}")


@each
def test_without_a_mask_the_trunk_is_the_dense_trunk(name: str) -> None:
    builder = CASES[name]
    model = build(builder)
    x, mask = sample(model)
    features = model.trunk(x)
    nothing = torch.zeros_like(mask)
    dense, class_token = Dense(builder, model).maps(x, nothing)
    for ours, theirs in zip(features.maps, dense, strict=True):
        assert_near(ours.squeeze(1), theirs.movedim(1, -1))
    assert (features.class_token is None) == (class_token is None)
    expected = gradients(model, dense[-1].square().sum())
    found = gradients(model, features.tokens.square().sum())
    for parameter, gradient in expected.items():
        assert_near(found[parameter], gradient, parameter)


@each
def test_a_mask_that_hides_nothing_is_no_mask(name: str) -> None:
    model = build(CASES[name])
    x, mask = sample(model)
    none, _ = model.encode(x, Shown(model.trunk.grid))
    nothing, _ = model.encode(x, model.trunk.shown(torch.zeros_like(mask), device=x.device))
    assert_near(nothing, none)
    assert_near(
        model.decoder(nothing, model.trunk.shown(torch.zeros_like(mask), device=x.device)),
        model.decoder(none, Shown(model.trunk.grid)),
    )
    ours, theirs = gradients(model, nothing.square().sum()), gradients(model, none.square().sum())
    for parameter, gradient in theirs.items():
        assert_near(ours[parameter], gradient, parameter)


# --- nothing leaks ----------------------------------------------------------------------------------------------


def shown_run(model: MaskedAutoencoder, x: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    latent, _ = model.encode(x, model.trunk.shown(mask, device=x.device))
    return latent, gradients(model, latent.square().sum())


@each
def test_hidden_pixels_cannot_move_shown_tokens_or_their_gradients(name: str) -> None:
    model = build(CASES[name])
    x, mask = sample(model)
    hidden = upsample(mask, model.trunk.size).unsqueeze(1)
    before, slopes = shown_run(model, x, mask)
    for poison in (math.nan, math.inf, -math.inf, 1e300):
        after, poisoned = shown_run(model, x.masked_fill(hidden, poison), mask)
        assert after.equal(before)  # bit for bit
        for parameter, gradient in slopes.items():
            assert poisoned[parameter].equal(gradient), (poison, parameter)


@each
def test_hidden_pixels_get_zero_gradient_and_shown_pixels_get_some(name: str) -> None:
    model = build(CASES[name])
    x, mask = sample(model)
    hidden = upsample(mask, model.trunk.size).unsqueeze(1).expand_as(x)
    x = x.masked_fill(hidden, math.nan).requires_grad_()
    latent, _ = model.encode(x, model.trunk.shown(mask, device=x.device))
    (gradient,) = torch.autograd.grad(latent.square().sum(), x)
    assert gradient[hidden].eq(0).all()
    assert gradient[~hidden].ne(0).all()
    assert gradient.isfinite().all()


@both
def test_hidden_pixels_of_one_sample_cannot_spoil_the_prediction_of_any(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    hidden = upsample(mask, model.trunk.size).unsqueeze(1)
    prediction = model(x, mask=mask)["prediction"]
    assert model(x.masked_fill(hidden, math.nan), mask=mask)["prediction"].equal(prediction)


@both
def test_the_loss_is_over_hidden_patches_alone(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    prediction = model(x, mask=mask)["prediction"].detach().requires_grad_()
    torch.autograd.backward(model.loss(x, prediction, model.trunk.shown(mask, device=x.device)))
    assert prediction.grad is not None
    assert prediction.grad[~mask.flatten(1)].eq(0).all()
    assert prediction.grad[mask.flatten(1)].ne(0).all()


# --- batches ----------------------------------------------------------------------------------------------------


@each
def test_a_sample_does_not_depend_on_its_batch_or_its_place_in_it(name: str) -> None:
    model = build(CASES[name])
    x, mask = sample(model, batch=4)
    together = model(x, mask=mask)["prediction"]
    order = torch.tensor([2, 0, 3, 1])
    assert_near(model(x[order], mask=mask[order])["prediction"], together[order])
    for number in range(4):
        alone = model(x[number : number + 1], mask=mask[number : number + 1])["prediction"]
        assert_near(alone[0], together[number])


@both
def test_one_shown_token_and_one_hidden_token_are_enough(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    for value in (True, False):
        lonely = torch.full_like(mask, value)
        lonely.flatten(1)[torch.arange(3), torch.tensor([0, 2, 5])] = not value
        dense = Dense(builder, model)(x, lonely)
        out = model(x, mask=lonely)
        assert_near(out["prediction"], dense["prediction"])
        assert_near(out["loss"], dense["loss"])


@both
def test_the_loss_of_a_mask_that_hides_nothing_is_refused_or_finite(builder: ConvMAE) -> None:
    """A mean over no patches is not a number: it must not come back as one silently."""
    model = build(builder)
    x, mask = sample(model)
    try:
        loss = model(x, mask=torch.zeros_like(mask))["loss"]
    except ValueError:
        return
    assert loss.isfinite()


@both
def test_inputs_may_have_any_strides(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert not turned.is_contiguous()
    assert_near(model(turned, mask=mask)["prediction"], model(x, mask=mask)["prediction"])


@both
def test_the_mask_comes_back_and_a_drawn_one_is_on_the_grid(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    assert model(x, mask=mask)["mask"].equal(mask)
    drawn = model(x)["mask"]
    assert drawn.dtype == torch.bool
    assert drawn.shape == (3, *builder.grid)


@both
def test_wrong_inputs_and_masks_are_refused_with_what_was_given(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    with pytest.raises(ValueError, match="was built for inputs"):
        model(x[..., :-1], mask=mask)
    with pytest.raises(ValueError, match="mask is for 2 samples, the input has 3"):
        model(x, mask=mask[:2])
    with pytest.raises(ValueError, match="mask must be boolean"):
        model(x, mask=mask.float())
    with pytest.raises(ValueError, match="mask must be boolean"):
        model(x, mask=mask.flatten(1))
    with pytest.raises(ValueError, match="mask must be boolean"):
        model(x, mask=mask.transpose(-1, -2))
    uneven = mask.clone()
    uneven[0] = ~uneven[0]
    uneven[0].flatten()[uneven[0].flatten().nonzero()[0]] = False
    with pytest.raises(ValueError, match="every sample must show equally many tokens"):
        model(x, mask=uneven)


# --- the tile convolution by itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "tile", "kernel"),
    [
        ((3, 2), (2, 2), (3, 3)),
        ((3, 3), (1, 1), (5, 3)),
        ((2, 3), (2, 1), (5, 5)),
        ((2, 2, 3), (2, 1, 2), (3, 3, 3)),
        ((3, 2, 2), (1, 2, 1), (5, 1, 3)),
        ((2, 2, 2), (2, 2, 2), (1, 3, 3)),
    ],
    ids=str,
)
def test_the_gradients_of_the_tile_convolution_are_right(
    grid: tuple[int, ...], tile: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = masking.random(0.5)(2, grid, generator)
    shown = show(mask, grid)
    assert shown.index is not None
    x = torch.randn(*shown.index.shape, *tile, 2, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(2, 1, *kernel, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, generator=generator).requires_grad_()
    around = shown.around(reach(tile, kernel))
    assert torch.autograd.gradcheck(lambda x, w, b: tile_convolution(x, w, b, around), (x, weight, bias))


def test_the_tile_convolution_gives_only_the_gradients_asked_for() -> None:
    mask = masking.random(0.5)(2, (3, 2), torch.Generator().manual_seed(0))
    around = show(mask, (3, 2)).around((1, 1))
    x, weight = torch.randn(2, 3, 2, 2, 4), torch.randn(4, 1, 3, 3)
    for wanted, other in ((x, weight), (weight, x)):
        wanted.requires_grad_()
        other.requires_grad_(False)
        torch.autograd.backward(tile_convolution(x, weight, None, around).sum())
        assert wanted.grad is not None
        assert other.grad is None
        wanted.grad = None


def test_a_second_derivative_of_the_tile_convolution_is_refused_rather_than_wrong() -> None:
    mask = masking.random(0.5)(1, (3, 2), torch.Generator().manual_seed(0))
    around = show(mask, (3, 2)).around((1, 1))
    x = torch.randn(1, 3, 2, 2, 4, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(tile_convolution(x, weight, None, around).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.backward(slope.sum())


def test_the_input_of_the_tile_convolution_stays_as_it_was() -> None:
    mask = masking.random(0.5)(2, (3, 2), torch.Generator().manual_seed(0))
    around = show(mask, (3, 2)).around((1, 1))
    x, weight = torch.randn(2, 3, 2, 2, 4), torch.randn(4, 1, 3, 3)
    copies = x.clone(), weight.clone()
    first = tile_convolution(x, weight, None, around)
    assert tile_convolution(x, weight, None, around).equal(first)
    assert x.equal(copies[0])
    assert weight.equal(copies[1])


# --- precision --------------------------------------------------------------------------------------------------


@both
def test_float32_is_near_float64(builder: ConvMAE) -> None:
    model = build(builder)
    x, mask = sample(model)
    exact = model(x, mask=mask)["prediction"].detach()
    rounded = model.float()(x.float(), mask=mask)["prediction"]
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).abs().max()) < 2e-5 * float(exact.abs().max())


@both
def test_bfloat16_autocast_trains_with_a_float32_loss_and_is_near(builder: ConvMAE) -> None:
    model = build(builder).float().train()
    x, mask = sample(model)
    x = x.float()
    out = model(x, mask=mask)
    exact = gradients(model, out["loss"])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, mask=mask)
    assert rounded["loss"].dtype == torch.float32
    assert rounded["loss"].item() == pytest.approx(out["loss"].item(), rel=0.02)
    spread = float(out["prediction"].std())
    assert float((rounded["prediction"].float() - out["prediction"]).abs().mean()) < 0.05 * spread
    near = gradients(model, rounded["loss"])
    for name, gradient in exact.items():
        assert near[name].dtype == torch.float32, name
        assert near[name].isfinite().all(), name
        if float(gradient.norm()) > 1e-4:
            cosine = F.cosine_similarity(gradient.flatten(), near[name].flatten(), dim=0)
            assert cosine > 0.95, (name, float(cosine))


@both
def test_bfloat16_autocast_of_the_dense_trunk_is_near(builder: ConvMAE) -> None:
    net = builder.classifier(5)
    model = replace(net, head_std=0.1).build().eval()
    x = torch.randn(2, 3, *builder.size)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    logits.float().sum().backward()
    exact = model(x)
    assert float((logits.float() - exact).abs().max()) < 0.05 * float(exact.abs().max()) + 0.01


@both
def test_a_whole_model_in_bfloat16_runs(builder: ConvMAE) -> None:
    model = build(builder).bfloat16().train()
    x, mask = sample(model)
    out = model(x.bfloat16(), mask=mask)
    assert out["prediction"].dtype == torch.bfloat16
    assert out["loss"].dtype == torch.float32
    out["loss"].backward()


@both
@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_whole_models_of_any_precision_take_pixels(builder: ConvMAE, precision: torch.dtype) -> None:
    pixels = torch.randint(256, (2, 3, *builder.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, classifier = build(builder).to(precision), builder.classifier(5).build().to(precision)
    backbone = builder.backbone().build().to(precision)
    mask = model.draw_masks(2, torch.Generator().manual_seed(0))
    out = model(pixels, mask)
    assert out["prediction"].dtype == classifier(pixels).dtype == backbone(pixels)[0].dtype == precision
    assert torch.equal(model(normalize(pixels, precision), mask)["loss"], out["loss"])


@both
def test_models_without_memory_give_shapes(builder: ConvMAE) -> None:
    model, classifier = builder.build(), builder.classifier(5).build().to("meta")
    shown = model.trunk.shown(model.draw_masks(2, torch.Generator().manual_seed(0)), device=torch.device("cpu"))
    pixels = torch.empty(2, 3, *builder.size, device="meta")
    prediction = model.to("meta")(pixels, shown)["prediction"]
    assert prediction.shape == (2, model.trunk.length, 3 * math.prod(model.trunk.stride))
    assert classifier(pixels).shape == (2, 5)
    assert prediction.is_meta


@both
def test_training_twice_from_one_seed_is_the_same_bit_for_bit(builder: ConvMAE) -> None:
    def run() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = builder.drop_path(0.3).build().train()
            optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimiser.zero_grad()
                model(torch.randn(2, 3, *builder.size))["loss"].backward()
                optimiser.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    assert run().equal(run())


# --- a plain ViT is the same code -------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("size", "patch"), [((32, 48), (8, 8)), ((4, 16, 24), (2, 8, 8))], ids=["image", "clip"])
def test_maes_shown_tokens_are_those_of_the_dense_reference(
    size: tuple[int, ...], patch: tuple[int, ...], class_token: bool
) -> None:
    builder = (
        MAE()
        .stages(AttentionStage(dim=12, depth=2, stride=patch, heads=2, mlp_ratio=2, hybrid=False))
        .input(size)
        .mask(masking.random(0.5))
        .decode(dim=12, depth=1, heads=2)
        .with_class_token(class_token)
    )
    model = build(builder)
    x, mask = sample(model)
    dense, out = Dense(builder, model)(x, mask), model(x, mask=mask)
    assert_near(out["prediction"], dense["prediction"])
    ours, theirs = gradients(model, out["loss"]), gradients(model, dense["loss"])
    for parameter, gradient in theirs.items():
        assert_near(ours[parameter], gradient, parameter)
