"""What is done to pixels: of each sample and of batches, against torchvision and timm."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from convmae import augmentation
from convmae.augmentation import (
    DISTORTIONS,
    Augment,
    CentreCrop,
    ColourJitter,
    Erasing,
    Flip,
    Mixing,
    RandAugment,
    distort,
    soft_targets,
)
from convmae.images import Crop
from convmae.targets import normalize

ROOT = Path(__file__).parents[1]
FILL = (124, 116, 104)
JITTER = ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8, grayscale=0.2)
AUGMENTS: list[Augment] = [Flip(), JITTER, RandAugment(), RandAugment(ops=2, magnitude=9)]
each = pytest.mark.parametrize("augment", AUGMENTS, ids=repr)
axes = pytest.mark.parametrize("size", [(24, 32), (5, 24, 32)], ids=["image", "clip"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """A smooth picture `(3, h, w)`: what interpolation does to noise says little."""
    coarse = 20 + 200 * torch.rand(1, 3, 6, 8, generator=seeded(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return smooth.round().clamp(0, 255).to(torch.uint8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed)).to(torch.uint8)


# Of each sample


@each
def test_every_frame_is_changed_as_the_image_alone_would_be(augment: Augment) -> None:
    image = picture()
    changed = 0
    for seed in range(30):
        alone = augment(image, seeded(seed))
        clip = augment(image.expand(3, -1, -1, -1), seeded(seed))
        clips = augment(image.expand(2, 3, -1, -1, -1), seeded(seed))
        assert (alone.shape, alone.dtype) == (image.shape, torch.uint8)
        assert (clip.shape, clips.shape) == ((3, *image.shape), (2, 3, *image.shape))
        assert (clip == alone).all()
        assert (clips == alone).all()
        changed += not torch.equal(alone, image)
    assert changed > 5


@each
def test_a_sample_follows_from_the_generator_and_nothing_else_moves(augment: Augment) -> None:
    clip = torch.stack([picture(seed=seed) for seed in range(3)])
    before, states = clip.clone(), (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    results = [augment(clip, seeded(seed)) for seed in range(10)]
    assert any(not torch.equal(results[0], result) for result in results)
    assert torch.equal(clip, before)
    assert torch.get_rng_state().equal(states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        assert all(torch.equal(result, augment(clip, seeded(seed))) for seed, result in enumerate(results))


def test_half_of_the_samples_are_mirrored() -> None:
    image, generator = picture(), seeded()
    mirrored = sum(torch.equal(Flip()(image, generator), image.flip(-1)) for _ in range(400))
    assert abs(mirrored - 200) < 5 * 10
    assert torch.equal(Flip(probability=0)(image, generator), image)
    assert torch.equal(Flip(probability=1)(image, generator), image.flip(-1))


def test_strengths_are_the_range_of_uniform_factors() -> None:
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    brighter = ColourJitter(brightness=0.4, contrast=0, saturation=0, hue=0)
    levels = torch.stack([brighter(grey, seeded(seed))[0, 0, 0] for seed in range(500)]).double()
    assert 60 <= levels.min() <= 62
    assert 138 <= levels.max() <= 140
    assert levels.mean().item() == pytest.approx(100, abs=5 * 23 / 500**0.5)
    rest = ColourJitter(brightness=0, contrast=0.9, saturation=0.9, hue=0.5)
    for seed in range(20):  # none of these changes a picture that is all of one grey, but by rounding
        assert (rest(grey, seeded(seed)).int() - 100).abs().max() <= 2


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.7, 1.3), ("contrast", 0.7, 1.3), ("saturation", 0.7, 1.3), ("hue", -0.3, 0.3)],
)
def test_a_change_of_colour_is_torchvisions(name: str, low: float, high: float) -> None:
    from torchvision.transforms.v2 import functional

    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, name: 0.3}
    number, image = list(strengths).index(name), picture()
    for seed in range(5):
        generator = seeded(seed)
        torch.randperm(4, generator=generator)
        amount = torch.rand(6, generator=generator, dtype=torch.float64)[2 + number].item()
        expected = getattr(functional, f"adjust_{name}")(image, low + amount * (high - low))
        assert torch.equal(ColourJitter(**strengths)(image, seeded(seed)), expected)


def test_the_order_of_colour_changes_is_random() -> None:
    from torchvision.transforms.v2 import functional

    image = picture()
    jitter = ColourJitter(brightness=0.8, contrast=0.8, saturation=0, hue=0)
    found = Counter[str]()
    for seed in range(40):
        generator = seeded(seed)
        torch.randperm(4, generator=generator)
        amounts = torch.rand(6, generator=generator, dtype=torch.float64)[2:4].tolist()
        bright, contrast = (0.2 + 1.6 * amount for amount in amounts)
        one = functional.adjust_contrast(functional.adjust_brightness(image, bright), contrast)
        other = functional.adjust_brightness(functional.adjust_contrast(image, contrast), bright)
        result = jitter(image, seeded(seed))
        found["bright first"] += torch.equal(result, one) and not torch.equal(one, other)
        found["contrast first"] += torch.equal(result, other) and not torch.equal(one, other)
        assert torch.equal(result, one) or torch.equal(result, other)
    assert min(found["bright first"], found["contrast first"]) > 8


def test_colour_is_taken_away_and_kept_as_often_as_asked() -> None:
    image, generator = picture(), seeded()
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    grey = [ColourJitter(**none, grayscale=0.2)(image, generator) for _ in range(400)]
    assert abs(sum(torch.equal(one[0], one[1]) and torch.equal(one[1], one[2]) for one in grey) - 80) < 5 * 8
    often = ColourJitter(brightness=0.4, contrast=0, saturation=0, hue=0, probability=0.8)
    same = sum(torch.equal(often(image, generator), image) for _ in range(400))
    assert abs(same - 80) < 5 * 8 + 4


# RandAugment


def timms(kind: str, strength: float, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    from timm.data import auto_augment

    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda level: math.copysign(level, strength))
    name = dict(zip(DISTORTIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))[kind]
    settings = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    op = auto_augment.AugmentOp(  # type: ignore[no-untyped-call]
        name, prob=1, magnitude=10 * abs(strength), hparams=settings
    )
    done = op(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


@pytest.mark.parametrize("strength", [0.99, 0.7, 0.0, -0.2, -0.9])
@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_distortion_is_timms(kind: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(96, 128)
    ours, theirs = distort(image, kind, strength, fill=FILL), timms(kind, strength, image, monkeypatch)
    apart = (ours.int() - theirs.int()).abs()
    moves = kind.split()[0] in ("rotate", "shear", "translate")
    if moves:  # Pillow does not blend the seam between picture and fill
        assert (apart > 2).float().mean() < 0.02
    else:
        assert apart.max() <= 1
    assert strength == 0 or not torch.equal(ours, image)


def test_the_strongest_posterize_keeps_one_bit() -> None:
    assert set(distort(picture(), "posterize", 1.0, fill=FILL).flatten().tolist()) == {0, 128}


def test_randaugment_draws_kinds_and_magnitudes_as_timm_does() -> None:
    generator, applied = seeded(), []
    counts = Counter[int]()
    for _ in range(3000):
        drawn = RandAugment(ops=4, magnitude=7, deviation=0.5).draw(generator)
        counts[len(drawn)] += 1
        applied += drawn
    for number in range(5):  # each with probability 1/2
        share = math.comb(4, number) / 16
        assert abs(counts[number] - 3000 * share) < 5 * (3000 * share * (1 - share)) ** 0.5
    kinds = Counter(kind for kind, _ in applied)
    assert kinds.keys() == set(DISTORTIONS)
    assert max(abs(count - 400) for count in kinds.values()) < 5 * 20
    strengths = np.array([strength for _, strength in applied])
    assert np.abs(strengths).mean() == pytest.approx(0.7, abs=0.005)
    assert np.abs(strengths).std() == pytest.approx(0.05, abs=0.005)
    assert (strengths > 0).mean() == pytest.approx(0.5, abs=0.04)


def test_magnitudes_stay_within_ten_and_may_be_exact() -> None:
    generator = seeded()
    wild = [abs(s) for _ in range(200) for _, s in RandAugment(magnitude=9, deviation=3).draw(generator)]
    assert max(wild) == 1
    exact = RandAugment(ops=3, magnitude=5, deviation=0, probability=1).draw(generator)
    assert [abs(strength) for _, strength in exact] == [0.5] * 3
    image = picture()
    assert torch.equal(RandAugment(probability=0)(image, generator), image)


# The centre


@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (256, 256), (100, 333)], ids=str)
def test_the_centre_is_torchvisions_bit_for_bit(shape: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import InterpolationMode, functional

    clip = noise(2, 3, *shape)
    crop: Crop = CentreCrop()
    resized = functional.resize(clip, [256], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(crop(clip, (224, 224), seeded()), functional.center_crop(resized, [224, 224]))
    plain = functional.resize(clip, [224], antialias=True)
    bilinear = CentreCrop(ratio=1, mode="bilinear")
    assert torch.equal(bilinear(clip, (224, 224), seeded()), functional.center_crop(plain, [224, 224]))
    assert (crop.short_side((224, 224)), bilinear.short_side((224, 224))) == (256, 224)


def test_a_centre_of_another_aspect_is_covered_and_not_distorted() -> None:
    ys, xs = torch.meshgrid(torch.arange(90), torch.arange(120), indexing="ij")
    image = torch.stack([ys, xs, 0 * xs]).byte()
    for size in ((30, 60), (60, 30), (30, 40)):
        centre = CentreCrop(ratio=1, mode="bilinear")(image, size, seeded()).float()
        down, across = centre[0].diff(dim=0).mean().item(), centre[1].diff(dim=1).mean().item()
        assert centre.shape == (3, *size)
        assert down == pytest.approx(across, rel=0.08)


# Erasing


@axes
def test_erasing_puts_normal_noise_into_one_box_of_all_frames(size: tuple[int, ...]) -> None:
    pixels = torch.full((40, 3, *size), 100.0)
    erased = Erasing(probability=1)(pixels, seeded())
    assert (pixels == 100).all()
    for sample, box in zip(erased, Erasing(probability=1).boxes(40, (24, 32), seeded()), strict=True):
        assert box is not None
        changed = (sample != 100).flatten(0, -3)
        assert (changed == changed[:1]).all()
        assert changed[0].sum() == box.area
        assert box.of(changed[0]).all()
    values = erased[erased != 100]
    assert values.mean().item() == pytest.approx(0, abs=0.03)
    assert values.std().item() == pytest.approx(1, abs=0.03)
    assert len(set(values.tolist())) > 0.99 * len(values)  # every frame and channel has its own


def test_erasing_bytes_is_noise_of_a_normalised_input() -> None:
    pixels = torch.zeros(60, 3, 64, 64, dtype=torch.uint8)
    erasing = Erasing(probability=1)
    erased = erasing(pixels, seeded())
    assert erased.dtype == torch.uint8
    boxes = [box for box in erasing.boxes(60, (64, 64), seeded()) if box is not None]
    seen = torch.cat([box.of(sample).flatten(1) for box, sample in zip(boxes, normalize(erased), strict=True)], 1)
    assert seen.mean(1).tolist() == pytest.approx([0, 0, 0], abs=0.1)  # black and white cut the tails
    assert seen.std(1).tolist() == pytest.approx([0.93, 0.93, 0.93], abs=0.1)


def test_erasing_follows_from_the_generator_alone() -> None:
    pixels, state = torch.zeros(8, 3, 16, 16), torch.get_rng_state()
    one = Erasing(probability=0.5)(pixels, seeded(3))
    assert torch.equal(one, Erasing(probability=0.5)(pixels, seeded(3)))
    assert not torch.equal(one, Erasing(probability=0.5)(pixels, seeded(4)))
    assert torch.get_rng_state().equal(state)


def test_boxes_are_drawn_as_timm_draws_them() -> None:
    from timm.data.random_erasing import RandomErasing

    boxes = Erasing().boxes(8000, (112, 160), seeded())
    drawn = [box for box in boxes if box is not None]
    assert abs(len(drawn) - 2000) < 5 * 39
    areas = np.array([box.area for box in drawn]) / (112 * 160)
    aspects = np.array([(box.bottom - box.top) / (box.right - box.left) for box in drawn])
    assert 0.018 < areas.min() < 0.03
    assert 0.31 < areas.max() < 0.335
    assert 0.28 < aspects.min() < aspects.max() < 3.5
    assert min(box.top for box in drawn) == min(box.left for box in drawn) == 0
    assert (max(box.bottom for box in drawn), max(box.right for box in drawn)) == (112, 160)

    random.seed(0)
    theirs = RandomErasing(  # type: ignore[no-untyped-call]
        probability=1, min_area=0.02, max_area=0.33, min_aspect=0.3, max_aspect=3.3, device="cpu"
    )
    erased = [theirs(torch.ones(1, 112, 160))[0] == 0 for _ in range(1000)]
    of_theirs = np.array([part.sum().item() for part in erased]) / (112 * 160)
    heights = np.array([part.any(1).sum().item() for part in erased])
    widths = np.array([part.any(0).sum().item() for part in erased])
    for ours, reference in ((areas, of_theirs), (np.log(aspects), np.log(heights / widths))):
        spread = 5 * reference.std() * (1 / 1000 + 1 / len(drawn)) ** 0.5
        assert ours.mean() == pytest.approx(reference.mean(), abs=spread)
        assert ours.std() == pytest.approx(reference.std(), rel=0.1)


def test_no_box_is_drawn_where_none_is_smaller_than_the_picture() -> None:
    pixels = torch.zeros(20, 3, 1, 1)
    assert torch.equal(Erasing(probability=1)(pixels, seeded()), pixels)
    assert torch.equal(Erasing(probability=0)(torch.zeros(20, 3, 9, 9), seeded()), torch.zeros(20, 3, 9, 9))


# Mixing


@axes
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_a_batch_is_blended_with_its_own_mirror_image(size: tuple[int, ...], batch: int) -> None:
    pixels, labels = noise(batch, 3, *size).float(), torch.arange(batch)
    mixing = Mixing(cutmix=0, smoothing=0)
    mixed, targets = mixing(pixels, labels, 7, seeded(1))
    kept, box = mixing.draw((24, 32), seeded(1))
    assert box is None
    assert 0.02 < kept < 0.98
    torch.testing.assert_close(mixed, kept * pixels + (1 - kept) * pixels.flip(0))
    hot = torch.nn.functional.one_hot(labels, 7)
    torch.testing.assert_close(targets, kept * hot + (1 - kept) * hot.flip(0))
    assert targets.dtype == torch.float32
    if batch % 2:
        assert torch.allclose(mixed[batch // 2], pixels[batch // 2])


@axes
def test_a_box_of_all_frames_is_pasted_and_labels_have_its_true_area(size: tuple[int, ...]) -> None:
    pixels, labels = torch.arange(4.0).view(4, *[1] * (1 + len(size))).expand(4, 3, *size), torch.arange(4)
    mixing, clipped = Mixing(mixup=0, smoothing=0), 0
    for seed in range(50):
        mixed, targets = mixing(pixels, labels, 4, seeded(seed))
        kept, box = mixing.draw((24, 32), seeded(seed))
        assert box is not None
        other = (mixed != pixels).flatten(1, -3)
        assert (other == other[:1, :1]).all()
        assert other[0, 0].sum() == box.area
        assert other[0, 0].float().mean().item() == pytest.approx(1 - kept)
        torch.testing.assert_close(targets[0], torch.tensor([kept, 0, 0, 1 - kept]))
        clipped += box.top == 0 or box.left == 0
    assert 5 < clipped < 45
    assert (pixels == torch.arange(4.0).view(4, *[1] * (1 + len(size)))).all()


@axes
def test_a_pair_is_mixed_as_by_torchvision(size: tuple[int, ...]) -> None:
    """Of two samples, torchvision's neighbour is our mirror image."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import CutMix, MixUp

    pixels, labels = noise(2, 3, *size).float(), torch.tensor([4, 1])
    video = tv_tensors.Video if len(size) == 3 else tv_tensors.Image
    ways: list[tuple[Mixing, Callable[..., Any]]] = [
        (Mixing(cutmix=0, smoothing=0), MixUp),
        (Mixing(mixup=0, smoothing=0), CutMix),
    ]
    for mixing, theirs in ways:
        mixed, targets = mixing(pixels, labels, 6, seeded(2))
        kept, box = mixing.draw((24, 32), seeded(2))
        drawn = {"labels": labels, "batch_size": 2, "lam": kept, "lam_adjusted": kept}
        if box is not None:
            drawn["box"] = (box.left, box.top, box.right, box.bottom)
        reference = theirs(num_classes=6)
        torch.testing.assert_close(mixed, reference.transform(video(pixels), drawn).as_subclass(Tensor))
        torch.testing.assert_close(targets, reference.transform(labels, drawn))


@pytest.mark.parametrize("batch", [1, 6, 7])
def test_targets_are_timms(batch: int) -> None:
    from timm.data.mixup import mixup_target

    labels = torch.randint(0, 10, (batch,), generator=seeded())
    pixels = torch.zeros(batch, 3, 8, 8)
    for seed in range(6):
        _, targets = Mixing(smoothing=0.1)(pixels, labels, 10, seeded(seed))
        kept, _ = Mixing().draw((8, 8), seeded(seed))
        reference = mixup_target(labels, 10, lam=kept, smoothing=0.1)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(targets, reference)
        torch.testing.assert_close(targets.sum(1), torch.ones(batch))


def test_boxes_and_parts_are_distributed_as_timms() -> None:
    from timm.data.mixup import cutmix_bbox_and_lam

    np.random.seed(0)  # noqa: NPY002
    theirs = [
        cutmix_bbox_and_lam((3, 56, 72), np.random.beta(1, 1))  # type: ignore[no-untyped-call]  # noqa: NPY002
        for _ in range(2000)
    ]
    generator = seeded()
    drawn = [Mixing(mixup=0).draw((56, 72), generator) for _ in range(2000)]
    ours = np.array([[kept, *box] for kept, box in drawn if box is not None])
    reference = np.array([[kept, *map(int, box)] for box, kept in theirs])
    spread = 5 * reference.std(0) * (2 / 2000) ** 0.5
    assert (np.abs(ours.mean(0) - reference.mean(0)) < spread).all()
    assert ours.std(0) == pytest.approx(reference.std(0), rel=0.1)


def test_parts_are_beta_and_both_ways_come_as_often_as_asked() -> None:
    generator = seeded()
    draws = [Mixing(switch=0.3, probability=0.9).draw((56, 56), generator) for _ in range(4000)]
    pasted = sum(box is not None for _, box in draws)
    alone = sum(kept == 1 and box is None for kept, box in draws)
    assert abs(alone - 400) < 5 * 19
    assert abs(pasted - 0.27 * 4000) < 5 * 28
    blended = np.array([kept for kept, box in draws if box is None and kept < 1])
    assert blended.mean() == pytest.approx(0.5, abs=0.03)
    assert blended.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_bytes_are_mixed_as_floats_and_rounded() -> None:
    pixels, labels = noise(4, 3, 3, 16, 16), torch.arange(4)
    for seed in range(8):
        of_bytes, targets = Mixing()(pixels, labels, 4, seeded(seed))
        of_floats, same = Mixing()(pixels.float(), labels, 4, seeded(seed))
        assert of_bytes.dtype == torch.uint8
        assert torch.equal(of_bytes.float(), of_floats.round())
        assert torch.equal(targets, same)
    half, _ = Mixing(cutmix=0)(pixels.bfloat16(), labels, 4, seeded())
    assert half.dtype == torch.bfloat16


def test_mixing_may_be_smoothing_alone() -> None:
    pixels, labels = noise(3, 3, 8, 8), torch.tensor([0, 2, 1])
    for mixing in (Mixing(mixup=0, cutmix=0), Mixing(probability=0)):
        mixed, targets = mixing(pixels, labels, 4, seeded())
        assert torch.equal(mixed, pixels)
        assert torch.equal(targets, soft_targets(labels, 4, smoothing=0.1))
    assert targets[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])


def test_mixing_follows_from_the_generator_and_reads_no_value_of_the_pixels() -> None:
    pixels, labels = noise(4, 3, 8, 8), torch.arange(4)
    states = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    assert torch.equal(Mixing()(pixels, labels, 4, seeded(5))[0], Mixing()(pixels, labels, 4, seeded(5))[0])
    assert (torch.get_rng_state().equal(states[0]), str(np.random.get_state())) == (True, states[1])  # noqa: NPY002
    for seed in range(8):  # on the meta device there is none to read
        mixed, targets = Mixing()(pixels.to("meta"), labels.to("meta"), 9, seeded(seed))
        assert (mixed.shape, targets.shape, targets.device.type) == ((4, 3, 8, 8), (4, 9), "meta")


def test_labels_that_are_no_classes_are_refused() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="labels from -1 to 3, but classes=4"):
        Mixing()(pixels, torch.tensor([-1, 3]), 4, seeded())
    with pytest.raises(ValueError, match="labels from 0 to 4, but classes=4: they must be 0 to 3"):
        Mixing()(pixels, torch.tensor([0, 4]), 4, seeded())
    with pytest.raises(ValueError, match="3 labels of 2 samples"):
        Mixing()(pixels, torch.tensor([0, 1, 2]), 4, seeded())


# Settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Flip(probability=1.5), "probability=1.5"),
        (lambda: RandAugment(magnitude=11), "magnitude=11: must be a number from 0 to 10"),
        (lambda: RandAugment(ops=-1, deviation=float("nan")), "ops=-1, deviation=nan"),
        (lambda: RandAugment(fill=(0, 300, 0)), r"fill\[1\]=300"),
        (lambda: ColourJitter(brightness=-1, contrast=0, saturation=0, hue=0), "brightness=-1"),
        (lambda: ColourJitter(brightness=0, contrast=0, saturation=0, hue=0.6), "hue=0.6"),
        (lambda: CentreCrop(ratio=0.5), "ratio=0.5"),
        (lambda: Erasing(area=(0.5, 0.2)), r"area=\(0.5, 0.2\)"),
        (lambda: Erasing(aspect=(0.0, 2.0)), r"aspect=\(0.0, 2.0\)"),
        (lambda: Erasing(probability=-0.1), "probability=-0.1"),
        (lambda: Mixing(mixup=-1, cutmix=float("inf")), "mixup=-1, cutmix=inf"),
        (lambda: Mixing(smoothing=2), "smoothing=2"),
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_made(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_print_as_they_are_written() -> None:
    for value in (*AUGMENTS, CentreCrop(), Erasing(), Mixing()):
        assert eval(repr(value), vars(augmentation)) == value


def test_importing_the_augmentation_does_not_import_torchvision() -> None:
    code = "import sys, convmae.augmentation; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
