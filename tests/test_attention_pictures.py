"""What is drawn as attention is what the model computed with, and pictures are looked at in the files written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import MEDIA, counting, needs_media
from PIL import Image
from torch import Tensor

from convmae import MAE, AttentionStage, ConvMAE, ConvStage, checkpoint
from convmae.attention_pictures import (
    attention_maps,
    attention_weights,
    heads,
    main,
    overlay,
    overview,
    principal_colours,
    rollout,
    sheet,
)
from convmae.nn.layers import Attention
from convmae.targets import normalize
from video import VideoConvMAE
from video import attention_pictures as of_clips

CONV = (
    ConvMAE()
    .input((32, 48))
    .stages(
        ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3), mlp_ratio=2.0),
        AttentionStage(dim=12, depth=2, stride=(2, 2), heads=2),
    )
    .drop_path(0.5)
)
CLIPS = VideoConvMAE.inflate(CONV, frames=4)
PLAIN = MAE(trunk=(AttentionStage(dim=8, depth=2, heads=2, stride=(8, 8), hybrid=False),)).input((32, 48))
BUILDERS = [CONV, CLIPS, PLAIN]


def made(builder: MAE) -> Any:
    """With weights large enough that attention is not the same everywhere."""
    torch.manual_seed(0)
    model = builder.build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.qkv.weight.mul_(4)
    return model


def some(builder: MAE, batch: int = 2) -> Tensor:
    return torch.randint(256, (batch, 3, *builder.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# --- attention --------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_by_which_the_layer_mixes_its_values() -> None:
    layer, x = Attention(12, 3).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    weights = attention_weights(layer, x)
    values = layer.qkv(x)[..., 24:].float().view(2, 7, 3, 4).transpose(1, 2)
    mixed = (weights @ values).transpose(1, 2).reshape(2, 7, 12)
    torch.testing.assert_close(layer.out(mixed.double()), layer(x), atol=1e-6, rtol=1e-5)


def theirs(model: Any, x: Tensor) -> list[Tensor]:
    """The attention of each block `(heads, N, N)`, class token first, by timm's ViT with the same weights."""
    from timm.layers import set_fused_attn  # type: ignore[attr-defined]
    from timm.models.vision_transformer import VisionTransformer
    from timm.utils import AttentionExtract  # type: ignore[attr-defined]

    set_fused_attn(False)
    peer = VisionTransformer((32, 48), 8, num_classes=0, embed_dim=8, depth=2, num_heads=2).eval()
    set_fused_attn(True)
    stage = model.trunk.stages[0]
    weights = peer.state_dict()
    weights |= {
        "cls_token": stage.class_token,
        "pos_embed": torch.cat([torch.zeros(1, 8), stage.positions.flatten(0, 1)])[None],
        "patch_embed.proj.weight": stage.embedding.weight,
        "patch_embed.proj.bias": stage.embedding.bias,
    }
    called = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for name, tensor in stage.blocks.state_dict().items():
        for ours, their in called.items():
            name = name.replace(ours, their)
        assert f"blocks.{name}" in weights
        weights[f"blocks.{name}"] = tensor
    peer.load_state_dict(weights)
    with torch.no_grad():
        return [attention[0] for attention in AttentionExtract(peer, method="fx")(x).values()]


def test_attention_and_rollout_are_those_of_timms_vit_with_the_same_weights() -> None:
    model, pixels = made(PLAIN), some(PLAIN, 1)
    blocks = theirs(model, normalize(pixels))
    assert blocks[0].shape == (2, 25, 25)
    assert blocks[1].std(-1).max() > 0.05
    for number, weights in enumerate(blocks):
        for query, expected in (
            ("all", weights[:, 1:, 1:].mean(1)),
            ("class", weights[:, 0, 1:]),
            ((2, 5), weights[:, 1 + 2 * 6 + 5, 1:]),
        ):
            found = attention_maps(model, pixels, query=query, block=number)  # type: ignore[arg-type]
            torch.testing.assert_close(found[0], expected.reshape(2, 4, 6))
    half = [(weights.mean(0) + torch.eye(25)) / 2 for weights in blocks]
    expected = (half[1] @ half[0])[1 + 3, 1:].view(4, 6)
    torch.testing.assert_close(rollout(model, pixels, query=(0, 3))[0], expected)


@pytest.mark.parametrize("builder", BUILDERS)
def test_attention_is_a_share_for_each_token_of_each_sample_by_itself(builder: MAE) -> None:
    model, pixels = made(builder), some(builder)
    for maps in (attention_maps(model, pixels), rollout(model, pixels).unsqueeze(1)):
        assert maps.shape[2:] == builder.grid
        assert maps.min() >= 0
        total = maps.flatten(2).sum(-1)
        if builder.class_token:
            assert ((total > 0) & (total < 1)).all()
        else:
            torch.testing.assert_close(total, torch.ones_like(total))
    one = attention_maps(model, pixels[1:])
    torch.testing.assert_close(attention_maps(model, pixels)[1:], one)


@pytest.mark.parametrize("builder", BUILDERS)
def test_looking_changes_neither_the_model_nor_what_is_drawn_at_random(builder: MAE) -> None:
    model, pixels = made(builder).train(), some(builder)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    first = attention_maps(model, pixels)
    rollout(model, pixels)
    overview(model, pixels[0])
    assert torch.equal(attention_maps(model, pixels), first)
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(random)
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_classifier_and_a_backbone_are_looked_into_as_well() -> None:
    pixels = some(CONV)
    for net in (CONV.classifier(3).build(), CONV.backbone().build()):
        assert attention_maps(net, pixels).shape == (2, 2, *CONV.grid)


def test_what_has_no_attention_or_no_such_token_is_refused() -> None:
    model, pixels = made(CONV), some(CONV)
    with pytest.raises(ValueError, match="last stage has convolution blocks, and so no attention"):
        attention_maps(CONV.backbone(stages=(0,)).build(), pixels)
    with pytest.raises(ValueError, match="the model has no class token"):
        attention_maps(model, pixels, query="class")
    for query in ((4, 0), (0, -1), (1,), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"is no token's place: there are \(4, 6\), counted from 0"):
            rollout(model, pixels, query=query)
    with pytest.raises(ValueError, match="block=2: the last stage has 2"):
        attention_maps(model, pixels, block=2)


# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(6, 8), (2, 6, 8)])
def test_colours_are_the_first_three_components(grid: tuple[int, ...]) -> None:
    features = torch.randn(7, *grid, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8).view(
        -1, *[1] * len(grid)
    )
    tokens = features.flatten(1).T.double().numpy()
    tokens = tokens - tokens.mean(0)
    left, sizes, _ = np.linalg.svd(tokens, full_matrices=False)
    colours = principal_colours(features).flatten(0, -2).double().numpy()
    for component, colour in zip((left * sizes)[:, :3].T, colours.T, strict=True):
        low, high = np.sort(component)[[len(component) // 100, -1 - len(component) // 100]]
        rising = ((component - low) / (high - low)).clip(0, 1) * 255
        off = min(abs(colour - rising).max(), abs(colour - (255 - rising)).max())
        assert off <= 0.5001


def test_what_is_alike_is_coloured_alike_and_few_tokens_or_channels_do_no_harm() -> None:
    kinds = torch.eye(5)[:, [0, 1, 2, 3]]
    which = torch.randint(4, (8, 8), generator=torch.Generator().manual_seed(0))
    colours = principal_colours(kinds[:, which])
    seen = {tuple(colour.tolist()) for colour in colours.flatten(0, 1)}
    assert len(seen) == 4
    for kind in range(4):
        assert len({tuple(colour.tolist()) for colour in colours[which == kind]}) == 1
    assert principal_colours(torch.randn(2, 4, 4)).shape == (4, 4, 3)
    assert principal_colours(torch.ones(8, 1, 1)).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(("size", "grid"), [((32, 48), (4, 6)), ((4, 32, 48), (2, 4, 6))])
def test_heat_lies_where_the_map_is_large(size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    pixels, values = torch.full((3, *size), 90, dtype=torch.uint8), torch.zeros(grid)
    values[..., 1, 4] = torch.arange(1, 1 + len(values.flatten(0, -3))) if len(grid) == 3 else 1.0
    drawn = overlay(pixels, values)
    assert drawn.shape == (*size, 3)
    light = drawn.float().mean(-1).view(-1, 32, 48)
    for frame in light:
        peak = frame.flatten().argmax()
        assert 8 <= peak // 48 < 16
        assert 32 <= peak % 48 < 40
        assert frame[20:, :24].max() == light.min()
    if len(grid) == 3:
        assert torch.equal(light[0], light[1])
        assert torch.equal(light[2], light[3])
        assert light[3].max() > light[0].max()  # one scale for all frames


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", BUILDERS)
def test_an_overview_has_the_input_attention_and_every_stage(builder: MAE) -> None:
    model, pixels = made(builder), some(builder)[0]
    query = (1,) * len(builder.grid)
    drawn = dict(overview(model, pixels, query=query))
    stages = [f"stage {number}" for number in range(1, 1 + len(builder.trunk))]
    token = ["class token"] if builder.class_token else []
    assert list(drawn) == ["input", "attention", "rollout", *token, "marked token", *stages]
    frames = builder.size[0] if len(builder.size) == 3 else 1
    for picture in drawn.values():
        assert picture.shape == (frames, 32, 48, 3)
        assert picture.dtype == torch.uint8
    unmarked = pixels.movedim(0, -1).reshape(frames, 32, 48, 3)
    changed = (drawn["input"] != unmarked).any(-1)
    inside = torch.zeros(frames, 32, 48, dtype=torch.bool)
    inside[slice(2, 4) if frames > 1 else slice(None), 8:16, 8:16] = True
    assert changed.any()
    assert not (changed & ~inside).any()
    assert torch.equal(dict(overview(model, pixels))["input"], unmarked)
    assert [title for title, _ in heads(model, pixels)] == ["head 1", "head 2"]


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_sheet_shows_every_picture(builder: MAE) -> None:
    drawn = overview(made(builder), some(builder)[0])
    page = np.asarray(sheet(drawn))
    for _, frames in drawn:
        cell = frames[0].numpy().repeat(4, 0).repeat(4, 1)
        strip = np.lib.stride_tricks.sliding_window_view(page[..., 0], (1, cell.shape[1]))[:, :, 0]
        assert (strip == cell[0, :, 0]).all(-1).any()


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "last.pt", made(CONV))
    return tmp_path / "run"


def test_the_command_draws_what_it_can_and_says_what_it_cannot(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (60, 50), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    files, out = [str(tmp_path / name) for name in ("broken.jpg", "red.png")], tmp_path / "out"
    assert main([str(trained), *files, "--folder", str(out), "--query", "1", "2"]) == 0
    said = capsys.readouterr()
    assert "broken.jpg: not an image" in said.err
    assert sorted(path.name for path in out.iterdir()) == ["red-heads.png", "red.png"]
    with Image.open(out / "red.png") as picture:
        assert (np.asarray(picture) == (255, 0, 0)).all(-1).sum() > 100 * 100
    assert main([str(trained), files[0], "--folder", str(out)]) == 1
    capsys.readouterr()
    for arguments, reason in (
        ([files[1], files[1]], "several files would be drawn to"),
        ([files[1], "--query", "9", "9"], "query=(9, 9) is no token's place"),
    ):
        assert main([str(trained), *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert of_clips.main([str(trained), files[1]]) == 2
    assert "use `python -m convmae.attention_pictures`" in capsys.readouterr().err


def test_clips_are_drawn_frame_by_frame(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "clips.pt", made(CLIPS))
    path = counting(tmp_path / "a.mp4", frames=20)
    out = tmp_path / "out"
    assert of_clips.main([str(tmp_path / "clips.pt"), str(path), "--folder", str(out), "--stride", "2"]) == 0
    with Image.open(out / "a.png") as picture:
        page = np.asarray(picture).astype(int)
    # four frames in the middle of 20, of which each is brighter than the one before by 6: a cell is 192 x 128
    grey = np.bincount(page[..., 0][np.ptp(page, axis=-1) <= 2], minlength=256)
    levels = [level for level in range(256) if grey[level] > 100 * 100]
    assert [round(level / 6) for level in levels] == [7, 9, 11, 13]


@needs_media
def test_real_photographs_and_videos_are_drawn(trained: Path, tmp_path: Path) -> None:
    photos = [str(path) for path in sorted((MEDIA / "images").glob("*.JPEG"))[:2]]
    assert main([str(trained), *photos, "--folder", str(tmp_path), "--size", "64"]) == 0
    for photo in photos:
        with Image.open(tmp_path / f"{Path(photo).stem}.png") as picture:
            assert np.asarray(picture).std() > 20
