"""The demonstration clips of `convmae.demo`, as video files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from convmae.demo import MOTIONS, SEED, Pixels, cached, clip


def make(folder: Path | None = None, *, train: int = 40, val: int = 10) -> Path:
    """Make the set in `folder`, or in the cache (see `convmae.demo.cached`), unless it is there; return where.

    Below are `train/MOTION/000.mp4` and so on, so many clips of each of 8 motions, and `val/`; a clip has 32 frames of
    96 pixels. The content is the same each time, and a larger set begins with the smaller one's clips. With the usual
    numbers it takes about 15 seconds and 5 MB.

    Raises ValueError where the folder cannot be written.
    """
    usual = (train, val) == (40, 10)
    name = "demo-videos-v1" if usual else f"demo-videos-v1-{train}-{val}"
    return cached(name, lambda place: _fill(place, (train, val)), folder)


def _fill(folder: Path, counts: tuple[int, int]) -> None:
    def draw(split: int, label: int, number: int) -> None:
        path = folder / ("train", "val")[split] / MOTIONS[label] / f"{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, clip(MOTIONS[label], np.random.default_rng([SEED, split, label, number])))

    motions = range(len(MOTIONS))
    wanted = [(split, label, n) for split, count in enumerate(counts) for label in motions for n in range(count)]
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
