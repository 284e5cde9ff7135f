"""Clips from a folder of video files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from convmae.data import Sample
from convmae.images import Crop, Listing, listing
from video import readers
from video.clips import MultiScaleCrop, dense
from video.demo import make

VIDEO_SUFFIXES = frozenset(
    [".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"]
)


@dataclass(frozen=True, kw_only=True)
class VideoFolder:
    """Videos below `root`, without one the built-in demonstration clips; subfolders, if any, are the classes.

    A clip is what `clips.dense` chooses, `stride` apart, of which `crop` takes a part, as VideoMAE pretrains.
    Listing opens no file: those count that end in one of `VIDEO_SUFFIXES`.
    """

    root: Path | None = None
    stride: int = 4
    crop: Crop = MultiScaleCrop()
    flip: bool = False
    """Mirror half of the clips: not where left and right tell classes apart, as in Something-Something."""

    def open(self, size: tuple[int, ...]) -> VideoSamples:
        """List the videos, to be loaded as clips of `size`, `(T, H, W)` frames and pixels.

        Raises ValueError where `size` has not three axes, `stride` is below 1, or `root` is not a folder or
        holds no video, or the demonstration set cannot be written.
        """
        if len(size) != 3:
            raise ValueError(f"{type(self).__name__} loads (T, H, W) clips, but the model's input is {size}")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} is below 1")
        root = make() / "train" if self.root is None else self.root
        return VideoSamples(source=self, root=root, size=size, listing=listing(root, VIDEO_SUFFIXES))


@dataclass(frozen=True, kw_only=True)
class VideoSamples:
    """The videos of an opened `VideoFolder`."""

    source: VideoFolder
    root: Path
    size: tuple[int, int, int]
    listing: Listing

    def __len__(self) -> int:
        return len(self.listing.files)

    def __repr__(self) -> str:
        return f"{len(self)} videos as clips of {self.size} in {str(self.root)!r}"

    def name(self, index: int) -> str:
        """The path of a video."""
        return os.path.join(self.root, self.listing.files[index])

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load a random clip of one video, uint8 `(3, T, H, W)`; one crop for all its frames.

        Raises `UnusableFileError` for a file that `readers.read` cannot read.
        """
        count, *size = self.size
        source, target = self.source, (size[0], size[1])
        place = float(torch.rand((), generator=generator))
        choose = partial(dense, frames=count, stride=source.stride, place=place)
        frames = readers.read(self.name(index), choose, short_side=source.crop.short_side(target))
        pixels = source.crop(torch.from_numpy(frames).permute(0, 3, 1, 2), target, generator)
        if source.flip and int(torch.randint(2, (), generator=generator)):
            pixels = pixels.flip(-1)
        return Sample(pixels.transpose(0, 1).contiguous(), self.listing.labels[index])
