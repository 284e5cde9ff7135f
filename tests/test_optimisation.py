"""Layer decay, the schedule, and the average of weights: against published rules, timm, and closed forms."""

import math
from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from convmae import MAE, AttentionStage, ConvMAE, ConvStage
from convmae.average import Average
from convmae.builders import Classifier
from convmae.optimisation import adamw, layer_of, layers, learning_rate, parameter_groups
from video import VideoConvMAE


def published_layer(name: str) -> int:
    """ConvMAE's rule for Base: all before the first of the 11 blocks is layer 0, then one a block, 12 after.

    In our names: the third stage is `stages.2`.
    """
    if name.startswith("trunk.stages.2.blocks."):
        return int(name.split(".")[4]) + 1
    return 0 if name.startswith("trunk.") else 12


@pytest.mark.parametrize("builder", [ConvMAE.base(), VideoConvMAE.base()], ids=repr)
def test_the_layers_of_base_are_the_published_ones(builder: ConvMAE) -> None:
    with torch.device("meta"):
        model = builder.input((*builder.size[:-2], 64, 64)).classifier(10).build()
    assert layers(model) == 12
    found = {name: layer_of(model, name) for name, _ in model.named_parameters()}
    assert found == {name: published_layer(name) for name in found}
    assert set(found.values()) == set(range(13))
    names = {layer: [name for name in found if found[name] == layer] for layer in range(13)}
    assert names[12] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert "trunk.stages.2.linear.weight" in names[0]
    assert "trunk.stages.2.positions" in names[0]
    assert all(name.startswith("trunk.stages.2.blocks.0.") for name in names[1])


def test_groups_have_the_published_scales_and_decays_and_every_parameter_once() -> None:
    model = ConvMAE.base().input(32).classifier(10).build()
    groups = parameter_groups(model, 0.05, layer_decay=0.65)
    named = {parameter: name for name, parameter in model.named_parameters()}
    seen = [parameter for group in groups for parameter in group["params"]]
    assert len(seen) == len(set(seen)) == len(named)
    for group in groups:
        for parameter in group["params"]:
            name = named[parameter]
            assert group["scale"] == pytest.approx(0.65 ** (12 - published_layer(name)))
            plain = parameter.ndim == 1 or name.endswith("positions")
            assert group["weight_decay"] == (0.0 if plain else 0.05), name


def test_a_plain_vit_has_timm_s_scales() -> None:
    """But for the last norm, which timm counts with the last block, and MAE, as we do, with the head."""
    ours = MAE().stages(AttentionStage(dim=24, depth=3, stride=(8, 8), heads=2, hybrid=False)).input(16)
    model = ours.classifier(5, pooling="token").build()
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5
    )
    theirs = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            vit, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=vit.no_weight_decay()
        )
        for parameter in group["params"]
    }
    mine = {
        parameter: (group["scale"], group["weight_decay"])
        for group in parameter_groups(model, 0.05, layer_decay=0.7)
        for parameter in group["params"]
    }
    own, named = dict(model.named_parameters()), dict(vit.named_parameters())
    stage = "trunk.stages.0."
    pairs = {
        f"{stage}embedding.weight": "patch_embed.proj.weight",
        f"{stage}embedding.bias": "patch_embed.proj.bias",
        f"{stage}positions": "pos_embed",
        f"{stage}class_token": "cls_token",
        "head.weight": "head.weight",
        "head.bias": "head.bias",
        **{f"{stage}blocks.{n}.norm1.weight": f"blocks.{n}.norm1.weight" for n in range(3)},
        **{f"{stage}blocks.{n}.attention.qkv.weight": f"blocks.{n}.attn.qkv.weight" for n in range(3)},
        **{f"{stage}blocks.{n}.mlp.2.bias": f"blocks.{n}.mlp.fc2.bias" for n in range(3)},
    }
    for here, there in pairs.items():
        assert mine[own[here]] == pytest.approx(theirs[named[there]]), here


def test_convolutions_after_attention_are_layers_of_their_own() -> None:
    builder = (
        ConvMAE()
        .input(32)
        .stages(
            ConvStage(dim=8, depth=2, stride=(4, 4), kernel=(3, 3)),
            AttentionStage(dim=8, depth=2, stride=(2, 2), heads=2),
            AttentionStage(dim=16, depth=1, stride=(2, 2), heads=2),
        )
    )
    model = builder.classifier(3).build()
    assert layers(model) == 4
    assert layer_of(model, "trunk.stages.0.blocks.1.norm1.weight") == 0
    assert layer_of(model, "trunk.stages.1.linear.weight") == 0
    assert layer_of(model, "trunk.stages.1.blocks.1.norm1.weight") == 2
    assert layer_of(model, "trunk.stages.2.embedding.weight") == 3
    assert layer_of(model, "trunk.stages.2.blocks.0.norm1.weight") == 3
    assert layer_of(model, "head.weight") == 4


def test_a_step_at_a_scale_of_nothing_moves_nothing_else() -> None:
    """With a layer decay that is almost 0 the head alone is trained."""
    model = ConvMAE.small().input(32).classifier(4).build()
    groups = parameter_groups(model, 0.0, layer_decay=1e-12)
    scales = [group.pop("scale") for group in groups]
    optimiser = adamw(groups, betas=(0.9, 0.999))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.autograd.backward(model(torch.randn(2, 3, 32, 32)).square().sum())
    for group, scale in zip(optimiser.param_groups, scales, strict=True):
        group["lr"] = 0.1 * scale
    optimiser.step()
    moved = {name for name, parameter in model.named_parameters() if (parameter - before[name]).abs().max() > 1e-6}
    assert moved == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_the_schedule_is_timm_s_cosine_with_warm_up() -> None:
    total, warm, peak, floor = 100, 10, 2e-3, 1e-6
    parameter = nn.Parameter(torch.zeros(()))
    theirs = CosineLRScheduler(
        torch.optim.SGD([parameter], lr=peak),
        t_initial=total - warm,
        lr_min=floor,
        warmup_t=warm,
        warmup_lr_init=0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(total):
        mine = learning_rate(step / total, peak=peak, floor=floor, warmup=warm / total)
        assert mine == pytest.approx(theirs._get_lr(step)[0], abs=1e-12), step


def tiny() -> Classifier:
    stage = AttentionStage(dim=8, depth=1, stride=(4, 4), heads=2)
    return ConvMAE().input(8).stages(stage).classifier(3)


def test_the_average_is_its_closed_form_and_leaves_the_weights_alone() -> None:
    model, decay = tiny().build(), 0.75
    average = Average(model, decay)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        average.update()
    with average.in_place():
        for name, parameter in model.named_parameters():
            newer = sum((1 - decay) * decay ** (4 - step) * step for step in range(1, 5))
            assert torch.allclose(parameter, decay**4 * start[name] + newer, atol=1e-6), name
    assert all(bool((parameter == 4).all()) for parameter in model.parameters())


def test_an_average_that_goes_on_has_the_same_bits() -> None:
    model = tiny().build()
    average = Average(model, 0.9)
    with torch.no_grad():
        model.head.weight.add_(1)
    average.update()
    kept = average.kept()
    assert math.isclose((kept["head.weight"] - model.head.weight).mean().item(), -0.9, abs_tol=1e-5)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = Average(model, 0.9)
    again.take_up(kept)
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(average.values, again.values, strict=True))
