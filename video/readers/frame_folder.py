"""A folder of frames as a video: one picture a frame, in the order of the numbers in their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from convmae import images
from convmae.data import UnusableFileError

from .protocol import Frames, RefusedError, Size, Track, Video


class FrameFolder:
    """Pictures of one size, as videos were often unpacked; their rate is not known."""

    name = "frames"

    @contextmanager
    def open(self, video: Video) -> Iterator[Opened]:
        """List the pictures, and look into the first; raises `UnusableFileError` where there is none."""
        if not isinstance(video, str):
            raise RefusedError("a folder is no file")
        pictures = (name for name in os.listdir(video) if Path(name).suffix.lower() in images.IMAGE_SUFFIXES)
        names = sorted((name for name in pictures if not name.startswith(".")), key=_by_number)
        if not names:
            raise UnusableFileError(video, "a folder without frames: no picture in it")
        kinds = sorted({re.sub(r"\d+", "#", name) for name in names})
        if len(kinds) > 1:
            raise UnusableFileError(
                video, f"a folder of pictures of several kinds, not of one video: {', '.join(kinds[:3])}"
            )
        height, width = images.read(os.path.join(video, names[0])).shape[-2:]
        yield Opened(video, names, Track(len(names), 0.0, height, width))


class Opened(NamedTuple):
    """A folder whose pictures are listed."""

    folder: str
    names: list[str]
    track: Track

    def take(self, indices: Sequence[int], size: Size | None) -> Frames:
        """Read pictures at rising indices; raises `UnusableFileError` for one that is damaged or of another size."""
        pixels, usual = [], (self.track.height, self.track.width)
        for index in indices:
            pixels.append(images.read(os.path.join(self.folder, self.names[index])))
            if pixels[-1].shape[-2:] != usual:
                sizes = f"{tuple(pixels[-1].shape[-2:])}, not {usual}"
                raise UnusableFileError(self.folder, f"its frame {self.names[index]} is of another size: {sizes}")
        stacked = torch.stack(pixels)
        if size is not None:
            stacked = images.resize(stacked, size, "bicubic")
        frames: Frames = stacked.permute(0, 2, 3, 1).contiguous().numpy()
        return frames


def _by_number(name: str) -> list[tuple[int, str]]:
    """Digits count as numbers, so that frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
