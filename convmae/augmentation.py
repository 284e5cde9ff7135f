"""What is done to pixels before a model learns from them, beside crops (`convmae.images`).

- To each sample where it is loaded, and the same to every frame of a clip: flips, colours, RandAugment.
- To a batch, on whatever device it is: erased boxes, mixup, cutmix.

All randomness comes from the generator that is given; the global one is neither read nor moved. torchvision's functions
do the work, and are imported when they are first needed: that takes as long as to import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from convmae.images import Augment as Augment
from convmae.images import CentreCrop as CentreCrop  # once defined here: checkpoints of then look for it here
from convmae.targets import unit_range

# Of each sample


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirror left and right: not where these tell classes apart, as in Something-Something."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        _within(0, 1, probability=self.probability)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels `(..., w)` to as many of the same kind."""
        return pixels.flip(-1) if _uniform(1, generator)[0] < self.probability else pixels


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Change brightness, contrast, saturation and hue, in random order; or take the colours away.

    torchvision's ColorJitter and RandomGrayscale. A strength of s draws a factor from 1 - s to 1 + s, not below 0; of
    hue, a shift from -s to s turns of the colour circle. CMAE: .4, .4, .4, .1 with probability .8, and greyscale .2.
    All frames of a clip are changed by the same amounts; contrast is about the mean of each frame by itself.

    Args:
        brightness, contrast, saturation: strengths, 0 for none.
        hue: strength, at most 1/2; the slow one of them.
        probability: of a change of these four.
        grayscale: probability of grey pixels, drawn separately.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    probability: float = 1.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        _within(0, math.inf, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)
        _within(0, 0.5, hue=self.hue)
        _within(0, 1, probability=self.probability, grayscale=self.grayscale)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels uint8 `(..., 3, h, w)` to as many of the same kind."""
        from torchvision.transforms.v2 import functional

        order = torch.randperm(4, generator=generator).tolist()
        changed, grey, *amounts = _uniform(6, generator)
        changes = [
            (functional.adjust_brightness, (max(1 - self.brightness, 0), 1 + self.brightness)),
            (functional.adjust_contrast, (max(1 - self.contrast, 0), 1 + self.contrast)),
            (functional.adjust_saturation, (max(1 - self.saturation, 0), 1 + self.saturation)),
            (functional.adjust_hue, (-self.hue, self.hue)),
        ]
        for number in order if changed < self.probability else ():
            adjust, (low, high) = changes[number]
            if low < high:
                pixels = adjust(pixels, low + amounts[number] * (high - low))
        if grey < self.grayscale:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        return pixels


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """Blur with a Gaussian of random width (SimCLR, MoCo v2; CMAE's target: 0.1 to 2 pixels with probability 1/2).

    The kernel reaches three deviations to either side, beyond which lies less than 0.3 % of the weight.

    Args:
        sigma: least and largest deviation in pixels; uniform between.
        probability: of a blur.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        _rising(1e-3, 1e3, sigma=self.sigma)
        _within(0, 1, probability=self.probability)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels uint8 `(..., 3, h, w)` to as many of the same kind."""
        from torchvision.transforms.v2 import functional

        chance, place = _uniform(2, generator)
        if chance >= self.probability:
            return pixels
        sigma = self.sigma[0] + place * (self.sigma[1] - self.sigma[0])
        reach = min(math.ceil(3 * sigma), min(pixels.shape[-2:]) - 1)
        side = 2 * reach + 1
        blurred: Tensor = functional.gaussian_blur(pixels, kernel_size=[side, side], sigma=[sigma, sigma])
        return blurred


@dataclass(frozen=True, kw_only=True)
class ReverseChannels:
    """RGB to BGR, and back; CMAE's released weights saw BGR, normalised with the statistics of RGB."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels `(..., 3, h, w)` to as many of the same kind; nothing is drawn."""
        return pixels.flip(-3)


DISTORTIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "add below half",
    "saturation",
    "contrast",
    "brightness",
    "sharpness",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
)
"""What RandAugment chooses from: timm's "increasing" set."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A few distortions of random kinds: RandAugment (arXiv 1909.13719) in timm's convention, as MAE and VideoMAE use.

    timm's `rand-m7-n4-mstd0.5-inc1` is the default, VideoMAE's for finetuning; ops=2 and magnitude=9 is
    `rand-m9-mstd0.5-inc1`, for images. Each distortion is chosen from `DISTORTIONS`, so the same one may come twice;
    `distort` says what a magnitude, as a part of 10, does. torchvision's own RandAugment has not quite the same kinds
    (neither "invert" nor "add below half", but none at all; posterize to 8 to 4 bits, where here it is 4 to 1), applies
    all that it chooses, and all at one magnitude.

    Args:
        ops: how many are chosen.
        magnitude: of distortions, 0 to 10.
        deviation: standard deviation of the magnitude of each, which stays within 0 to 10.
        probability: with which a chosen one is applied.
        fill: colour of what a shift uncovers; ImageNet's mean.
    """

    ops: int = 4
    magnitude: float = 7.0
    deviation: float = 0.5
    probability: float = 0.5
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        _within(0, math.inf, ops=self.ops, deviation=self.deviation)
        _within(0, 10, magnitude=self.magnitude)
        _within(0, 1, probability=self.probability)
        _within(0, 255, **{f"fill[{channel}]": value for channel, value in enumerate(self.fill)})

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels uint8 `(..., 3, h, w)` to as many of the same kind."""
        for kind, strength in self.draw(generator):
            pixels = distort(pixels, kind, strength, fill=self.fill)
        return pixels

    def draw(self, generator: torch.Generator) -> list[tuple[str, float]]:
        """Draw what is done, in order: kinds, with strengths as `distort` takes them."""
        kinds = torch.randint(len(DISTORTIONS), (self.ops,), generator=generator).tolist()
        levels = self.magnitude + self.deviation * torch.randn(self.ops, generator=generator)
        signs = 1 - 2 * torch.randint(2, (self.ops,), generator=generator)
        strengths = (signs * levels.clamp(0, 10) / 10).tolist()
        chances = _uniform(self.ops, generator)
        return [
            (DISTORTIONS[kind], strength)
            for kind, strength, chance in zip(kinds, strengths, chances, strict=True)
            if chance < self.probability
        ]


def distort(pixels: Tensor, kind: str, strength: float, *, fill: tuple[int, int, int]) -> Tensor:
    """Distort pixels uint8 `(..., 3, h, w)` in one of the `DISTORTIONS`, as timm does by Pillow.

    `strength` s is -1 to 1. Its sign is the direction, where there are two; what grows with its absolute value a is

    - rotate by 30 s degrees; shear by 0.3 s; translate by 0.45 s of the width or height; filled with `fill`.
    - saturation, contrast, brightness, sharpness: factor 1 + 0.9 s.
    - posterize to 4 - int(4 a) bits, at least 1; solarize, which is to invert values from 256 - int(256 a) on; add
      int(110 a) to those below 128.
    - autocontrast, equalize and invert have no strength. The first two and contrast look at each frame by itself.

    So all grow stronger with a: timm's "increasing" set. In RandAugment's first code posterize and solarize grow
    weaker, and factors run from 0.1 to 1.9. Shifts are bilinear; timm takes bicubic, or either at random.
    """
    from torchvision.transforms.v2 import functional

    amount, factor = abs(strength), 1 + 0.9 * strength
    match kind:
        case "autocontrast" | "equalize" | "invert":
            result = getattr(functional, kind)(pixels)
        case "posterize":
            result = functional.posterize(pixels, max(4 - int(4 * amount), 1))
        case "solarize":
            inverted = int(256 * amount)
            result = functional.solarize(pixels, 256 - inverted) if inverted else pixels
        case "add below half":
            result = pixels + (pixels < 128).to(torch.uint8) * int(110 * amount)
        case "saturation" | "contrast" | "brightness" | "sharpness":
            result = getattr(functional, f"adjust_{kind}")(pixels, factor)
        case _:
            result = _shift(pixels, kind, strength, fill)
    return cast(Tensor, result)


def _shift(pixels: Tensor, kind: str, strength: float, fill: tuple[int, int, int]) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = pixels.shape[-2:]
    shear = math.degrees(math.atan(0.3 * strength))
    changes: dict[str, dict[str, float | Sequence[float]]] = {
        "rotate": {"angle": -30 * strength},
        "shear x": {"shear": [shear, 0], "center": [0, 0]},
        "shear y": {"shear": [0, shear], "center": [0, 0]},
        "translate x": {"translate": [-0.45 * strength * width, 0]},
        "translate y": {"translate": [0, -0.45 * strength * height]},
    }
    still: dict[str, float | Sequence[float]] = {"angle": 0, "translate": [0, 0], "scale": 1, "shear": [0, 0]}
    bilinear = InterpolationMode.BILINEAR
    return cast(
        Tensor, functional.affine(pixels, **{**still, **changes[kind]}, interpolation=bilinear, fill=list(fill))
    )


# Of a batch


class Box(NamedTuple):
    """A part of a picture, in pixels; `bottom` and `right` are outside."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Pixels in it."""
        return (self.bottom - self.top) * (self.right - self.left)

    def of(self, pixels: Tensor) -> Tensor:
        """The part of pixels `(..., h, w)`; not a copy."""
        return pixels[..., self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, kw_only=True)
class Erasing:
    """Put noise into a box of some samples, the same box in all frames: Random Erasing (arXiv 1708.04896).

    The noise is timm's "pixel" mode: every value is normal, in the units of an ImageNet-normalised input.

    Args:
        probability: with which a sample has a box.
        area: least and largest, as parts of the picture.
        aspect: least and largest height over width; its logarithm is uniform.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 0.33)
    aspect: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        _within(0, 1, probability=self.probability)
        _rising(0, 1, area=self.area)
        _rising(1e-3, 1e3, aspect=self.aspect)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Erase in pixels `(B, 3, *size)`, normalised floats or uint8, on any device.

        Boxes follow from the generator, which is the CPU's; the noise also from the kind of device. Nothing waits for
        the device.
        """
        boxes = self.boxes(len(pixels), (pixels.shape[-2], pixels.shape[-1]), generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        noise = torch.Generator(pixels.device).manual_seed(seed)
        pixels = pixels.clone()
        for sample, box in zip(pixels, boxes, strict=True):
            if box is not None:
                part = box.of(sample)
                values = torch.randn(part.shape, generator=noise, device=pixels.device)
                part.copy_(values if part.is_floating_point() else _as_bytes(values))
        return pixels

    def boxes(self, samples: int, size: tuple[int, int], generator: torch.Generator) -> list[Box | None]:
        """Draw the box of each sample, or None; also None where ten trials, as in timm, give none that fits."""
        chances = _uniform(samples, generator)
        trials = torch.rand(samples, 10, 4, generator=generator, dtype=torch.float64).tolist()
        return [
            next((box for numbers in tried if (box := self._box(numbers, size))), None)
            if chance < self.probability
            else None
            for chance, tried in zip(chances, trials, strict=True)
        ]

    def _box(self, numbers: list[float], size: tuple[int, int]) -> Box | None:
        """The box that four uniform numbers make, if it is smaller than the picture."""
        u, v, down, across = numbers
        area = size[0] * size[1] * (self.area[0] + u * (self.area[1] - self.area[0]))
        low, high = (math.log(aspect) for aspect in self.aspect)
        aspect = math.exp(low + v * (high - low))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < size[0] and 0 < width < size[1]):
            return None
        top, left = int(down * (size[0] - height + 1)), int(across * (size[1] - width + 1))
        return Box(top, top + height, left, left + width)


def _as_bytes(x: Tensor) -> Tensor:
    """Normalised values `(3, ...)` as pixels uint8."""
    return (unit_range(x, axis=0) * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mix each sample of a batch with another: mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899), smooth labels.

    As timm does in its batch mode: sample i is mixed with sample B - 1 - i, all of a batch in equal parts. The part
    that a sample keeps is drawn from Beta(a, a); in cutmix the other takes a box of the rest of the area, cut at
    the borders of the picture, the same in all frames, and labels have the parts that came of it. In a batch of odd
    size the one in the middle stays alone.

    Args:
        mixup: a of mixup; 0 for no mixup.
        cutmix: a of cutmix; 0 for no cutmix.
        switch: probability of cutmix, where both are on.
        probability: with which a batch is mixed.
        smoothing: of the labels: what is taken from the right class and given to all, this one included.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    probability: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        _within(0, math.inf, mixup=self.mixup, cutmix=self.cutmix)
        _within(0, 1, switch=self.switch, probability=self.probability, smoothing=self.smoothing)

    def __call__(
        self, pixels: Tensor, labels: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix pixels `(B, 3, *size)`, floats or uint8, labels int64 `(B)` -> pixels, targets float32 `(B, classes)`.

        Everything is on one device, and nothing waits for it; the generator is the CPU's.

        Raises ValueError where there are not as many labels as samples, or a label on the CPU is no class.
        """
        if len(labels) != len(pixels):
            raise ValueError(f"there are {len(labels)} labels of {len(pixels)} samples")
        kept, box = self.draw((pixels.shape[-2], pixels.shape[-1]), generator)
        targets = soft_targets(labels, classes, smoothing=self.smoothing)
        mixed = pixels if kept == 1 else _blended(pixels, kept) if box is None else _pasted(pixels, box)
        return mixed, torch.lerp(targets.flip(0), targets, kept)

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> tuple[float, Box | None]:
        """Draw the part that a sample keeps, and the box that the other takes if that is how they are mixed."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        mixed, by_box = random.random(2)
        by_cutmix = bool(self.cutmix) and (not self.mixup or by_box < self.switch)
        concentration = self.cutmix if by_cutmix else self.mixup
        if not concentration or mixed >= self.probability:
            return 1.0, None
        kept = float(random.beta(concentration, concentration))
        if not by_cutmix:
            return kept, None
        spans = []
        for side in size:
            length, centre = int(side * math.sqrt(1 - kept)), int(random.integers(side))
            spans += [max(centre - length // 2, 0), min(centre - length // 2 + length, side)]
        box = Box(*spans)
        return 1 - box.area / (size[0] * size[1]), box


def _blended(pixels: Tensor, kept: float) -> Tensor:
    """Samples with a part of the ones from the other end of the batch: mixup."""
    if pixels.is_floating_point():
        return torch.lerp(pixels.flip(0), pixels, kept)
    return torch.lerp(pixels.flip(0).float(), pixels.float(), kept).round().to(pixels.dtype)


def _pasted(pixels: Tensor, box: Box) -> Tensor:
    """Samples with a box of the ones from the other end of the batch: cutmix."""
    mixed = pixels.clone()
    box.of(mixed).copy_(box.of(pixels).flip(0))
    return mixed


def soft_targets(labels: Tensor, classes: int, *, smoothing: float) -> Tensor:
    """Labels int64 `(B)` to float32 `(B, classes)`: smoothing / classes, and 1 - smoothing more for the right one.

    Raises ValueError where a label is no class. This is looked up for labels on the CPU only: on a GPU one would have
    to wait for it, and torch itself fails.
    """
    if labels.device.type == "cpu" and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < classes:
            raise ValueError(f"labels from {low} to {high}, but classes={classes}: they must be 0 to {classes - 1}")
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def _uniform(count: int, generator: torch.Generator) -> list[float]:
    numbers: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return numbers


def _within(low: float, high: float, **numbers: float) -> None:
    wrong = [f"{name}={x}" for name, x in numbers.items() if not (low <= x <= high and math.isfinite(x))]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must be a number from {low:g} to {high:g}")


def _rising(low: float, high: float, **pairs: tuple[float, float]) -> None:
    wrong = [f"{name}={pair}" for name, pair in pairs.items() if not low <= pair[0] <= pair[1] <= high]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must be the least and the largest, from {low:g} to {high:g}")
