"""torchcodec, where it is installed: it needs FFmpeg's libraries on the system, and a release that fits torch's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from convmae.data import Packed
from convmae.images import resize

from .protocol import Frames, RefusedError, Size, Track, Video, is_avi


class TorchCodec:
    """torchcodec in its exact mode: the approximate one is wrong on variable frame rates, and no faster.

    It uses torch's threads. A process forked from one that has used them, too, must call `torch.set_num_threads(1)`
    before, as torch's loader processes do; else it hangs.
    """

    name = "torchcodec"

    @contextmanager
    def open(self, video: Video) -> Iterator[Opened]:
        """Look into a file; raises `RefusedError` for AVI, whose frames it tells apart by times that AVI has not."""
        if is_avi(video):
            raise RefusedError("it is off by one on AVI files without good times")
        source = video.data if isinstance(video, Packed) else video
        decoder = module()(source, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="exact")
        about = decoder.metadata
        seconds = about.duration_seconds_from_header  # the other readers' rates are those of headers, too
        fps = about.num_frames / seconds if seconds else float(about.average_fps or 0)
        yield Opened(decoder, Track(about.num_frames, fps, about.height, about.width))


class Opened(NamedTuple):
    """A file that torchcodec has read the packets of."""

    decoder: Any
    track: Track

    def take(self, indices: Sequence[int], size: Size | None) -> Frames:
        """Decode frames at rising indices; raises RuntimeError where one cannot be decoded."""
        pixels: torch.Tensor = self.decoder.get_frames_at(list(indices)).data
        if size is not None:
            pixels = resize(pixels.permute(0, 3, 1, 2), size, "bicubic").permute(0, 2, 3, 1).contiguous()
        frames: Frames = pixels.numpy()
        return frames


@functools.cache
def module() -> Any:
    """torchcodec's decoder, or None where it is not installed or cannot load FFmpeg."""
    try:
        return importlib.import_module("torchcodec.decoders").VideoDecoder
    except (ImportError, OSError, RuntimeError):
        return None
