"""CMAE is the authors' CMAE: their weights by their names, and recorded runs of their code, one process's and two's.

They ran in float32, and in float64 for losses and gradients. Ours runs in float64, where those must come out to the
last digits, and lie as far from their float32 as their own; and in float32.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import explanation, needs_shared, tensors, under
from runs import several
from torch import Tensor, nn

from convmae import CMAE, MAE, AttentionStage, masking, official_cmae, weights
from convmae.builders import Decoder
from convmae.distributed import join
from convmae.grids import Shown
from convmae.nn.contrast import BatchNorm, ContrastiveMaskedAutoencoder, Head, contrastive_loss
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.positions import sincos
from convmae.nn.trunk import Features
from convmae.targets import normalize

pytestmark = needs_shared

State = dict[str, Tensor]

LATENT = 2e-6  # float32 against float64, shared/README.md
OUTPUTS = {
    "out.latent_online": LATENT,
    "out.latent_target": LATENT,
    "out.pred_pixel": LATENT,
    "out.pred_feature": LATENT,
    "out.proj_online": LATENT,
    "out.proj_target": LATENT,
    "out.pred_online": 3.5e-6,  # as far as the authors' own float32 lies from their float64
}
GRADIENT = 2e-5  # of the largest entry; the heads' batch norms over four samples make it coarser than ConvMAE's
ROUNDING = 1e-13  # of float64

ZERO = (
    "projector.fc0.bias",
    "head.predictor.fc0.bias",
    "feature_decoder.decoder_pred.bias",
    "feature_decoder.ln1.bias",
)
"""Their gradients are zero, mathematically: the mean over tokens, then batch norm, removes what all samples share."""

FOLDED = {
    "backbone.cls_token": "trunk.stages.0.class_token",
    "target_backbone.cls_token": "target_encoder.trunk.stages.0.class_token",
    "pixel_decoder.mask_token": "decoder.mask_token",
    "pixel_decoder.decoder_embed.bias": "decoder.embedding.bias",
    "feature_decoder.mask_token": "feature_decoder.mask_token",
    "feature_decoder.decoder_embed.bias": "feature_decoder.embedding.bias",
}
"""What has taken up a row of positions, so that it holds other values than the authors'; its gradient is the same."""


def furthest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.detach().double() - theirs.double()).abs().max())


def load(source: Any, **how: Any) -> ContrastiveMaskedAutoencoder:
    model = official_cmae.load(source, heads=4, decoder_heads=4, **how)
    assert isinstance(model, ContrastiveMaskedAutoencoder)
    return model


class Recorded:
    """A tiny CMAE of the authors', ours with its weights, and the step that both make."""

    def __init__(self) -> None:
        self.about = explanation("cmae_tiny")
        self.content = tensors("cmae_tiny")
        self.state = under(self.content, "state.")
        self.online, self.second = self.content["in.img"].double(), self.content["in.img_t"].double()
        self.mask = masking.block(0.65, 2).from_noise(self.content["in.noise"], (8, 8))
        # theirs keeps tokens in the order of the noise, ours in the order of the grid; the class token comes first
        order = self.content["mask.ids_keep"].long().argsort(1) + 1
        self.order = torch.cat([torch.zeros(len(order), 1, dtype=torch.long), order], dim=1)

    def model(self) -> ContrastiveMaskedAutoencoder:
        """In float64, for training; what was folded in is rounded to float64 too, and not to float32."""
        model = load(self.state).double().train()
        theirs = {name: tensor.double() for name, tensor in self.state.items()}
        own = model.state_dict()
        for encoder in ("backbone", "target_backbone"):
            token = theirs[f"{encoder}.cls_token"] + theirs[f"{encoder}.pos_embed"][:, :1]
            own[FOLDED[f"{encoder}.cls_token"]].copy_(token)
        for decoder, name in (("pixel_decoder", "decoder"), ("feature_decoder", "feature_decoder")):
            row, *rest = theirs[f"{decoder}.decoder_pos_embed"][0]
            own[f"{name}.embedding.bias"].copy_(theirs[f"{decoder}.decoder_embed.bias"] + row)
            own[f"{name}.positions"].copy_((torch.stack(rest) - row).view(8, 8, -1))
            own[f"{name}.mask_token"].copy_(theirs[f"{decoder}.mask_token"] + row)
        return model

    def run(self, model: ContrastiveMaskedAutoencoder) -> dict[str, Tensor]:
        """One forward in the model's precision, and what passes by on its way, by the recorded names."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, inputs, output: seen.update({name: output})

        def keep_latent(module: nn.Module, inputs: tuple[Tensor, Shown, Tensor]) -> None:
            seen["out.latent_online"] = torch.cat([inputs[2], inputs[0]], dim=1)

        def keep_target(module: nn.Module, inputs: Any, output: Features) -> None:
            assert output.class_token is not None
            seen["out.latent_target"] = torch.cat([output.class_token, output.tokens], dim=1)

        hooks = [
            model.feature_decoder.register_forward_pre_hook(keep_latent),
            model.feature_decoder.register_forward_hook(keep("out.pred_feature")),
            model.projector.register_forward_hook(keep("out.proj_online")),
            model.predictor.register_forward_hook(keep("out.pred_online")),
            model.target_encoder.register_forward_hook(keep("out.proj_target")),
        ]
        stage = model.target_encoder.trunk.stages[0]
        if stage.class_token is not None:
            hooks.append(model.target_encoder.trunk.register_forward_hook(keep_target))
        precision = model.norm.weight.dtype
        out = model(self.online.to(precision), self.mask, self.second.to(precision))
        for hook in hooks:
            hook.remove()
        return {**seen, "out.pred_pixel": out["prediction"], "loss": out["loss"], **out}

    def theirs(self, name: str) -> Tensor:
        tensor = self.content[name]
        if name == "out.latent_online":
            return tensor[torch.arange(len(tensor))[:, None], self.order]
        return tensor


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def model_after(recorded: Recorded) -> tuple[ContrastiveMaskedAutoencoder, dict[str, Tensor]]:
    """The model in float64 after one forward and backward, and what that gave."""
    model = recorded.model()
    seen = recorded.run(model)
    torch.autograd.backward(seen["loss"])
    return model, seen


@pytest.fixture(scope="module")
def pairs(recorded: Recorded) -> dict[str, str]:
    """The authors' names to ours, by the values that they hold: no table of names is trusted but `FOLDED`."""
    own, found = load(recorded.state).state_dict(), dict(FOLDED)
    for theirs, tensor in recorded.state.items():
        if theirs in FOLDED or "pos_embed" in theirs or "num_batches" in theirs:
            continue
        same = [name for name, value in own.items() if value.shape == tensor.shape and torch.equal(value, tensor)]
        assert len(same) == 1, (theirs, same)
        found[theirs] = same[0]
    left = {name for name in own if "positions" not in name and "num_batches" not in name} - set(found.values())
    assert not left
    return found


def test_the_mask_of_recorded_noise_is_the_authors(recorded: Recorded) -> None:
    assert recorded.mask.flatten(1).equal(recorded.content["mask.mask"].bool())


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_of_cmae_is_the_authors(
    recorded: Recorded, model_after: tuple[ContrastiveMaskedAutoencoder, dict[str, Tensor]], name: str
) -> None:
    assert furthest(model_after[1][name], recorded.theirs(name)) < OUTPUTS[name]


def test_in_float64_cmae_lies_as_far_from_the_recorded_float32_as_the_authors_float64(
    recorded: Recorded, model_after: tuple[ContrastiveMaskedAutoencoder, dict[str, Tensor]]
) -> None:
    for name, apart in recorded.about["float32_vs_float64_max_abs"].items():
        assert furthest(model_after[1][f"out.{name}"], recorded.theirs(f"out.{name}")) == pytest.approx(apart, rel=1e-5)


def test_both_losses_of_cmae_are_the_authors_in_float64_and_float32(
    recorded: Recorded, model_after: tuple[ContrastiveMaskedAutoencoder, dict[str, Tensor]]
) -> None:
    seen, about = model_after[1], recorded.about["float64"]
    assert seen["contrast"].item() == pytest.approx(about["loss_ct"], rel=ROUNDING)
    assert seen["reconstruction"].item() == pytest.approx(about["loss_rc"], rel=ROUNDING)
    assert seen["loss"].item() == pytest.approx(about["loss_ct"] + about["loss_rc"], rel=ROUNDING)
    in_float32 = recorded.run(load(recorded.state).train())
    for name, theirs in (("contrast", "loss_ct"), ("reconstruction", "loss_rc"), ("loss", "loss_total")):
        assert in_float32[name].item() == pytest.approx(recorded.content[f"out.{theirs}"].item(), rel=5e-6)
    for name, apart in OUTPUTS.items():
        assert furthest(in_float32[name], recorded.theirs(name)) < 2 * apart, name


def test_every_gradient_of_cmae_is_the_authors(
    recorded: Recorded, pairs: dict[str, str], model_after: tuple[ContrastiveMaskedAutoencoder, dict[str, Tensor]]
) -> None:
    own = dict(model_after[0].named_parameters())
    norms = recorded.about["grad_norms_float64"]
    assert {pairs[name] for name in norms} == {name for name, tensor in own.items() if tensor.grad is not None}
    for name, norm in norms.items():
        gradient = own[pairs[name]].grad
        assert gradient is not None
        if name in ZERO:
            assert float(gradient.norm()) < 1e-11, name
        else:
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-10), name
    recorded_gradients = under(recorded.content, "grad.")
    assert len(recorded_gradients) == 8
    for name, theirs in recorded_gradients.items():
        gradient = own[pairs[name]].grad
        assert gradient is not None
        assert furthest(gradient, theirs) < GRADIENT * float(theirs.abs().max()), name


def test_nothing_that_the_authors_do_not_train_gets_a_gradient(
    recorded: Recorded, pairs: dict[str, str], model_after: tuple[ContrastiveMaskedAutoencoder, dict[str, Tensor]]
) -> None:
    own = dict(model_after[0].named_parameters())
    untrained = {name for name in recorded.about["params_without_grad"] if "pos_embed" not in name}
    assert len(untrained) == 32
    assert all(own[pairs[name]].grad is None and not own[pairs[name]].requires_grad for name in untrained)


@torch.no_grad()
def test_the_target_after_a_step_is_the_authors(recorded: Recorded, pairs: dict[str, str]) -> None:
    model, content = recorded.model(), recorded.content
    with torch.enable_grad():
        torch.autograd.backward(recorded.run(model)["loss"])
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=0.05)
    model.update_target(0.9)
    own, after = model.state_dict(), under(content, "after.")
    positions = after.pop("target_backbone.pos_embed")
    # our class tokens hold the row of positions too, which is averaged in the target's and stays in the online one's
    after["target_backbone.cls_token"] = after["target_backbone.cls_token"].double() + positions[:, :1].double()
    after["backbone.cls_token"] = (
        after["backbone.cls_token"].double() + content["state.backbone.pos_embed"][:, :1].double()
    )
    assert len(after) == 11
    for name, theirs in after.items():
        assert furthest(own[pairs[name]], theirs) < 1e-6 * max(1.0, float(theirs.abs().max())), name
        before = content[f"state.{name}"]
        assert furthest(before, theirs) > 1e-4, f"{name} did not move"
    assert furthest(own["target_encoder.trunk.stages.0.positions"].view(1, 64, 48), positions[:, 1:]) < 2e-7


def test_the_buffers_of_batch_norm_are_kept_apart_and_not_averaged(recorded: Recorded) -> None:
    """Of the target's head they come from its own batch alone, whatever the momentum."""
    model = recorded.model()
    recorded.run(model)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert all(tensor == 1 for name, tensor in buffers.items() if "num_batches" in name)
    model.update_target(0.0)
    assert len(buffers) == 9
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, buffers[name])


@torch.no_grad()
def test_a_target_without_a_class_token_is_the_authors(recorded: Recorded) -> None:
    model = recorded.model()
    model.target_encoder.trunk.stages[0].register_parameter("class_token", None)
    seen, content = recorded.run(model), recorded.content
    assert furthest(seen["out.proj_target"], content["out_nocls.proj_target"]) < 1.5 * LATENT
    assert seen["contrast"].item() == pytest.approx(content["out_nocls.loss_ct"].item(), rel=5e-6)
    with_it = content["out.loss_ct"].item()
    assert abs(seen["contrast"].item() - with_it) > 1e-3 * with_it


@torch.no_grad()
def test_every_epsilon_is_the_authors_and_a_wrong_one_of_batch_norm_is_told_apart(recorded: Recorded) -> None:
    model = recorded.model()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | BatchNorm)]
    assert sorted(module.eps for module in norms) == sorted(recorded.about["norm_eps"].values())
    for module in norms:
        if isinstance(module, BatchNorm):
            module.eps = 1e-5
    wrong = recorded.run(model)["contrast"].item()
    assert wrong == pytest.approx(recorded.about["loss_ct_if_BN_eps_1e-5"], rel=1e-5)
    assert abs(wrong - recorded.about["float64"]["loss_ct"]) > 0.03


@pytest.mark.parametrize("end", ["1.0", "0.996"])
def test_the_momentum_goes_as_the_authors_hook_has_it(recorded: Recorded, end: str) -> None:
    model = CMAE(mae=MAE.small().input(32)).follow(0.996, float(end)).build()
    for step, momentum in recorded.about["momentum_schedule"][f"end={end}"].items():
        assert model.momentum(int(step) / 1000) == pytest.approx(momentum, abs=1e-12)


def test_the_authors_initial_positions_are_ours_with_the_row_first(recorded: Recorded) -> None:
    table = recorded.content["init.pos_embed"][0]
    assert not table[0].any()
    assert furthest(sincos((8, 8), 48).transpose(0, 1).flatten(0, 1), table[1:]) < 1e-6


# --- two processes ----------------------------------------------------------------------------------------------------

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


def told_by_one_process(out: Path) -> None:
    """Losses of this process's rows, and their gradients, to a file; the keys are those of both processes."""
    torch.set_num_threads(1)
    content = tensors("cmae_head_2ranks")
    with join("cpu", minutes=2) as world:
        rows = slice(3 * world.rank, 3 * world.rank + 3)
        for name, precision in PRECISIONS.items():
            told = losses(content, rows, precision)
            torch.save(told, out / f"{name} of {world.rank}.pt")


def losses(content: State, rows: slice, precision: torch.dtype, *, alone: bool = False) -> State:
    about = explanation("cmae_head_2ranks")
    sizes = about["predictor"]
    head = Head(sizes["in"], sizes["hidden"], sizes["out"])
    names = {"fc0": "0", "bn0": "1", "fc1": "3"}
    state = under(content, "state.predictor.")
    head.load_state_dict({f"{names[name[:3]]}{name[3:]}": tensor for name, tensor in state.items()})
    head.to(precision).eval()
    inputs = {name: content[f"in.{name}"][rows] for name in ("img", "pred_pixel", "mask", "proj_online", "proj_target")}
    online = inputs["proj_online"].to(precision).requires_grad_()
    prediction = inputs["pred_pixel"].to(precision).requires_grad_()
    keys = inputs["proj_target"].to(precision).requires_grad_()
    told = contrastive_loss(head(online.squeeze(1)), keys.squeeze(1), about["temperature"], alone=alone)
    stage = AttentionStage(dim=16, depth=1, stride=(4, 4), heads=2, hybrid=False)
    model = MAE().input(16).stages(stage).decode(dim=16, depth=1, heads=2).build()
    reconstruction = model.loss(inputs["img"].to(precision), prediction, uneven(inputs["mask"]))
    torch.autograd.backward(told["contrast"] + reconstruction)
    assert keys.grad is None
    assert online.grad is not None
    assert prediction.grad is not None
    return {
        "loss_ct": told["contrast"].detach(),
        "loss_rc": reconstruction.detach(),
        "grad.proj_online": online.grad,
        "grad.pred_pixel": prediction.grad,
    }


def uneven(mask: Tensor) -> Shown:
    """What masks show that hide unequal numbers: no model takes them, but the loss does; the last is shown twice."""
    shown = [(row == 0).nonzero()[:, 0] for row in mask]
    longest = max(map(len, shown))
    index = torch.stack([torch.cat([each, each[-1:].expand(longest - len(each))]) for each in shown])
    found = Shown((4, 4), index)
    assert found.hidden.flatten(1).equal(mask.bool())
    return found


@pytest.fixture(scope="module")
def told_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("told")
    codes, said = several(2, __file__, out)
    assert codes == [0, 0], "\n".join(said)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", [0, 1])
def test_losses_and_gradients_of_each_of_two_processes_are_the_authors(
    told_by_two: Path, rank: int, precision: str
) -> None:
    content = tensors("cmae_head_2ranks")
    told = torch.load(told_by_two / f"{precision} of {rank}.pt", weights_only=True)
    rows = slice(3 * rank, 3 * rank + 3)
    for name in ("loss_ct", "loss_rc"):
        assert told[name].dtype == PRECISIONS[precision]
        assert told[name].item() == pytest.approx(content[f"out.{name}"][rank].item(), rel=2e-6)
    for name in ("grad.proj_online", "grad.pred_pixel"):
        theirs = content[name][rows]
        assert furthest(told[name], theirs) < 5e-6 * float(theirs.abs().max())


def test_each_of_two_processes_compares_with_the_keys_of_both(told_by_two: Path) -> None:
    content = tensors("cmae_head_2ranks")
    for rank in (0, 1):
        told = torch.load(told_by_two / f"float64 of {rank}.pt", weights_only=True)
        by_itself = losses(content, slice(3 * rank, 3 * rank + 3), torch.float64, alone=True)
        assert told["loss_ct"] > by_itself["loss_ct"] + 0.01
        assert torch.equal(told["loss_rc"], by_itself["loss_rc"])


# --- the loader -------------------------------------------------------------------------------------------------------


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def encoder_of(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in under(state, "backbone.").items()}


def test_every_size_is_inferred_from_shapes(recorded: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "convmae")
    model = load(recorded.state)
    stage = AttentionStage(dim=48, depth=2, stride=(4, 4), heads=4, mlp_ratio=2.0, hybrid=False)
    mae = MAE().input(32).stages(stage).mask(masking.block(0.65, 2)).decode(dim=32, depth=2, heads=4)
    expected = CMAE(mae=mae).decode_features(dim=32, depth=1, heads=4).project(hidden=64, dim=16)
    assert model.builder == expected
    assert not model.training
    said = "".join(f"{line}\n" for line in caplog.messages)
    assert f"used {len(recorded.state)} tensors of {len(recorded.state)} in the file: " in said
    assert "missing, left as initialised: none\nunexpected, not used: none\n" in said


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_prefixes_and_wrappers_are_taken_off(recorded: Recorded, prefix: str, key: str | None) -> None:
    wrapped: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in recorded.state.items()}
    assert same(load({"meta": {"epoch": 3}, key: wrapped} if key else wrapped), load(recorded.state))


def test_loading_leaves_the_source_and_the_random_state_alone(recorded: Recorded) -> None:
    copies = {name: tensor.clone() for name, tensor in recorded.state.items()}
    before = torch.get_rng_state()
    for parameter in load(recorded.state, channels="bgr").parameters():
        parameter.data.zero_()
    assert torch.get_rng_state().equal(before)
    for name, tensor in recorded.state.items():
        assert tensor.equal(copies[name]), name


@pytest.mark.parametrize("prefix", ["backbone.", "", "module.backbone."])
def test_the_encoder_alone_gives_a_plain_model_with_a_fresh_decoder(
    recorded: Recorded, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convmae")
    encoder = encoder_of(recorded.state, prefix)
    model = official_cmae.load(encoder, heads=4)
    said = "".join(f"{line}\n" for line in caplog.messages)
    whole = load(recorded.state)
    assert type(model) is MaskedAutoencoder
    assert model.builder.decoder == Decoder(dim=512, depth=8, heads=16)
    assert same(model.trunk, whole.trunk)
    assert same(model.norm, whole.norm)
    assert f"used {len(encoder)} tensors of {len(encoder)} in the file: backbone ({len(encoder)})" in said
    assert "missing, left as initialised: decoder.mask_token, decoder.positions, decoder.embedding.weight" in said
    assert model(torch.randn(2, 3, 32, 32))["loss"].isfinite()


def test_the_encoder_with_its_pixel_decoder_gives_a_plain_model_with_both(recorded: Recorded) -> None:
    parts = {n: t for n, t in recorded.state.items() if n.startswith(("backbone.", "pixel_decoder."))}
    model, whole = official_cmae.load(parts, heads=4, decoder_heads=4), load(recorded.state)
    assert type(model) is MaskedAutoencoder
    assert same(model.trunk, whole.trunk)
    assert same(model.decoder, whole.decoder)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.1.ffn.layers.0.0.weight",
        "backbone.patch_embed.projection.bias",
        "backbone.ln1.weight",
        "backbone.pos_embed",
        "backbone.cls_token",
        "target_backbone.cls_token",
        "target_backbone.layers.0.attn.qkv.weight",
        "pixel_decoder.mask_token",
        "pixel_decoder.decoder_embed.bias",
        "pixel_decoder.decoder_blocks.1.ln2.bias",
        "feature_decoder.decoder_pos_embed",
        "feature_decoder.decoder_embed.weight",
        "projector.bn0.running_var",
        "projector.fc0.weight",
        "target_projector.fc1.weight",
        "head.predictor.bn0.bias",
    ],
)
def test_a_file_with_a_tensor_missing_or_cut_is_refused(recorded: Recorded, name: str) -> None:
    with pytest.raises(ValueError, match=r"a poor match: the file lacks|pos_embed has 65 positions"):
        load({other: tensor for other, tensor in recorded.state.items() if other != name})
    with pytest.raises(ValueError, match=r"the file has|needed is|not a square"):
        load({**recorded.state, name: recorded.state[name][..., :-1]})


@pytest.mark.parametrize("part", ["target_backbone.", "feature_decoder.", "projector.", "head.predictor."])
def test_a_file_with_a_part_missing_is_refused(recorded: Recorded, part: str) -> None:
    with pytest.raises(ValueError, match="a poor match: the file lacks"):
        load({name: tensor for name, tensor in recorded.state.items() if not name.startswith(part)})


def test_unexpected_names_are_named(recorded: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "convmae")
    load({**recorded.state, "stranger.weight": torch.zeros(3)})
    assert "unexpected, not used: stranger.weight" in caplog.messages


def test_other_models_are_refused_with_how_they_begin(recorded: Recorded) -> None:
    with pytest.raises(ValueError, match=r"not a CMAE checkpoint: .* it begins with conv1"):
        official_cmae.load({"conv1": torch.zeros(1)})
    swin = {"backbone.patch_embed.projection.weight": torch.zeros(96, 3, 4, 4), "backbone.stages.0.w": torch.zeros(1)}
    with pytest.raises(ValueError, match="not a CMAE checkpoint"):
        official_cmae.load(swin)
    clip = {**recorded.state, "backbone.patch_embed.projection.weight": torch.zeros(48, 3, 2, 4, 4)}
    with pytest.raises(ValueError, match=r"\(48, 3, 2, 4, 4\), needed is \(width, 3, patch, patch\)"):
        load(clip)
    short = {**recorded.state, "pixel_decoder.decoder_pred.bias": torch.zeros(47)}
    with pytest.raises(ValueError, match=r"pixel_decoder\.decoder_pred\.bias is \(47,\), needed is \(48,\)"):
        load(short, channels="bgr")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        official_cmae.load("there_is_none.pth")


def test_what_no_shape_tells_is_asked_for(recorded: Recorded) -> None:
    with pytest.raises(ValueError, match=r"no shape tells the heads of an encoder 48 wide: give heads=\.\.\."):
        official_cmae.load(recorded.state)
    with pytest.raises(ValueError, match="dim 32 is not divisible by heads 5"):
        official_cmae.load(recorded.state, heads=4, decoder_heads=5)
    with pytest.raises(ValueError, match=r'channels is "rgb" or "bgr".*got \'rbg\''):
        load(recorded.state, channels="rbg")


def test_a_decoders_row_that_is_zero_changes_nothing(recorded: Recorded) -> None:
    state = dict(recorded.state)
    name = "pixel_decoder.decoder_pos_embed"
    state[name] = torch.cat([torch.zeros(1, 1, 32), state[name][:, 1:]], dim=1)
    decoder = load(state).decoder
    assert decoder.embedding.bias.equal(state["pixel_decoder.decoder_embed.bias"])
    assert decoder.mask_token.equal(state["pixel_decoder.mask_token"])
    assert decoder.positions.view(1, 64, 32).equal(state[name][:, 1:])


@torch.no_grad()
def test_channels_in_the_other_order_are_folded_into_both_encoders(recorded: Recorded) -> None:
    """RGB images normalised as ever, against BGR images under the statistics of RGB, in the authors' own model."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = load(recorded.state, channels="bgr"), load(recorded.state)
    rgb, bgr = normalize(pixels), normalize(pixels.flip(1))
    shown = ours.trunk.shown(recorded.mask[:2], device=rgb.device)
    (latent, token), (their_latent, their_token) = ours.encode(rgb, shown), theirs.encode(bgr, shown)
    assert token is not None
    assert their_token is not None
    assert furthest(latent, their_latent) < 1e-5
    assert furthest(token, their_token) < 1e-5
    assert furthest(ours.target_encoder(rgb), theirs.target_encoder(bgr)) < 1e-5
    assert furthest(latent, theirs.encode(rgb, shown)[0]) > 0.1, "unfolded it is another model"
    prediction = ours.decoder(latent, shown, token).unflatten(2, (16, 3))
    their_prediction = theirs.decoder(their_latent, shown, their_token).unflatten(2, (16, 3))
    assert furthest(prediction, their_prediction.flip(3)) < 1e-5
    assert furthest(ours(rgb, shown)["contrast"], theirs(bgr, shown)["contrast"]) < 1e-5
    alone = official_cmae.load(encoder_of(recorded.state, ""), heads=4, channels="bgr")
    assert same(alone.trunk, ours.trunk)


def test_positions_are_resized_for_another_input_size(recorded: Recorded) -> None:
    model = load(recorded.state, size=48)
    assert model.builder.size == (48, 48)
    assert model.builder.mae.masking == masking.block(0.65, 2)
    assert model(torch.randn(2, 3, 48, 48))["loss"].isfinite()
    odd = load(recorded.state, size=36)
    assert odd.builder.mae.masking == masking.random(0.65)
    assert odd(torch.randn(2, 3, 36, 36))["loss"].isfinite()


def test_the_one_way_in_knows_them(recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "convmae")
    path = tmp_path / "cmae.pth"
    torch.save({"meta": {}, "state_dict": recorded.state}, path)
    with caplog.at_level(logging.INFO, "convmae"):
        model = weights.load(path, heads=4, decoder_heads=4)
    assert "cmae.pth: taken for the authors' CMAE, of RGB images" in caplog.text
    assert same(model, load(recorded.state))
    target = weights.load(path, heads=4, decoder_heads=4, encoder="target")
    assert same(target.trunk, load(recorded.state).target_encoder.trunk)
    reversed_ = weights.load(path, heads=4, decoder_heads=4, channels="bgr")
    assert same(reversed_, load(recorded.state, channels="bgr"))
    alone = weights.load(encoder_of(recorded.state, ""), heads=4)
    assert same(alone.trunk, model.trunk)


if __name__ == "__main__":
    told_by_one_process(Path(sys.argv[1]))
