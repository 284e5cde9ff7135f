"""Which frames make a clip, and which part of them it shows.

A short video is sampled more densely, and where it has less frames than a clip, its frames are repeated: `Dense` says
its last one again, `Segments` each as often as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from convmae.images import resize

if TYPE_CHECKING:
    from video.readers import Track


class Sampling(Protocol):
    """Chooses which frames of a video make a clip."""

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """So many indices, never falling, of the track's; at random, or without a generator those in the middle."""
        ...

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The clip at a place in [0, 1], from the first that fits to the last."""
        ...


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
class Dense:
    """Frames at a stride, from a random place: `dense`, as SlowFast and VideoMAE sample.

    Args:
        stride: from a frame to the next.
        fps: the rate that the stride counts in: a video of twice this rate is taken at twice the stride, rounded to
            whole frames from an exact beginning. None: the stride counts the frames of whatever video. A video whose
            rate is not known, as of a folder of frames, is taken to have this one.
    """

    stride: int = 4
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.stride < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError(f"{self} has a stride below 1, or a rate that is not positive")

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """So many indices of the track's, as `dense` and the stride have it."""
        place = 0.5 if generator is None else float(torch.rand((), generator=generator))
        if self.fps is None or not track.fps:
            return dense(track.frames, frames=frames, stride=self.stride, place=place)
        span = self._span(track, frames)
        return self._from(int(place * (track.frames - span + 1)), track, frames)

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The clip at a place in [0, 1], from the first that fits to the last."""
        if self.fps is None or not track.fps:
            return dense(track.frames, frames=frames, stride=self.stride, place=min(place, _BELOW_ONE))
        return self._from(round(place * (track.frames - self._span(track, frames))), track, frames)

    def _step(self, track: Track, frames: int) -> float:
        """From a frame to the next; for a short video, the largest that fits."""
        assert self.fps is not None
        wanted = self.stride * track.fps / self.fps
        return min(wanted, max(track.frames - 1, 0) / max(frames - 1, 1))

    def _span(self, track: Track, frames: int) -> int:
        return min(math.floor((frames - 1) * self._step(track, frames) + 0.5) + 1, track.frames)

    def _from(self, start: int, track: Track, frames: int) -> list[int]:
        step = self._step(track, frames)
        return [min(start + math.floor(number * step + 0.5), track.frames - 1) for number in range(frames)]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """One frame of each of so many equal parts of the video: TSN's sampling, usual for Something-Something."""

    def __call__(self, track: Track, frames: int, generator: torch.Generator | None) -> list[int]:
        """So many indices of the track's; each at random in its part, or without a generator in its middle."""
        places = [0.5] * frames if generator is None else torch.rand(frames, generator=generator).tolist()
        return self._inside(track, places)

    def at(self, track: Track, frames: int, place: float) -> list[int]:
        """The frames at the same place, in [0, 1], of all parts."""
        return self._inside(track, [min(place, _BELOW_ONE)] * frames)

    def _inside(self, track: Track, places: list[float]) -> list[int]:
        length = track.frames / len(places)
        return [min(int((number + place) * length), track.frames - 1) for number, place in enumerate(places)]


_BELOW_ONE = math.nextafter(1.0, 0.0)


def views(sampling: Sampling, track: Track, frames: int, clips: int) -> list[list[int]]:
    """So many clips for a test, at even distances from the first that fits to the last; one is in the middle."""
    if clips < 1:
        raise ValueError(f"{clips=} is below 1")
    places = [0.5] if clips == 1 else [number / (clips - 1) for number in range(clips)]
    return [sampling.at(track, frames, place) for place in places]


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
