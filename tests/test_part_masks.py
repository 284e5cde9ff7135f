"""Several masks of one sample, and a decoder that predicts a part of what is hidden."""

import math
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from runs import Noise, TinyRun, losses, tiny
from test_laws import CLIP, IMAGE, assert_near, build, gradients, upsample
from torch import Tensor

from convmae import AttentionStage, ConvMAE, ConvStage, checkpoint, masking
from convmae.grids import patches, show
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.training import fit
from video import VideoConvMAE

both = pytest.mark.parametrize("builder", [IMAGE, CLIP], ids=["image", "clip"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(builder: ConvMAE, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, *builder.size, generator=generator(seed), dtype=torch.float64)


# --- complementary masks ----------------------------------------------------------------------------------------

COMPLEMENTARY = [
    (masking.complementary(), (4, 4)),
    (masking.complementary(2), (3, 2)),
    (masking.complementary(7), (14, 14)),
    (masking.complementary(3, block=(2, 1)), (4, 3)),
    (masking.complementary(4), (3, 2, 4)),
    (masking.complementary(4, block=(None, 1, 1)), (3, 4, 5)),
    (masking.complementary(2, block=(None, 2, 2)), (3, 4, 6)),
    (masking.complementary(4, block=(2, None, None)), (8, 3, 3)),
]
dealt = pytest.mark.parametrize(("rule", "grid"), COMPLEMENTARY, ids=str)


@dealt
def test_every_token_is_shown_in_exactly_one_mask_of_its_sample(
    rule: masking.ComplementaryMasking, grid: tuple[int, ...]
) -> None:
    mask = rule(5, grid, generator(0))
    assert mask.dtype == torch.bool
    assert mask.shape == (5 * rule.groups, *grid)
    assert mask.device.type == "cpu"
    assert (~mask).view(5, rule.groups, *grid).sum(1).eq(1).all()
    assert (~mask).flatten(1).sum(1).eq(math.prod(grid) // rule.groups).all()


@dealt
def test_the_masks_of_a_sample_follow_one_another_and_are_dealt_out_by_noise(
    rule: masking.ComplementaryMasking, grid: tuple[int, ...]
) -> None:
    """Each group's tokens have lower noise than the next one's, by a loop over samples and groups."""
    sides = rule.block or (1,) * len(grid)
    coarse = tuple(size // (size if side is None else side) for size, side in zip(grid, sides, strict=True))
    noise = torch.rand(3, math.prod(coarse), generator=generator(0))
    masks = rule.from_noise(noise, grid)
    each = math.prod(coarse) // rule.groups
    for sample in range(3):
        order = sorted(range(math.prod(coarse)), key=noise[sample].tolist().__getitem__)
        for group in range(rule.groups):
            hidden = torch.ones(math.prod(coarse), dtype=torch.bool)
            hidden[order[each * group : each * (group + 1)]] = False
            expected = upsample(hidden.view(1, *coarse), grid)[0]
            assert masks[sample * rule.groups + group].equal(expected), (sample, group)


def test_tubes_of_complementary_masks_show_the_same_tokens_at_every_time_step() -> None:
    mask = masking.complementary(4, block=(None, 1, 1))(3, (5, 4, 4), generator(0))
    assert mask.equal(mask[:, :1].expand_as(mask))


@dealt
def test_a_generator_decides_complementary_masks_and_samples_differ(
    rule: masking.ComplementaryMasking, grid: tuple[int, ...]
) -> None:
    drawn = [rule(16, grid, generator(seed)) for seed in (1, 1, 2)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert len({tuple(one.flatten().tolist()) for one in drawn[0][:: rule.groups]}) > 1


@dealt
def test_complementary_maskings_print_pickle_and_are_values(
    rule: masking.ComplementaryMasking, grid: tuple[int, ...]
) -> None:
    assert eval(repr(rule), {"masking": masking}) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert len({rule, pickle.loads(pickle.dumps(rule))}) == 1
    with pytest.raises(AttributeError):
        rule.groups = 2  # type: ignore[misc]


@pytest.mark.parametrize("groups", [1, 0, -4, 2.0])
def test_fewer_than_two_groups_are_refused_at_the_call(groups: int) -> None:
    message = f"groups is the number of masks that share a sample's tokens, 2 or more; got {groups!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        masking.complementary(groups)


def test_a_block_that_is_no_block_is_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="block sides are positive numbers of tokens, or None for an axis"):
        masking.complementary(4, block=(0, 1))


@pytest.mark.parametrize(
    ("rule", "grid", "message"),
    [
        (masking.complementary(4), (3, 3), "9 blocks on the token grid (3, 3) cannot be dealt out to 4 groups"),
        (
            masking.complementary(4, block=(None, 1, 1)),
            (8, 3, 3),
            "9 blocks on the token grid (8, 3, 3) cannot be dealt out to 4 groups",
        ),
        (masking.complementary(2, block=(2, 2)), (4, 5), "block (2, 2) does not divide the token grid (4, 5)"),
        (
            masking.complementary(2, block=(None, 1, 1)),
            (4, 4),
            "block (None, 1, 1) has 3 axes, the token grid (4, 4) has 2",
        ),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_dealt_out_are_refused_by_the_masking_and_by_the_builder(
    rule: masking.ComplementaryMasking, grid: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rule(1, grid)
    builder: ConvMAE = (IMAGE if len(grid) == 2 else CLIP).mask(rule)
    builder = builder.input(tuple(side * stride for side, stride in zip(grid, builder.stride, strict=True)))
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the whole message is compared
        builder.build()
    assert str(refused.value) == f"{type(builder).__name__} cannot be built:\n  - .mask({rule!r}): {message}"


@dataclass(frozen=True, kw_only=True)
class OneTooFew:
    """A masking that says it has three masks a sample, and gives two."""

    groups: int = 3

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        return masking.random(0.5)(2 * batch, grid, generator)


def test_a_masking_that_gives_fewer_masks_than_its_groups_is_refused() -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the whole message is compared
        IMAGE.mask(OneTooFew()).build()
    assert str(refused.value) == (
        "ConvMAE cannot be built:\n"
        "  - .mask(OneTooFew(groups=3)) must give boolean masks (3 * batch, 2, 3); it gave torch.bool (4, 2, 3)"
    )


def complementary(builder: ConvMAE) -> tuple[MaskedAutoencoder, ConvMAE]:
    """On a grid of a number of tokens that four masks can share."""
    size = (64, 32) if len(builder.size) == 2 else (8, 16, 32)
    builder = builder.input(size).mask(masking.complementary(4))
    return build(builder), builder


@both
def test_four_masks_at_once_are_four_models_of_one_mask_each(builder: ConvMAE) -> None:
    model, builder = complementary(builder)
    x = pixels(builder)
    mask = model.draw_masks(2, generator(3))
    out = model(x, mask=mask)
    assert out["prediction"].shape[0] == len(mask) == 8
    assert out["mask"].equal(mask)
    separate = [model(x, mask=mask[group::4]) for group in range(4)]
    for group, alone in enumerate(separate):
        assert_near(out["prediction"][group::4], alone["prediction"])
    mean = torch.stack([alone["loss"] for alone in separate]).mean()
    assert_near(out["loss"], mean)
    ours, theirs = gradients(model, out["loss"]), gradients(model, mean)
    for name, gradient in theirs.items():
        assert_near(ours[name], gradient, name)


@both
def test_four_masks_of_a_sample_are_bitwise_those_of_four_copies_of_it(builder: ConvMAE) -> None:
    """As many rows in both: matrix products of another number of rows may add up in another order."""
    model, builder = complementary(builder)
    x = pixels(builder)
    mask = model.draw_masks(2, generator(3))
    out, copies = model(x, mask=mask), model(x.repeat_interleave(4, dim=0), mask=mask)
    assert out["prediction"].equal(copies["prediction"])
    assert out["loss"].equal(copies["loss"])


@both
def test_a_model_draws_its_own_complementary_masks(builder: ConvMAE) -> None:
    model, builder = complementary(builder)
    out = model(pixels(builder))
    assert out["mask"].shape == (8, *builder.grid)
    assert (~out["mask"]).view(2, 4, *builder.grid).sum(1).eq(1).all()


@both
def test_masks_of_no_whole_number_a_sample_are_refused(builder: ConvMAE) -> None:
    model, builder = complementary(builder)
    mask = model.draw_masks(2, generator(3))
    with pytest.raises(ValueError, match="mask is for 8 samples, the input has 3"):
        model(pixels(builder, batch=3), mask=mask)
    with pytest.raises(ValueError, match="the mask is for 8 samples, the input has 3"):
        model(pixels(builder, batch=3), mask=show(mask, builder.grid))
    with pytest.raises(ValueError, match="mask is for 2 samples, the input has 4"):
        model(pixels(builder, batch=4), mask=mask[:2])


@both
def test_reconstructions_of_complementary_masks_keep_what_each_of_them_shows(builder: ConvMAE) -> None:
    model, builder = complementary(builder)
    x = pixels(builder)
    out = model(x)
    whole = model.reconstruct(x, out["prediction"], out["mask"])
    copies = x.repeat_interleave(4, dim=0)
    hidden = upsample(out["mask"], builder.size).unsqueeze(1).expand_as(copies)
    assert whole.shape == copies.shape
    assert whole[~hidden].equal(copies[~hidden])
    assert whole[hidden].ne(copies[hidden]).all()
    for row in range(8):
        alone = model.reconstruct(x[row // 4][None], out["prediction"][row : row + 1], out["mask"][row : row + 1])
        assert_near(whole[row : row + 1], alone)


# --- running cells ----------------------------------------------------------------------------------------------

PARTS = [masking.running_cells(keep) for keep in (0.1, 0.25, 0.5, 0.7, 0.75)]
MASKINGS = [
    (masking.random(0.75), (8, 8)),
    (masking.random(0.6), (5, 7)),
    (masking.block(0.75, 2), (6, 8)),
    (masking.random(0.9), (4, 6, 5)),
    (masking.tube(0.75), (6, 4, 4)),
    (masking.tube_block(0.5, 2), (4, 6, 4)),
    (masking.complementary(4), (4, 4, 4)),
]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize(("rule", "grid"), MASKINGS, ids=str)
def test_running_cells_choose_so_many_of_the_hidden_tokens_in_every_sample(
    part: masking.RunningCells, rule: masking.Masking, grid: tuple[int, ...]
) -> None:
    mask = rule(6, grid, generator(0))
    chosen = part(mask, generator(1))
    assert chosen.dtype == torch.uint8
    assert chosen.shape == mask.shape
    assert chosen.max() == 2
    assert chosen.gt(0).equal(mask)
    counts = chosen.eq(1).flatten(1).sum(1)
    assert counts.eq(max(1, round(int(mask[0].sum()) * part.keep))).all()
    assert part(mask, generator(1)).equal(chosen)
    assert not part(mask, generator(2)).equal(chosen)


def test_running_cells_leave_the_mask_and_the_global_random_state_alone() -> None:
    mask = masking.tube(0.5)(2, (4, 4, 4), generator(0))
    kept, before = mask.clone(), torch.get_rng_state()
    masking.running_cells()(mask, generator(1))
    assert mask.equal(kept)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("rule", [masking.tube(0.75), masking.tube(0.5), masking.tube_block(0.5, 2)], ids=str)
@pytest.mark.parametrize("frames", [4, 8, 12])
def test_in_a_tube_every_hidden_place_is_predicted_at_half_of_the_time_steps(
    rule: masking.BlockMasking, frames: int
) -> None:
    mask = rule(5, (frames, 4, 4), generator(0))
    chosen = masking.running_cells(0.5)(mask, generator(1)) == 1
    assert chosen.sum(1)[mask[:, 0]].eq(frames // 2).all()
    assert chosen.sum(1)[~mask[:, 0]].eq(0).all()


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_the_places_that_are_predicted_go_round_the_cell_in_time(keep: float) -> None:
    """Where every token is hidden but one place, a cell has as many predicted tokens at every step, and others next."""
    mask = torch.ones(4, 8, 6, 6, dtype=torch.bool)
    mask[..., :2, :2] = False
    chosen = masking.running_cells(keep)(mask, generator(0)) == 1
    cells = chosen.view(4, 8, 3, 2, 3, 2).transpose(3, 4).flatten(4)  # (4, 8, 3, 3, 2 x 2)
    hidden = torch.ones(3, 3, dtype=torch.bool)
    hidden[0, 0] = False
    assert cells.sum(-1)[:, :, hidden].eq(4 * keep).all()
    assert cells[:, 1:].ne(cells[:, :-1]).any(-1)[:, :, hidden].all()
    assert cells[:, 4:].equal(cells[:, :-4])
    assert cells[:, :4].sum(1)[:, hidden].eq(4 * keep).all()


@pytest.mark.parametrize("grid", [(4, 6), (5, 4, 6)], ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_every_hidden_token_is_predicted_in_some_draw(grid: tuple[int, ...], keep: float) -> None:
    mask = masking.random(0.7)(1, grid, generator(0)).expand(200, *grid)
    chosen = masking.running_cells(keep)(mask, generator(1)) == 1
    often = chosen.float().mean(0)[mask[0]]
    assert often.min() > 0
    assert float((often - often.mean()).abs().max()) < 0.25


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_running_cells_print_pickle_and_are_values(part: masking.RunningCells) -> None:
    assert eval(repr(part), {"masking": masking}) == part
    assert pickle.loads(pickle.dumps(part)) == part
    assert len({part, pickle.loads(pickle.dumps(part))}) == 1
    builder = CLIP.reconstruct_part(part)
    names = {"masking": masking} | {one.__name__: one for one in (VideoConvMAE, ConvStage, AttentionStage)}
    assert eval(repr(builder), names) == builder
    assert builder.reconstruct_part(None) == CLIP


@pytest.mark.parametrize("keep", [0, 1, -0.5, 1.5, math.nan])
def test_a_share_outside_zero_to_one_is_refused_at_the_call(keep: float) -> None:
    with pytest.raises(ValueError, match="keep is the share of hidden tokens to predict, between 0 and 1; got"):
        masking.running_cells(keep)


# --- a part in the decoder --------------------------------------------------------------------------------------


def in_part(builder: ConvMAE, keep: float = 0.5) -> MaskedAutoencoder:
    size = (64, 32) if len(builder.size) == 2 else (8, 16, 32)
    return build(builder.input(size).reconstruct_part(masking.running_cells(keep)))


def places(mask: Tensor, value: int) -> Tensor:
    """Row-major indices of the tokens of this value, `(R, n)`, by a loop."""
    return torch.tensor([[at for at, v in enumerate(row) if v == value] for row in mask.flatten(1).tolist()])


@both
def test_the_loss_is_the_mean_over_the_chosen_patches(builder: ConvMAE) -> None:
    model = in_part(builder)
    x = pixels(builder.input(model.trunk.size))
    mask = model.draw_masks(2, generator(3))
    out = model(x, mask=mask)
    chosen = places(mask, 1)
    cubes = patches(x, model.trunk.stride)
    assert out["prediction"].shape == (*chosen.shape, cubes.shape[2] * cubes.shape[3])
    assert out["mask"].equal(mask > 0)
    squares = []
    for row, tokens in enumerate(chosen.tolist()):
        for number, token in enumerate(tokens):
            cube = cubes[row, token]
            if len(builder.size) == 2:
                target = (cube - cube.mean()) / (cube.var() + 1e-6).sqrt()
            else:
                pixel = cube * torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
                target = (pixel - pixel.mean(0)) / (pixel.var(0).sqrt() + 1e-6)
            squares.append((out["prediction"][row, number] - target.flatten()).square().mean())
    assert out["loss"].item() == pytest.approx(torch.stack(squares).mean().item(), rel=1e-12)


@both
def test_predictions_are_in_the_order_of_the_grid_and_of_those_tokens(builder: ConvMAE) -> None:
    """Where all hidden tokens are chosen the decoder sees what it sees without: its predictions are the same."""
    model = in_part(builder)
    x = pixels(builder.input(model.trunk.size))
    hidden = model.masking(2, model.trunk.grid, generator(3))
    whole, part = model(x, mask=hidden), model(x, mask=hidden.to(torch.uint8))
    chosen = places(hidden.to(torch.uint8), 1)
    expected = torch.stack([whole["prediction"][row, tokens] for row, tokens in enumerate(chosen)])
    assert_near(part["prediction"], expected)
    assert_near(part["loss"], whole["loss"])
    ours, theirs = gradients(model, part["loss"]), gradients(model, whole["loss"])
    for name, gradient in theirs.items():
        assert_near(ours[name], gradient, name)


@both
def test_what_is_left_out_plays_no_part(builder: ConvMAE) -> None:
    """Its pixels are in no value, and get no gradient; its positions are in no token of the decoder."""
    model = in_part(builder)
    x = pixels(builder.input(model.trunk.size))
    mask = model.draw_masks(2, generator(3))
    out = model(x, mask=mask)
    slopes = gradients(model, out["loss"])
    left_out = upsample(mask == 2, model.trunk.size).unsqueeze(1).expand_as(x)
    poisoned = model(x.masked_fill(left_out, math.nan), mask=mask)
    assert poisoned["loss"].equal(out["loss"])
    for name, gradient in gradients(model, poisoned["loss"]).items():
        assert gradient.equal(slopes[name]), name

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf, mask=mask)["loss"], leaf)
    assert gradient[left_out].eq(0).all()
    assert gradient[~left_out].ne(0).all()

    positions = model.decoder.positions.data.flatten(0, -2)
    one_row = model(x[:1], mask=mask[:1])["loss"]
    positions[places(mask, 2)[0]] = math.nan
    assert model(x[:1], mask=mask[:1])["loss"].equal(one_row)


@both
def test_shown_chosen_and_left_out_tokens_are_the_whole_grid(builder: ConvMAE) -> None:
    model = in_part(builder)
    mask = model.draw_masks(3, generator(3))
    shown = model.trunk.shown(mask, device=torch.device("cpu"))
    assert shown.index is not None
    assert shown.decoded is not None
    assert shown.index.equal(places(mask, 0))
    assert shown.decoded.equal(places(mask, 1))
    for index, decoded in zip(shown.index.tolist(), shown.decoded.tolist(), strict=True):
        assert not set(index) & set(decoded)
        assert len(index) + len(decoded) < model.trunk.length
    assert shown.hidden.equal(mask > 0)


def test_a_mask_written_by_hand_says_what_is_shown_predicted_and_left_out() -> None:
    mask = torch.tensor([[[0, 1, 2], [2, 0, 1]], [[1, 0, 0], [1, 2, 2]]], dtype=torch.uint8)
    shown = show(mask, (2, 3))
    assert shown.index is not None
    assert shown.decoded is not None
    assert shown.index.tolist() == [[0, 4], [1, 2]]
    assert shown.decoded.tolist() == [[1, 5], [0, 3]]
    assert shown.count == 2
    assert build(IMAGE)(pixels(IMAGE), mask=mask)["prediction"].shape[:2] == (2, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 0, 1, 2], [0, 1, 2, 2]], "every sample must show equally many tokens; in this mask they have [2, 1]"),
        (
            [[0, 1, 1, 2], [0, 1, 2, 2]],
            "every sample must have equally many tokens to predict; in this mask they have [2, 1]",
        ),
    ],
)
def test_masks_by_hand_of_unequal_counts_are_refused(rows: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        show(torch.tensor(rows, dtype=torch.uint8).view(2, 2, 2), (2, 2))


@both
def test_without_a_part_every_token_is_predicted_as_ever(builder: ConvMAE) -> None:
    """The verb adds no parameter and draws nothing: the same seed gives the same weights, masks and predictions."""
    off, on = build(builder), build(builder.reconstruct_part(masking.running_cells()))
    assert builder.part is None
    assert all(one.equal(other) for one, other in zip(off.state_dict().values(), on.state_dict().values(), strict=True))
    mask = off.draw_masks(2, generator(3))
    assert mask.dtype == torch.bool
    assert mask.equal(builder.masking(2, builder.grid, generator(3)))
    assert on.draw_masks(2, generator(3)).gt(0).equal(mask)
    x = pixels(builder)
    out = off(x, mask=mask)
    assert out["prediction"].shape[1] == math.prod(builder.grid)
    assert on(x, mask=mask)["prediction"].equal(out["prediction"])


@both
def test_complementary_masks_and_a_part_go_together(builder: ConvMAE) -> None:
    _, builder = complementary(builder)
    model = build(builder.reconstruct_part(masking.running_cells(0.5)))
    x = pixels(builder)
    mask = model.draw_masks(2, generator(3))
    out = model(x, mask=mask)
    assert out["prediction"].shape[:2] == (8, round(math.prod(builder.grid) * 0.75 * 0.5))
    separate = [model(x, mask=mask[group::4])["loss"] for group in range(4)]
    assert_near(out["loss"], torch.stack(separate).mean())


# --- misfits of a part ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A part that is wrong in the way named."""

    how: str

    def __call__(self, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        right = masking.running_cells(0.5)(mask, generator)
        match self.how:
            case "boolean":
                return right > 1
            case "one row":
                return right[:1]
            case "shows":
                return right * 0
            case "nothing":
                return 2 * mask.to(torch.uint8)
            case "uneven":
                right[0][mask[0]] = 1
                return right
        raise ValueError(f"it is {self.how}")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("boolean", " must give uint8 masks (2, 2, 3); it gave torch.bool (2, 2, 3)"),
        ("one row", " must give uint8 masks (2, 2, 3); it gave torch.uint8 (1, 2, 3)"),
        ("shows", " must leave what is hidden hidden, and predict equally many in every sample: [0, 0]"),
        ("nothing", " must leave what is hidden hidden, and predict equally many in every sample: [0, 0]"),
        ("uneven", " must leave what is hidden hidden, and predict equally many in every sample: [3, 2]"),
        ("tired", ": it is tired"),
    ],
)
def test_a_part_that_does_not_suit_is_refused_by_the_builder(how: str, problem: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the whole message is compared
        IMAGE.reconstruct_part(Wrong(how=how)).build()
    assert str(refused.value) == f"ConvMAE cannot be built:\n  - .reconstruct_part(Wrong(how={how!r})){problem}"


def test_a_part_that_is_no_part_is_refused_at_the_call() -> None:
    message = ".reconstruct_part(...) takes which hidden tokens to predict, as masking.running_cells(0.5), or None"
    with pytest.raises(ValueError, match=re.escape(message)):
        IMAGE.reconstruct_part(0.5)  # type: ignore[arg-type]


# --- kept and trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "builder",
    [
        IMAGE.input((64, 32)).mask(masking.complementary(4)),
        CLIP.reconstruct_part(masking.running_cells(0.5)),
        CLIP.input((8, 16, 32)).mask(masking.complementary(2, block=(None, 1, 1))).reconstruct_part(PARTS[1]),
    ],
    ids=["complementary", "part", "both"],
)
def test_a_checkpoint_brings_the_masks_back(builder: ConvMAE, tmp_path: Path) -> None:
    model = builder.build()
    checkpoint.save(tmp_path / "last.pt", model)
    again = checkpoint.load(tmp_path / "last.pt")
    assert isinstance(again, MaskedAutoencoder)
    assert again.builder == builder
    assert repr(again.builder) == repr(builder)
    mask = model.draw_masks(2, generator(3))
    assert again.draw_masks(2, generator(3)).equal(mask)
    x = pixels(builder).float()
    here, there = model.eval()(x, mask=mask), again.eval()(x, mask=mask)
    assert there["prediction"].equal(here["prediction"])
    assert there["loss"].equal(here["loss"])


@pytest.mark.parametrize(
    "builder",
    [
        tiny().mask(masking.complementary(4)),
        tiny().reconstruct_part(masking.running_cells(0.5)),
        tiny().mask(masking.complementary(4)).reconstruct_part(masking.running_cells(0.5)),
        VideoConvMAE.inflate(tiny(), frames=8).mask(masking.tube(0.75)).reconstruct_part(masking.running_cells(0.5)),
    ],
    ids=["complementary", "part", "both", "clip"],
)
def test_a_run_trains_and_draws_with_such_masks(builder: ConvMAE, tmp_path: Path) -> None:
    run = replace(TinyRun(folder=tmp_path).run(), model=builder, epochs=0.5, warmup_epochs=0, pictures=1)
    fit(run)
    assert len(losses(run.folder)) == 2
    assert all(math.isfinite(loss) for loss in losses(run.folder))
    assert list((run.folder / "pictures").rglob("*.png"))


def test_micro_batches_of_complementary_masks_and_parts_are_the_whole_batch(tmp_path: Path) -> None:
    builder = tiny().drop_path(0).mask(masking.complementary(4)).reconstruct_part(masking.running_cells(0.5))
    run = replace(TinyRun(folder=tmp_path / "whole").run(), model=builder, epochs=0.5, warmup_epochs=0, pictures=0)
    small = replace(run, folder=tmp_path / "small", micro_batch=2)
    for one in (run, small):
        fit(one)
    assert losses(small.folder) == pytest.approx(losses(run.folder), rel=1e-4)


def test_samples_that_cannot_be_loaded_take_their_masks_with_them(tmp_path: Path) -> None:
    builder = tiny().mask(masking.complementary(4))
    run = replace(TinyRun(folder=tmp_path).run(), model=builder, data=Noise(bad=(0, 3, 4, 11)), epochs=1)
    fit(run)
    assert len(losses(run.folder)) == 4
    assert all(math.isfinite(loss) for loss in losses(run.folder))


def test_such_builders_build_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = ConvMAE.base().mask(masking.complementary(4)).reconstruct_part(masking.running_cells(0.5)).build()
    assert model.decoder.head.weight.is_meta


@pytest.mark.parametrize("numbers", [(0, 2), (0, 255), (0, 1, 7)], ids=str)
def test_a_uint8_mask_of_other_numbers_is_refused(numbers: tuple[int, ...]) -> None:
    mask = torch.tensor(numbers, dtype=torch.uint8).repeat(2, 4, 4)[:, :4, :4]
    with pytest.raises(ValueError, match="a uint8 mask has 0 where tokens are shown"):
        show(mask, (4, 4))


def test_no_samples_are_refused_in_words() -> None:
    model = build(IMAGE)
    with pytest.raises(ValueError, match="the mask shows 0 of"):
        model(torch.zeros(0, 3, *IMAGE.size, dtype=torch.float64))
