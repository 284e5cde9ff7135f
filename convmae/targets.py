"""What the decoder predicts for each hidden patch, and the way back from a prediction to pixels.

A target sees the input's patches `(B, L, P, C)`: L tokens, P pixels a patch in row-major order, C channels,
ImageNet-normalised; and gives the values to predict `(B, L, values)`, flattened (pixel, channel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(pixels: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Pixels uint8 `(B, 3, *size)` to ImageNet-normalised floats, on the device where they are."""
    x = pixels.to(torch.promote_types(precision, torch.float32)) / 255
    mean, std = _statistics(x, axis=1)
    return ((x - mean) / std).to(precision)


def unit_range(x: Tensor, *, axis: int) -> Tensor:
    """Undo the ImageNet normalisation: values in [0, 1]; `axis` is the one with the three channels."""
    mean, std = _statistics(x, axis=axis)
    return x * std + mean


def _statistics(x: Tensor, *, axis: int) -> tuple[Tensor, Tensor]:
    shape = [1] * x.ndim
    shape[axis] = 3
    return _numbers(IMAGENET_MEAN, x).view(shape), _numbers(IMAGENET_STD, x).view(shape)


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """A vector made on the device: a copy from the host would wait for a GPU."""
    return torch.stack([like.new_full((), value) for value in values])


class Target(Protocol):
    """What a target of your own must be: a frozen dataclass with these two; and, for pictures, `invert`.

    `invert(values (B, L, values), patches (B, L, P, C)) -> (B, L, P, C)` turns predicted values back into pixels,
    with whatever of the input's own patches it needs; without it a run draws no reconstructions.
    """

    def values(self, pixels: int, channels: int) -> int:
        """How many values the decoder predicts for a patch of so many pixels and channels."""
        ...

    def __call__(self, patches: Tensor) -> Tensor:
        """The values to predict: `(B, L, P, C) -> (B, L, values)`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The pixels themselves.

    Args:
        unit: predict values in [0, 1] (VideoMAE's un-normalised form) and not the ImageNet-normalised ones (MAE's).
    """

    unit: bool = False

    def __repr__(self) -> str:
        return f"targets.Pixels(unit={self.unit})"

    def values(self, pixels: int, channels: int) -> int:
        """One a pixel and channel."""
        return pixels * channels

    def __call__(self, patches: Tensor) -> Tensor:
        """`(B, L, P, C) -> (B, L, P·C)`."""
        return (unit_range(patches, axis=-1) if self.unit else patches).flatten(2)

    def invert(self, values: Tensor, patches: Tensor) -> Tensor:
        """`(B, L, P·C) -> (B, L, P, C)`, ImageNet-normalised."""
        pixels = torch.unflatten(values, 2, patches.shape[2:])
        if not self.unit:
            return pixels
        mean, std = _statistics(pixels, axis=-1)
        return (pixels - mean) / std


@dataclass(frozen=True, kw_only=True)
class NormalizedPixels:
    """Pixels normalised patch by patch, by the patch's own mean and unbiased variance.

    Args:
        per_channel: False: one mean and variance over all values of a patch, `(x - mean) / sqrt(var + 1e-6)`
            (MAE, section 4.1; ConvMAE). True: one for each channel, over [0, 1] pixels, and the epsilon outside
            the root, `(x - mean) / (sqrt(var) + 1e-6)` (VideoMAE's code).
    """

    per_channel: bool = False

    def __repr__(self) -> str:
        return f"targets.NormalizedPixels(per_channel={self.per_channel})"

    def values(self, pixels: int, channels: int) -> int:
        """One a pixel and channel."""
        return pixels * channels

    def __call__(self, patches: Tensor) -> Tensor:
        """`(B, L, P, C) -> (B, L, P·C)`."""
        _, centred, scale = self._moments(patches)
        return (centred / scale).flatten(2)

    def invert(self, values: Tensor, patches: Tensor) -> Tensor:
        """`(B, L, P·C) -> (B, L, P, C)`, ImageNet-normalised, with mean and variance of the input's own patches."""
        mean, _, scale = self._moments(patches)
        return torch.unflatten(values, 2, patches.shape[2:]) * scale + mean

    def _moments(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, the patches less it, and what to divide by, in the units of the patches.

        In [0, 1] pixels a channel's values are its ImageNet deviation s times larger, less a constant; so dividing
        them by `sqrt(var) + eps` there is dividing by `sqrt(var) + eps / s` here.
        """
        over = (2,) if self.per_channel else (2, 3)
        mean = patches.mean(over, keepdim=True)
        count = math.prod([patches.shape[axis] for axis in over])
        centred = patches - mean
        variance = centred.square().sum(over, keepdim=True) / (count - 1)
        if self.per_channel:
            return mean, centred, variance.sqrt() + 1e-6 / _numbers(IMAGENET_STD, patches)
        return mean, centred, (variance + 1e-6).sqrt()


def pixels(*, unit: bool = False) -> Pixels:
    """The pixels themselves; see `Pixels`."""
    return Pixels(unit=unit)


def normalized_pixels(*, per_channel: bool = False) -> NormalizedPixels:
    """Pixels normalised patch by patch; see `NormalizedPixels`."""
    return NormalizedPixels(per_channel=per_channel)
