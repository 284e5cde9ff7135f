"""The authors' checkpoints: found in any wrapping, inferred from shapes, and refused where they do not match."""

import argparse
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import explanation, needs_shared, tensors, under
from torch import Tensor

from convmae import AttentionStage, ConvMAE, ConvStage, official, targets
from convmae.nn.classifier import Classifier
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.trunk import AttentionStage as StageModule

pytestmark = needs_shared

State = dict[str, Tensor]
PATCH_NAME = "patch_embed1.proj.weight"


@pytest.fixture(scope="module")
def state() -> State:
    return under(tensors("convmae_tiny"), "state.")


@pytest.fixture(scope="module")
def classifier_state() -> State:
    found = under(tensors("convvit_tiny"), "state.")
    return {name: tensor for name, tensor in found.items() if not name.startswith("norm.")}


def load(source: Any) -> MaskedAutoencoder:
    model = official.load(source, heads=4, decoder_heads=4)
    assert isinstance(model, MaskedAutoencoder)
    return model


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def test_every_size_is_inferred_from_shapes(state: State) -> None:
    model = load(state)
    assert model.builder == (
        ConvMAE()
        .stages(
            ConvStage(dim=16, depth=1, stride=(4, 4), kernel=(5, 5)),
            ConvStage(dim=24, depth=1, stride=(2, 2), kernel=(5, 5)),
            AttentionStage(dim=48, depth=2, stride=(2, 2), heads=4),
        )
        .decode(dim=32, depth=2, heads=4)
    )
    assert model.builder.grid == (14, 14)
    assert not model.training
    assert model.builder.target == targets.normalized_pixels()


def test_mlp_ratios_and_depths_of_every_stage_are_inferred() -> None:
    """A state of another shape, written with the authors' names from one of ours."""
    builder = (
        ConvMAE()
        .input((32, 32))
        .stages(
            ConvStage(dim=4, depth=3, stride=(2, 2), kernel=(7, 7), mlp_ratio=8.0),
            ConvStage(dim=6, depth=1, stride=(4, 4), kernel=(3, 3), mlp_ratio=8.0),
            AttentionStage(dim=8, depth=2, stride=(2, 2), heads=2, mlp_ratio=3.0),
        )
        .decode(dim=12, depth=3, heads=4, mlp_ratio=8.0)
    )
    model = builder.build()
    theirs = official_names(model)
    again = official.load(theirs, heads=2, decoder_heads=4)
    assert again.builder == builder
    assert weights(again).equal(weights(model))


def official_names(model: MaskedAutoencoder) -> State:
    """Ours under the authors' names and shapes, written out by hand: three stages, a decoder, fusion."""
    renames = [
        ("trunk.stages.2.linear.", "patch_embed4."),
        *((f"trunk.stages.{i}.embedding.", f"patch_embed{i + 1}.proj.") for i in range(3)),
        *((f"trunk.stages.{i}.norm.", f"patch_embed{i + 1}.norm.") for i in range(3)),
        *((f"trunk.stages.{i}.blocks.", f"blocks{i + 1}.") for i in range(3)),
        ("trunk.stages.2.positions", "pos_embed"),
        ("fusion.0.", "stage1_output_decode."),
        ("fusion.1.", "stage2_output_decode."),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embedding.", "decoder_embed."),
        ("trunk.stages.2.class_token", "cls_token"),
        ("decoder.positions", "decoder_pos_embed"),
        ("decoder.blocks.", "decoder_blocks."),
        ("decoder.norm.", "decoder_norm."),
        ("decoder.head.", "decoder_pred."),
        (".into.", ".conv1."),
        (".depthwise.", ".attn."),
        (".attention.qkv.", ".attn.qkv."),
        (".attention.out.", ".attn.proj."),
        (".mlp.0.", ".mlp.fc1."),
        (".mlp.2.", ".mlp.fc2."),
    ]
    theirs: State = {}
    for name, tensor in model.state_dict().items():
        convolution = name.startswith(("trunk.stages.0.blocks", "trunk.stages.1.blocks"))
        if convolution:
            name = name.replace(".out.", ".conv2.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        if "positions" in name:
            tensor = tensor.flatten(0, -2).unsqueeze(0)
        for ours, official_name in renames:
            name = name.replace(ours, official_name)
        theirs[name] = tensor
    return theirs


# --- wrappings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("key", [None, "model", "state_dict", "module"])
def test_prefixes_and_wrappers_are_taken_off(state: State, prefix: str, key: str | None) -> None:
    wrapped: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if key:
        wrapped = {key: wrapped, "epoch": 3, "optimizer": {"state": {}}}
    assert weights(load(wrapped)).equal(weights(load(state)))


def test_a_file_and_a_path_as_text_load_as_the_dict_does(state: State, tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pth"
    torch.save({"model": state, "epoch": 1599}, path)
    for source in (path, str(path)):
        assert weights(load(source)).equal(weights(load(state)))


def test_a_file_of_the_authors_training_script_with_its_arguments_loads(state: State, tmp_path: Path) -> None:
    """Their script saves `args`, an argparse.Namespace of plain values, beside the model."""
    path = tmp_path / "checkpoint-199.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4, model="convmae"), "epoch": 199}, path)
    assert weights(load(path)).equal(weights(load(state)))


def test_half_precision_weights_are_taken_at_their_values(state: State) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    model = load(half)
    assert next(model.parameters()).dtype == torch.float32
    expected = load({name: tensor.float() for name, tensor in half.items()})
    assert weights(model).equal(weights(expected))


def test_loading_leaves_the_source_and_the_random_state_alone(state: State) -> None:
    copies = {name: tensor.clone() for name, tensor in state.items()}
    before = torch.get_rng_state()
    model = load(state)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.get_rng_state().equal(before)
    for name, tensor in state.items():
        assert tensor.equal(copies[name]), name


def test_channels_last_weights_load(state: State) -> None:
    last = {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in state.items()
    }
    assert weights(load(last)).equal(weights(load(state)))


# --- what is missing --------------------------------------------------------------------------------------------


def test_a_first_release_without_mask_token_and_fusion_loads_without_fusion(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convmae")
    first = {name: tensor for name, tensor in state.items() if name != "mask_token" and not name.startswith("stage")}
    model = load(first)
    said = "".join(f"{line}\n" for line in caplog.messages)
    assert not model.builder.fusion
    assert len(model.fusion) == 0
    assert f"used {len(first)} tensors of {len(first)} in the file" in said
    assert "missing, left as initialised: decoder.mask_token\n" in said
    assert model(torch.randn(1, 3, 224, 224))["loss"].isfinite()


def test_a_whole_file_is_used_whole_and_nothing_is_said_to_be_missing(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convmae")
    load(state)
    said = "".join(f"{line}\n" for line in caplog.messages)
    assert f"used {len(state)} tensors of {len(state)} in the file: " in said
    assert "missing, left as initialised: none\nunexpected, not used: none\n" in said


def test_unexpected_names_are_named(state: State, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "convmae")
    load({**state, "stranger.weight": torch.zeros(3)})
    said = "".join(f"{line}\n" for line in caplog.messages)
    assert f"used {len(state)} tensors of {len(state) + 1} in the file" in said
    assert "unexpected, not used: stranger.weight\n" in said


def test_an_encoder_without_a_decoder_loads_and_names_what_is_missing(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convmae")
    encoder = {n: t for n, t in state.items() if not n.startswith("decoder_") and n != "mask_token"}
    model = official.load(encoder, heads=4)
    assert isinstance(model, MaskedAutoencoder)
    assert "decoder.blocks.0.attention.qkv.weight" in caplog.text
    assert model.trunk.state_dict().keys() == load(state).trunk.state_dict().keys()


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed2.proj.weight",
        "patch_embed4.bias",
        "blocks1.0.attn.weight",
        "blocks1.0.conv2.bias",
        "blocks3.1.attn.qkv.weight",
        "blocks3.0.mlp.fc1.weight",
        "blocks2.0.norm1.weight",
        "norm.weight",
        "pos_embed",
    ],
)
def test_an_encoder_with_a_tensor_missing_is_refused(state: State, name: str) -> None:
    broken = {other: tensor for other, tensor in state.items() if other != name}
    with pytest.raises(ValueError, match=r"."):
        load(broken)


@pytest.mark.parametrize("name", ["stage2_output_decode.weight", "stage1_output_decode.bias"])
def test_half_of_the_fusion_is_refused(state: State, name: str) -> None:
    """No release is like that; left as initialised, random convolutions would be added to trained features."""
    broken = {other: tensor for other, tensor in state.items() if other != name}
    with pytest.raises(ValueError, match="poor match"):
        load(broken)


@pytest.mark.parametrize("name", ["decoder_blocks.1.attn.qkv.weight", "decoder_norm.weight", "decoder_pred.bias"])
def test_half_of_a_decoder_is_refused(state: State, name: str) -> None:
    broken = {other: tensor for other, tensor in state.items() if other != name}
    with pytest.raises(ValueError, match="poor match"):
        load(broken)


@pytest.mark.parametrize(
    "name", ["blocks3.0.attn.qkv.weight", "blocks1.0.mlp.fc2.weight", "patch_embed4.weight", "decoder_pred.weight"]
)
def test_a_tensor_of_another_shape_is_refused_by_name(state: State, name: str) -> None:
    with pytest.raises(ValueError, match=r"the file has|poor match"):
        load({**state, name: state[name][:-1]})


def test_a_transposed_tensor_is_refused_and_not_read_in_another_order(state: State) -> None:
    """As many values, another shape: a view would scramble them."""
    name = "blocks3.0.attn.qkv.weight"
    with pytest.raises(ValueError, match=r"the file has|poor match"):
        load({**state, name: state[name].T.contiguous()})


def test_a_head_without_a_bias_is_refused(classifier_state: State) -> None:
    broken = {name: tensor for name, tensor in classifier_state.items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"a poor match: the file lacks head\.bias"):
        official.load(broken, heads=4)


def test_other_models_are_refused_with_how_they_begin(state: State) -> None:
    with pytest.raises(ValueError, match=r"not a ConvMAE checkpoint: it has no patch_embed1.*begins with cls, fc"):
        official.load({"cls": torch.zeros(1), "fc": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a ConvMAE checkpoint"):
        official.load({})


def test_a_width_that_tells_no_heads_asks_for_them(state: State, classifier_state: State) -> None:
    with pytest.raises(ValueError, match=r"no shape tells the heads of a stage 48 wide: give heads=\.\.\."):
        official.load(state)
    with pytest.raises(ValueError, match="heads"):
        official.load(classifier_state)


def test_the_published_widths_know_their_heads() -> None:
    for builder in (ConvMAE.small(), ConvMAE.base(), ConvMAE.large(), ConvMAE.huge()):
        last = builder.trunk[-1]
        assert isinstance(last, AttentionStage)
        assert official.KNOWN_HEADS[last.dim] == last.heads


def test_heads_that_do_not_divide_are_refused(state: State) -> None:
    with pytest.raises(ValueError, match="dim 48 is not divisible by heads 7"):
        official.load(state, heads=7, decoder_heads=4)
    with pytest.raises(ValueError, match="dim 32 is not divisible by heads 5"):
        official.load(state, heads=4, decoder_heads=5)


# --- classifiers ------------------------------------------------------------------------------------------------


def test_a_file_with_a_head_gives_a_classifier_with_the_pooling_of_its_norm(classifier_state: State) -> None:
    model = official.load(classifier_state, heads=4)
    assert isinstance(model, Classifier)
    assert model.builder.classes == explanation("convvit_tiny")["constructor"]["num_classes"]
    assert model.pooling == "mean"
    token = {name.replace("fc_norm.", "norm."): tensor for name, tensor in classifier_state.items()}
    model = official.load(token, heads=4)
    assert isinstance(model, Classifier)
    assert model.pooling == "token"


def test_a_classifiers_positions_are_trained(classifier_state: State) -> None:
    model = official.load(classifier_state, heads=4)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- the second release, with a class token ---------------------------------------------------------------------------


def with_token(state: State, *, row: Tensor | None, decoder_row: Tensor | None = None) -> State:
    """The state with a class token, and position tables with a row for it, in front, where one is given."""
    found = {**state, "cls_token": torch.linspace(-1, 1, 48).view(1, 1, 48)}
    for name, first in (("pos_embed", row), ("decoder_pos_embed", decoder_row)):
        if first is not None:
            found[name] = torch.cat([first, state[name]], dim=1)
    return found


def test_a_class_token_is_inferred_and_loaded_with_or_without_rows_for_it(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convmae")
    zeros, decoder_zeros = torch.zeros(1, 1, 48), torch.zeros(1, 1, 32)
    without = load(with_token(state, row=None))
    assert without.builder == load(state).builder.with_class_token()
    assert without.builder.grid == (14, 14)
    assert without.trunk.stages[-1].get_parameter("class_token").equal(torch.linspace(-1, 1, 48).view(1, 1, 48))
    for row, decoder_row in ((zeros, None), (None, decoder_zeros), (zeros, decoder_zeros)):
        caplog.clear()
        model = load(with_token(state, row=row, decoder_row=decoder_row))
        assert model.builder == without.builder
        assert weights(model).equal(weights(without))
        said = "".join(f"{line}\n" for line in caplog.messages)
        assert f"used {len(state) + 1} tensors of {len(state) + 1} in the file" in said
        assert "missing, left as initialised: none\nunexpected, not used: none\n" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_class_tokens_row_gives_what_adding_positions_to_all_tokens_gives(state: State, dtype: torch.dtype) -> None:
    """The last stage as MAE has it, written out: the token first, all rows added, then the blocks."""
    row = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0))
    theirs = {name: tensor.to(dtype) for name, tensor in with_token(state, row=row).items()}
    model = load(theirs)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    stage = model.trunk.stages[-1]
    assert isinstance(stage, StageModule)
    with torch.no_grad():
        finer = model.trunk(x).maps[-2]
        embedded = stage.linear(stage.activation(stage.norm(stage.embedding(finer)))).flatten(1, -2)
        tokens = torch.cat([theirs["cls_token"].float().expand(2, -1, -1), embedded], dim=1)
        tokens = tokens + theirs["pos_embed"].float()
        for block in stage.blocks:
            tokens = block(tokens)
        features = model.trunk(x)
    assert features.class_token is not None
    torch.testing.assert_close(features.class_token, tokens[:, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.tokens, tokens[:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_class_tokens_row_in_the_decoder_gives_what_adding_positions_to_all_tokens_gives(state: State) -> None:
    """The decoder as MAE has it, written out: mask tokens in their places, the class token first, all rows added."""
    decoder_row = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    theirs = with_token(state, row=torch.zeros(1, 1, 48), decoder_row=decoder_row)
    model = load(theirs).double()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shown = model.trunk.shown(model.draw_masks(2, torch.Generator().manual_seed(2)), device=x.device)
    latent, class_token = model.encode(x, shown)
    assert class_token is not None
    weight, bias = theirs["decoder_embed.weight"].double(), theirs["decoder_embed.bias"].double()
    tokens = theirs["mask_token"].double().expand(2, 196, -1).clone()
    tokens[~shown.hidden.flatten(1)] = (latent @ weight.T + bias).flatten(0, 1)
    tokens = torch.cat([class_token @ weight.T + bias, tokens], dim=1) + theirs["decoder_pos_embed"].double()
    for block in model.decoder.blocks:
        tokens = block(tokens)
    expected = model.decoder.head(model.decoder.norm(tokens[:, 1:]))
    prediction = model.decoder(latent, shown, class_token)
    torch.testing.assert_close(prediction, expected, atol=1e-6, rtol=0)  # the sums are rounded to float32
    without = load(with_token(state, row=None)).double().decoder(latent, shown, class_token)
    assert not torch.allclose(without, expected, atol=1e-3), "the row matters"


def test_a_model_with_a_class_token_goes_out_and_comes_back() -> None:
    builder = (
        ConvMAE()
        .input((32, 32))
        .stages(
            ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(5, 5)),
            ConvStage(dim=6, depth=1, stride=(2, 2), kernel=(5, 5)),
            AttentionStage(dim=8, depth=2, stride=(2, 2), heads=2),
        )
        .decode(dim=12, depth=1, heads=4)
        .with_class_token()
    )
    model = builder.build()
    again = official.load(official_names(model), heads=2, decoder_heads=4)
    assert again.builder == builder
    assert weights(again).equal(weights(model))
    larger = official.load(official_names(model), heads=2, decoder_heads=4, size=64)
    assert larger.builder == builder.input(64)
    assert larger(torch.zeros(1, 3, 64, 64))["loss"].isfinite()


def test_a_classifier_with_a_class_token_pools_it_or_the_mean_of_the_others(classifier_state: State) -> None:
    theirs = with_token(classifier_state, row=torch.ones(1, 1, 48))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for norm, pooling in (("fc_norm.", "mean"), ("norm.", "token")):
        model = official.load({name.replace("fc_norm.", norm): tensor for name, tensor in theirs.items()}, heads=4)
        assert isinstance(model, Classifier)
        assert model.pooling == pooling
        features = model.trunk(x)
        assert features.class_token is not None
        pooled = features.tokens.mean(1) if pooling == "mean" else features.class_token[:, 0]
        assert model(x).equal(model.head(model.norm(pooled)))


def test_rows_that_are_not_a_class_tokens_are_refused(state: State) -> None:
    row, decoder_row = torch.zeros(1, 1, 48), torch.ones(1, 1, 32)
    extra = with_token(state, row=row)
    with pytest.raises(ValueError, match=r"pos_embed has 197 positions, not a square grid$"):
        load({name: tensor for name, tensor in extra.items() if name != "cls_token"})
    two = {**extra, "pos_embed": torch.cat([row, extra["pos_embed"]], dim=1)}
    with pytest.raises(ValueError, match="pos_embed has 198 positions, not a square grid, with or without a row"):
        load(two)
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 1\), needed is \(1, 1, 48\), to fit pos_embed"):
        load({**extra, "cls_token": torch.zeros(1, 1, 1)})
    positioned = with_token(state, row=row, decoder_row=decoder_row)
    with pytest.raises(ValueError, match=r"decoder_embed\.bias is \(1,\), needed is \(32,\), to fit decoder_pos_embed"):
        load({**positioned, "decoder_embed.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="a poor match: the file lacks mask_token"):
        load({name: tensor for name, tensor in positioned.items() if name != "mask_token"})
    encoder = {n: t for n, t in extra.items() if not n.startswith("decoder_") and n != "mask_token"}
    assert official.load(encoder, heads=4).trunk.stages[-1].get_parameter("class_token").shape == (1, 1, 48)


# --- files ------------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled by an incautious reader, it leaves a folder behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_malicious_file_executes_nothing(state: State, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"model": state, "args": Malicious(trace)}, tmp_path / "theirs.pth")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load(tmp_path / "theirs.pth")
    assert not trace.exists()


def test_files_that_are_missing_or_hold_something_else_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        official.load(tmp_path / "none.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list, not a state dict"):
        official.load(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: b"hello"],
    ids=["empty", "half", "text"],
)
def test_a_damaged_file_is_refused_by_name(state: State, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    torch.save(state, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged\.pth"):
        load(path)


def test_positions_are_resized_for_another_input_size(state: State) -> None:
    model = official.load(state, heads=4, decoder_heads=4, size=96)
    assert isinstance(model, MaskedAutoencoder)
    assert tuple(model.trunk.stages[-1].get_parameter("positions").shape[:-1]) == (6, 6)
    assert model(torch.randn(1, 3, 96, 96))["loss"].isfinite()
