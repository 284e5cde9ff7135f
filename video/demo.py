"""The demonstration clips of `convmae.demo`, as video files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import av
import numpy as np

from convmae.demo import MOTIONS, SEED, Pixels, cached, clip
from convmae.images import Crop
from video.clips import MultiScaleCrop
from video.folder import VideoFolder, VideoSamples


@dataclass(frozen=True, kw_only=True)
class DemoVideos:
    """The drawn clips, made on first use: 8 motions, 40 clips to train with and 10 held out of each.

    A clip has 32 frames of 96 pixels, and no single frame tells its class (`convmae.demo` says why). Nothing is
    mirrored: left and right are classes.
    """

    split: Literal["train", "val"] = "train"
    stride: int = 2
    crop: Crop = MultiScaleCrop()

    def open(self, size: tuple[int, ...]) -> VideoSamples:
        """Make the set if it is not there, and open it at `size`, `(T, H, W)` frames and pixels.

        Raises ValueError where `size` has not three axes or the set cannot be written.
        """
        return VideoFolder(root=make() / self.split, stride=self.stride, crop=self.crop).open(size)


def make(folder: Path | None = None) -> Path:
    """Make the set in `folder`, or in the cache (see `convmae.demo.cached`), unless it is there; return where.

    Below are `train/MOTION/000.mp4` and so on, and `val/`. The content is the same each time.
    """
    return cached("demo-videos-v1", partial(_fill, train=40, val=10), folder)


def _fill(folder: Path, *, train: int, val: int) -> None:
    def draw(split: int, label: int, number: int) -> None:
        path = folder / ("train", "val")[split] / MOTIONS[label] / f"{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, clip(MOTIONS[label], np.random.default_rng([SEED, split, label, number])))

    labels = range(len(MOTIONS))
    wanted = [(split, label, n) for split in (0, 1) for label in labels for n in range((train, val)[split])]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # drawing and encoding release the GIL
        list(pool.map(lambda which: draw(*which), wanted))


def encode(path: Path, frames: Pixels, *, rate: int = 16) -> None:
    """Write frames, RGB uint8 `(T, H, W, 3)`, as H.264, or MPEG-4 part 2 where libx264 is missing."""
    x264 = "libx264" in av.codecs_available
    options = {"crf": "21", "preset": "veryfast"} if x264 else {"qscale": "3"}
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264" if x264 else "mpeg4", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
