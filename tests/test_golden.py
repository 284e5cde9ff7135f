"""The framework's numbers are the authors' numbers: recorded runs of their code, to float32's last digits.

The authors ran in float32 and wrote down how far that lay from float64. Ours runs in float64 here, so that it must lie
exactly as far from their float32 numbers as their own float64 run did.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import explanation, needs_shared, tensors, under
from torch import Tensor, nn

from convmae import MAE, AttentionStage, ConvMAE, checkpoint, masking, official, targets
from convmae.grids import patches
from convmae.nn.classifier import Classifier
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.positions import sincos
from video import VideoConvMAE

pytestmark = needs_shared

LATENT = 2e-6  # float32 against float64, shared/README.md
PREDICTION = 5.3e-7
GRADIENT = 5e-6  # float32 against float64, of a tensor's largest entry


def furthest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.detach().double() - theirs.double()).abs().max())


def pair_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """The authors' names to ours by the values they hold, which are all different: no table of names is trusted."""
    pairs: dict[str, str] = {}
    own = model.state_dict()
    for official_name, tensor in state.items():
        same = [
            name
            for name, value in own.items()
            if value.numel() == tensor.numel() and torch.equal(value.flatten(), tensor.flatten())
        ]
        assert len(same) == 1, (official_name, same)
        pairs[official_name] = same[0]
    assert sorted(pairs.values()) == sorted(own)
    return pairs


def norm_of(model: nn.Module, pairs: dict[str, str], official_norm: str) -> nn.LayerNorm:
    module = model.get_submodule(pairs[f"{official_norm}.weight"].removesuffix(".weight"))
    assert isinstance(module, nn.LayerNorm)
    return module


# --- ConvMAE pretraining ----------------------------------------------------------------------------------------


class Recorded:
    """A tiny ConvMAE of the authors', ours with its weights, and the run that both make."""

    def __init__(self) -> None:
        self.about = explanation("convmae_tiny")
        self.content = tensors("convmae_tiny")
        self.state = under(self.content, "state.")
        self.images = self.content["in.imgs"].double()
        self.mask = masking.random(self.about["mask_ratio"]).from_noise(self.content["in.noise"], (14, 14))
        # theirs keeps tokens in the order of the noise, ours in the order of the grid
        self.order = self.content["mask.ids_keep"].long().argsort(1)

    def model(self, state: dict[str, Tensor] | None = None) -> MaskedAutoencoder:
        model = official.load(state or self.state, heads=4, decoder_heads=4)
        assert isinstance(model, MaskedAutoencoder)
        return model.double()

    def kept(self, name: str) -> Tensor:
        tensor = self.content[name]
        return tensor[torch.arange(len(tensor))[:, None], self.order]

    def run(self, model: MaskedAutoencoder) -> dict[str, Tensor]:
        shown = model.trunk.shown(self.mask, device=self.images.device)
        seen: dict[str, Tensor] = {}
        first_block = model.trunk.stages[2].get_submodule("blocks.0")
        hook = first_block.register_forward_pre_hook(lambda module, inputs: seen.update({"out.blocks3_in": inputs[0]}))
        maps = model.trunk(self.images, shown).maps
        hook.remove()
        seen |= {"out.stage1_vis": maps[0], "out.stage2_vis": maps[1], "out.blocks3_out": maps[2].flatten(1, -2)}
        seen["out.stage1_embed_vis"] = model.fusion[0](maps[0]).flatten(1, -2)
        seen["out.stage2_embed_vis"] = model.fusion[1](maps[1]).flatten(1, -2)
        seen["out.latent"], _ = model.encode(self.images, shown)
        return seen


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def intermediates(recorded: Recorded) -> dict[str, Tensor]:
    """Of one run in float64."""
    with torch.no_grad():
        return recorded.run(recorded.model())


@pytest.fixture(scope="module")
def pairs(recorded: Recorded) -> dict[str, str]:
    return pair_names(recorded.state, recorded.model().float())


def with_target(model: MaskedAutoencoder, normalized: bool) -> MaskedAutoencoder:
    model.target = targets.normalized_pixels() if normalized else targets.pixels()
    return model


def test_the_mask_of_recorded_noise_is_the_authors(recorded: Recorded) -> None:
    assert recorded.mask.flatten(1).equal(recorded.content["mask.mask"].bool())
    assert int((~recorded.mask[0]).sum()) == recorded.about["n_keep"]


@pytest.mark.parametrize(
    "name",
    [
        "out.stage1_vis",
        "out.stage2_vis",
        "out.stage1_embed_vis",
        "out.stage2_embed_vis",
        "out.blocks3_in",
        "out.blocks3_out",
        "out.latent",
    ],
)
def test_every_intermediate_of_convmae_is_the_authors(
    recorded: Recorded, intermediates: dict[str, Tensor], name: str
) -> None:
    theirs = recorded.kept(name)
    assert furthest(intermediates[name], theirs) < LATENT * max(1.0, float(theirs.abs().max()) / 4)


@torch.no_grad()
def test_in_float64_convmae_lies_as_far_from_the_recorded_float32_as_the_authors_float64(
    recorded: Recorded, intermediates: dict[str, Tensor]
) -> None:
    latent = intermediates["out.latent"]
    prediction = recorded.model()(recorded.images, mask=recorded.mask)["prediction"]
    apart = recorded.about["float32_vs_float64_max_abs"]
    assert furthest(latent, recorded.kept("out.latent")) == pytest.approx(apart["latent"], rel=1e-6)
    assert furthest(prediction, recorded.content["out.pred"]) == pytest.approx(apart["pred"], rel=1e-6)
    assert float(latent.abs().max()) == pytest.approx(recorded.about["latent_abs_max"], rel=1e-12)
    assert float(prediction.abs().max()) == pytest.approx(recorded.about["pred_abs_max"], rel=1e-12)


@torch.no_grad()
def test_in_float32_convmae_is_within_rounding_of_the_recorded_numbers(recorded: Recorded) -> None:
    model = recorded.model().float()
    out = model(recorded.images.float(), mask=recorded.mask)
    assert furthest(out["prediction"], recorded.content["out.pred"]) < 2 * PREDICTION
    assert out["loss"].item() == pytest.approx(recorded.content["out.loss_norm_pix"].item(), rel=1e-6)


@pytest.mark.parametrize(("normalized", "kind"), [(True, "norm_pix"), (False, "raw")])
def test_loss_and_gradients_of_convmae_are_the_authors(
    recorded: Recorded, pairs: dict[str, str], normalized: bool, kind: str
) -> None:
    model = with_target(recorded.model(), normalized)
    loss = model(recorded.images, mask=recorded.mask)["loss"]
    assert loss.item() == pytest.approx(recorded.about[f"loss_{kind}_float64"], rel=1e-12)
    assert loss.item() == pytest.approx(recorded.content[f"out.loss_{kind}"].item(), rel=1e-6)

    torch.autograd.backward(loss)
    own = dict(model.named_parameters())
    for name in recorded.about["params_without_grad"]:
        assert own[pairs[name]].grad is None
    norms = recorded.about[f"grad_norms_{kind}"]
    assert {*norms, *recorded.about["params_without_grad"]} == set(pairs)
    for name, norm in norms.items():
        gradient = own[pairs[name]].grad
        assert gradient is not None, name
        assert float(gradient.norm()) == pytest.approx(norm, rel=2e-5), name
    gradients = under(recorded.content, f"grad_{kind}.")
    assert len(gradients) == 13
    for name, theirs in gradients.items():
        ours = own[pairs[name]].grad
        assert ours is not None
        assert furthest(ours.view(theirs.shape), theirs) < GRADIENT * float(theirs.abs().max()) + 1e-9, name


# --- the probe of LayerNorm's epsilons --------------------------------------------------------------------------


def probe(recorded: Recorded) -> dict[str, Tensor]:
    about = recorded.about["epsilon_probe"]
    return {
        name: tensor * about["factor"] if any(part in name for part in about["substrings"]) else tensor
        for name, tensor in recorded.state.items()
    }


def test_every_layer_norm_has_the_epsilon_of_the_authors(recorded: Recorded, pairs: dict[str, str]) -> None:
    model = recorded.model()
    expected = recorded.about["norm_eps"]
    assert len(expected) == sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert {name: norm_of(model, pairs, name).eps for name in expected} == expected


@torch.no_grad()
def test_the_epsilon_probe_gives_the_recorded_numbers(recorded: Recorded) -> None:
    model = recorded.model(probe(recorded))
    out = model(recorded.images, mask=recorded.mask)
    latent = recorded.run(model)["out.latent"]
    # latents of the probe are of order one, out of inputs of order 1e-3: float32 rounding grows with them
    assert furthest(latent, recorded.kept("eps.latent")) < 10 * LATENT
    assert furthest(out["prediction"][:, ::14], recorded.content["eps.pred_rows"]) < 10 * PREDICTION
    assert out["loss"].item() == pytest.approx(recorded.content["eps.loss_norm_pix"].item(), rel=1e-6)


WRONG: dict[str, tuple[Callable[[str], bool], float]] = {
    "stage1-2 norms (1e-5) set to 1e-6": (
        lambda name: re.match(r"patch_embed|blocks[12]\.", name) is not None,
        1e-6,
    ),
    "patch_embed*.norm set to 1e-6": (lambda name: name.startswith("patch_embed"), 1e-6),
    "blocks1/blocks2 norms set to 1e-6": (
        lambda name: re.match(r"blocks[12]\.", name) is not None,
        1e-6,
    ),
    "stage-3 and final norms (1e-6) set to 1e-5": (
        lambda name: name == "norm" or name.startswith("blocks3"),
        1e-5,
    ),
    "decoder norms (1e-6) set to 1e-5, change of pred": (lambda name: name.startswith("decoder"), 1e-5),
}


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG)
def test_the_epsilon_probe_tells_a_wrong_epsilon(recorded: Recorded, pairs: dict[str, str], wrong: str) -> None:
    model = recorded.model(probe(recorded))
    chosen, eps = WRONG[wrong]
    for name in filter(chosen, recorded.about["norm_eps"]):
        norm_of(model, pairs, name).eps = eps
    measured = recorded.about["epsilon_probe"]["measured_change_of_latent_if_wrong"][wrong]
    if "pred" in wrong:
        prediction = model(recorded.images, mask=recorded.mask)["prediction"]
        change = furthest(prediction[:, ::14], recorded.content["eps.pred_rows"])
        assert change > 1000 * 10 * PREDICTION
        assert change == pytest.approx(measured, rel=0.2)  # theirs over all rows, ours over those recorded
    else:
        change = furthest(recorded.run(model)["out.latent"], recorded.kept("eps.latent"))
        assert change == pytest.approx(measured, rel=1e-3)


# --- the classifier ---------------------------------------------------------------------------------------------


class Recognised:
    """A tiny ConvViT classifier of the authors'."""

    def __init__(self) -> None:
        self.about = explanation("convvit_tiny")
        self.content = tensors("convvit_tiny")
        self.images = self.content["in.imgs"].double()
        self.labels = self.content["in.labels"].long()

    def state(self, pooling: str) -> dict[str, Tensor]:
        other = "norm." if pooling == "mean" else "fc_norm."
        state = under(self.content, "state.")
        return {name: tensor for name, tensor in state.items() if not name.startswith(other)}

    def model(self, pooling: str) -> Classifier:
        model = official.load(self.state(pooling), heads=4)
        assert isinstance(model, Classifier)
        assert model.pooling == pooling
        return model.double()


@pytest.fixture(scope="module")
def recognised() -> Recognised:
    return Recognised()


@pytest.mark.parametrize(("pooling", "kind"), [("mean", "gp1"), ("token", "gp0")])
def test_logits_features_loss_and_gradients_of_the_classifier_are_the_authors(
    recognised: Recognised, pooling: str, kind: str
) -> None:
    model, content = recognised.model(pooling), recognised.content
    logits = model(recognised.images)
    in_float64 = torch.tensor(recognised.about[f"logits_{kind}_float64"], dtype=torch.float64)
    assert furthest(logits, in_float64) < 1e-12
    assert furthest(logits, content[f"out.{kind}.logits"]) < PREDICTION
    assert furthest(model.pool(recognised.images), content[f"out.{kind}.features"]) < LATENT

    loss = F.cross_entropy(logits, recognised.labels)
    assert loss.item() == pytest.approx(content[f"out.{kind}.loss"].item(), rel=1e-6)
    torch.autograd.backward(loss)
    pairs = pair_names(recognised.state(pooling), recognised.model(pooling).float())
    own = dict(model.named_parameters())
    norms = recognised.about[f"grad_norms_{kind}"]
    assert set(norms) == set(pairs)  # every parameter is trained, positions too
    for name, norm in norms.items():
        gradient = own[pairs[name]].grad
        assert gradient is not None, name
        assert float(gradient.norm()) == pytest.approx(norm, rel=2e-5), name
    for name, theirs in under(content, f"grad_{kind}.").items():
        ours = own[pairs[name]].grad
        assert ours is not None
        assert furthest(ours.view(theirs.shape), theirs) < GRADIENT * float(theirs.abs().max()) + 1e-9, name


@torch.no_grad()
def test_stages_of_the_dense_trunk_are_the_authors_up_to_the_border(recognised: Recognised) -> None:
    model, content = recognised.model("mean"), recognised.content
    seen: list[Tensor] = []
    first_block = model.trunk.stages[2].get_submodule("blocks.0")
    hook = first_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = model.trunk(recognised.images)
    hook.remove()
    for number in (1, 2):
        whole = features.maps[number - 1].squeeze(1)
        assert furthest(whole.mean((1, 2)), content[f"out.stage{number}_mean"]) < 1e-12
        corner = whole[:, :8, -8:].movedim(-1, 1)
        assert furthest(corner, content[f"out.stage{number}_corner"]) < 1e-12
    assert furthest(seen[0], content["out.blocks3_in"]) < 1e-12
    assert furthest(features.tokens, content["out.blocks3_out"]) < 1e-12


def test_a_file_with_both_norms_takes_the_one_of_the_pooling_asked_for(recognised: Recognised) -> None:
    both = under(recognised.content, "state.")
    for pooling, kind in (("mean", "gp1"), ("token", "gp0")):
        model = official.load(both, heads=4, pooling=pooling)
        logits = model(recognised.images.float())
        assert furthest(logits, recognised.content[f"out.{kind}.logits"]) < 2 * PREDICTION


def test_every_layer_norm_of_the_classifier_has_the_epsilon_of_the_authors(recognised: Recognised) -> None:
    model = recognised.model("mean").float()
    pairs = pair_names(recognised.state("mean"), model)
    for name, eps in recognised.about["norm_eps"].items():
        if name != "norm":
            assert norm_of(model, pairs, name).eps == eps, name


# --- positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid", "dim", "rows"),
    [
        ("convmae_sincos_14x14_d48", (14, 14), 48, list(range(196))),
        ("convmae_sincos_14x14_d768_rows", (14, 14), 768, [0, 1, 14, 15, 195]),
        ("convmae_sincos_3x3_d60", (3, 3), 60, list(range(9))),
    ],
)
def test_positions_are_the_authors_tables(name: str, grid: tuple[int, ...], dim: int, rows: list[int]) -> None:
    ours = sincos(grid, dim).flatten(0, -2)[rows]
    theirs = tensors("pos_embeds")[name]
    assert furthest(ours, theirs) <= 6e-8  # one unit in the last place of float32
    assert ours.dtype == torch.float32


# --- initial weights --------------------------------------------------------------------------------------------


def statistics(tensor: Tensor) -> dict[str, float]:
    values = tensor.detach().double()
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def law(stats: dict[str, Any]) -> str:
    """A uniform law's largest value is sqrt(3) deviations out; among hundreds of values a normal's is three."""
    if stats["std"] == 0:
        return "constant"
    return "uniform" if max(-stats["min"], stats["max"]) / stats["std"] < 2.2 else "normal"


def check_distributions(
    model: nn.Module, pairs: dict[str, str], theirs: dict[str, dict[str, Any]], tables: tuple[str, ...]
) -> None:
    own = model.state_dict()
    used = set()
    problems = []
    for name, expected in theirs.items():
        # the tiny model that names were paired on has fewer blocks: look up the first block, then go to this one
        first = re.sub(r"(blocks\d*)\.\d+\.", r"\1.0.", name)
        number = re.search(r"blocks\d*\.(\d+)\.", name)
        ours = pairs[first]
        if number:
            ours = ours.replace("blocks.0.", f"blocks.{number[1]}.")
        used.add(ours)
        tensor = own[ours]
        n = math.prod(expected["shape"])
        assert tensor.numel() == n, (name, ours, tensor.shape, expected["shape"])
        found = statistics(tensor)
        if name in tables or law(expected) == "constant":
            good = all(abs(found[key] - expected[key]) < 1e-5 for key in found)
        else:
            spread = expected["std"]
            good = law(found) == law(expected)
            good &= abs(found["std"] / spread - 1) < 6 * math.sqrt(2) * math.sqrt(0.5 / n)
            good &= abs(found["mean"] - expected["mean"]) < 6 * math.sqrt(2) * spread / math.sqrt(n)
            if law(expected) == "uniform":
                slack = 60 / n * spread
                good &= abs(found["max"] - expected["max"]) < slack
                good &= abs(found["min"] - expected["min"]) < slack
        if not good:
            problems.append((name, ours, found, expected))
    assert not problems, "\n".join(map(str, problems))
    assert used == set(own), set(own) - used


def test_the_check_of_distributions_tells_xavier_from_torchs_default() -> None:
    """The bound of stage 2's fusion: 0.0255 by torch's default, 0.0442 by Xavier; a check that passes both is none."""
    pairs = {"stage2_output_decode.weight": "weight"}
    theirs = explanation("init_stats")["convmae_base_pretraining"]["stage2_output_decode.weight"]
    layer = nn.Linear(4 * 384, 768, bias=False)
    check_distributions(layer, pairs, {"stage2_output_decode.weight": theirs}, ())
    nn.init.xavier_uniform_(layer.weight)
    with pytest.raises(AssertionError, match="stage2_output_decode"):
        check_distributions(layer, pairs, {"stage2_output_decode.weight": theirs}, ())


def test_fresh_weights_of_convmae_base_are_distributed_as_the_authors(pairs: dict[str, str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvMAE.base().build()
    theirs = explanation("init_stats")["convmae_base_pretraining"]
    check_distributions(model, pairs, theirs, ("pos_embed", "decoder_pos_embed"))


def test_fresh_weights_of_the_base_classifier_are_distributed_as_the_authors(recognised: Recognised) -> None:
    pairs = pair_names(recognised.state("mean"), recognised.model("mean").float())
    theirs = explanation("init_stats")["convvit_base_classifier_global_pool"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvMAE.base().classifier(1000).build()
    # recorded before their script draws the head again, at 2e-5
    assert 1.9e-5 < float(model.head.weight.detach().std()) < 2.1e-5
    model.head.weight.data *= 1000
    check_distributions(model, pairs, theirs, ())


# --- VideoMAE's target and mask ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> dict[str, Tensor]:
    return tensors("videomae_tiny")


def removed(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask.bool()].view(len(values), -1, values.shape[-1])


def test_videomaes_normalised_target_is_the_authors(clips: dict[str, Tensor]) -> None:
    cubes = patches(clips["in.video"].double(), (2, 8, 8))
    ours = removed(targets.normalized_pixels(per_channel=True)(cubes), clips["mask.mask"])
    theirs = clips["out.labels_norm"]
    apart = (ours - theirs).abs().amax(-1)
    assert float(apart.max()) < 5e-4  # the nearly constant cube, in their float32
    assert int((apart > 2e-6).sum()) == 1
    # the epsilon belongs outside the root: inside, the nearly constant cube is far off
    cube = cubes * torch.tensor(targets.IMAGENET_STD) + torch.tensor(targets.IMAGENET_MEAN)
    variance, mean = torch.var_mean(cube, dim=2, keepdim=True)
    inside = removed(((cube - mean) / (variance + 1e-6).sqrt()).flatten(2), clips["mask.mask"])
    assert furthest(inside, theirs) > 100 * 5e-4


def test_videomaes_plain_target_is_the_authors(clips: dict[str, Tensor]) -> None:
    cubes = patches(clips["in.video"].double(), (2, 8, 8))
    ours = removed(targets.pixels(unit=True)(cubes), clips["mask.mask"])[:, ::8]
    assert furthest(ours, clips["out.labels_raw"]) < 2e-7


@pytest.mark.parametrize("kind", ["norm", "raw"])
def test_videomaes_loss_of_the_recorded_prediction_is_the_authors(clips: dict[str, Tensor], kind: str) -> None:
    """Through a model's own loss, which averages over hidden tokens only."""
    target = targets.normalized_pixels(per_channel=True) if kind == "norm" else targets.pixels(unit=True)
    builder = (
        MAE()
        .input((16, 32, 32))
        .patch((2, 8, 8))
        .mask(masking.tube(0.9))
        .decode(dim=8, depth=1, heads=1)
        .predict(target)
    )
    model = builder.stages(AttentionStage(dim=8, depth=1, stride=(2, 8, 8), heads=1, hybrid=False)).build()
    mask = clips["mask.mask"].bool()
    prediction = torch.full((2, 128, 384), torch.nan)
    prediction[mask] = clips["out.pred"].flatten(0, 1)
    prediction[~mask] = 1e3  # no part in the loss
    loss = model.loss(
        clips["in.video"].double(), prediction, model.trunk.shown(mask.view(2, 8, 4, 4), device=mask.device)
    )
    assert loss.item() == pytest.approx(clips[f"out.loss_{kind}"].item(), rel=1e-6)


def test_a_tube_mask_hides_as_many_as_videomae_at_every_time_step(clips: dict[str, Tensor]) -> None:
    theirs = clips["mask.mask"].bool().view(2, 8, 4, 4)
    ours = masking.tube(0.9)(64, (8, 4, 4))
    assert ours.shape == (64, 8, 4, 4)
    assert set(ours.flatten(2).sum(2).flatten().tolist()) == {explanation("videomae_tiny")["mask_per_frame"]}
    for mask in (theirs, ours):
        assert mask.equal(mask[:, :1].expand_as(mask))
    assert set(ours.flatten(1).sum(1).tolist()) == set(theirs.flatten(1).sum(1).tolist())


# --- sizes ------------------------------------------------------------------------------------------------------


def count(module: nn.Module, *, positions: bool = True) -> int:
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if positions or not name.endswith("positions")
    )


def plain_ratios(builder: ConvMAE) -> ConvMAE:
    """With MLP ratios of 4 in every stage, as the paper has them."""
    return builder.stages(*(replace(stage, mlp_ratio=4) for stage in builder.trunk))


def encoder_count(builder: MAE) -> int:
    """Parameters of trunk and final norm without fixed positions, from trunks of one and two transformer blocks."""
    *convolutions, last = builder.trunk

    def of_depth(depth: int) -> int:
        short = replace(last, depth=depth)
        return count(builder.stages(*convolutions, short).build_trunk(), positions=False)

    block = of_depth(2) - of_depth(1)
    return of_depth(1) + (last.depth - 1) * block + 2 * last.dim


def test_convmae_base_has_the_authors_number_of_parameters() -> None:
    model = ConvMAE.base().build()
    assert count(model) == 115_041_408
    assert count(model) - count(model, positions=False) == 250_880
    assert count(model.decoder) == 26_108_672
    assert count(model.fusion) == 4_326_912
    assert count(model.trunk) + count(model.norm) + count(model.fusion) == 88_932_736


def test_the_base_classifier_has_the_authors_number_of_parameters() -> None:
    assert encoder_count(ConvMAE.base()) + 196 * 768 + 1000 * 769 == 85_374_824


@pytest.mark.parametrize(
    ("builder", "millions"),
    [
        (ConvMAE.small(), "21.9"),
        (ConvMAE.base(), "84.5"),
        pytest.param(ConvMAE.large(), "322", marks=pytest.mark.slow),
        pytest.param(ConvMAE.huge(), "679", marks=pytest.mark.slow),
        pytest.param(plain_ratios(ConvMAE.large()), "310", marks=pytest.mark.slow),
        pytest.param(plain_ratios(ConvMAE.huge()), "653", marks=pytest.mark.slow),
    ],
    ids=["small", "base", "large", "huge", "large, ratios 4", "huge, ratios 4"],
)
def test_encoders_have_the_published_sizes(builder: ConvMAE, millions: str) -> None:
    digits = len(millions.partition(".")[2])
    assert f"{encoder_count(builder) / 1e6:.{digits}f}" == millions


def test_video_convmae_base_with_the_kinetics_head_has_the_published_86_million() -> None:
    """With positions, as VideoMAE counts its 1568; the temporal kernel moves it by less than 0.15 M."""
    builder = VideoConvMAE.base()
    assert builder.grid == (8, 14, 14)
    assert round((encoder_count(builder) + 1568 * 768 + 400 * 769) / 1e6) == 86
    counts = [encoder_count(VideoConvMAE.inflate(ConvMAE.base(), frames=16, kernel=kernel)) for kernel in (1, 3, 5)]
    assert counts[0] < counts[1] < counts[2] < counts[0] + 0.15e6


def test_a_golden_model_survives_a_checkpoint(recorded: Recorded, tmp_path: Any) -> None:
    model = recorded.model().float()
    checkpoint.save(tmp_path / "tiny.pt", model)
    again = checkpoint.load(tmp_path / "tiny.pt")
    out = again(recorded.images.float(), mask=recorded.mask)["prediction"]
    assert out.equal(model(recorded.images.float(), mask=recorded.mask)["prediction"])
    assert json.dumps(repr(again.builder)) == json.dumps(repr(model.builder))


# --- FastConvMAE: four complementary masks ----------------------------------------------------------------------


class Shared:
    """A tiny FastConvMAE of the authors', every sample under four masks. Their rows go by mask, ours by sample."""

    GROUPS = 4

    def __init__(self) -> None:
        self.about = explanation("fastconvmae_tiny")
        self.content = tensors("fastconvmae_tiny")
        self.state = under(self.content, "state.")
        self.images = self.content["in.imgs"].double()
        self.mask = masking.complementary(self.GROUPS).from_noise(self.content["in.noise"], (14, 14))
        # theirs keeps tokens in the order of the noise, ours in the order of the grid
        self.kept = self.content["mask.ids_shuffle"].long().view(len(self.mask), -1)
        self.order = self.kept.argsort(1)

    def model(self) -> MaskedAutoencoder:
        model = official.load(self.state, heads=4, decoder_heads=4)
        assert isinstance(model, MaskedAutoencoder)
        return model.double()

    def by_sample(self, name: str) -> Tensor:
        return torch.unflatten(self.content[name], 0, (self.GROUPS, -1)).transpose(0, 1).flatten(0, 1)

    def shown(self, name: str) -> Tensor:
        """Of tensors of the shown tokens, in the order of the grid."""
        return self.by_sample(name)[torch.arange(len(self.order))[:, None], self.order]


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared()


def test_the_complementary_masks_of_recorded_noise_are_the_authors(shared: Shared) -> None:
    assert shared.mask.flatten(1).equal(shared.by_sample("mask.masks").bool())
    assert (~shared.mask).view(-1, Shared.GROUPS, 14, 14).sum(1).eq(1).all()
    assert (~shared.mask).flatten(1).nonzero()[:, 1].view(len(shared.mask), -1).equal(shared.kept.sort(1).values)


@torch.no_grad()
def test_maps_latents_and_predictions_of_fastconvmae_are_the_authors(shared: Shared) -> None:
    model, content = shared.model(), shared.content
    shown = model.trunk.shown(shared.mask, device=shared.images.device)
    maps = model.trunk(shared.images, shown).maps
    # every cell is shown in one of the four masks: together they are the authors' whole maps
    whole = []
    for tiles in maps[:2]:
        volume = tiles.new_full((len(shared.images), 14, 14, *tiles.shape[2:]), math.nan)
        for row, places in enumerate((~shared.mask).nonzero()[:, 1:].view(*tiles.shape[:2], 2).tolist()):
            for tile, (y, x) in zip(tiles[row], places, strict=True):
                volume[row // Shared.GROUPS, y, x] = tile
        whole.append(volume.transpose(2, 3).flatten(3, 4).flatten(1, 2).movedim(-1, 1))
    assert furthest(whole[0][:, :, :16, -16:], content["out.stage1_corner"]) < LATENT  # the upper right one
    assert furthest(whole[1], content["out.stage2"]) < LATENT

    seen: list[Tensor] = []
    first_block = model.decoder.get_submodule("blocks.0")
    hook = first_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    prediction = model(shared.images, mask=shared.mask)["prediction"]
    hook.remove()
    assert furthest(seen[0], shared.by_sample("out.decoder_in")) < LATENT
    latent, _ = model.encode(shared.images, shown)
    apart = shared.about["float32_vs_float64_max_abs"]
    assert furthest(latent, shared.shown("out.latent")) == pytest.approx(apart["latent"], rel=1e-6)
    assert furthest(prediction[:, ::7], shared.by_sample("out.pred_rows")) <= apart["pred"] * (1 + 1e-6)


@torch.no_grad()
def test_the_error_of_every_patch_of_fastconvmae_is_the_authors(shared: Shared) -> None:
    model = with_target(shared.model(), False)
    prediction = model(shared.images, mask=shared.mask)["prediction"]
    target = model.target(patches(shared.images, model.trunk.stride)).repeat_interleave(Shared.GROUPS, dim=0)
    error = (prediction - target).square().mean(-1)
    assert furthest(error, shared.by_sample("out.per_patch_mse_raw")) < 1e-6 * float(error.max())


@pytest.mark.parametrize(("normalized", "kind"), [(True, "norm_pix"), (False, "raw")])
def test_loss_and_gradients_of_fastconvmae_are_the_authors(shared: Shared, normalized: bool, kind: str) -> None:
    model = with_target(shared.model(), normalized)
    loss = model(shared.images, mask=shared.mask)["loss"]
    assert loss.item() == pytest.approx(shared.about[f"loss_{kind}_float64"], rel=1e-12)
    assert loss.item() == pytest.approx(shared.content[f"out.loss_{kind}"].item(), rel=1e-6)

    torch.autograd.backward(loss)
    pairs = pair_names(shared.state, shared.model().float())
    own = dict(model.named_parameters())
    norms = shared.about[f"grad_norms_{kind}"]
    assert set(pairs) - set(norms) == {"pos_embed", "decoder_pos_embed"}
    for name, norm in norms.items():
        gradient = own[pairs[name]].grad
        assert gradient is not None, name
        assert float(gradient.norm()) == pytest.approx(norm, rel=2e-5), name
    gradients = under(shared.content, f"grad_{kind}.")
    assert len(gradients) == 7
    for name, theirs in gradients.items():
        ours = own[pairs[name]].grad
        assert ours is not None
        assert furthest(ours.view(theirs.shape), theirs) < GRADIENT * float(theirs.abs().max()) + 1e-9, name
