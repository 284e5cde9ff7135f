"""Image weights on clips: what a still clip gives is what the image gives, and where it is not, by how much."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from golden import needs_shared, tensors, under
from runs import Noise
from torch import Tensor, nn

from convmae import MAE, AttentionStage, ConvMAE, ConvStage, checkpoint, masking, official, targets
from convmae.builders import Backbone, Classifier
from convmae.finetune import Finetune
from convmae.nn.classifier import Classifier as ClassifierModule
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.trunk import ConvolutionStage, Trunk
from video import VideoConvMAE
from video.inflation import Rule, inflate, main

RULES: tuple[Rule, ...] = ("centre", "mean")
CONV = (
    ConvMAE()
    .input((32, 48))
    .stages(
        ConvStage(dim=6, depth=2, stride=(4, 4), kernel=(3, 5), mlp_ratio=2.0),
        ConvStage(dim=8, depth=1, stride=(2, 2), kernel=(3, 3), mlp_ratio=2.0),
        AttentionStage(dim=12, depth=2, stride=(2, 2), heads=2),
    )
    .decode(dim=16, depth=2, heads=2)
    .predict(targets.pixels())
)
VIT = (
    MAE()
    .input((32, 48))
    .stages(AttentionStage(dim=12, depth=2, stride=(16, 16), heads=2, hybrid=False))
    .decode(dim=16, depth=2, heads=2)
    .predict(targets.pixels())
    .with_class_token(False)
)


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """So many numbers a patch, its mean, of `pixels` pixels one."""

    pixels: int | None = None

    def values(self, pixels: int, channels: int) -> int:
        return 1 if self.pixels is None else 1 + pixels // self.pixels

    def __call__(self, patches: Tensor) -> Tensor:
        return patches.mean((2, 3)).unsqueeze(-1).expand(-1, -1, self.values(patches.shape[2], 3))


def trained(builder: MAE | Classifier | Backbone) -> Any:
    """A model in float64 none of whose weights is what it was initialised to: positions, norms, biases, tokens too."""
    torch.manual_seed(0)
    model: nn.Module = builder.build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(builder: MAE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *builder.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def still(x: Tensor, frames: int) -> Tensor:
    return repeat(x, "b c h w -> b c t h w", t=frames)


def moving(builder: MAE, frames: int) -> Tensor:
    shape = (2, 3, frames, *builder.size)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


def parameter(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = model.state_dict()[name]
    return tensor


# --- still clips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize(
    ("builder", "numbers"),
    [
        (CONV, {"frames": 4}),
        (CONV, {"frames": 6, "tubelet": 3, "kernel": 5}),
        (CONV, {"frames": 3, "tubelet": 1, "kernel": 1, "rule": "mean"}),
        (CONV, {"frames": 4, "tubelet": 4, "kernel": 1, "rule": "mean"}),
        (VIT, {"frames": 4}),
        (VIT, {"frames": 6, "tubelet": 3, "rule": "mean"}),
    ],
)
def test_a_still_clip_has_the_logits_of_its_image(builder: MAE, numbers: dict[str, Any], pooling: Any) -> None:
    image_model = trained(builder.classifier(5, pooling=pooling))
    model = inflate(image_model, **numbers)
    assert isinstance(model, ClassifierModule)
    x = images(builder)
    logits = image_model(x)
    assert logits.std() > 0.1
    close(model(still(x, numbers["frames"])), logits)


def test_a_still_clip_has_the_maps_of_its_image_at_every_time() -> None:
    image_model = trained(CONV.backbone(norm=True))
    model = inflate(image_model, frames=6)
    x = images(CONV)
    for of_clip, of_image in zip(model(still(x, 6)), image_model(x), strict=True):
        close(of_clip, repeat(of_image, "b c h w -> b c t h w", t=3))


@pytest.mark.parametrize("builder", [CONV, VIT, CONV.fuse(False)], ids=["ConvMAE", "MAE", "without fusion"])
@pytest.mark.parametrize("tubelet", [1, 2])
def test_a_still_clip_under_tubes_has_the_predictions_and_the_loss_of_its_image(builder: MAE, tubelet: int) -> None:
    image_model = trained(builder)
    model = inflate(image_model, frames=4, tubelet=tubelet)
    assert isinstance(model, MaskedAutoencoder)
    x = images(builder)
    mask = masking.random(0.5)(2, builder.grid, torch.Generator().manual_seed(3))
    of_image = image_model(x, mask)
    of_clip = model(still(x, 4), repeat(mask, "b h w -> b t h w", t=4 // tubelet))
    close(of_clip["loss"], of_image["loss"])
    for frame in of_clip["prediction"].view(2, 4 // tubelet, -1, tubelet, of_image["prediction"].shape[-1]).unbind(1):
        for each in frame.unbind(2):
            close(each, of_image["prediction"])


@pytest.mark.parametrize("per_channel", [False, True])
def test_normalised_targets_differ_by_their_variance_alone(per_channel: bool) -> None:
    """With predictions of 0 the loss is the target's mean square: (n - 1) / n of n values, by the unbiased variance."""
    builder = CONV.predict(targets.normalized_pixels(per_channel=per_channel))
    image_model = trained(builder)
    for each in image_model.decoder.head.parameters():
        nn.init.zeros_(each)
    x, mask = images(builder), masking.random(0.5)(2, builder.grid)
    of_image = image_model(x, mask)["loss"].item()
    model = inflate(image_model, frames=4)
    of_clip = model(still(x, 4), repeat(mask, "b h w -> b t h w", t=2))["loss"].item()
    n = math.prod(builder.stride) * (1 if per_channel else 3)
    assert of_image == pytest.approx((n - 1) / n, abs=1e-4)
    assert of_clip == pytest.approx((2 * n - 1) / (2 * n), abs=1e-4)
    assert of_clip - of_image == pytest.approx(1 / (2 * n), rel=1e-3)


def test_the_mean_is_exact_but_for_the_clips_first_and_last_times() -> None:
    """Two blocks of kernel 3: the first and last two time steps see beyond the clip."""
    builder = CONV.backbone(stages=(0,))
    image_model = trained(builder)
    model = inflate(image_model, frames=14, rule="mean")
    x = images(CONV)
    (of_image,), (of_clip,) = image_model(x), model(still(x, 14))
    close(of_clip[:, :, 2:-2], repeat(of_image, "b c h w -> b c t h w", t=3))
    for time in (0, 1, 5, 6):
        assert (of_clip[:, :, time] - of_image).abs().max() > 1e-3


def test_a_class_token_has_less_weight_beside_more_tokens_and_the_stages_before_are_exact() -> None:
    image_model = trained(CONV.with_class_token().classifier(5))
    model = inflate(image_model, frames=4)
    x = images(CONV)
    of_image, of_clip = image_model.trunk(x), model.trunk(still(x, 4))
    for stage in (0, 1):
        close(of_clip.maps[stage][:, 0], repeat(of_image.maps[stage][:, 0], "b h w c -> b t h w c", t=2))
    assert (of_clip.class_token - of_image.class_token).abs().max() > 1e-3
    one = inflate(image_model, frames=2)
    close(one(still(x, 2)), image_model(x))  # a token at one time only: nothing changes


# --- moving clips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tubelet", "seen"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_the_centre_sees_the_middle_frame_of_each_tubelet_alone_until_the_attention(tubelet: int, seen: int) -> None:
    image_model = trained(CONV.backbone(stages=(0, 1)))
    model = inflate(image_model, frames=12, tubelet=tubelet, kernel=3)
    clips = moving(CONV, 12)
    frames = rearrange(clips[:, :, seen::tubelet], "b c t h w -> (b t) c h w")
    for of_clip, of_frames in zip(model(clips), image_model(frames), strict=True):
        close(of_clip, rearrange(of_frames, "(b t) c h w -> b c t h w", b=2))


def test_the_mean_embeds_the_mean_of_a_tubelets_frames() -> None:
    image_model = trained(VIT.backbone())
    model = inflate(image_model, frames=6, tubelet=3, rule="mean")
    clips = moving(VIT, 6)
    frames = reduce(clips, "b c (t f) h w -> b c t h w", "mean", f=3)
    embedding = image_model.trunk.stages[0].embedding
    expected = F.conv2d(rearrange(frames, "b c t h w -> (b t) c h w"), embedding.weight, embedding.bias, stride=16)
    ours = model.trunk.stages[0].embedding(clips.movedim(1, -1).unsqueeze(1))[:, 0]
    close(ours, rearrange(expected, "(b t) d h w -> b t h w d", b=2))


@pytest.mark.parametrize("rule", RULES)
def test_kernels_along_time_sum_up_to_the_images(rule: Rule) -> None:
    image_model = trained(CONV)
    model = inflate(image_model, frames=4, kernel=5, rule=rule)
    name = "trunk.stages.0.blocks.1.depthwise.weight"
    inflated, image = parameter(model, name), parameter(image_model, name)
    assert inflated.shape == (6, 1, 5, 3, 5)
    close(inflated.sum(2), image)
    shares = [0, 0, 1, 0, 0] if rule == "centre" else [0.2] * 5
    for time, share in enumerate(shares):
        close(inflated[:, :, time], share * image)


# --- positions that tell times ----------------------------------------------------------------------------------------


def test_without_positions_in_time_a_hidden_tube_is_predicted_alike_at_all_times_and_with_them_not() -> None:
    image_model = trained(CONV)
    clips = moving(CONV, 4)
    mask = repeat(masking.random(0.5)(2, CONV.grid), "b h w -> b t h w", t=2)
    for temporal in (False, True):
        model = inflate(image_model, frames=4, rule="mean", temporal_positions=temporal)
        first, second = model(clips, mask)["prediction"].unflatten(1, (2, -1)).unbind(1)
        apart = (first - second)[mask[:, 0].flatten(1)].abs().max()
        assert apart > 1e-2 if temporal else apart < 1e-11


def test_positions_in_time_leave_the_mean_over_time_as_it_was() -> None:
    image_model = trained(CONV)
    model = inflate(image_model, frames=12, temporal_positions=True)
    for name in ("trunk.stages.2.positions", "decoder.positions"):
        close(parameter(model, name).mean(0), parameter(image_model, name))
        added = parameter(model, name) - parameter(image_model, name)
        assert torch.allclose(added, added[:, :1, :1], atol=1e-12)  # the same at every place
        assert torch.pdist(added[:, 0, 0]).min() > 0.1


# --- what is made -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [CONV, VIT, CONV.with_class_token(), CONV.drop_path(0.2)])
def test_the_builder_is_the_video_builders_and_all_weights_come_from_the_image(builder: MAE) -> None:
    image_model = trained(builder)
    model = inflate(image_model, frames=4, tubelet=2, kernel=3)
    assert model.builder == VideoConvMAE.inflate(builder, frames=4, tubelet=2, kernel=3)
    assert not model.training
    for name, tensor in model.state_dict().items():
        image = parameter(image_model, name)
        assert tensor.dtype == torch.float64
        assert tensor.data_ptr() != image.data_ptr()
        if tensor.shape == image.shape:
            assert tensor.equal(image), name
    positions = [name for name in model.state_dict() if name.endswith("positions")]
    assert len(positions) == 2
    assert all(len(parameter(model, name)) == 2 for name in positions)


def test_a_classifier_keeps_its_numbers_and_trains_its_positions() -> None:
    builder = replace(CONV.classifier(3, pooling="token", dropout=0.5), names=("a", "b", "c"))
    model = inflate(builder.build(), frames=4)
    assert model.builder == replace(builder, backbone=VideoConvMAE.inflate(CONV, frames=4))
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize(("target", "fresh"), [(Brightness(), False), (Brightness(pixels=256), True)])
def test_a_head_is_copied_where_it_fits_and_fresh_where_nobody_knows(
    target: Brightness, fresh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One value a patch and one a tubelet; or two and three."""
    image_model = trained(CONV.predict(target))
    with caplog.at_level(logging.INFO):
        model = inflate(image_model, frames=4)
    weight, image = parameter(model, "decoder.head.weight"), parameter(image_model, "decoder.head.weight")
    if fresh:
        assert len(weight) == 3
        assert "decoder.head.weight is fresh: 2 values a patch of images, 3 a tubelet" in caplog.text
        assert parameter(model, "decoder.head.bias").eq(0).all()
        assert weight.std() > 0
    else:
        assert weight.equal(image)
        assert not caplog.text
    assert parameter(model, "decoder.norm.weight").equal(parameter(image_model, "decoder.norm.weight"))


def test_the_random_state_and_the_image_model_stay_as_they_were() -> None:
    image_model = trained(CONV).train()
    copies = {name: tensor.clone() for name, tensor in image_model.state_dict().items()}
    before = torch.get_rng_state()
    model = inflate(image_model, frames=4)
    assert torch.get_rng_state().equal(before)
    for each in model.parameters():
        each.data.zero_()
    assert image_model.training
    assert all(copies[name].equal(tensor) for name, tensor in image_model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: inflate(CONV.build(), frames=4, rule="median"), r'rule is "centre" or "mean"; got \'median\''),  # type: ignore[arg-type]
        (lambda: inflate(nn.Linear(2, 2), frames=4), r"a model that an image builder built.*this one: no builder"),
        (lambda: inflate(CONV.build(), frames=5), r"\.input\(size=\(5, 32, 48\)\) is not a multiple of \(2, 16, 16\)"),
        (lambda: inflate(CONV.build(), frames=4, kernel=2), "kernel sides are odd"),
        (lambda: inflate(CONV.build(), frames=4, tubelet=0), "positive int"),
        (
            lambda: inflate(VideoConvMAE.inflate(CONV, frames=4).build(), frames=4),
            r"takes an image builder, of size \(H, W\)",
        ),
    ],
)
def test_what_cannot_be_inflated_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_model_of_another_builder_is_refused_by_the_builders_name() -> None:
    model = nn.Linear(2, 2)
    model.builder = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="this one: object"):
        inflate(model, frames=4)


# --- from the authors, and to finetuning ------------------------------------------------------------------------------


@needs_shared
def test_the_authors_weights_and_numbers_carry_over_to_still_clips() -> None:
    """Their classifier's recorded logits, from the inflated model."""
    recorded = tensors("convvit_tiny")
    state = {name: tensor for name, tensor in under(recorded, "state.").items() if not name.startswith("norm.")}
    model = inflate(official.load(state, heads=4), frames=4).double()
    logits = model(still(recorded["in.imgs"].double(), 4))
    torch.testing.assert_close(logits.float(), recorded["out.gp1.logits"], atol=2e-6, rtol=1e-5)


def test_the_command_writes_a_checkpoint_that_finetuning_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    image_model = CONV.build().eval()
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "last.pt", image_model)
    out = tmp_path / "new" / "clips.pt"
    assert main([str(tmp_path / "run"), str(out), "--frames", "4", "--kernel", "5", "--rule", "mean"]) == 0
    assert capsys.readouterr().out == f"{out}: clips (B, 3, 4, 32, 48), MaskedAutoencoder\n"
    expected = inflate(image_model, frames=4, kernel=5, rule="mean").state_dict()
    written = checkpoint.load(out)
    assert all(tensor.equal(expected[name]) for name, tensor in written.state_dict().items())

    builder = VideoConvMAE.inflate(CONV, frames=8)
    run = Finetune(
        model=builder, data=Noise(), classes=3, epochs=9, batch_size=1, folder=tmp_path / "fine", checkpoint=out
    )
    trunk = run.learner(Noise().open(builder.size)).model.get_submodule("trunk")
    assert isinstance(trunk, Trunk)
    assert trunk.grid == (4, 2, 3)
    stage = trunk.stages[0]
    assert isinstance(stage, ConvolutionStage)
    assert stage.kernel == (5, 3, 5)
    assert stage.embedding.weight.equal(expected["trunk.stages.0.embedding.weight"])
    positions = trunk.stages[2].get_parameter("positions")
    assert positions.requires_grad
    close(positions, repeat(parameter(image_model, "trunk.stages.2.positions"), "h w d -> t h w d", t=4))


@pytest.mark.parametrize("average", [False, True])
def test_the_command_takes_a_classifier_and_the_average_that_its_run_kept(average: bool, tmp_path: Path) -> None:
    image_model = trained(CONV.classifier(3)).float()
    averaged = {name: 2 * tensor for name, tensor in image_model.state_dict().items()}
    checkpoint.save(tmp_path / "images.pt", image_model, average=averaged)
    out = tmp_path / "clips.pt"
    flags = ["--frames", "4", "--temporal-positions", *["--average"] * average]
    assert main([str(tmp_path / "images.pt"), str(out), *flags]) == 0
    if average:
        image_model.load_state_dict(averaged)
    expected = inflate(image_model, frames=4, temporal_positions=True)
    model = checkpoint.load(out)
    assert model.builder == expected.builder
    x = torch.randn(2, 3, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    assert model(x).equal(expected(x))


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "clips.pt")
    assert main([str(tmp_path / "nowhere.pt"), out]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    checkpoint.save(tmp_path / "image.pt", CONV.build())
    assert main([str(tmp_path / "image.pt"), str(tmp_path)]) == 2
    assert "is a folder: name the file to write" in capsys.readouterr().err
    assert main([str(tmp_path / "image.pt"), out, "--frames", "5"]) == 2
    assert "python -m video.inflation: VideoConvMAE cannot be built" in capsys.readouterr().err
    assert not Path(out).exists()
