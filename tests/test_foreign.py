"""Plain ViTs of transformers and timm, with random weights, give the same here; their published names are known."""

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from convmae import foreign
from convmae.foreign import load, recognised, sinusoid
from convmae.nn.classifier import Classifier
from convmae.nn.masked_autoencoder import MaskedAutoencoder

VIDEO: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "tubelet_size": 2,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 60,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 32,
    "use_mean_pooling": False,
}
IMAGE = {name: VIDEO[name] for name in VIDEO if name not in ("num_frames", "tubelet_size", "use_mean_pooling")}
IMAGE["layer_norm_eps"] = 1e-6  # MAE's own


def stirred(model: nn.Module) -> nn.Module:
    """With weights that matter, biases and norms too; fixed positions stay."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def clips(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float(theirs.abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


# --- VideoMAE ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_videomae_of_transformers_gives_its_predictions_and_its_loss() -> None:
    theirs: Any = stirred(transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**VIDEO)))
    ours = load(theirs.state_dict(), size=(4, 32, 32), heads=2, decoder_heads=4)
    assert isinstance(ours, MaskedAutoencoder)
    x, mask = clips(), ours.draw_masks(2, torch.Generator().manual_seed(2))
    out = theirs(x.transpose(1, 2), bool_masked_pos=mask.flatten(1))
    mine = ours(x, mask=mask)
    hidden = mine["prediction"][mask.flatten(1)].view(2, -1, mine["prediction"].shape[-1])
    close(hidden, out.logits)
    close(mine["loss"], out.loss)


@pytest.mark.parametrize("mean", [True, False])
@torch.no_grad()
def test_a_videomae_classifier_gives_its_logits(mean: bool) -> None:
    config = transformers.VideoMAEConfig(**{**VIDEO, "use_mean_pooling": mean, "num_labels": 7})
    theirs: Any = stirred(transformers.VideoMAEForVideoClassification(config))
    ours = load(theirs.state_dict(), size=(4, 32, 32), heads=2)
    assert isinstance(ours, Classifier)
    assert ours.pooling == ("mean" if mean else "token")
    close(ours(clips()), theirs(clips().transpose(1, 2)).logits)


@torch.no_grad()
def test_an_encoder_alone_has_its_features_and_a_fresh_decoder(caplog: pytest.LogCaptureFixture) -> None:
    theirs: Any = stirred(transformers.VideoMAEModel(transformers.VideoMAEConfig(**VIDEO)))
    with caplog.at_level(logging.INFO, "convmae"):
        ours = load(theirs.state_dict(), size=(4, 32, 32), heads=2)
    assert isinstance(ours, MaskedAutoencoder)
    assert "no decoder" in caplog.text
    close(ours.norm(ours.trunk(clips()).tokens), theirs(clips().transpose(1, 2)).last_hidden_state)


def as_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VideoMAE of transformers by the names of VideoMAE's own pretraining files."""
    found: dict[str, Tensor] = {}
    for name, tensor in foreign._common(state).items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            pairs = {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            pairs = {name: tensor}
        for common, value in pairs.items():
            if common.startswith("decoder_blocks."):
                found["decoder." + common.removeprefix("decoder_")] = value
            elif common.startswith("decoder_embed."):
                found[common.replace("decoder_embed", "encoder_to_decoder")] = value
            elif common.startswith(("decoder_norm.", "decoder_pred.")):
                found[common.replace("decoder_", "decoder.").replace("pred", "head")] = value
            elif common == "mask_token":
                found[common] = value
            else:
                found["encoder." + common] = value
    return found


def test_videomae_s_own_names_mean_the_same() -> None:
    theirs = stirred(transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**VIDEO)))
    state = as_published(theirs.state_dict())
    assert {"encoder.blocks.0.attn.q_bias", "encoder_to_decoder.weight", "decoder.blocks.1.norm1.weight"} <= set(state)
    assert recognised(state)
    one, other = (load(each, size=(4, 32, 32), heads=2, decoder_heads=4) for each in (theirs.state_dict(), state))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_positions_are_videomae_s() -> None:
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    table: Any = get_sinusoid_encoding_table
    theirs = table(2 * 4 * 4, 24)[0]
    torch.testing.assert_close(sinusoid((2, 4, 4), 24).flatten(0, 2), theirs, rtol=0, atol=1e-6)


# --- MAE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_a_vitmae_of_transformers_gives_its_predictions(normalised: bool) -> None:
    config = transformers.ViTMAEConfig(**IMAGE, mask_ratio=0.75, norm_pix_loss=normalised)
    theirs: Any = stirred(transformers.ViTMAEForPreTraining(config))
    ours = load(theirs.state_dict(), heads=2, decoder_heads=4)
    assert isinstance(ours, MaskedAutoencoder)
    assert ours.trunk.size == (32, 32)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    out = theirs(x, noise=noise)
    mine = ours(x, mask=out.mask.bool().view(2, 4, 4))
    hidden = out.mask.bool()
    close(mine["prediction"][hidden], out.logits[hidden])
    if normalised:
        close(mine["loss"], out.loss)


@torch.no_grad()
def test_a_decoder_whose_class_token_has_a_position_gives_its_predictions() -> None:
    theirs: Any = stirred(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**IMAGE)))
    theirs.decoder.decoder_pos_embed[:, 0] = torch.randn(16, generator=torch.Generator().manual_seed(3))
    ours = load(theirs.state_dict(), heads=2, decoder_heads=4)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out = theirs(x, noise=torch.rand(2, 16, generator=torch.Generator().manual_seed(2)))
    hidden = out.mask.bool()
    close(ours(x, mask=hidden.view(2, 4, 4))["prediction"][hidden], out.logits[hidden])


@pytest.mark.parametrize("pooling", ["token", "avg"])
@torch.no_grad()
def test_a_vit_of_timm_gives_its_logits(pooling: Any) -> None:
    vit: Any = stirred(
        timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5, global_pool=pooling
        )
    )
    ours = load(vit.state_dict(), heads=2)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    close(ours(x), vit(x))
    larger = load(vit.state_dict(), heads=2, size=48)
    assert isinstance(larger, Classifier)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 5)


# --- what does not match ----------------------------------------------------------------------------------------------


def a_state() -> dict[str, Tensor]:
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    state: dict[str, Tensor] = vit.state_dict()
    return state


def test_an_encoder_without_its_norm_is_refused() -> None:
    config = transformers.VideoMAEConfig(**{**VIDEO, "use_mean_pooling": True})
    theirs = transformers.VideoMAEForPreTraining(config)
    with pytest.raises(ValueError, match="no norm after its encoder"):
        load(theirs.state_dict(), size=(4, 32, 32), heads=2, decoder_heads=4)


def test_names_of_older_transformers_mean_the_same() -> None:
    """Files on the hub keep them."""
    theirs = stirred(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**IMAGE)))
    renamed = (
        ("vit.layers.", "vit.encoder.layer."),
        (".attention.q_proj.", ".attention.attention.query."),
        (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    )
    state = theirs.state_dict()
    older: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for new, old in renamed:
            name = name.replace(new, old)
        older[name] = tensor
    one, other = (load(each, heads=2, decoder_heads=4) for each in (state, older))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_poor_match_is_refused_with_what_is_wrong() -> None:
    state = a_state()
    assert recognised(state)
    assert not recognised({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"not a plain ViT.*conv1\.weight"):
        load({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"heads of a ViT 24 wide: give heads"):
        load(state)
    without = {name: tensor for name, tensor in state.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(ValueError, match=r"missing: trunk\.stages\.0\.blocks\.1\.norm2\.bias"):
        load(without, heads=2)
    with pytest.raises(ValueError, match=r"unexpected: .*ls1"):
        load({**state, "blocks.0.ls1.gamma": torch.ones(24)}, heads=2)
    with pytest.raises(ValueError, match="lacks pos_embed"):
        load({name: tensor for name, tensor in state.items() if name != "pos_embed"}, heads=2)
    with pytest.raises(ValueError, match=r"a norm before its mean over tokens"):
        load(state, heads=2, pooling="mean")
    oblong = {**state, "pos_embed": torch.zeros(1, 1 + 12, 24)}
    with pytest.raises(ValueError, match="12 positions, not those of a square image"):
        load(oblong, heads=2)
