"""Which frames make a clip: random ones, those of a test, and of videos that are too short."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from media import MEDIA, needs_media
from torch import Tensor

from video import readers
from video.clips import LAST, Dense, Sampling, Segments, many, stretched, three_crops, views
from video.readers import Track

ROOT = Path(__file__).parents[1]

SAMPLINGS: list[Sampling] = [
    Dense(stride=4),
    Dense(stride=2, fps=30),
    Dense(stride=1, fps=120),
    Dense(stride=4, windows=True),
    Dense(stride=4, fps=30, windows=True),
    Segments(),
]
each = pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def track(frames: int, fps: float = 30.0) -> Track:
    return Track(frames, fps, 240, 320)


# Laws of all


@each
def test_indices_are_in_the_video_and_never_fall(sampling: Sampling) -> None:
    for there, frames, fps in itertools.product((1, 2, 7, 15, 16, 17, 63, 64, 65, 300), (1, 2, 16), (0.0, 12.5, 59.94)):
        video = track(there, fps)
        clips = [sampling(video, frames, seeded(there)), sampling(video, frames, None)]
        clips += [sampling.at(video, frames, place) for place in (0, 0.3, LAST)]
        for clip in clips:
            assert len(clip) == frames
            assert clip == sorted(clip)
            assert 0 <= clip[0] <= clip[-1] < there


@each
def test_a_clip_follows_from_the_generator_and_without_one_is_the_middle(sampling: Sampling) -> None:
    video, random = track(300), torch.get_rng_state()
    assert sampling(video, 8, seeded(3)) == sampling(video, 8, seeded(3))
    assert len({tuple(sampling(video, 8, seeded(seed))) for seed in range(20)}) > 15
    assert sampling(video, 8, None) == sampling.at(video, 8, 0.5)
    assert torch.get_rng_state().equal(random)


@each
def test_random_clips_reach_both_ends_of_the_video(sampling: Sampling) -> None:
    clips, generator = [], seeded()
    for _ in range(3000):
        clips.append(sampling(track(100), 4, generator))
    first, last = sampling.at(track(100), 4, 0), sampling.at(track(100), 4, LAST)
    assert min(clip[0] for clip in clips) == first[0] == 0
    assert max(clip[-1] for clip in clips) == last[-1] == 99


@each
def test_impossible_clips_are_refused(sampling: Sampling) -> None:
    for there, frames, place, message in ((0, 4, 0.5, "below 1"), (9, 0, 0.5, "frames=0"), (9, 4, 1.0, "place=1")):
        with pytest.raises(ValueError, match=message):
            sampling.at(track(there), frames, place)


# Dense


@pytest.mark.parametrize("fps", [10.0, 23.976, 24.0, 25.0, 30.0, 59.94, 120.0])
def test_clips_at_a_rate_last_equally_long_in_every_video(fps: float) -> None:
    clip = Dense(stride=4, fps=30)(track(2000, fps), 16, seeded())
    seconds = (np.array(clip) - clip[0]) / fps
    assert np.abs(seconds - np.arange(16) * 4 / 30).max() <= 0.5 / fps + 1e-9


def test_a_video_of_the_rate_or_of_none_known_keeps_the_exact_stride() -> None:
    for fps in (0.0, 30.0):
        assert Dense(stride=4, fps=30).at(track(100, fps), 16, 0) == list(range(0, 64, 4))
    assert Dense(stride=4).at(track(100, 60.0), 16, 0) == list(range(0, 64, 4))


def test_a_slow_video_shows_frames_as_long_as_they_last() -> None:
    sampling = Dense(stride=1, fps=30)
    assert sampling.at(track(100, 10.0), 7, 0) == [0, 0, 1, 1, 1, 2, 2]
    assert sampling.at(track(3, 10.0), 7, 0.9) == [0, 0, 1, 1, 1, 2, 2]


def test_short_videos_lower_the_stride_then_repeat_their_last_frame() -> None:
    assert Dense(stride=4, fps=30).at(track(60, 60.0), 16, 0) == list(range(0, 46, 3))
    assert Dense(stride=2, fps=30).at(track(5, 60.0), 8, 0.7) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_windows_spread_a_clip_as_videomae_does() -> None:
    clip = Dense(stride=4, windows=True).at(track(300), 16, 0)
    assert np.diff(clip).tolist() == [4, 4, 4, 5, 4, 4, 4, 5, 4, 4, 4, 5, 4, 4, 4]
    assert (clip[0], clip[-1]) == (0, 63)
    assert Dense(stride=4, windows=True).at(track(300), 16, LAST)[-1] == 299
    starts = [stretched(100, frames=16, stride=4, place=place / 1000)[0] for place in range(1000)]
    counts = np.bincount(starts, minlength=37)
    assert len(counts) == 37
    assert counts.max() - counts.min() <= 1


def test_a_video_shorter_than_the_window_is_the_window() -> None:
    sampling = Dense(stride=4, windows=True)
    assert sampling.at(track(30), 16, 0.8) == [*range(0, 30, 2), 29]
    assert sampling.at(track(3), 5, 0.8) == [0, 0, 1, 2, 2]


def test_impossible_samplings_are_refused() -> None:
    with pytest.raises(ValueError, match="stride=0"):
        Dense(stride=0)
    for fps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"fps={fps}"):
            Dense(fps=fps)


# Segments


def test_segments_give_one_frame_of_each_part_and_each_frame_equally_often() -> None:
    generator, counts = seeded(), np.zeros(40, int)
    for _ in range(2000):
        clip = Segments()(track(40), 8, generator)
        assert [index // 5 for index in clip] == list(range(8))
        np.add.at(counts, clip, 1)
    assert np.abs(counts - 400).max() < 5 * 400**0.5


def test_parts_are_drawn_independently_and_their_middle_is_the_default() -> None:
    clips = np.array([Segments()(track(80), 8, seeded(seed)) for seed in range(1000)]) % 10
    assert np.abs(np.corrcoef(clips.T) - np.eye(8)).max() < 0.15
    assert Segments()(track(40), 8, None) == list(range(2, 40, 5))


def test_parts_of_an_odd_video_differ_by_one_frame_and_share_none() -> None:
    firsts = Segments().at(track(21), 8, 0)
    lasts = Segments().at(track(21), 8, LAST)
    assert [last + 1 for last in lasts] == [*firsts[1:], 21]
    assert {last - first + 1 for first, last in zip(firsts, lasts, strict=True)} == {2, 3}


def test_segments_of_a_short_video_repeat_frames_in_order() -> None:
    assert Segments()(track(3), 8, seeded()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert Segments()(track(8), 8, seeded()) == list(range(8))


# Several clips


def test_repeated_clips_are_independent_and_follow_from_the_generator() -> None:
    sampling = Dense(stride=4)
    clips = many(sampling, track(300), 16, 4, seeded())
    assert clips == many(sampling, track(300), 16, 4, seeded())
    assert len({clip[0] for clip in clips}) == 4


@each
def test_views_go_from_the_first_frame_to_the_last(sampling: Sampling) -> None:
    clips = views(track(300), 16, sampling, clips=5)
    assert (len(clips), clips[0][0], clips[-1][-1]) == (5, 0, 299)
    assert clips[2] == sampling(track(300), 16, None)
    assert views(track(300), 16, sampling, clips=1) == [sampling(track(300), 16, None)]
    steps = np.diff([clip[0] for clip in clips])
    assert steps.min() > 0
    assert steps.max() - steps.min() <= 2
    with pytest.raises(ValueError, match="clips=0"):
        views(track(300), 16, sampling, clips=0)


@pytest.mark.parametrize("frames", [61, 64, 100, 250, 301])
def test_views_are_spaced_as_pytorchvideos_but_reach_the_end(frames: int) -> None:
    from pytorchvideo.data.clip_sampling import ConstantClipsPerVideoSampler

    starts = [clip[0] for clip in views(track(frames), 16, Dense(stride=4), clips=5)]
    # its unit is the second: one frame lasts one here; of 5 clips, it would put the last at 4/5 of the way
    sampler = ConstantClipsPerVideoSampler(clip_duration=61, clips_per_video=4)
    theirs = [float(sampler(0, frames, {}).clip_start_sec) for _ in range(4)]
    assert np.abs(np.subtract(starts[:-1], theirs)).max() < 1
    assert starts[-1] == frames - 61


def coordinates(height: int, width: int) -> Tensor:
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([ys, xs, 0 * xs]).byte().expand(2, -1, -1, -1)


def test_three_crops_are_both_ends_and_the_centre_of_the_longer_side() -> None:
    wide = three_crops(coordinates(60, 120), (60, 60))
    assert wide.shape == (3, 2, 3, 60, 60)
    assert wide[:, 0, 1, 0, 0].tolist() == [0, 30, 60]
    assert wide[:, 0, 0, 0, 0].tolist() == [0, 0, 0]
    tall = three_crops(coordinates(120, 60), (60, 60))
    assert tall[:, 1, 0, 0, 0].tolist() == [0, 30, 60]
    square = three_crops(coordinates(100, 100), (60, 60))
    assert (square == square[:1]).all()


def test_three_crops_resize_the_short_side_as_torchvision_does() -> None:
    from torchvision.transforms.v2 import functional

    clip = torch.randint(0, 256, (2, 3, 90, 131), generator=seeded()).byte()
    resized = functional.resize(clip, [64], antialias=True)
    left, centre, right = three_crops(clip, (64, 64))
    assert torch.equal(left, resized[..., :64])
    assert torch.equal(centre, functional.center_crop(resized, [64, 64]))
    assert torch.equal(right, resized[..., -64:])


@needs_media
def test_all_views_of_a_real_video_come_from_one_decode() -> None:
    path, sampling = MEDIA / "clips" / "kin_abseiling.mp4", Dense(stride=4)
    at_once = readers.read(path, lambda track: np.concatenate(views(track, 16, sampling, 3)).tolist(), short_side=64)
    assert at_once.shape[0] == 48
    last = readers.read(path, lambda track: views(track, 16, sampling, 3)[2], short_side=64)
    assert np.array_equal(at_once[32:], last)
    assert three_crops(torch.from_numpy(at_once).permute(0, 3, 1, 2), (64, 64)).shape == (3, 48, 3, 64, 64)


def test_importing_the_samplings_loads_no_reader() -> None:
    heavy = ("av", "decord", "pytorchvideo", "torchvision", "timm")
    code = f"import sys, video.clips; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
