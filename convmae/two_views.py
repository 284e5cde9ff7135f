"""Two views of each sample, as contrastive pretraining compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augmentation import ColourJitter, GaussianBlur
from .data import Sample, Samples, Source
from .grids import Grid
from .images import Augment

COLOUR = (
    ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8, grayscale=0.2),
    GaussianBlur(sigma=(0.1, 2.0), probability=0.5),
)
"""What CMAE does to the target's colours."""


@dataclass(frozen=True, kw_only=True)
class TwoViews:
    """Each sample of a source in two views, a little apart: CMAE's pixel shift (arXiv 2207.13532, section 3.2).

    The source loads samples larger than the input by the shift. The first view, which the online encoder sees, is the
    window at their corner; the second, the target's, the one that is shifted by a random part of it, uniformly. A shift
    in time (CMAE-V, arXiv 2301.06018) is by frames of the file, and one read decodes both clips. Crop, flip and
    whatever else the source does are the same in both views.

    Args:
        source: of images or clips.
        shift: numbers of places along each axis, `(H, W)` pixels or `(T, H, W)` frames and pixels: n shifts by 0 to
            n - 1, and 0 by none. CMAE's windows of 224 lie in crops of 256: 32; CMAE-V's range is not published.
        colour: what is done to the second view alone, the same to all frames of a clip.

    Raises ValueError for a negative shift.
    """

    source: Source
    shift: Grid = (32, 32)
    colour: tuple[Augment, ...] = COLOUR

    def __post_init__(self) -> None:
        if isinstance(self.shift, Sequence):
            object.__setattr__(self, "shift", tuple(self.shift))
        if not isinstance(self.shift, tuple) or not all(
            isinstance(places, int) and places >= 0 for places in self.shift
        ):
            raise ValueError(f"TwoViews: shift has a number of places from 0 for each axis; got {self.shift!r}")

    @property
    def root(self) -> Path | str | None:
        """Where the source is."""
        found: Path | str | None = getattr(self.source, "root", None)
        return found

    @property
    def split(self) -> str | int | None:
        """The part of its root that the source takes."""
        found: str | int | None = getattr(self.source, "split", None)
        return found

    def as_test(self) -> Any:
        """The source as a test looks at it: in one view."""
        any_: Any = self.source
        return any_.as_test() if hasattr(any_, "as_test") else any_

    def open(self, size: tuple[int, ...]) -> TwoViewsSamples:
        """List the samples, to be loaded in two views of `size`.

        Raises ValueError where the shift has other axes, or is in time and the source knows none, and as the source.
        """
        if len(self.shift) != len(size):
            raise ValueError(
                f"TwoViews: shift={self.shift} has {len(self.shift)} axes, the model's input {size} has {len(size)}: "
                f"give {len(size)}, as shift={(0,) * (len(size) - 2) + (32, 32)}"
            )
        source: Any = self.source
        loaded = tuple(side + places for side, places in zip(size[-2:], self.shift[-2:], strict=True))
        if len(size) == 3:
            later = self.shift[0] > 1
            if later and not hasattr(source, "twice"):
                raise ValueError(
                    f"TwoViews: shift={self.shift} is in time, but {type(source).__name__} has no `twice`, by which it "
                    f"loads a clip and a later one: give shift={(0, *self.shift[1:])}, or a source of clips"
                )
            source = source.twice(self.shift[0]) if later else source
            loaded = (2 * size[0] if later else size[0], *loaded)
        return TwoViewsSamples(source=self, samples=source.open(loaded), size=size)


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoViewsSamples:
    """The samples of an opened `TwoViews`; what else they know is as of those that they are made of."""

    source: TwoViews
    samples: Samples
    size: tuple[int, ...]

    views = 2

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "samples":  # as pickle asks, before there is anything
            raise AttributeError(name)
        return getattr(self.samples, name)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        most = tuple(max(0, places - 1) for places in self.source.shift)
        return f"{self.samples!r}, cut to two views of {self.size} up to {most} apart"

    def name(self, index: int) -> str:
        """The file of a sample."""
        return self.samples.name(index)

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load a sample in both views. Raises `UnusableFileError` as its own samples do."""
        sample = self.samples.load(index, generator)
        several = sample.pixels.reshape(-1, *sample.pixels.shape[-1 - len(self.size) :])
        views = [self._cut(pixels, generator) for pixels in several]
        shape = (*sample.pixels.shape[: -len(self.size)], *self.size)
        first, second = (torch.stack(each).reshape(shape) for each in zip(*views, strict=True))
        return Sample(first, sample.label, second)

    def _cut(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels `(3, *loaded)` to the two views, `(3, *size)` each."""
        *_, height, width = self.size
        first = second = pixels
        if len(self.size) == 3 and self.source.shift[0] > 1:
            first, second = pixels.chunk(2, dim=1)
        top, left = (int(torch.randint(max(places, 1), (), generator=generator)) for places in self.source.shift[-2:])
        second = second[..., top : top + height, left : left + width]
        frames = second.transpose(0, 1) if len(self.size) == 3 else second
        for change in self.source.colour:
            frames = change(frames, generator)
        return first[..., :height, :width], frames.transpose(0, 1) if len(self.size) == 3 else frames
