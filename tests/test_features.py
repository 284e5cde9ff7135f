"""Backbones: the maps of a trunk. Features of files: each once, whatever stops the command, and easy to read back."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange

from convmae import MAE, AttentionStage, ConvMAE, ConvStage, checkpoint, masking, targets
from convmae.builders import Backbone, backbone_of
from convmae.nn.layers import ATTENTION_EPS, recompute
from convmae.nn.trunk import Trunk
from convmae.targets import normalize
from video import VideoConvMAE

THREE = (
    ConvMAE()
    .input((32, 48))
    .stages(
        ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3), mlp_ratio=2.0),
        ConvStage(dim=6, depth=1, stride=(2, 2), kernel=(3, 3), mlp_ratio=2.0),
        AttentionStage(dim=12, depth=2, stride=(2, 2), heads=2),
    )
    .decode(dim=12, depth=1, heads=2)
)
CLIPS = VideoConvMAE.inflate(THREE, frames=4)
PLAIN = MAE(trunk=(AttentionStage(dim=8, depth=2, heads=2, stride=(16, 16), hybrid=False),)).input((32, 48))
BUILDERS = [THREE, CLIPS, PLAIN, THREE.with_class_token()]


def some(builder: MAE, batch: int = 2, size: tuple[int, ...] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or builder.size), generator=generator)


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "channels", "strides"),
    [
        (ConvMAE.base(), [256, 384, 768], [(4, 4), (8, 8), (16, 16)]),
        (VideoConvMAE.small(), [128, 256, 384], [(2, 4, 4), (2, 8, 8), (2, 16, 16)]),
        (MAE.small(), [384], [(16, 16)]),
        (MAE.huge(), [1280], [(14, 14)]),
    ],
)
def test_widths_and_strides_are_known_before_any_map_is(
    builder: MAE, channels: list[int], strides: list[tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        backbone = builder.backbone().build()
    assert backbone.channels == backbone.feature_info.channels() == channels
    assert backbone.strides == strides
    assert backbone.feature_info.reduction() == [stride[-1] for stride in strides]


def test_feature_info_answers_as_timms_does() -> None:
    import timm

    theirs: Any = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)).feature_info
    ours = ConvMAE.small().backbone(stages=(0, 1, 2))
    with torch.device("meta"):
        info = ours.build().feature_info
    channels: list[int] = theirs.channels()
    assert theirs.reduction() == info.reduction() == [4, 8, 16]
    assert [type(number) for number in channels] == [type(number) for number in info.channels()]


def test_strides_that_differ_in_height_and_width_have_no_single_reduction() -> None:
    flat = replace(PLAIN, trunk=(replace(PLAIN.trunk[0], stride=(8, 16)),)).backbone().build()
    assert flat.strides == [(8, 16)]
    with pytest.raises(ValueError, match=r"\[\(8, 16\)\] differ in height and width: use \.strides"):
        flat.feature_info.reduction()


@pytest.mark.parametrize("builder", BUILDERS)
def test_maps_are_the_trunks_channels_first_and_not_copied(builder: MAE) -> None:
    backbone, x = builder.backbone().build(), some(builder)
    kept = []
    backbone.trunk.stages[-1].register_forward_hook(lambda module, given, out: kept.append(out[0]))
    maps = backbone.features(x)
    for features, own in zip(maps, backbone.trunk(x).maps, strict=True):
        assert torch.equal(features, rearrange(own, "b 1 ... c -> b c ..."))
    for features, width, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        cells = [side // by for side, by in zip(builder.size, stride, strict=True)]
        assert features.shape == (2, width, *cells)
    assert maps[-1].data_ptr() == kept[0].data_ptr()


@pytest.mark.parametrize("builder", BUILDERS)
def test_pixels_are_normalised_inside(builder: MAE) -> None:
    backbone = builder.backbone().build()
    pixels = torch.randint(256, (2, 3, *builder.size), dtype=torch.uint8)
    for one, other in zip(backbone(pixels), backbone(normalize(pixels)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("builder", [THREE, CLIPS])
def test_every_parameter_takes_part_and_maps_are_those_of_the_whole(builder: MAE, stages: tuple[int, ...]) -> None:
    whole, chosen = builder.backbone().build(), builder.backbone(stages=stages).build()
    mine = chosen.state_dict()
    chosen.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in mine})
    maps, all_maps = chosen(some(builder)), whole(some(builder))
    assert [len(maps), chosen.channels] == [len(stages), [whole.channels[stage] for stage in stages]]
    for features, stage in zip(maps, stages, strict=True):
        assert torch.equal(features, all_maps[stage])
    sum(features.square().sum() for features in maps).backward()
    assert not [name for name, parameter in chosen.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_norm_is_over_the_channels_of_the_last_map_alone(builder: MAE) -> None:
    torch.manual_seed(0)
    plain = builder.backbone().build()
    normed = builder.backbone(norm=True).build()
    normed.load_state_dict(plain.state_dict(), strict=False)
    *finer, last = plain(some(builder))
    *same, out = normed(some(builder))
    assert all(torch.equal(one, other) for one, other in zip(finer, same, strict=True))
    mean = last.mean(1, keepdim=True)
    expected = (last - mean) / (last - mean).square().mean(1, keepdim=True).add(ATTENTION_EPS).sqrt()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("options", [{}, {"stages": [0]}, {"norm": True}, {"any_size": True}])
def test_a_backbone_prints_as_the_code_that_makes_it(builder: MAE, options: dict[str, bool]) -> None:
    net = builder.backbone(**options)  # type: ignore[arg-type]
    names = {kind.__name__: kind for kind in (Backbone, MAE, AttentionStage, ConvMAE, ConvStage, VideoConvMAE)}
    assert eval(repr(net), {**names, "masking": masking, "targets": targets}) == net
    assert pickle.loads(pickle.dumps(net)) == net
    hash(net)
    assert net.input((32, 32) if len(builder.size) == 2 else 32).size[-2:] == (32, 32)


def test_stages_that_are_not_there_are_refused() -> None:
    for stages in ((), (3,), (-1,), (1, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"give some of \(0, 1, 2\), ascending, or None for all"):
            THREE.backbone(stages=stages)
    with pytest.raises(ValueError, match=r"norm=True is for the last stage's map: add 2 to stages=\(0, 1\)"):
        THREE.backbone(stages=(0, 1), norm=True)
    with pytest.raises(ValueError, match=r"\(230, 230\)\) is not a multiple of \(16, 16\)"):
        THREE.backbone().input(230).build()


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_backbone_of_any_size_is_the_one_that_was_built_for_that_size(builder: MAE, tmp_path: Path) -> None:
    size = (*[2 * side for side in builder.size[:-2]], 64, 16)
    fixed, any_size = builder.backbone().build().eval(), builder.backbone(any_size=True).build().eval()
    any_size.load_state_dict(fixed.state_dict())
    checkpoint.save(tmp_path / "fixed.pt", fixed)
    resized = checkpoint.load(tmp_path / "fixed.pt", size=size)
    for at, reference in ((builder.size, fixed), (size, resized)):
        for one, other in zip(any_size(some(builder, size=at)), reference(some(builder, size=at)), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"the model was built for inputs"):
        fixed(some(builder, size=size))
    any_size(some(builder, size=size))[-1].square().sum().backward()
    assert not [name for name, parameter in any_size.named_parameters() if parameter.grad is None]
    for odd in ((*size[:-2], 64, 24), (*size[:-2], 64, 0), (4, *size)):
        with pytest.raises(ValueError, match=r"are not a multiple of \(.*16, 16\): pad or resize"):
            any_size(torch.zeros(1, 3, *odd))


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_backbone_starts_from_a_pretrained_trunk_and_comes_back_from_a_file(builder: MAE, tmp_path: Path) -> None:
    pretrained = builder.build()
    checkpoint.save(tmp_path / "pretrained.pt", pretrained)
    backbone = builder.backbone().build()
    checkpoint.load_trunk(backbone, tmp_path / "pretrained.pt")
    checkpoint.save(tmp_path / "backbone.pt", backbone)
    again = checkpoint.load(tmp_path / "backbone.pt")
    assert again.builder == builder.backbone()
    x = some(builder)
    for one, other, trunk in zip(again(x), backbone(x), pretrained.trunk(x).maps, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, rearrange(trunk, "b 1 ... c -> b c ..."))


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_backbone_of_a_model_shares_its_trunk(builder: MAE, tmp_path: Path) -> None:
    for model in (builder.build(), builder.classifier(3).build().eval(), builder.backbone(norm=True).build()):
        backbone = backbone_of(model)
        assert backbone.trunk is model.trunk
        assert backbone.training == model.training
        assert backbone.builder == builder.backbone(stages=range(len(builder.trunk)))
        first = backbone_of(model, stages=(0,), any_size=True)
        assert next(first.parameters()) is next(model.trunk.parameters())
        checkpoint.save(tmp_path / "first.pt", first)
        again, x = checkpoint.load(tmp_path / "first.pt"), some(builder)
        assert torch.equal(again(x)[0], backbone.eval()(x)[0])
    with pytest.raises(ValueError, match=r"a Linear has no \.trunk: give a masked autoencoder or a classifier"):
        backbone_of(torch.nn.Linear(2, 2))


def test_a_backbone_of_a_model_without_a_builder_works_and_is_not_saved(tmp_path: Path) -> None:
    model = THREE.build()
    model.builder = None
    backbone = backbone_of(model)
    assert isinstance(backbone.trunk, Trunk)
    with pytest.raises(ValueError, match="came from no builder"):
        checkpoint.save(tmp_path / "none.pt", backbone)


@pytest.mark.slow
@pytest.mark.parametrize("any_size", [False, True])
def test_a_compiled_backbone_gives_the_same_maps_and_gradients(any_size: bool) -> None:
    plain = THREE.backbone(any_size=any_size).build()
    # traced ahead of time, bicubic interpolation is many operators, and takes half a minute
    compiled = torch.compile(plain, backend="eager" if any_size else "aot_eager", fullgraph=True)
    x = some(THREE, size=(48, 32) if any_size else None)
    gradients = []
    for net in (plain, compiled):
        plain.zero_grad()
        maps = net(x)
        sum(features.square().sum() for features in maps).backward()
        gradients.append([maps, [parameter.grad for parameter in plain.parameters()]])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_blocks_may_be_computed_again_in_the_backward_pass() -> None:
    backbone = THREE.backbone(any_size=True).build()
    expected = torch.autograd.grad(backbone(some(THREE))[-1].square().sum(), list(backbone.parameters()))
    recompute(backbone)
    torch.testing.assert_close(
        torch.autograd.grad(backbone(some(THREE))[-1].square().sum(), list(backbone.parameters())), expected
    )
