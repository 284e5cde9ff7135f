"""Which frames make a clip, and which part of them it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from convmae.images import cover, resize, window

if TYPE_CHECKING:  # importing the readers loads PyAV
    from video.readers import Track

LAST = math.nextafter(1, 0)
"""The place of the last clip: places lie in [0, 1)."""


class Sampling(Protocol):
    """Chooses the frames that make a clip: indices from 0 to `track.frames - 1`, never falling."""

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """Choose so many frames of a video at random, or without a generator those in the middle."""
        ...

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The clip at a place in [0, 1), from 0 for the first that the video holds to `LAST`."""
        ...


def dense(frames_in_file: int, *, frames: int, stride: float = 1, place: float = 0.5) -> list[int]:
    """Choose `frames` frames, `stride` apart: dense sampling (as SlowFast and VideoMAE do).

    The stride is exact: VideoMAE's own code rounds it within windows, and wanders by a frame (`stretched`). With one
    that is not whole, frames are the nearest to where it leads from the first; below 1 some of them repeat. `place`,
    at least 0 and below 1, says which of all clips that fit: uniformly random gives each of them equally often.

    A shorter video gets the largest whole stride that fits. One of less than `frames` frames gives all of its
    frames, and then its last one again and again.

    Returns indices from 0 to `frames_in_file - 1`, never falling. Raises ValueError for numbers of frames below 1, a
    stride that is not above 0, and a place outside [0, 1).
    """
    _check(frames_in_file, frames, stride, place)
    steps = max(frames - 1, 1)
    if _nearest(steps * stride) >= frames_in_file:
        stride = min(stride, max((frames_in_file - 1) // steps, 1))
    offsets = [_nearest(step * stride) for step in range(frames)]
    start = int(place * max(frames_in_file - offsets[-1], 1))
    return [min(start + offset, frames_in_file - 1) for offset in offsets]


def stretched(frames_in_file: int, *, frames: int, stride: float = 1, place: float = 0.5) -> list[int]:
    """Spread `frames` frames over a window of `frames * stride`, as VideoMAE's own code does.

    16 frames at stride 4 reach from the first to the last of 64 frames, and so advance by 4, 4, 4, 5, and so on.
    `place` is that of the window. A shorter video is the window; one of less than `frames` frames repeats some.
    Returns and raises as `dense` does.
    """
    _check(frames_in_file, frames, stride, place)
    length = min(max(_nearest(frames * stride), 1), frames_in_file)
    start = int(place * (frames_in_file - length + 1))
    return [start + min(step * length // max(frames - 1, 1), length - 1) for step in range(frames)]


def _check(frames_in_file: int, frames: int, stride: float, place: float) -> None:
    if min(frames_in_file, frames) < 1:
        raise ValueError(f"numbers below 1: {frames_in_file=}, {frames=}")
    if not 0 < stride < math.inf:
        raise ValueError(f"{stride=} is not a number above 0")
    if not 0 <= place < 1:
        raise ValueError(f"{place=} is not in [0, 1)")


def _nearest(number: float) -> int:
    return math.floor(number + 0.5)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Frames that are `stride` apart, somewhere in the video: see `dense`, also on short videos.

    Args:
        stride: how many frames a clip advances at a time.
        fps: of what video the stride is meant; None: of each as it is. Other videos advance as far in seconds, so by
            `stride * (their fps) / fps` frames. One whose rate is not known counts as having this one.
        windows: as VideoMAE's own code, by a stride that wanders by a frame: see `stretched`.
    """

    stride: int = 4
    fps: float | None = None
    windows: bool = False

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} is below 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps} is not a number above 0")

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """Choose so many frames of a video at random, or without a generator those in the middle."""
        return self.at(track, frames, 0.5 if generator is None else float(_uniform(1, generator)))

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The clip at a place in [0, 1), from 0 for the first that the video holds to `LAST`."""
        rate = track.fps / self.fps if self.fps and track.fps else 1
        choose = stretched if self.windows else dense
        return choose(track.frames, frames=frames, stride=self.stride * rate, place=place)


@dataclass(frozen=True, kw_only=True)
class Twice:
    """Two clips, one after the other: what a sampling chooses, and the same frames a little later.

    Args:
        sampling: of the first clip.
        by: the second is 0 to `by - 1` frames of the file later, uniformly: fewer where the video is too short for both
            (`Segments` moves within their parts).
    """

    sampling: Sampling
    by: int

    def __post_init__(self) -> None:
        if self.by < 1:
            raise ValueError(f"by={self.by} is below 1")

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """Choose half of so many frames, and as many again; without a generator those in the middle, twice."""
        if generator is None:
            return self.at(track, frames, 0.5)
        earliest = self.sampling.at(track, frames // 2, 0.0)
        places = min(self.by, track.frames - (earliest[-1] - earliest[0]))
        later = int(torch.randint(max(places, 1), (), generator=generator))
        chosen = self.sampling(track._replace(frames=track.frames - later), frames // 2, generator)
        return chosen + [index + later for index in chosen]

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The clip at a place in [0, 1), twice."""
        return 2 * self.sampling.at(track, frames // 2, place)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """One frame of each of as many equal parts of the whole video: TSN's sampling, and VideoMAE's on SSv2.

    Parts that are not of whole numbers of frames differ by one frame. A place is one within each part. A video of
    less frames than asked for shows each of them once or several times, in order.
    """

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """Choose any frame of each part, each at random by itself, or without a generator the one in the middle."""
        if generator is None:
            return self.at(track, frames, 0.5)
        return _one_of_each(track.frames, _uniform(frames, generator).tolist())

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The frames at a place in [0, 1) of each part, from 0 for its first frame to `LAST`."""
        _check(track.frames, frames, 1, place)
        return _one_of_each(track.frames, [place] * frames)


def _one_of_each(frames_in_file: int, places: list[float]) -> list[int]:
    bounds = [part * frames_in_file // len(places) for part in range(len(places) + 1)]
    return [
        first + int(place * max(stop - first, 1)) for (first, stop), place in zip(pairwise(bounds), places, strict=True)
    ]


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def many(
    sampling: Sampling, track: Track, frames: int, count: int, generator: torch.Generator | None
) -> list[list[int]]:
    """The frames of several clips that are drawn independently, to be decoded at once (repeated augmentation)."""
    return [sampling(track, frames, generator) for _ in range(count)]


def views(track: Track, frames: int, sampling: Sampling, clips: int = 5) -> list[list[int]]:
    """The clips that a test looks at: evenly spaced, to within a frame, from the first to the last; one is the centre.

    VideoMAE takes 5 of each video of Kinetics, and 2 of Something-Something, each with `three_crops`. (Starts of
    pytorchvideo's ConstantClipsPerVideoSampler are the first of one more: its last clip does not reach the end.)

    Raises ValueError for less than one clip.
    """
    if clips < 1:
        raise ValueError(f"{clips=} is below 1")
    places = [min(clip / (clips - 1), LAST) for clip in range(clips)] if clips > 1 else [0.5]
    return [sampling.at(track, frames, place) for place in places]


def three_crops(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Both ends and the centre of frames: pixels uint8 `(..., 3, h, w)` to `(3, ..., 3, *size)`.

    Resized bilinearly, until they just cover `size`; so left, centre and right of wide frames, and top, centre and
    bottom of tall ones.
    """
    covering = cover(pixels, size, mode="bilinear")
    return torch.stack([window(covering, size, place) for place in (0, 0.5, 1)])


@dataclass(frozen=True, kw_only=True)
class Views:
    """What a test looks at of each video: evenly spaced clips (`views`), each in one crop or three.

    VideoMAE takes 5 clips in 3 crops on Kinetics and UCF101, and 2 in 3 on Something-Something.

    Args:
        clips: of each video; one is the centre.
        crops: of each clip: 1 is the centre, 3 also both ends (`three_crops`). Resized bilinearly, until frames just
            cover the input.
    """

    clips: int = 1
    crops: Literal[1, 3] = 1

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"clips={self.clips} is below 1")
        if self.crops not in (1, 3):
            raise ValueError(f"crops={self.crops} is not 1, the centre, or 3, both ends as well")

    def __len__(self) -> int:
        return self.clips * self.crops

    def choose(self, track: Track, frames: int, sampling: Sampling) -> list[list[int]]:
        """The frames of each clip."""
        return views(track, frames, sampling, self.clips)

    def crop(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Crop pixels uint8 `(..., 3, h, w)` to `(crops, ..., 3, *size)`."""
        if self.crops == 3:
            return three_crops(pixels, size)
        return window(cover(pixels, size, mode="bilinear"), size, 0.5)[None]


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
