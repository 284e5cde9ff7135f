"""Laws of CMAE: its builder, its target, its loss, and one and the same step on one process and on several.

RANK=0 python test_cmae.py FOLDER        is one of the four processes of a test
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden import explanation, needs_shared
from runs import TwoNoises, several
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from convmae import CMAE, MAE, AttentionStage, Classifier, ConvMAE, ConvStage, backbone_of, checkpoint, masking, targets
from convmae.data import Stream
from convmae.grids import Shown
from convmae.learners import Contrast
from convmae.nn.contrast import BatchNorm, ContrastiveMaskedAutoencoder, contrastive_loss
from convmae.optimisation import parameter_groups
from convmae.plain import from_plain, to_plain
from convmae.targets import normalize
from video import VideoConvMAE

# --- tiny builders ----------------------------------------------------------------------------------------------------


def contrastive(mae: MAE) -> CMAE:
    return CMAE(mae=mae).decode_features(dim=8, depth=1, heads=2, mlp_ratio=2).project(hidden=10, dim=6)


VIT = contrastive(
    MAE()
    .input(32)
    .stages(AttentionStage(dim=12, depth=2, stride=(4, 4), heads=2, mlp_ratio=2, hybrid=False))
    .mask(masking.block(0.75, 2))
    .decode(dim=8, depth=1, heads=2, mlp_ratio=2)
)
HYBRID = contrastive(
    ConvMAE()
    .input((16, 32))
    .stages(
        ConvStage(dim=4, depth=1, stride=(2, 2), kernel=(3, 3), mlp_ratio=2),
        ConvStage(dim=6, depth=1, stride=(2, 2), kernel=(5, 5), mlp_ratio=2),
        AttentionStage(dim=10, depth=1, stride=(2, 2), heads=1, mlp_ratio=2),  # a patch has 8 * 8 * 3 values
    )
    .mask(masking.random(0.5))
    .decode(dim=12, depth=1, heads=2, mlp_ratio=2)
)
CLIP = contrastive(
    VideoConvMAE()
    .input((4, 16, 24))
    .stages(
        ConvStage(dim=4, depth=1, stride=(2, 4, 4), kernel=(3, 3, 3), mlp_ratio=2),
        AttentionStage(dim=12, depth=1, stride=(1, 2, 2), heads=2, mlp_ratio=2),
    )
    .mask(masking.tube(0.5))
    .decode(dim=12, depth=1, heads=2, mlp_ratio=2)
)
CASES = {
    "MAE": VIT,
    "ConvMAE": HYBRID,
    "ConvMAE without fusion": replace(HYBRID, mae=HYBRID.mae.fuse(False)),
    "VideoConvMAE": CLIP,
    "MAE that decodes a part": replace(
        VIT, mae=VIT.mae.mask(masking.random(0.5)).reconstruct_part(masking.running_cells(0.5))
    ),
}
each = pytest.mark.parametrize("name", CASES)
WATCHED = ("loss", "reconstruction", "contrast", "agreement", "spread")


def build(builder: CMAE, *, seed: int = 0) -> ContrastiveMaskedAutoencoder:
    """In float64, all parameters and statistics away from zero, one, and the target from the online encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = builder.build().double()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += torch.rand_like(buffer)
    return model


class Batch(NamedTuple):
    x: Tensor
    mask: Tensor
    second: Tensor


def sample(model: ContrastiveMaskedAutoencoder, batch: int = 5, *, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    x, second = torch.randn(2, batch, 3, *model.trunk.size, generator=random, dtype=torch.float64)
    return Batch(x, model.draw_masks(batch, random), second)


def hidden_pixels(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """`(B, *grid) -> (B, 1, *size)`."""
    for axis, side in enumerate(size, 1):
        mask = mask.repeat_interleave(side // mask.shape[axis], axis)
    return mask.bool().unsqueeze(1)


class Heads(NamedTuple):
    """What the two heads gave in a call of the model."""

    queries: Tensor
    keys: Tensor
    out: dict[str, Tensor]


def call(model: ContrastiveMaskedAutoencoder, batch: Batch, **how: Any) -> Heads:
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, given, out, name=name: found.__setitem__(name, out))
        for name, module in (("queries", model.predictor), ("keys", model.target_encoder))
    ]
    out = model(batch.x, mask=batch.mask, **{"second": batch.second, **how})
    for hook in hooks:
        hook.remove()
    return Heads(found["queries"], found["keys"], out)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def gradients(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """Of every trained parameter, all of which must have one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(scalar, list(named.values()), retain_graph=True), strict=True))


def assert_near(ours: Tensor, theirs: Tensor, what: str = "", *, within: float = 1e-12) -> None:
    """To that much of the largest value, or of one."""
    assert ours.shape == theirs.shape, what
    assert ours.isfinite().all(), what
    apart = float((ours.double() - theirs.double()).detach().abs().max())
    assert apart <= within * max(1.0, float(theirs.detach().abs().max())), (what, apart)


# --- the builder ------------------------------------------------------------------------------------------------------

BUILDERS = [
    *CASES.values(),
    CMAE(mae=MAE()),
    CMAE(mae=ConvMAE.base()).follow(0.99, end=1.0).contrast(temperature=0.2).weigh(reconstruction=0.5, contrast=3),
    CMAE(mae=VideoConvMAE.small()).decode_features(dim=64, depth=3, heads=4, mlp_ratio=1.5).project(hidden=7, dim=9),
    VIT.follow(1 / 3).contrast(temperature=1e-7).weigh(reconstruction=0).input((16, 32)),
    replace(VIT, mae=VIT.mae.predict(targets.pixels(unit=True)).drop_path(0.1)),
]
ofall = pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: repr(builder)[-60:])


@ofall
def test_a_builder_prints_as_the_code_that_makes_it(builder: CMAE) -> None:
    names = ("CMAE", "MAE", "ConvMAE", "VideoConvMAE", "AttentionStage", "ConvStage", "masking", "targets")
    again = eval(repr(builder), {"__builtins__": {}, **{name: globals()[name] for name in names}})
    assert again == builder
    assert repr(again) == repr(builder)
    assert "\n" not in repr(builder)


@ofall
def test_builders_compare_hash_pickle_copy_and_are_plain_data(builder: CMAE) -> None:
    for again in (
        pickle.loads(pickle.dumps(builder)),
        copy.deepcopy(builder),
        replace(builder),
        from_plain(to_plain(builder)),
    ):
        assert again == builder
        assert type(again) is CMAE
        assert hash(again) == hash(builder)
    assert len({builder, builder.follow(0.123), builder.follow(0.123)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        builder.dim = 3  # type: ignore[misc]


def test_the_defaults_are_those_of_the_authors_code() -> None:
    builder = CMAE(mae=MAE())
    assert (builder.features.dim, builder.features.depth, builder.features.heads) == (512, 2, 16)
    assert (builder.hidden, builder.dim, builder.temperature) == (1536, 256, 0.07)
    assert (builder.momentum, builder.momentum_end) == (0.996, 0.996)
    assert (builder.reconstruction_weight, builder.contrast_weight) == (1.0, 1.0)
    with pytest.raises(TypeError):
        CMAE(MAE())  # type: ignore[call-arg]


def test_a_verb_sets_what_it_names_and_leaves_its_builder_as_it_was() -> None:
    before = repr(VIT)
    features = VIT.decode_features(dim=24, depth=3, heads=4, mlp_ratio=1.5).features
    assert dataclasses.asdict(features) == {"dim": 24, "depth": 3, "heads": 4, "mlp_ratio": 1.5}
    assert VIT.decode_features(dim=24, depth=3, heads=4).features.mlp_ratio == 4.0
    changed: dict[CMAE, dict[str, Any]] = {
        VIT.project(hidden=7, dim=3): {"hidden": 7, "dim": 3},
        VIT.follow(0.9, end=0.99): {"momentum": 0.9, "momentum_end": 0.99},
        VIT.follow(momentum=0.9): {"momentum": 0.9, "momentum_end": 0.9},
        VIT.contrast(temperature=0.5): {"temperature": 0.5},
        VIT.weigh(reconstruction=2, contrast=0): {"reconstruction_weight": 2, "contrast_weight": 0},
        VIT.input(64): {"mae": VIT.mae.input(64)},
    }
    for builder, fields in changed.items():
        assert builder == replace(VIT, **fields)
    assert VIT.input((16, 32)).size == (16, 32)
    assert CLIP.input(32).size == (4, 32, 32), "an int keeps the frames"
    assert VIT.classifier(5) == VIT.mae.classifier(5)
    assert HYBRID.classifier(5, pooling="token", dropout=0.1) == HYBRID.mae.classifier(5, pooling="token", dropout=0.1)
    assert HYBRID.backbone(stages=(0, 2), norm=True) == HYBRID.mae.backbone(stages=(0, 2), norm=True)
    assert repr(VIT) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CMAE(mae="base"), "mae .*builder.*'base'"),  # type: ignore[arg-type]
        (lambda: CMAE(mae=VIT), "mae .*builder.*CMAE"),  # type: ignore[arg-type]
        (lambda: CMAE(mae=MAE().classifier(3)), "mae .*builder.*Classifier"),  # type: ignore[arg-type]
        (lambda: VIT.project(hidden=0, dim=3), "hidden .*positive.*0"),
        (lambda: VIT.project(hidden=3, dim=-1), "dim .*positive.*-1"),
        (lambda: VIT.project(hidden=2.5, dim=3), "hidden .*int.*2.5"),  # type: ignore[arg-type]
        (lambda: VIT.decode_features(dim=0, depth=1, heads=1), "dim .*positive.*0"),
        (lambda: VIT.decode_features(dim=8, depth=0, heads=1), "depth .*positive.*0"),
        (lambda: VIT.decode_features(dim=8, depth=1, heads=0), "heads .*positive.*0"),
        (lambda: VIT.decode_features(dim=8, depth=1, heads=1, mlp_ratio=0), "mlp_ratio .*positive.*0"),
        (lambda: VIT.follow(-0.1), "momentum .*0.*1.*-0.1"),
        (lambda: VIT.follow(1.1), "momentum .*0.*1.*1.1"),
        (lambda: VIT.follow(math.nan), "momentum .*nan"),
        (lambda: VIT.follow(0.9, end=1.5), "momentum_end .*1.5"),
        (lambda: VIT.contrast(temperature=0), "temperature .*positive.*0"),
        (lambda: VIT.contrast(temperature=-1), "temperature .*positive.*-1"),
        (lambda: VIT.contrast(temperature=math.nan), "temperature .*positive.*nan"),
        (lambda: VIT.weigh(reconstruction=-1), "reconstruction.*-1"),
        (lambda: VIT.weigh(contrast=-0.5), "contrast.*-0.5"),
        (lambda: VIT.weigh(contrast=math.nan), "contrast.*nan"),
        (lambda: VIT.input((0, 32)), "size .*positive.*0, 32"),
    ],
)
def test_what_is_wrong_by_itself_is_refused_at_the_call(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: VIT.contrast(temperature=math.inf),
        lambda: VIT.weigh(reconstruction=math.inf),
        lambda: VIT.weigh(contrast=math.inf),
    ],
    ids=["temperature", "reconstruction", "contrast"],
)
def test_infinite_numbers_are_refused_at_the_call(make: Callable[[], CMAE]) -> None:
    with pytest.raises(ValueError, match="inf"):
        make()


@pytest.mark.parametrize("verb", [CMAE.check, CMAE.build], ids=["check", "build"])
def test_what_is_wrong_between_the_parts_is_listed_with_the_calls_to_change(verb: Callable[[CMAE], object]) -> None:
    several = replace(VIT, mae=VIT.mae.mask(masking.complementary(4))).decode_features(dim=9, depth=1, heads=2)
    with pytest.raises(ValueError, match="CMAE cannot be built:\n  - ") as refused:
        verb(several)
    for said in (r".decode_features(dim=9, heads=2): dim 9 is not divisible by heads 2", "groups=4"):
        assert said in str(refused.value)
    with pytest.raises(ValueError, match=r"\.input\(size=\(30, 30\)\) is not a multiple of \(4, 4\)"):
        verb(VIT.input(30))


def test_what_is_wrong_with_the_plain_part_and_with_the_rest_is_listed_together() -> None:
    with pytest.raises(ValueError, match="cannot be built") as refused:
        VIT.input(30).decode_features(dim=9, depth=1, heads=2).check()
    for said in ("is not a multiple of (4, 4)", "dim 9 is not divisible by heads 2"):
        assert said in str(refused.value)


# --- the module -------------------------------------------------------------------------------------------------------


@each
def test_the_plain_part_is_initialised_as_the_plain_builder_does_it(name: str) -> None:
    builder = CASES[name]
    states = []
    for one in (builder.mae, builder):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            states.append(one.build().state_dict())
    plain, whole = states
    assert whole.keys() > plain.keys()
    for what, tensor in plain.items():
        assert whole[what].equal(tensor), what


@each
def test_the_parts_have_their_names_and_shapes(name: str) -> None:
    builder = CASES[name]
    model = builder.build()
    assert model.builder == builder
    added = {what.split(".")[0] for what in model.state_dict()} - {
        what.split(".")[0] for what in builder.mae.build().state_dict()
    }
    assert added == {"feature_decoder", "projector", "predictor", "target_encoder"}
    width = model.trunk.dims[-1]
    assert width != math.prod(builder.mae.stride) * 3
    assert model.feature_decoder.head.out_features == width
    assert not hasattr(model.target_encoder, "norm")
    heads = [(model.projector, width), (model.predictor, 6), (model.target_encoder.projector, width)]
    for head, given in heads:
        assert [type(part) for part in head] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
        shapes = {what: tuple(parameter.shape) for what, parameter in head.named_parameters()}
        assert shapes == {
            "0.weight": (10, given),
            "0.bias": (10,),
            "1.weight": (10,),
            "1.bias": (10,),
            "3.weight": (6, 10),
        }
        assert head.get_submodule("1").eps == 1e-6
    assert model.feature_decoder.mask_token.std() > 0
    assert not model.feature_decoder.mask_token.equal(model.decoder.mask_token)


@each
def test_reconstruction_is_the_plain_loss_to_the_bit(name: str) -> None:
    """Drop path too: the target and the heads draw no random numbers before or between."""
    builder = replace(CASES[name], mae=CASES[name].mae.drop_path(0.3))
    model, plain = build(builder).float(), builder.mae.build()
    plain.load_state_dict({what: model.state_dict()[what] for what in plain.state_dict()})
    x, mask, second = sample(model)
    for training in (True, False):
        out = []
        for one, more in ((plain, {}), (model, {"second": second.float()})):
            with torch.random.fork_rng():
                torch.manual_seed(5)
                out.append(one.train(training)(x.float(), mask=mask, **more))
        expected, ours = out
        assert ours["reconstruction"].equal(expected["loss"])
        assert ours["prediction"].equal(expected["prediction"])
        assert ours["mask"].equal(expected["mask"])


def through(head: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    """Linear, batch norm, ReLU and Linear, written out."""
    weights = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    x = x @ weights["0.weight"].T + weights["0.bias"]
    mean, variance = (
        (x.mean(0), x.var(0, unbiased=False))
        if training
        else (
            weights["1.running_mean"],
            weights["1.running_var"],
        )
    )
    x = (x - mean) / (variance + 1e-6).sqrt() * weights["1.weight"] + weights["1.bias"]
    return x.clamp(min=0) @ weights["3.weight"].T


def by_hand(model: ContrastiveMaskedAutoencoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Queries and keys by their definition."""
    shown = model.trunk.shown(batch.mask, device=batch.x.device)
    latent, class_token = model.encode(batch.x, shown)
    tokens = model.feature_decoder(latent, Shown(shown.grid, shown.index), class_token)
    projected = through(model.projector, tokens.mean(1), training=model.training)
    queries = through(model.predictor, projected, training=model.training)
    keys = through(model.target_encoder.projector, pooled(model, batch.second), training=model.training)
    return queries, keys


def pooled(model: ContrastiveMaskedAutoencoder, second: Tensor) -> Tensor:
    """The mean of the target's patch tokens, with fusion and without a norm: `(B, D)`."""
    maps = model.target_encoder.trunk(second).maps
    tokens = maps[-1]
    for convolution, finer in zip(model.target_encoder.fusion, maps[:-1], strict=False):
        tokens = tokens + convolution(finer)
    mean: Tensor = torch.flatten(tokens, 1, -2).mean(1)
    return mean


def cross_entropy(queries: Tensor, keys: Tensor, temperature: float) -> tuple[float, float]:
    """CMAE's contrastive loss with 2 tau before it, and the mean cosine of the pairs, sample by sample."""
    rows = []
    both = (queries.detach().numpy(), keys.numpy())  # a tiny head may give nothing but zeros: they stay
    q, k = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in both)
    for number, query in enumerate(q):
        powers = np.exp(k @ query / temperature)
        rows.append(-np.log(powers[number] / powers.sum()))
    return 2 * temperature * float(np.mean(rows)), float(np.mean((q * k).sum(1)))


@pytest.mark.parametrize("training", [True, False])
@each
def test_queries_keys_and_the_loss_are_those_of_the_definition(name: str, training: bool) -> None:
    builder = CASES[name].contrast(temperature=0.3)
    model = build(builder).train(training)
    batch = sample(model)
    queries, keys = by_hand(model, batch)
    found = call(model, batch)
    assert_near(found.queries, queries)
    assert_near(found.keys, keys)
    contrast, agreement = cross_entropy(queries, keys, 0.3)
    assert float(found.out["contrast"]) == pytest.approx(contrast, rel=1e-12)
    assert float(found.out["agreement"]) == pytest.approx(agreement, rel=1e-12)
    assert found.out["loss"].item() == pytest.approx(float(found.out["reconstruction"]) + contrast, rel=1e-12)
    weighed = build(builder.weigh(reconstruction=0.5, contrast=3)).train(training)
    loss = weighed(batch.x, mask=batch.mask, second=batch.second)["loss"]
    assert loss.item() == pytest.approx(0.5 * float(found.out["reconstruction"]) + 3 * contrast, rel=1e-12)


@each
def test_one_view_is_compared_with_itself_and_bytes_are_normalised(name: str) -> None:
    model = build(CASES[name]).float()
    x, second = torch.randint(256, (2, 3, 3, *model.trunk.size), generator=torch.Generator().manual_seed(0)).byte()
    mask = model.draw_masks(3, torch.Generator().manual_seed(0))
    bytes_ = model(x, mask=mask, second=second)
    floats = model(normalize(x), mask=mask, second=normalize(second))
    assert bytes_["loss"].equal(floats["loss"])
    assert model(x, mask=mask)["loss"].equal(model(x, mask=mask, second=x)["loss"])
    assert not bytes_["contrast"].equal(model(x, mask=mask)["contrast"])
    drawn = model(x, second=second)
    assert drawn["mask"].shape == (3, *model.trunk.grid)
    assert drawn["loss"].isfinite()


@each
def test_permuting_the_batch_permutes_predictions_and_nothing_else(name: str) -> None:
    model = build(CASES[name])
    batch = sample(model)
    order = torch.tensor([3, 0, 4, 2, 1])
    one, other = call(model, batch), call(model, Batch(*(part[order] for part in batch)))
    for what in WATCHED:
        assert_near(other.out[what], one.out[what], what)
    assert_near(other.out["prediction"], one.out["prediction"][order])
    assert_near(other.queries, one.queries[order])
    before, after = gradients(model, one.out["loss"]), gradients(model, other.out["loss"])
    for what, gradient in before.items():
        assert_near(after[what], gradient, what)
    apart = call(model, batch._replace(second=batch.second[order]))
    assert abs(float(apart.out["contrast"] - one.out["contrast"])) > 1e-3, "a pair is a row of both views"


@pytest.mark.parametrize(
    "second",
    [(4, 3, 32, 32), (6, 3, 32, 32), (1, 3, 32, 32), (5, 3, 16, 16), (5, 1, 32, 32)],
    ids=str,
)
def test_views_of_different_shapes_are_refused(second: tuple[int, ...]) -> None:
    model = VIT.build()
    with pytest.raises(ValueError, match=r"\(5, 3, 32, 32\)(?s:.*)" + str(second).replace("(", r"\(").strip(")")):
        model(torch.zeros(5, 3, 32, 32), second=torch.zeros(second))


@pytest.mark.parametrize(
    "wrong",
    [
        {"valid": torch.ones(5, 1, dtype=torch.bool)},
        {"valid": torch.ones(4, dtype=torch.bool)},
        {"valid": torch.ones(1, dtype=torch.bool)},
        {"valid": torch.ones(5)},
        {"mask": masking.block(0.75, 2)(10, (8, 8))},
    ],
    ids=["valid (5, 1)", "valid (4,)", "valid (1,)", "valid float", "mask of 10"],
)
def test_rows_that_do_not_fit_the_views_are_refused(wrong: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="5"):
        VIT.build()(torch.zeros(5, 3, 32, 32), **wrong)


# --- the target -------------------------------------------------------------------------------------------------------


@each
def test_the_target_is_a_copy_at_the_start_and_is_not_trained(name: str) -> None:
    model = CASES[name].build()
    state = model.target_encoder.state_dict()
    parts = ("trunk.", "fusion.", "projector.")
    expected = {what for what in model.state_dict() if what.startswith(parts)}
    assert state.keys() == expected
    for what, tensor in state.items():
        assert tensor.equal(model.state_dict()[what]), what
        assert tensor.data_ptr() != model.state_dict()[what].data_ptr(), what
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())


@each
def test_no_gradient_reaches_the_target_or_the_second_view(name: str) -> None:
    model = build(CASES[name])
    x, mask, second = sample(model)
    second.requires_grad_()
    out = model(x, mask=mask, second=second)
    for what in WATCHED:
        if out[what].requires_grad:
            (slope,) = torch.autograd.grad(out[what], second, allow_unused=True, retain_graph=True)
            assert slope is None, what
    model.requires_grad_(True)  # as somebody's code may do
    model(x, mask=mask, second=second)["loss"].backward()
    for what, parameter in model.named_parameters():
        assert (parameter.grad is None) == what.startswith("target_encoder."), what
    assert second.grad is None
    slopes: list[Tensor] = []
    for as_second in (None, x.clone()):
        x.requires_grad_()
        slopes += torch.autograd.grad(model(x, mask=mask, second=as_second)["loss"], x)
    assert slopes[0].equal(slopes[1]), "as a target's view, x has no gradient"


@each
def test_the_target_is_the_closed_form_of_the_average(name: str) -> None:
    model = build(CASES[name])
    random = torch.Generator().manual_seed(0)
    moving = {what: one.detach().clone() for what, one in model.target_encoder.named_parameters()}
    places = {what: one.data_ptr() for what, one in model.target_encoder.named_parameters()}
    before = statistics(model.target_encoder)
    momenta = [0.9, 0.5, 0.99, 0.0, 0.7, 0.996, 1.0]
    seen = []
    for momentum in momenta:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        seen.append({what: tensor.clone() for what, tensor in model.state_dict().items()})
        model.update_target(momentum)
        for what, tensor in model.state_dict().items():
            assert what.startswith("target_encoder.") or tensor.equal(seen[-1][what]), what
    for what, found in model.target_encoder.named_parameters():
        left = [math.prod(momenta[number + 1 :]) for number in range(len(momenta))]
        expected = math.prod(momenta) * moving[what]
        for then, momentum, rest in zip(seen, momenta, left, strict=True):
            expected += (1 - momentum) * rest * then[what]
        assert_near(found, expected, what)
        assert found.data_ptr() == places[what], "in place, as compiled and shared models need it"
        assert found.grad_fn is None
    for what, buffer in model.target_encoder.named_buffers():
        assert buffer.equal(before[what]), what


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_of_nothing_copies_and_of_one_stays(momentum: float) -> None:
    model = build(HYBRID).float()
    before = {what: tensor.clone() for what, tensor in model.target_encoder.named_parameters()}
    model.update_target(momentum)
    for what, found in model.target_encoder.named_parameters():
        assert found.equal(model.get_parameter(what) if momentum == 0 else before[what]), what


def test_what_the_target_learns_from_a_batch_are_statistics_of_its_own_keys() -> None:
    model = build(HYBRID)
    batch = sample(model)
    before = statistics(model)
    weights = {what: one.clone() for what, one in model.target_encoder.named_parameters()}
    call(model, batch)
    for what, one in model.target_encoder.named_parameters():
        assert one.equal(weights[what]), what
    for head in ("projector", "predictor", "target_encoder.projector"):
        assert int(model.get_buffer(f"{head}.1.num_batches_tracked")) == 1
        for kind in ("mean", "var"):
            name = f"{head}.1.running_{kind}"
            assert not model.get_buffer(name).equal(before[name]), name
    weights = dict(model.target_encoder.projector.named_parameters())
    features = pooled(model, batch.second) @ weights["0.weight"].T + weights["0.bias"]
    for kind, of_batch in (("mean", features.mean(0)), ("var", features.var(0))):
        name = f"target_encoder.projector.1.running_{kind}"
        assert_near(model.get_buffer(name), 0.9 * before[name] + 0.1 * of_batch)


SCHEDULES = [(0.996, 1.0), (0.996, 0.996), (0.9, 0.99), (0.99, 0.5)]


@pytest.mark.parametrize(("start", "end"), SCHEDULES)
def test_the_momentum_goes_along_half_a_cosine(start: float, end: float) -> None:
    model = VIT.follow(start, end=end).build()
    for progress in (0, 0.001, 0.25, 0.5, 0.77, 0.999):
        expected = end - (end - start) * (1 + math.cos(math.pi * progress)) / 2
        assert model.momentum(progress) == pytest.approx(expected, rel=1e-12)


def test_a_momentum_without_an_end_is_constant() -> None:
    model = VIT.follow(0.9).build()
    assert {model.momentum(step / 7) for step in range(7)} == {0.9}


@needs_shared
@pytest.mark.parametrize("end", ["1.0", "0.996"])
def test_the_momentum_is_that_of_the_authors_hook(end: str) -> None:
    recorded = explanation("cmae_tiny")["momentum_schedule"][f"end={end}"]
    model = VIT.follow(0.996, end=float(end)).build()
    for iteration, momentum in recorded.items():
        assert model.momentum(int(iteration) / 1000) == pytest.approx(momentum, rel=1e-13), iteration


@each
def test_drop_path_in_the_online_encoder_never_makes_the_target_random(name: str) -> None:
    steady = build(CASES[name])
    builder = replace(CASES[name], mae=CASES[name].mae.drop_path(0.5))
    model = builder.build().double()
    model.load_state_dict(steady.state_dict())
    batch = sample(model, 8)
    calls: list[Heads] = []
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)).train()):
        with torch.random.fork_rng():
            torch.manual_seed(len(calls))
            calls.append(call(one, batch))
    expected = call(steady, batch).keys
    for found in calls:
        assert found.keys.equal(expected)
    assert not calls[0].queries.equal(calls[1].queries), "the online encoder drops paths"


@each
def test_the_target_sees_every_pixel_of_the_second_view(name: str) -> None:
    model = build(CASES[name]).eval()
    size = model.trunk.size
    view = torch.randn(3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        before = model.target_encoder(view.unsqueeze(0))
        for first in range(0, math.prod(size), 256):
            places = torch.arange(first, min(first + 256, math.prod(size)))
            changed = view.flatten(1).repeat(len(places), 1, 1)
            changed[torch.arange(len(places)), places % 3, places] += 1
            keys = model.target_encoder(torch.unflatten(changed, 2, size))
            assert (keys - before).abs().amax(1).gt(1e-9).all()


@each
def test_hidden_pixels_move_neither_predictions_nor_queries_and_the_second_view_moves_keys_alone(name: str) -> None:
    model = build(CASES[name])
    batch = sample(model)
    start = copy.deepcopy(model)
    before = call(model, batch)
    for poison in (math.nan, math.inf, 1e300):
        hidden = batch.x.masked_fill(hidden_pixels(batch.mask, model.trunk.size), poison)
        after = call(copy.deepcopy(start), batch._replace(x=hidden))
        assert after.queries.equal(before.queries)
        assert after.keys.equal(before.keys)
        for what in ("prediction", "contrast", "agreement", "spread"):
            assert after.out[what].equal(before.out[what]), what
    after = call(copy.deepcopy(start), batch._replace(second=2 * batch.second))
    assert after.queries.equal(before.queries)
    assert not after.keys.equal(before.keys)
    for what in ("prediction", "reconstruction"):
        assert after.out[what].equal(before.out[what]), what


# --- the contrast -----------------------------------------------------------------------------------------------------

AXES = torch.cat([torch.eye(6), -torch.eye(6)]).double()


@pytest.mark.parametrize(("rows", "temperature"), [(2, 1.0), (7, 0.07), (33, 0.2)])
def test_the_contrastive_loss_is_that_of_plain_numpy(rows: int, temperature: float) -> None:
    random = torch.Generator().manual_seed(rows)
    queries, keys = torch.randn(2, rows, 6, generator=random, dtype=torch.float64)
    queries.requires_grad_()
    found = contrastive_loss(queries, keys, temperature)
    contrast, agreement = cross_entropy(queries, keys, temperature)
    assert found["contrast"].item() == pytest.approx(contrast, rel=1e-12)
    assert found["agreement"].item() == pytest.approx(agreement, rel=1e-12)
    assert 0 < found["spread"].item() <= 1 + 1e-12
    assert torch.autograd.gradcheck(lambda q: contrastive_loss(q, keys, temperature)["contrast"], (queries,))
    lengths = torch.rand(rows, 1, generator=random, dtype=torch.float64) + 0.1
    longer = contrastive_loss(queries * lengths, keys / lengths, temperature)
    for what, value in found.items():
        assert_near(longer[what], value, what)


def test_neither_keys_nor_what_is_watched_have_a_gradient() -> None:
    queries, keys = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    out = contrastive_loss(queries, keys, 0.07)
    assert torch.autograd.grad(out["contrast"], [queries, keys], allow_unused=True)[1] is None
    found = VIT.build()(torch.randn(2, 3, 32, 32))
    assert [what for what in WATCHED if found[what].requires_grad] == ["loss"]


@pytest.mark.parametrize(
    ("queries", "keys", "agreement", "spread", "cosines"),
    [
        (AXES, AXES, 1, 1, [1, -1, *[0] * 10]),
        (AXES, -AXES, -1, 1, [-1, 1, *[0] * 10]),
        (AXES, AXES[:1].expand(12, 6), 0, 0, None),
        (AXES[:1].expand(12, 6), AXES[:1].expand(12, 6), 1, 0, [1] * 12),
        (AXES[:1].expand(12, 6), AXES[1:2].expand(12, 6), 0, 0, [0] * 12),
        (5 * AXES, AXES.roll(1, 0), 0, 1, [0, 1, -1, *[0] * 9]),
    ],
    ids=["perfect", "opposite", "keys collapsed", "collapsed", "collapsed apart", "other pairs"],
)
def test_agreement_and_spread_tell_of_a_collapse(
    queries: Tensor, keys: Tensor, agreement: float, spread: float, cosines: list[float] | None
) -> None:
    """`cosines` are those of every query with the keys, its own first."""
    out = contrastive_loss(queries, keys, 0.5)
    assert float(out["agreement"]) == pytest.approx(agreement, abs=1e-7)
    assert float(out["spread"]) == pytest.approx(spread, abs=1e-7)
    if cosines is not None:
        expected = -cosines[0] / 0.5 + math.log(sum(math.exp(cosine / 0.5) for cosine in cosines))
        assert float(out["contrast"]) == pytest.approx(2 * 0.5 * expected, rel=1e-6)


@each
def test_a_collapsed_model_is_seen(name: str) -> None:
    """Heads that say the same of every sample: they agree, tell nothing, and the loss is that of guessing."""
    model = build(CASES[name])
    with torch.no_grad():
        for head in ("predictor", "target_encoder.projector"):
            model.get_parameter(f"{head}.1.weight").zero_()
            model.get_parameter(f"{head}.1.bias").fill_(1)
        same = model.get_parameter("predictor.3.weight")
        model.get_parameter("target_encoder.projector.3.weight").copy_(same)
    out = call(model, sample(model)).out
    assert float(out["agreement"]) == pytest.approx(1, abs=1e-12)
    assert float(out["spread"]) == pytest.approx(0, abs=1e-7)
    assert float(out["contrast"]) == pytest.approx(2 * 0.07 * math.log(5), rel=1e-12)


# --- batch norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}, {"momentum": 0.3}], ids=str)
@pytest.mark.parametrize("counted", ["no word of it", "all", "some"])
def test_batch_norm_alone_is_torchs(options: dict[str, Any], counted: str) -> None:
    """Where only some rows count, torch's of those rows."""
    random = torch.Generator().manual_seed(0)
    ours, theirs = BatchNorm(4, **options).double(), nn.BatchNorm1d(4, **options).double()
    for parameter in ours.parameters():
        parameter.data += torch.randn(4, generator=random, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    rows = torch.tensor([True, False, True, True, False, True]) | (counted != "some")
    valid = None if counted == "no word of it" else rows
    for _ in range(3):
        x, weight = torch.randn(2, 6, 4, generator=random, dtype=torch.float64)
        inputs = [(3 + 2 * x).requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0], valid)[rows], theirs(inputs[1][rows])]
        assert_near(*outputs)
        slopes = [
            torch.autograd.grad((out * weight[rows]).sum(), [given, *norm.parameters()])
            for out, given, norm in zip(outputs, inputs, (ours, theirs), strict=True)
        ]
        for mine, other in zip(*slopes, strict=True):
            assert_near(mine, other)
        for what, buffer in theirs.named_buffers():
            assert_near(ours.get_buffer(what), buffer, what)
            assert ours.get_buffer(what).dtype == buffer.dtype
    ours.eval()
    theirs.eval()
    x = torch.randn(1, 4, generator=random, dtype=torch.float64)
    assert_near(ours(x), theirs(x))
    assert statistics(ours).keys() == statistics(theirs).keys()


@pytest.mark.parametrize("valid", [None, torch.tensor([True, False, True, True])], ids=["all rows", "some rows"])
def test_the_gradients_of_batch_norm_are_its_slopes(valid: Tensor | None) -> None:
    norm = BatchNorm(3).double()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=random, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.randn(3, generator=random, dtype=torch.float64, requires_grad=True) for _ in range(2))
    counted = slice(None) if valid is None else valid

    def normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(norm, {"weight": scale, "bias": shift}, (x, valid))
        return out[counted]

    assert torch.autograd.gradcheck(normed, (x, scale, shift))


def test_batch_norm_of_values_far_from_zero_keeps_the_digits_that_torchs_keeps() -> None:
    x = 1e4 + torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    exact = F.batch_norm(x.double(), None, None, training=True)
    theirs = float((nn.BatchNorm1d(5)(x) - exact).detach().abs().max())
    assert float((BatchNorm(5)(x) - exact).detach().abs().max()) <= 4 * theirs


# --- rows that do not count -------------------------------------------------------------------------------------------

VALID = torch.tensor([False, True, True, False, True, False, True])


def with_rows(batch: Batch, filling: Tensor) -> Batch:
    """The batch's rows where they count, this elsewhere."""
    mask = batch.mask.new_empty((len(VALID), *batch.mask.shape[1:]))
    mask[VALID], mask[~VALID] = batch.mask, batch.mask[:1].expand(int((~VALID).sum()), *mask.shape[1:])
    views = []
    for view in (batch.x, batch.second):
        whole = filling.to(view.dtype).expand(len(VALID), *view.shape[1:]).clone()
        whole[VALID] = view
        views.append(whole)
    return Batch(views[0], mask, views[1])


@each
def test_rows_that_do_not_count_are_as_if_they_were_not_there(name: str) -> None:
    model = build(CASES[name])
    whole = copy.deepcopy(model)
    batch = sample(model, int(VALID.sum()))
    filling = torch.randn(7, 3, *model.trunk.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = call(model, batch)
    found = call(whole, with_rows(batch, filling), valid=VALID)
    for what in WATCHED:
        assert_near(found.out[what], expected.out[what], what)
    assert_near(found.out["prediction"][VALID], expected.out["prediction"])
    assert_near(found.queries[VALID], expected.queries)
    assert_near(found.keys[VALID], expected.keys)
    theirs = gradients(model, expected.out["loss"])
    for what, gradient in gradients(whole, found.out["loss"]).items():
        assert_near(gradient, theirs[what], what)
    for what, buffer in statistics(model).items():
        assert_near(whole.get_buffer(what), buffer, what)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "extreme"), [(torch.float64, 1e30), (torch.float32, 1e12)], ids=str)
@each
def test_whatever_is_in_rows_that_do_not_count_moves_no_bit(
    name: str, dtype: torch.dtype, extreme: float, training: bool
) -> None:
    model = build(CASES[name]).to(dtype).train(training)
    batch = sample(model, int(VALID.sum()))
    batch = Batch(batch.x.to(dtype), batch.mask, batch.second.to(dtype))
    noise = torch.randn(7, 3, *model.trunk.size, generator=torch.Generator().manual_seed(2), dtype=dtype)
    calls = []
    for filling in (torch.zeros(()), noise, torch.tensor(extreme), extreme * noise):
        own = copy.deepcopy(model)
        out = call(own, with_rows(batch, filling), valid=VALID).out
        calls.append(
            {
                **{what: out[what] for what in WATCHED},
                "prediction": out["prediction"][VALID],
                **gradients(own, out["loss"]),
                **{f"buffer {what}": buffer for what, buffer in statistics(own).items()},
            }
        )
    for other in calls[1:]:
        for what, tensor in calls[0].items():
            assert tensor.isfinite().all(), what
            assert other[what].equal(tensor), what


@each
def test_without_a_row_that_counts_losses_and_gradients_are_zero(name: str) -> None:
    model = build(CASES[name])
    batch = sample(model)
    out = call(model, batch, valid=torch.zeros(5, dtype=torch.bool)).out
    for what in WATCHED:
        assert out[what].item() == 0, what
    for what, gradient in gradients(model, out["loss"]).items():
        assert gradient.eq(0).all(), what


@each
def test_without_a_row_that_counts_running_statistics_stay(name: str) -> None:
    model = build(CASES[name])
    before = statistics(model)
    call(model, sample(model), valid=torch.zeros(5, dtype=torch.bool))
    for what, buffer in statistics(model).items():
        assert buffer.equal(before[what]), what


@each
def test_a_single_row_that_counts_gives_finite_numbers_and_nothing_to_tell_apart(name: str) -> None:
    model = build(CASES[name])
    batch = sample(model)
    out = call(model, batch, valid=torch.tensor([False, False, True, False, False])).out
    for what in WATCHED:
        assert out[what].isfinite(), what
    assert out["contrast"].item() == pytest.approx(0, abs=1e-12)
    plain = model.loss(batch.x[2:3], out["prediction"][2:3], model.trunk.shown(batch.mask[2:3], device=batch.x.device))
    assert_near(out["reconstruction"], plain.detach())
    for what, gradient in gradients(model, out["loss"]).items():
        assert gradient.isfinite().all(), what
    for what, buffer in statistics(model).items():
        assert buffer.isfinite().all(), what
    alone = call(build(CASES[name]), Batch(*(part[2:3] for part in batch))).out
    for what in WATCHED:
        assert_near(out[what], alone[what], what)


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(9, 8), (21, 5)])
def test_the_last_micro_batch_of_a_share_that_does_not_divide_has_as_much_to_compare(
    batch_size: int, micro_batch: int
) -> None:
    learner = Contrast(build(VIT).float())
    samples = TwoNoises(count=batch_size).open(VIT.size)
    stream = Stream(samples, VIT.size, 0, batch_size, micro_batch=micro_batch, draw_mask=learner.draw_mask)
    learner.begin(stream.most)
    [batches] = stream.batches(0, 1, workers=0)
    for batch in batches:
        inputs = learner.inputs(batch, torch.device("cpu"), torch.Generator())
        *_, valid = inputs
        assert len(valid) == stream.most
        assert int(valid.sum()) >= len(valid) - 1 >= 3, "black rows"
        out = learner.losses(learner.model, inputs)
        assert out["contrast"] > 0.5 * 2 * 0.07 * math.log(4)
        assert out["spread"] > 0.1


# --- states, types and the compiler -----------------------------------------------------------------------------------


@each
def test_a_state_a_copy_and_a_pickle_are_the_same_model(name: str) -> None:
    model = build(CASES[name]).float()
    x, mask, second = sample(model)
    target = {what: one.detach().clone() for what, one in model.target_encoder.named_parameters()}
    again = CASES[name].build()
    again.load_state_dict(model.state_dict())
    copies = [again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    outputs = [one(x.float(), mask=mask, second=second.float()) for one in (model, *copies)]
    for one, out in zip(copies, outputs[1:], strict=True):
        assert one.builder == CASES[name]
        for what, tensor in outputs[0].items():
            assert out[what].equal(tensor), what
        for what, tensor in model.state_dict().items():
            assert one.state_dict()[what].equal(tensor), what
        one.update_target(0.5)
        for what, tensor in model.target_encoder.named_parameters():
            assert tensor.equal(target[what]), f"{what}: copies share nothing"
            assert not one.target_encoder.get_parameter(what).equal(tensor), what


@each
def test_a_checkpoint_gives_the_same_loss_to_the_bit(name: str, tmp_path: Path) -> None:
    model = build(CASES[name]).float()
    batch = Batch(*(part.float() if part.is_floating_point() else part for part in sample(model)))
    call(model, batch)  # so that statistics are some
    checkpoint.save(tmp_path / "a.pt", model)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert type(loaded) is type(model)
    assert loaded.builder == CASES[name]
    assert not loaded.training
    for training in (False, True):
        model.train(training)
        loaded.train(training)
        expected, found = call(model, batch), call(loaded, batch)
        for what, tensor in expected.out.items():
            assert found.out[what].equal(tensor), what
        assert found.keys.equal(expected.keys)
    assert not any(parameter.requires_grad for parameter in loaded.target_encoder.parameters())


@each
def test_losses_are_at_least_in_float32_whatever_the_model_is_in(name: str) -> None:
    """What is watched, too; in float64 to the digits of float32."""
    model = build(CASES[name]).float()
    exact = copy.deepcopy(model).double()
    rough = copy.deepcopy(model)
    batch = sample(model)
    single = Batch(batch.x.float(), batch.mask, batch.second.float())
    expected, found = call(model, single).out, call(exact, Batch(single.x.double(), batch.mask, single.second.double()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = call(rough, single).out
    for what in WATCHED:
        assert expected[what].dtype == rounded[what].dtype == torch.float32, what
        assert found.out[what].dtype == torch.float64, what
        assert_near(expected[what], found.out[what], what, within=1e-4)
        assert_near(rounded[what], expected[what], what, within=0.1)
    for what, gradient in gradients(rough, rounded["loss"]).items():
        assert gradient.dtype == torch.float32, what
        assert gradient.isfinite().all(), what


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_bfloat16_has_losses_in_float32_as_the_plain_one(training: bool) -> None:
    model = build(VIT).bfloat16().train(training)
    x, mask, second = sample(model)
    plain = VIT.mae.build().bfloat16()(x.bfloat16(), mask=mask)
    assert plain["loss"].dtype == torch.float32
    out = model(x.bfloat16(), mask=mask, second=second.bfloat16())
    for what in WATCHED:
        assert out[what].dtype == torch.float32, what
        assert out[what].isfinite(), what


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_that_follows_the_target() -> None:
    model = build(HYBRID)
    x, mask, second = sample(model)
    shown = model.trunk.shown(mask, device=x.device)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    valid = torch.tensor([True, True, False, True, True])
    for _ in range(2):
        expected = eager(x, mask=shown, second=second, valid=valid)
        found = compiled(x, mask=shown, second=second, valid=valid)
        for what in (*WATCHED, "prediction"):
            assert_near(found[what], expected[what], what)
        theirs = gradients(eager, expected["loss"])
        for what, gradient in gradients(model, found["loss"]).items():
            assert_near(gradient, theirs[what], what)
        for what, buffer in statistics(eager).items():
            assert_near(model.get_buffer(what), buffer, what)
        for one in (model, eager):
            one.update_target(0.3)


# --- what is made of it -----------------------------------------------------------------------------------------------


@each
def test_weights_decay_those_of_batch_norm_too_and_the_target_is_nobodys(name: str) -> None:
    model = CASES[name].build()
    names = {id(parameter): what for what, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05)
    found = {
        rate: {names[id(one)] for group in groups if group["weight_decay"] == rate for one in group["params"]}
        for rate in (0.05, 0.0)
    }
    decayed, undecayed = found[0.05], found[0.0]
    trained = [what for what, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(decayed | undecayed) == sorted(trained)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert not any("target" in what or "positions" in what for what in trained)
    assert {"projector.1.weight", "predictor.1.weight"} <= decayed
    assert all(what.endswith("weight") and "norm" not in what for what in decayed)
    assert all(what.endswith(("bias", "mask_token", "class_token")) or "norm" in what for what in undecayed)
    assert {"projector.0.weight", "projector.3.weight", "feature_decoder.head.weight"} <= decayed
    assert {"projector.1.bias", "predictor.1.bias", "projector.0.bias", "feature_decoder.mask_token"} <= undecayed


@each
def test_its_trunk_is_a_backbone_and_starts_a_classifier(name: str, tmp_path: Path) -> None:
    model = build(CASES[name]).float()
    x = sample(model, 2).x.float()
    backbone = backbone_of(model)
    assert backbone.builder == CASES[name].backbone(stages=range(len(CASES[name].mae.trunk)))
    for found, expected in zip(backbone(x), model.trunk(x).maps, strict=True):
        assert found.equal(expected.squeeze(1).movedim(-1, 1))
    checkpoint.save(tmp_path / "a.pt", model)
    classifier = CASES[name].classifier(5)
    assert isinstance(classifier, Classifier)
    net = classifier.build().eval()
    checkpoint.load_trunk(net, tmp_path / "a.pt")
    assert net.trunk(x).tokens.equal(model.trunk(x).tokens)
    assert net(x).shape == (2, 5)


# --- several processes ------------------------------------------------------------------------------------------------

SHARED = ("MAE", "ConvMAE", "VideoConvMAE")
SHARES = {"2, equal": (4, 4), "2, uneven": (5, 3), "4, equal": (2, 2, 2, 2), "4, uneven": (3, 1, 0, 4)}
TOTAL = 8


def own_rows(batch: Batch, counts: tuple[int, ...], rank: int) -> tuple[Batch, Tensor | None]:
    """A process's rows, filled up with some that do not count, before its own in every other process."""
    first, count, rows = sum(counts[:rank]), counts[rank], max(counts)
    if len(set(counts)) == 1:
        return Batch(*(part[first : first + count] for part in batch)), None
    random = torch.Generator().manual_seed(rank)
    own, valid = [], torch.ones(count, dtype=torch.bool)
    for part in batch:
        if part.is_floating_point():
            more = 1e6 * torch.randn(rows - count, *part.shape[1:], generator=random, dtype=part.dtype)
        else:
            more = part[: rows - count]
        pieces = [part[first : first + count], more]
        own.append(torch.cat(pieces[::-1] if rank % 2 else pieces))
    pieces = [valid, torch.zeros(rows - count, dtype=torch.bool)]
    return Batch(*own), torch.cat(pieces[::-1] if rank % 2 else pieces)


def taken(model: ContrastiveMaskedAutoencoder, network: nn.Module, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """A step of this process: what all together have of losses and gradients, and this one of statistics."""
    rank = dist.get_rank()
    batch, valid = own_rows(sample(model, TOTAL), counts, rank)
    out = network(batch.x, mask=batch.mask, second=batch.second, valid=valid)
    weight = counts[rank] / TOTAL
    averaged = isinstance(network, DistributedDataParallel)
    (out["loss"] * weight * (len(counts) if averaged else 1)).backward()
    dist.all_reduce(watched := torch.stack([out[what].detach() * weight for what in WATCHED]))
    slopes = {what: p.grad for what, p in model.named_parameters() if p.grad is not None}
    if not averaged:
        dist.all_reduce(vector := parameters_to_vector(slopes.values()))
        vector_to_parameters(vector, slopes.values())
    statistics = {f"buffer {what}": buffer for what, buffer in model.named_buffers()}
    return {**dict(zip(WATCHED, watched, strict=True)), **slopes, **statistics}


def main() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for number, (label, counts) in enumerate(SHARES.items()):
        if rank >= len(counts):
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{number}",
            timeout=timedelta(minutes=5),
            rank=rank,
            world_size=len(counts),
        )
        found = {}
        for name in SHARED:
            model = build(CASES[name])
            found[name] = taken(model, model, counts)
            if "uneven" in label:
                model = build(CASES[name])
                found[f"{name}, DDP"] = taken(model, DistributedDataParallel(model), counts)
        if rank == 0:  # as when one process draws pictures: the others do not take part
            model = build(VIT).eval()
            found["evaluated"] = {what: one.detach() for what, one in call(model, sample(model)).out.items()}
        torch.save(found, folder / f"{label}, {rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes, and the first two of them, have found."""
    folder = tmp_path_factory.mktemp("together")
    codes, said = several(4, "test_cmae.py", folder)
    assert codes == [0] * 4, "\n".join(said)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "wrapped"), [*((shares, "") for shares in SHARES), ("2, uneven", ", DDP"), ("4, uneven", ", DDP")]
)
@pytest.mark.parametrize("name", SHARED)
def test_several_processes_have_the_loss_gradients_and_statistics_of_one(
    together: Path, name: str, shares: str, wrapped: str
) -> None:
    model = build(CASES[name])
    out = call(model, sample(model, TOTAL)).out
    expected = {what: out[what].detach() for what in WATCHED}
    expected |= gradients(model, out["loss"])
    expected |= {f"buffer {what}": buffer for what, buffer in model.named_buffers()}
    for rank in range(len(SHARES[shares])):
        found = torch.load(together / f"{shares}, {rank}.pt")[f"{name}{wrapped}"]
        assert found.keys() == expected.keys()
        for what, tensor in expected.items():
            assert_near(found[what], tensor, f"{what} in process {rank}", within=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("shares", SHARES)
def test_a_process_evaluates_without_the_others(together: Path, shares: str) -> None:
    model = build(VIT).eval()
    found = torch.load(together / f"{shares}, 0.pt")["evaluated"]
    for what, tensor in call(model, sample(model)).out.items():
        assert found[what].equal(tensor), what


if __name__ == "__main__":
    importlib.import_module("test_cmae").main()
