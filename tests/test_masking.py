"""Maskings: counts, blocks, tubes, randomness, and what is refused."""

import math
import pickle

import pytest
import torch

from convmae import masking
from convmae.masking import BlockMasking

CASES = [
    (masking.random(0.75), (14, 14)),
    (masking.random(0.6), (6, 10)),
    (masking.random(0.75, rounding="hide"), (7, 9)),
    (masking.random(0.9), (8, 14, 14)),
    (masking.block(0.75, 2), (14, 14)),
    (masking.block(0.5, (1, 3)), (4, 9)),
    (masking.block(0.5, (2, 2, 2)), (4, 6, 8)),
    (masking.tube(0.9), (8, 14, 14)),
    (masking.tube(0.9, rounding="keep"), (8, 14, 14)),
    (masking.tube_block(0.9, 2), (8, 14, 14)),
    (masking.tube_block(0.75, (1, 7)), (8, 14, 14)),
    (BlockMasking(ratio=0.5, block=(1, None, None)), (8, 3, 3)),
    (BlockMasking(ratio=0.5, block=(2, None, 1)), (8, 3, 4)),
]
each = pytest.mark.parametrize(("rule", "grid"), CASES, ids=str)


def sides(rule: BlockMasking, grid: tuple[int, ...]) -> list[int]:
    block = rule.block or (1,) * len(grid)
    return [size if side is None else side for side, size in zip(block, grid, strict=True)]


@each
def test_masks_are_boolean_on_the_grid_with_equally_many_hidden(rule: BlockMasking, grid: tuple[int, ...]) -> None:
    mask = rule(32, grid)
    assert mask.dtype == torch.bool
    assert mask.shape == (32, *grid)
    assert mask.device.type == "cpu"
    counts = mask.flatten(1).sum(1)
    assert (counts == counts[0]).all()
    blocks = math.prod(grid) // math.prod(sides(rule, grid))
    keep = rule.rounding == "keep"
    expected = blocks - int(blocks * (1 - rule.ratio)) if keep else int(blocks * rule.ratio)
    assert counts[0] == expected * math.prod(sides(rule, grid))


@each
def test_a_block_is_hidden_or_shown_as_one(rule: BlockMasking, grid: tuple[int, ...]) -> None:
    mask = rule(8, grid)
    coarse = mask
    for axis, side in enumerate(sides(rule, grid), 1):
        coarse = coarse.index_select(axis, torch.arange(0, mask.shape[axis], side))
    again = coarse
    for axis, side in enumerate(sides(rule, grid), 1):
        again = again.repeat_interleave(side, axis)
    assert again.equal(mask)


@each
def test_one_generator_gives_one_mask_and_another_gives_another(rule: BlockMasking, grid: tuple[int, ...]) -> None:
    def draw(seed: int) -> torch.Tensor:
        return rule(16, grid, torch.Generator().manual_seed(seed))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))
    assert not draw(1)[0].equal(draw(1)[1]) or not draw(1)[0].equal(draw(1)[2])


def test_a_generator_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    masking.random(0.5)(2, (4, 4), torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(before)
    masking.random(0.5)(2, (4, 4))
    assert not torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("rule", "grid", "shown"),
    [
        (masking.random(0.75), (14, 14), 49),
        (masking.random(0.75), (12, 12), 36),
        (masking.tube(0.9), (8, 14, 14), 160),  # VideoMAE's rounding: 176 of 196 hidden at each time step
        (masking.tube(0.9, rounding="keep"), (8, 14, 14), 152),
        (masking.block(0.65, 2), (14, 14), 4 * int(49 * (1 - 0.65))),  # CMAE's code
        (masking.tube_block(0.9, 2), (8, 14, 14), 8 * 4 * (49 - int(49 * 0.9))),
    ],
    ids=str,
)
def test_as_many_are_shown_as_published(rule: BlockMasking, grid: tuple[int, ...], shown: int) -> None:
    assert int((~rule(1, grid)).sum()) == shown


def test_every_token_is_hidden_about_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    often = masking.random(0.75)(4000, (6, 6), generator).float().mean(0)
    assert float((often - 0.75).abs().max()) < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_noise_hides_the_largest() -> None:
    noise = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.4, 0.1, 0.8, 0.9]])
    mask = masking.random(0.5).from_noise(noise, (2, 2))
    assert mask.tolist() == [[[False, True], [True, False]], [[False, False], [True, True]]]


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, math.nan])
def test_a_ratio_outside_zero_to_one_is_refused_at_the_call(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio is the share of tokens to hide, between 0 and 1; got"):
        masking.random(ratio)


def test_wrong_blocks_and_roundings_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="block sides are positive numbers of tokens, or None"):
        masking.block(0.5, 0)
    with pytest.raises(ValueError, match='rounding is "keep" or "hide"; got \'up\''):
        masking.random(0.5, rounding="up")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "grid", "message"),
    [
        (masking.tube(0.9), (14, 14), r"block \(None, 1, 1\) has 3 axes, the token grid \(14, 14\) has 2"),
        (masking.block(0.5, 2), (4, 7), r"block \(2, 2\) does not divide the token grid \(4, 7\)"),
        (masking.random(0.99), (2, 2), r"ratio 0.99 of 4 blocks hides everything on the token grid \(2, 2\)"),
        (masking.tube(0.1), (8, 2, 2), r"ratio 0.1 of 4 blocks hides nothing on the token grid \(8, 2, 2\)"),
    ],
)
def test_a_masking_that_does_not_suit_the_grid_says_so(rule: BlockMasking, grid: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(2, grid)


@each
def test_maskings_print_as_the_code_that_makes_them_and_are_values(rule: BlockMasking, grid: tuple[int, ...]) -> None:
    assert eval(repr(rule), {"masking": masking}) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert len({rule, pickle.loads(pickle.dumps(rule))}) == 1
    with pytest.raises(AttributeError):
        rule.ratio = 0.1  # type: ignore[misc]


def test_a_block_given_as_a_list_is_as_good_as_a_tuple() -> None:
    assert masking.block(0.5, [2, 2]) == masking.block(0.5, 2)
    hash(BlockMasking(ratio=0.5, block=[2, 2]))  # type: ignore[arg-type]
