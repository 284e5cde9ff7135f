"""Clips from videos in WebDataset shards, on a disk or in object storage."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from convmae.data import Sample
from convmae.shards import Members, Shards
from video.lists import VIDEO_SUFFIXES
from video.videos import Clips


@dataclass(frozen=True, kw_only=True)
class VideoShards(Clips, Shards):
    """Videos in shards; `python -m video.prepare ROOT OUT --shards-mb 1000` packs them."""

    def open(self, size: tuple[int, ...]) -> VideoShardSamples:
        """List the videos, to be loaded as clips of `size`, `(T, H, W)` frames and pixels.

        Raises ValueError where `size` has not three axes, and as `Shards.members` does.
        """
        self.check(size)
        return VideoShardSamples(source=self, size=(size[0], size[1], size[2]), members=self.members(VIDEO_SUFFIXES))


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoShardSamples:
    """The videos of opened `VideoShards`."""

    source: VideoShards
    size: tuple[int, int, int]
    members: Members

    @property
    def repeats(self) -> int:
        """Clips that each video gives."""
        return self.source.given

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, where the index has them."""
        return self.members.classes

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        shards = len(self.members.shards)
        return f"{len(self)} videos as clips of {self.size} in {shards} shards of {os.fspath(self.source.root)!r}"

    def name(self, index: int) -> str:
        """The path of a video: its shard's, and its name in there."""
        return self.members.name(index)

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of an epoch; see `convmae.shards.order_of_lanes`."""
        return self.members.order(generator)

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load random clips of a video, or its views; see `Clips.load`."""
        pixels = self.source.load(self.members.read(index), self.size, generator)
        return Sample(pixels, int(self.members.labels[index]))
