"""Clips from video files."""

import logging
import os
import pickle
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from convmae.data import UNLABELLED, Source, UnusableFileError
from convmae.images import RandomResizedCrop
from video import readers
from video.clips import MultiScaleCrop, dense
from video.demo import encode
from video.videos import Videos

MEDIA = Path(__file__).parents[2] / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason=f"the real videos are not in {MEDIA}")
CLIPS = sorted(path for path in (MEDIA / "clips").glob("*") if path.suffix != ".json")

REASONS = {
    "audio_only.mp4": "no video stream",
    "corrupt_first_gop.mp4": "no frame can be decoded",
    "corrupt_moov.mp4": "header is lost or damaged",
    "header_only.mp4": "no frame can be decoded",
    "one_frame.mp4": "a single frame",
    "random.mp4": "not a video",
    "text.mp4": "not a video",
    "trunc_moov_lost.mp4": "header is lost",
    "zero_bytes.mp4": "empty file",
}
FRAMES_THAT_EXIST = {
    "drv_editlist_copycut.mp4": 165,
    "tc_discard_first_keyframe.mp4": 25,
    "corrupt_middle.mp4": 92,
    "decord_corrupted.mp4": 28,
    "trunc_faststart50.mp4": 103,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counting(path: Path, frames: int = 40, height: int = 48, width: int = 64) -> Path:
    """A video whose n-th frame is as bright as 6 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (6 * np.arange(frames)).astype(np.uint8)[:, None, None, None]
    encode(path, np.broadcast_to(levels, (frames, height, width, 3)).copy())
    return path


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 6) for frame in frames]


# Which frames


def test_a_dense_clip_keeps_its_stride_and_reaches_both_ends() -> None:
    places = [dense(100, frames=16, stride=4, place=place / 1000) for place in range(1000)]
    assert all(np.diff(indices).tolist() == [4] * 15 for indices in places)
    starts = [indices[0] for indices in places]
    assert (min(starts), max(starts)) == (0, 100 - 61)
    counts = np.bincount(starts)
    assert counts.max() - counts.min() <= 1
    assert dense(61, frames=16, stride=4) == list(range(0, 61, 4))


def test_a_short_video_lowers_the_stride_then_repeats_its_last_frame() -> None:
    assert dense(60, frames=16, stride=4, place=0.0) == list(range(0, 46, 3))
    assert dense(16, frames=16, stride=4) == list(range(16))
    assert dense(3, frames=5, stride=4) == [0, 1, 2, 2, 2]
    assert dense(7, frames=1, stride=4, place=0.99) == [6]


def test_impossible_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="frames=0"):
        dense(10, frames=0)
    with pytest.raises(ValueError, match="place=1"):
        dense(10, frames=2, place=1)


# Which part of them


def test_a_multi_scale_crop_takes_the_same_box_of_every_frame() -> None:
    ys, xs = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    frame = torch.stack([2 * ys, 2 * xs, 0 * xs]).byte()
    clip, corners = frame.expand(4, -1, -1, -1), set()
    for seed in range(100):
        cropped = MultiScaleCrop()(clip, (96, 96), seeded(seed))
        assert (cropped.shape, cropped.dtype) == ((4, 3, 96, 96), torch.uint8)
        assert (cropped == cropped[:1]).all()
        height, width = (int(cropped[0, axis].max()) - int(cropped[0, axis].min()) for axis in (0, 1))
        corners.add((int(cropped[0, 0].min()) // 2, int(cropped[0, 1].min()) // 2))
        assert 0.66 * 96 - 3 <= height / 2 <= 96
        assert 0.65 < height / width < 1.5
    assert {(0, 0), (0, 32)} <= corners  # the whole height, at the left and the right end
    assert len(corners) > 30


def test_a_crop_of_another_aspect_is_not_distorted_at_equal_scales() -> None:
    xs = torch.arange(120).expand(2, 3, 90, 120).byte()
    cropped = MultiScaleCrop(scales=(1.0,))(xs, (30, 60), seeded())
    assert cropped.shape == (2, 3, 30, 60)
    assert (cropped[0, 0, 0, 1:].int() - cropped[0, 0, 0, :-1].int()).float().mean() == pytest.approx(2, abs=0.05)


# Folders


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("walk/b.mp4", "run/a.MKV", "loose.avi"):
        counting(tmp_path / name, frames=20)
    source = Videos(root=tmp_path)
    assert isinstance(source, Source)
    samples = source.open((8, 32, 48))
    assert [samples.load(index, seeded()).label for index in range(3)] == [UNLABELLED, 0, 1]
    assert samples.name(1) == str(tmp_path / "run" / "a.MKV")
    names = {"PosixPath": Path, "Videos": Videos, "MultiScaleCrop": MultiScaleCrop}
    assert eval(repr(source), names) == source


def test_samples_follow_from_the_generator_alone_and_pickle(tmp_path: Path) -> None:
    counting(tmp_path / "a.mp4")
    samples = Videos(root=tmp_path, crop=RandomResizedCrop(), flip=True).open((4, 32, 32))
    one = samples.load(0, seeded(5)).pixels
    assert torch.equal(one, pickle.loads(pickle.dumps(samples)).load(0, seeded(5)).pixels)
    assert len({numbers(samples.load(0, seeded(seed)).pixels.transpose(0, 1).numpy())[0] for seed in range(20)}) > 5


def test_wrong_sizes_strides_and_roots_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file ending in \.3gp \.avi"):
        Videos(root=tmp_path).open((8, 32, 32))
    with pytest.raises(ValueError, match="is not a folder"):
        Videos(root=tmp_path / "none").open((8, 32, 32))
    with pytest.raises(ValueError, match=r"loads \(T, H, W\) clips"):
        Videos(root=tmp_path).open((32, 32))
    with pytest.raises(ValueError, match="stride=0"):
        Videos(root=tmp_path, stride=0).open((8, 32, 32))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux's")
def test_memory_stays_flat(tmp_path: Path, reader: str) -> None:
    path = counting(tmp_path / "a.mp4", frames=60, height=180, width=320)

    def memory() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def read(times: int) -> None:
        for _ in range(times):
            readers.read(path, lambda count: [0, 10, 20], short_side=64)

    read(40)
    before = memory()
    read(200)
    assert memory() - before < 25
