"""Builders: values that print as their own code, and that say everything that is wrong with them at once."""

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from convmae import MAE, AttentionStage, Classifier, ConvMAE, ConvStage, masking, recipes, targets
from convmae.nn.layers import DropPath
from video import VideoConvMAE


@dataclass(frozen=True, kw_only=True)
class Checkerboard:
    """A user's own masking: every other token, which half drawn by the generator."""

    step: int = 2

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        if math.prod(grid) % self.step:
            raise ValueError(f"a checkerboard needs a multiple of {self.step} tokens, not {math.prod(grid)}")
        places = sum(torch.arange(side).view(-1, *[1] * (len(grid) - 1 - axis)) for axis, side in enumerate(grid))
        start = torch.randint(self.step, (batch, *[1] * len(grid)), generator=generator)
        mask: Tensor = (places + start) % self.step == 0
        return mask


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """A user's own target: one number a patch, its mean; not pixels, so without invert."""

    scale: float = 1.0

    def values(self, pixels: int, channels: int) -> int:
        return 1

    def __call__(self, patches: Tensor) -> Tensor:
        return self.scale * patches.mean((2, 3)).unsqueeze(-1)


TINY = (
    ConvMAE()
    .input((32, 32))
    .stages(
        ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3), mlp_ratio=2.0),
        AttentionStage(dim=8, depth=1, stride=(2, 2), heads=2),
    )
    .decode(dim=8, depth=1, heads=2)
)
TINY_CLIP = VideoConvMAE.inflate(TINY, frames=4).decode(dim=12, depth=1, heads=2)

PRESETS: list[MAE] = [
    getattr(kind, size)()
    for kind, size in itertools.product((MAE, ConvMAE, VideoConvMAE), ("small", "base", "large", "huge"))
]
ODD: list[MAE] = [
    MAE(),
    ConvMAE(),
    VideoConvMAE(),
    TINY,
    TINY_CLIP,
    MAE.base().patch(8).input(64).with_class_token(False).drop_path(0.1),
    MAE.base()
    .input((16, 224, 224))
    .patch((2, 16, 16))
    .mask(masking.tube(0.9))
    .predict(targets.normalized_pixels(per_channel=True))
    .with_class_token(False),
    ConvMAE.base().fuse(False).predict(targets.pixels(unit=True)).mask(masking.block(0.65, 2)),
    ConvMAE.large().input(192).drop_path(0.25).decode(dim=64, depth=1, heads=1, mlp_ratio=1.5),
    VideoConvMAE.small().mask(masking.tube_block(0.9, 2)).input(112),
    VideoConvMAE.inflate(ConvMAE.huge(), frames=8, tubelet=1, kernel=5),
    VideoConvMAE.inflate(MAE.small(), frames=16).with_class_token(),
    TINY.mask(Checkerboard()).predict(Brightness(scale=3)),
]


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [*PRESETS, *ODD], ids=lambda b: repr(b)[:60])
def test_a_builder_prints_as_the_code_that_makes_it(builder: MAE) -> None:
    names = {
        name: globals()[name] for name in ("MAE", "AttentionStage", "ConvMAE", "ConvStage", "VideoConvMAE", "masking")
    }
    if builder.target != type(builder)().target:  # a default target needs no name
        names |= {"targets": targets, "Brightness": Brightness, "Checkerboard": Checkerboard}
    assert "\n" not in repr(builder)
    again = eval(repr(builder), {"__builtins__": {}, **names})
    assert again == builder
    assert type(again) is type(builder)
    assert repr(again) == repr(builder)


@pytest.mark.parametrize("builder", [*PRESETS, *ODD], ids=lambda b: repr(b)[:60])
def test_builders_compare_hash_pickle_and_copy(builder: MAE) -> None:
    for again in (pickle.loads(pickle.dumps(builder)), copy.deepcopy(builder), replace(builder)):
        assert again == builder
        assert hash(again) == hash(builder)
    assert builder != builder.drop_path(0.123)
    assert len({builder, builder.drop_path(0.123), replace(builder)}) == 2


@pytest.mark.parametrize("net", [TINY.classifier(10), TINY_CLIP.classifier(7, pooling="token", dropout=0.5)])
def test_a_classifier_prints_as_the_code_that_makes_it(net: Classifier) -> None:
    assert eval(repr(net)) == net
    assert pickle.loads(pickle.dumps(net)) == net
    hash(net)


def test_builders_of_different_papers_are_different() -> None:
    assert ConvMAE.base() != VideoConvMAE.base()
    plain, conv = MAE(), ConvMAE()
    assert plain != conv


def test_builders_and_their_parts_are_frozen() -> None:
    for value in (TINY, TINY.trunk[0], TINY.trunk[1], TINY.decoder, TINY.classifier(3)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.dim = 3  # type: ignore[union-attr, misc]


def test_a_verb_leaves_its_builder_as_it_was() -> None:
    before = repr(TINY)
    verbs: list[Callable[[], MAE]] = [
        lambda: TINY.input(64),
        lambda: TINY.mask(masking.random(0.5)),
        lambda: TINY.decode(dim=16, depth=2, heads=4),
        lambda: TINY.predict(targets.pixels()),
        lambda: TINY.fuse(False),
        lambda: TINY.drop_path(0.2),
        lambda: TINY.with_class_token(),
        lambda: TINY.stages(*TINY.trunk[1:]),
    ]
    for verb in verbs:
        assert verb() != TINY
        assert type(verb()) is ConvMAE
    assert repr(TINY) == before


def test_an_int_is_height_and_width_and_keeps_the_frames() -> None:
    assert TINY.input(64).size == (64, 64)
    assert TINY_CLIP.input(64).size == (4, 64, 64)
    assert TINY_CLIP.input((8, 32, 64)).size == (8, 32, 64)
    assert TINY.input([32, 64]).size == (32, 64)
    assert MAE.base().input((16, 224, 224)).patch((2, 16, 16)).patch(8).stride == (2, 8, 8)


# --- building ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "builder",
    [
        TINY,
        TINY.input((16, 8)).mask(masking.random(0.5)),
        TINY.input((40, 72)),
        TINY.fuse(False),
        TINY.with_class_token(),
        TINY.mask(Checkerboard()),
        TINY.predict(Brightness()),
        TINY.stages(AttentionStage(dim=8, depth=1, stride=(8, 4), heads=1, hybrid=False)),
        TINY.stages(ConvStage(dim=4, depth=2, stride=(8, 8), kernel=(5, 3))),
        TINY_CLIP,
        TINY_CLIP.input((2, 16, 32)),
        TINY_CLIP.mask(Checkerboard(step=4)).predict(Brightness()),
        TINY_CLIP.mask(masking.tube_block(0.5, 2)),
        VideoConvMAE.inflate(TINY, frames=3, tubelet=3, kernel=5),
        VideoConvMAE.inflate(TINY, frames=1, tubelet=1, kernel=1),
        VideoConvMAE.inflate(TINY.with_class_token(), frames=6),
        MAE()
        .stages(AttentionStage(dim=12, depth=1, stride=(2, 4, 4), heads=2, hybrid=False))
        .input((4, 8, 8))
        .mask(masking.tube(0.5))
        .decode(dim=12, depth=1, heads=2),
    ],
    ids=lambda b: repr(b)[-80:],
)
def test_any_size_that_divides_trains_and_classifies(builder: MAE) -> None:
    builder = builder.decode(dim=12, depth=1, heads=2)
    model = builder.build()
    assert model.builder == builder
    x = torch.randn(2, 3, *builder.size)
    out = model(x)
    assert out["loss"].shape == ()
    assert out["loss"].isfinite()
    assert out["mask"].shape == (2, *builder.grid)
    pixels = math.prod(builder.stride)
    assert out["prediction"].shape == (2, math.prod(builder.grid), builder.target.values(pixels, 3))
    out["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert [n for n, p in model.named_parameters() if not p.requires_grad and "positions" not in n] == []

    net = builder.classifier(5).build()
    logits = net(x)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    trained = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    unused = {name for name, _ in net.named_parameters()} - trained
    assert unused == set()


def test_the_same_seed_builds_the_same_weights() -> None:
    def build(seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.utils.parameters_to_vector(TINY.build().parameters()).detach()

    assert build(0).equal(build(0))
    assert not build(0).equal(build(1))


def test_a_built_model_pickles_and_copies_with_its_builder() -> None:
    model = TINY.build().eval()
    x, mask = torch.randn(2, 3, 32, 32), masking.random(0.75)(2, (4, 4))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.builder == TINY
        assert again(x, mask=mask)["prediction"].equal(model(x, mask=mask)["prediction"])


def test_drop_path_rises_linearly_over_all_blocks_of_all_stages() -> None:
    trunk = ConvMAE.small().input(32).drop_path(0.1).build_trunk()
    rates = [m.rate for m in trunk.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 15).tolist())
    decoder = TINY.drop_path(0.1).build().decoder
    assert {m.rate for m in decoder.modules() if isinstance(m, DropPath)} == {0.0}


def test_drop_path_drops_whole_samples_keeps_the_mean_and_rests_in_evaluation() -> None:
    drop = DropPath(0.25)
    x = torch.ones(20000, 2, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = drop(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.flatten(1).std(1).eq(0).all()
    assert float(out.mean()) == pytest.approx(1, abs=0.02)
    assert drop.eval()(x) is x


# --- inflating --------------------------------------------------------------------------------------------------


def test_inflating_puts_the_tubelet_in_the_first_stride_and_the_kernel_in_every_depthwise() -> None:
    clips = VideoConvMAE.inflate(ConvMAE.base(), frames=16, tubelet=2, kernel=5)
    assert clips.size == (16, 224, 224)
    assert [stage.stride for stage in clips.trunk] == [(2, 4, 4), (1, 2, 2), (1, 2, 2)]
    assert [stage.kernel for stage in clips.trunk if isinstance(stage, ConvStage)] == [(5, 5, 5)] * 2
    assert clips.grid == (8, 14, 14)
    assert VideoConvMAE.inflate(ConvMAE.base(), frames=16).trunk == VideoConvMAE.base().trunk


def test_inflating_keeps_everything_but_the_masking() -> None:
    image = TINY.predict(targets.pixels()).fuse(False).drop_path(0.3).with_class_token().decode(dim=6, depth=3, heads=1)
    clips = VideoConvMAE.inflate(image, frames=4)
    for name in ("decoder", "target", "fusion", "drop_path_rate", "class_token"):
        assert getattr(clips, name) == getattr(image, name), name
    assert clips.masking == VideoConvMAE().masking


def test_only_an_image_builder_with_positive_numbers_is_inflated() -> None:
    with pytest.raises(ValueError, match=r"inflate takes an image builder, of size \(H, W\); this one has size"):
        VideoConvMAE.inflate(TINY_CLIP, frames=4)
    with pytest.raises(ValueError, match="positive"):
        VideoConvMAE.inflate(TINY, frames=4, tubelet=0)
    with pytest.raises(ValueError, match="odd"):
        VideoConvMAE.inflate(TINY, frames=4, kernel=2)


@pytest.mark.parametrize("frames", [0, -4])
def test_a_clip_of_no_frames_is_refused_at_the_call(frames: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        VideoConvMAE.inflate(TINY, frames=frames)


def untyped(value: Any) -> Any:
    """What a type checker would have refused."""
    return value


# --- mistakes at the call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvStage(dim=0, depth=1, stride=(4, 4), kernel=(3, 3)), "ConvStage: dim is a positive int; got 0"),
        (lambda: ConvStage(dim=4, depth=-1, stride=(4, 4), kernel=(3, 3)), "depth is a positive int; got -1"),
        (lambda: ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(4, 3)), r"kernel sides are odd; got \(4, 3\)"),
        (lambda: ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3, 3)), "the same number of axes"),
        (lambda: ConvStage(dim=4, depth=1, stride=(4,), kernel=(3,)), "a positive int for each axis"),
        (lambda: ConvStage(dim=4, depth=1, stride=(4, 0), kernel=(3, 3)), "a positive int for each axis"),
        (lambda: ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3), mlp_ratio=0), "mlp_ratio is positive; got 0"),
        (lambda: AttentionStage(dim=4, depth=1, stride=(4, 4), heads=0), "heads is a positive int; got 0"),
        (lambda: AttentionStage(dim=untyped(4.0), depth=1, stride=(4, 4), heads=1), "dim is a positive int; got 4.0"),
        (lambda: TINY.input(0), r"\.input\(\.\.\.\): size has a positive int for each axis"),
        (lambda: TINY.input((32,)), r"\(H, W\) or \(T, H, W\); got \(32,\)"),
        (lambda: TINY.stages(), r"\.stages\(\.\.\.\) takes one stage or more"),
        (lambda: TINY.decode(dim=8, depth=0, heads=1), "Decoder: depth is a positive int; got 0"),
        (lambda: TINY.drop_path(1), r"\.drop_path\(rate\) is in \[0, 1\); got 1"),
        (lambda: TINY.drop_path(-0.1), r"\.drop_path\(rate\) is in \[0, 1\); got -0.1"),
        (lambda: TINY.mask(untyped(0.75)), r"\.mask\(\.\.\.\) takes a masking, as masking.random\(0.75\); got 0.75"),
        (lambda: TINY.predict(untyped(abs)), r"\.predict\(\.\.\.\) takes a target"),
        (lambda: TINY.patch(16), r"\.patch\(\.\.\.\) is for a trunk of one stage"),
        (lambda: TINY.classifier(0), "classes is a positive int; got 0"),
        (lambda: TINY.classifier(3, pooling=untyped("max")), 'pooling is "mean" or "token"; got \'max\''),
        (lambda: TINY.classifier(3, dropout=1.0), r"dropout is in \[0, 1\); got 1.0"),
        (lambda: TINY.stages(untyped("ConvStage")), "stage"),
        (lambda: TINY.stages(untyped(TINY.trunk)), "stage"),
    ],
)  # fmt: skip
def test_a_local_mistake_is_refused_at_the_call(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- mistakes between parts -------------------------------------------------------------------------------------


def problems(builder: MAE) -> list[str]:
    with pytest.raises(ValueError, match=f"^{type(builder).__name__} cannot be built:\n  - ") as caught:
        builder.build()
    return str(caught.value).split("\n  - ")[1:]


def test_all_mistakes_between_parts_are_reported_together_each_with_its_call() -> None:
    builder = (
        ConvMAE()
        .input((230, 230))
        .stages(
            ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3)),
            AttentionStage(dim=9, depth=1, stride=(2, 2), heads=2),
            ConvStage(dim=4, depth=1, stride=(2, 2), kernel=(3, 3)),
        )
        .decode(dim=100, heads=16, depth=1)
        .with_class_token()
    )
    assert problems(builder) == [
        ".input(size=(230, 230)) is not a multiple of (16, 16), the product of the strides in .stages(...)",
        ".stages(...): stage 2: dim 9 is not divisible by heads 2",
        ".stages(...): stage 2: dim 9 must be even and at least 4, for positions on 2 axes",
        ".with_class_token(True) needs an AttentionStage as the last of .stages(...)",
        ".decode(dim=100, heads=16): dim 100 is not divisible by heads 16",
    ]


def test_sizes_and_strides_of_different_axes_are_reported_for_every_stage() -> None:
    found = problems(TINY.input((4, 32, 32)).decode(dim=9, depth=1, heads=2))
    assert found[:2] == [
        ".input(size=(4, 32, 32)) has 3 axes, stage 1 of .stages(...) has a stride of 2: (4, 4)",
        ".input(size=(4, 32, 32)) has 3 axes, stage 2 of .stages(...) has a stride of 2: (2, 2)",
    ]
    assert ".decode(dim=9, heads=2): dim 9 is not divisible by heads 2" in found


def test_frames_that_do_not_divide_are_reported() -> None:
    assert problems(TINY_CLIP.input((5, 32, 32))) == [
        ".input(size=(5, 32, 32)) is not a multiple of (2, 8, 8), the product of the strides in .stages(...)"
    ]


@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        (TINY.mask(masking.tube(0.9)), "has 3 axes, the token grid (4, 4) has 2"),
        (TINY.mask(masking.block(0.5, 3)), "does not divide the token grid (4, 4)"),
        (TINY.mask(masking.random(0.99)), "hides everything on the token grid (4, 4)"),
        (TINY.mask(masking.random(0.01, rounding="hide")), "hides nothing on the token grid (4, 4)"),
        (TINY.input(24).mask(Checkerboard()), "a checkerboard needs a multiple of 2 tokens, not 9"),
    ],
)
def test_a_masking_that_does_not_suit_is_reported_with_the_call(builder: MAE, problem: str) -> None:
    (found,) = problems(builder)
    assert found.startswith(f".mask({builder.masking!r})")
    assert problem in found


@dataclass(frozen=True)
class Wrong:
    """A user's masking with a bug."""

    bug: str

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Any:
        mask = torch.zeros(batch, *grid, dtype=torch.bool)
        mask[..., 0] = True
        uneven = mask.clone()
        uneven[0] = ~mask[0]
        return {
            "floats": mask.float(),
            "flat": mask.flatten(1),
            "one sample": mask[:1],
            "all": torch.ones_like(mask),
            "none": torch.zeros_like(mask),
            "uneven": uneven,
            "a list": mask.tolist(),
            "nothing": None,
        }[self.bug]


@pytest.mark.parametrize(
    ("bug", "problem"),
    [
        ("floats", "must give boolean masks (batch, 4, 4); it gave torch.float32 (2, 4, 4)"),
        ("flat", "must give boolean masks (batch, 4, 4); it gave torch.bool (2, 16)"),
        ("one sample", "must give boolean masks (batch, 4, 4); it gave torch.bool (1, 4, 4)"),
        ("all", "must hide some tokens but not all, equally many in every sample; of 16 it hid [16, 16]"),
        ("none", "must hide some tokens but not all, equally many in every sample; of 16 it hid [0, 0]"),
        ("uneven", "must hide some tokens but not all, equally many in every sample; of 16 it hid [12, 4]"),
        ("a list", "must give boolean masks (batch, 4, 4)"),
        ("nothing", "must give boolean masks (batch, 4, 4)"),
    ],
)
def test_a_users_masking_with_a_bug_is_reported(bug: str, problem: str) -> None:
    (found,) = problems(TINY.mask(Wrong(bug)))
    assert found.startswith(f".mask({Wrong(bug)!r})")
    assert problem in found


@dataclass(frozen=True)
class WrongTarget:
    """A user's target that does not give what it promises."""

    promised: int
    shape: tuple[int, ...]

    def values(self, pixels: int, channels: int) -> int:
        return self.promised

    def __call__(self, patches: Tensor) -> Tensor:
        return patches.new_zeros(len(patches), *self.shape)


@pytest.mark.parametrize(
    "target",
    [WrongTarget(7, (16, 1)), WrongTarget(7, (16, 6)), WrongTarget(7, (1, 7)), WrongTarget(0, (16, 0))],
    ids=repr,
)
def test_a_users_target_that_does_not_give_what_it_promises_is_reported(target: WrongTarget) -> None:
    """Unreported, `(B, L, 1)` and `(B, 1, values)` would broadcast against the prediction, and train on nonsense."""
    (found,) = problems(TINY.predict(target))
    assert found.startswith(f".predict({target!r})")


def test_a_users_masking_and_target_work_and_a_target_without_invert_draws_no_pictures() -> None:
    builder = TINY.mask(Checkerboard()).predict(Brightness(scale=2))
    model = builder.build()
    x = torch.randn(3, 3, 32, 32)
    out = model(x)
    assert out["prediction"].shape == (3, 16, 1)
    assert (out["mask"].flatten(1).sum(1) == 8).all()
    with pytest.raises(ValueError, match=r"Brightness\(scale=2\) has no invert\(values, patches\)"):
        model.reconstruct(x, out["prediction"], out["mask"])


def test_a_classifier_reports_its_backbones_mistakes_but_not_of_parts_that_it_does_not_use() -> None:
    TINY.mask(masking.tube(0.9)).decode(dim=9, depth=1, heads=2).classifier(5).build()
    with pytest.raises(ValueError, match=r"ConvMAE cannot be built:\n  - \.input"):
        TINY.input(30).classifier(5).build()


def test_building_draws_no_mask_from_the_global_random_state() -> None:
    """Checking a masking must not change which weights a seed gives."""

    def build(builder: ConvMAE) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.utils.parameters_to_vector(builder.build().parameters()).detach()

    assert build(TINY.mask(masking.random(0.5))).equal(build(TINY.mask(masking.block(0.5, 2))))


def test_the_recipe_of_fastconvmae_has_the_published_numbers() -> None:
    run, plain = recipes.imagenet_fast_pretrain(), recipes.imagenet_pretrain()
    assert (run.epochs, run.warmup_epochs, run.batch_size, run.base_lr) == (50, 10, 512, 6e-4)
    assert run.model == ConvMAE.base().mask(masking.complementary(4))
    assert (run.betas, run.weight_decay, run.min_lr) == (plain.betas, plain.weight_decay, plain.min_lr)
    run.model.check()
