"""Clips from video files."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import CLIPS, MEDIA, UNUSABLE, counting, needs_media, numbers
from PIL import Image

from convmae import manifest
from convmae.data import UNLABELLED, Source, UnusableFileError
from convmae.images import RandomResizedCrop
from video import readers
from video.clips import Dense, MultiScaleCrop, dense
from video.videos import Videos


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# Sources


@needs_media
@pytest.mark.parametrize("reader", readers.installed())
def test_every_real_clip_loads(reader: readers.Choice) -> None:
    samples = Videos(root=MEDIA / "clips", reader=reader).open((16, 96, 80))
    assert len(samples) == len(CLIPS)
    for index in range(len(samples)):
        pixels, label, _ = samples.load(index, seeded(index))
        assert (tuple(pixels.shape), pixels.dtype, label) == ((3, 16, 96, 80), torch.uint8, UNLABELLED)
        assert pixels.is_contiguous()
        assert pixels.float().std() > 5


@needs_media
def test_every_bad_file_loads_or_is_unusable() -> None:
    samples = Videos(root=MEDIA / "bad").open((16, 64, 64))
    unusable = set()
    for index in range(len(samples)):
        try:
            assert samples.load(index, seeded()).pixels.shape == (3, 16, 64, 64)
        except UnusableFileError:
            unusable.add(Path(samples.name(index)).name)
    assert unusable == UNUSABLE.keys()


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("walk/b.mp4", "run/a.MKV", "loose.avi"):
        counting(tmp_path / name, frames=20)
    for number in range(9):
        (tmp_path / "walk" / "frames").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (number,) * 3).save(tmp_path / "walk" / "frames" / f"{number}.png")
    source = Videos(root=tmp_path)
    assert isinstance(source, Source)
    samples = source.open((8, 32, 48))
    assert [samples.load(index, seeded()).label for index in range(4)] == [UNLABELLED, 0, 1, 1]
    assert samples.name(1) == str(tmp_path / "run" / "a.MKV")
    assert samples.name(3) == str(tmp_path / "walk" / "frames")
    names = {"PosixPath": Path, "Videos": Videos, "MultiScaleCrop": MultiScaleCrop, "Dense": Dense}
    assert eval(repr(source), names) == source


def test_a_list_of_videos(tmp_path: Path) -> None:
    for name in ("a b.mp4", "sub/c.mp4"):
        counting(tmp_path / name)
    listed = tmp_path / "train.csv"
    listed.write_text(f"a b.mp4,3\n{tmp_path}/sub/c.mp4,1\n")
    assert Videos(root=str(listed)) == Videos(root=listed)  # type: ignore[arg-type]
    samples = Videos(root=listed).open((4, 32, 32))
    assert [samples.load(index, seeded()).label for index in range(2)] == [3, 1]
    assert samples.name(0) == str(tmp_path / "a b.mp4")
    assert samples.name(1) == str(tmp_path / "sub" / "c.mp4")


def test_samples_follow_from_the_generator_alone_and_pickle(tmp_path: Path) -> None:
    counting(tmp_path / "a.mp4")
    samples = Videos(root=tmp_path, crop=RandomResizedCrop(), flip=True).open((4, 32, 32))
    one = samples.load(0, seeded(5)).pixels
    assert torch.equal(one, pickle.loads(pickle.dumps(samples)).load(0, seeded(5)).pixels)
    assert len({numbers(samples.load(0, seeded(seed)).pixels.transpose(0, 1).numpy())[0] for seed in range(20)}) > 5


def test_several_clips_of_a_video_come_from_one_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(tmp_path / "a.mp4")
    asked, read = [], readers.read

    def counted(*given: Any, **named: Any) -> readers.Frames:
        asked.append(given)
        return read(*given, **named)

    monkeypatch.setattr(readers, "read", counted)
    samples = Videos(root=tmp_path, repeats=3, sampling=Dense(stride=1)).open((4, 32, 32))
    assert samples.repeats == 3
    pixels = samples.load(0, seeded()).pixels
    assert pixels.shape == (3, 3, 4, 32, 32)
    firsts = [numbers(clip.transpose(0, 1).numpy()) for clip in pixels]
    assert len({tuple(first) for first in firsts}) == 3
    assert all(np.diff(first).tolist() == [1, 1, 1] for first in firsts)
    assert len(asked) == 1


def test_a_manifest_leaves_out_what_is_unusable_and_keeps_to_what_is_intact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.mp4", "b/2.mp4", "b/3.mp4", "b/4.mp4"):
        counting(tmp_path / name)
    known: dict[str, Any] = {"bytes": 1, "modified": 0.0, "frames": 40}
    entries = [
        manifest.Entry(file="a/1.mp4", usable=False, reason="no video stream in it", **known),
        manifest.Entry(file="b/2.mp4", usable=True, reason="damaged after 20", intact=(12, 20), reader="pyav", **known),
        manifest.Entry(file="b/3.mp4", usable=True, intact=(0, 40), **known),
    ]
    manifest.write(manifest.beside(tmp_path), entries)
    with caplog.at_level("INFO", "convmae.folder"):
        samples = Videos(root=tmp_path, sampling=Dense(stride=1)).open((4, 32, 32))
    assert [Path(samples.name(index)).name for index in range(len(samples))] == ["2.mp4", "3.mp4", "4.mp4"]
    assert repr(samples).endswith("without 1 that are unusable")
    assert "left out, as the manifest has it: 1 x no video stream in it" in caplog.messages
    assert any(message.startswith("1 files are not in the manifest") for message in caplog.messages)
    seen = {n for seed in range(30) for n in numbers(samples.load(0, seeded(seed)).pixels.transpose(0, 1).numpy())}
    assert seen == set(range(12, 20))
    assert samples.load(0, seeded()).label == samples.load(2, seeded()).label == 1
    manifest.beside(tmp_path).rename(tmp_path / "m")
    manifest.write(tmp_path / "b" / manifest.NAME, [manifest.Entry(file="3.mp4", usable=False, reason="bad", **known)])
    assert len(Videos(root=tmp_path).open((4, 32, 32))) == 3  # a folder below was scanned by itself
    elsewhere = tmp_path / "b" / "manifest.of.a"
    with pytest.raises(ValueError, match=r"manifest\.of\.a' is not there"):
        Videos(root=tmp_path, manifest=elsewhere).open((4, 32, 32))
    manifest.write(elsewhere, [entries[0]])
    assert len(Videos(root=tmp_path, manifest=elsewhere).open((4, 32, 32))) == 3


def test_wrong_sizes_strides_and_roots_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file ending in \.3gp \.avi"):
        Videos(root=tmp_path).open((8, 32, 32))
    with pytest.raises(ValueError, match="is not a folder of videos, nor a list"):
        Videos(root=tmp_path / "none").open((8, 32, 32))
    with pytest.raises(ValueError, match=r"loads \(T, H, W\) clips"):
        Videos(root=tmp_path).open((32, 32))
    with pytest.raises(ValueError, match="repeats=0"):
        Videos(root=tmp_path, repeats=0).open((8, 32, 32))
    with pytest.raises(ValueError, match="reader='other' is not known"):
        Videos(root=tmp_path, reader="other").open((8, 32, 32))  # type: ignore[arg-type]
