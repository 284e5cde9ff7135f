"""Which frames make a clip, and which part of them it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convmae.images import resize


def dense(frames_in_file: int, *, frames: int, stride: int = 1, place: float = 0.5) -> list[int]:
    """Choose `frames` frames, `stride` apart: dense sampling (as SlowFast and VideoMAE do).

    The stride is exact: VideoMAE's own code rounds it within windows, and wanders by a frame. `place`, at least
    0 and below 1, says which of all clips that fit: uniformly random gives each of them equally often.

    A shorter video gets the largest stride that fits. One of less than `frames` frames gives all of its
    frames, and then its last one again and again.

    Returns indices from 0 to `frames_in_file - 1`, never falling. Raises ValueError for numbers below 1, and
    for a place outside [0, 1).
    """
    if min(frames_in_file, frames, stride) < 1:
        raise ValueError(f"numbers below 1: {frames_in_file=}, {frames=}, {stride=}")
    if not 0 <= place < 1:
        raise ValueError(f"{place=} is not in [0, 1)")
    if frames_in_file < frames:
        return [min(index, frames_in_file - 1) for index in range(frames)]
    steps = max(frames - 1, 1)
    stride = min(stride, max((frames_in_file - 1) // steps, 1))
    span = (frames - 1) * stride + 1
    start = int(place * (frames_in_file - span + 1))
    return list(range(start, start + span, stride))


@dataclass(frozen=True, kw_only=True)
class MultiScaleCrop:
    """One of a few sizes at one of 13 places, the same in all frames: TSN's crop, and VideoMAE's.

    Height and width are drawn from `scales`, as parts of the largest box that has the aspect asked for; they
    are at most one step of `scales` apart. The places are the corners, the centre, and those halfway between.
    Resized bilinearly; nothing is mirrored.
    """

    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)

    def __call__(self, pixels: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Crop pixels uint8 `(T, 3, h, w)` to `(T, 3, *size)`."""
        height, width = pixels.shape[-2:]
        unit = min(height / size[0], width / size[1])
        pairs = [(a, b) for i, a in enumerate(self.scales) for b in self.scales[max(i - 1, 0) : i + 2]]
        places = [(i, j) for i in range(5) for j in range(5) if (i + j) % 2 == 0]
        pair, place = (int(torch.randint(len(of), (), generator=generator)) for of in (pairs, places))
        h, w = (max(int(unit * side * scale), 1) for side, scale in zip(size, pairs[pair], strict=True))
        top, left = (height - h) * places[place][0] // 4, (width - w) * places[place][1] // 4
        return resize(pixels[..., top : top + h, left : left + w], size, "bilinear")

    def short_side(self, size: tuple[int, int]) -> int:
        """The input's short side, in pixels, from which on a larger input would only be resized down."""
        return math.ceil(max(size) / min(self.scales))
