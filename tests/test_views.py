"""What a test looks at: the same views every time, of the samples of a split whose classes have the same numbers."""

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import MEDIA, counting, needs_media, numbers
from PIL import Image
from torch import Tensor

from convmae import manifest
from convmae.augmentation import CentreCrop, Flip
from convmae.data import Source, Stream
from convmae.folder import Unusable
from convmae.images import Augment, ImageFolder, RandomResizedCrop, Stills, cover, read, window
from convmae.plain import from_plain, to_plain
from convmae.shards import ImageShards, write_shard
from video import readers
from video.clips import Dense, Segments, Views, views
from video.datasets import SomethingSomething
from video.readers import Track
from video.scan import scan
from video.shards import VideoShards
from video.videos import Clips, Videos


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoded(path: Path) -> Tensor:
    """All frames `(T, 3, h, w)`, one after the other."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def covered(frames: Tensor, size: int) -> Tensor:
    """The short side resized by torchvision."""
    from torchvision.transforms.v2 import functional

    resized: Tensor = functional.resize(frames, [size], antialias=True)
    return resized


# --- views of videos --------------------------------------------------------------------------------------------------


@needs_media
@pytest.mark.parametrize("name", ["kin_abseiling.mp4", "wlasl_19frames.mp4", "ucf_basketball_mpeg4.avi"])
@pytest.mark.parametrize("sampling", [Dense(stride=4), Segments()], ids=repr)
def test_views_are_the_frames_and_crops_of_a_straightforward_decode(name: str, sampling: Dense | Segments) -> None:
    path, size, frames = MEDIA / "clips" / name, 120, decoded(MEDIA / "clips" / name)
    source = Videos(root=path.parent, sampling=sampling, reader="pyav").as_test(clips=5, crops=3)
    pixels = source.load(str(path), (8, size, size), seeded())
    assert pixels.shape == (15, 3, 8, size, size)
    assert pixels.is_contiguous()
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate or 0)
    expected = []
    for clip in range(5):
        place = min(clip / 4, np.nextafter(1, 0))
        chosen = sampling.at(Track(len(frames), fps, 0, 0), 8, float(place))
        whole = covered(frames[chosen], size)
        spare = [whole.shape[-2] - size, whole.shape[-1] - size]
        for third in (0, 0.5, 1):
            top, left = (round(third * side) for side in spare)
            expected.append(whole[..., top : top + size, left : left + size].transpose(0, 1))
    assert torch.equal(pixels, torch.stack(expected))
    centre = replace(source, views=Views(clips=5)).load(str(path), (8, size, size), seeded(1))
    assert torch.equal(centre, pixels[1::3])


def test_one_view_is_the_centre_of_the_middle(tmp_path: Path) -> None:
    counting(tmp_path / "a.mp4", frames=40)
    samples = Videos(root=tmp_path, sampling=Dense(stride=2)).as_test().open((4, 32, 32))
    pixels, label, _ = samples.load(0, seeded())
    assert (samples.repeats, tuple(pixels.shape), label) == (1, (3, 4, 32, 32), -1)
    assert numbers(pixels.transpose(0, 1).numpy()) == [17, 19, 21, 23]
    assert Videos(root=tmp_path, sampling=Dense(stride=2)).as_test(clips=2).open((4, 32, 32)).repeats == 2


def test_all_views_come_from_one_decode_and_none_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(tmp_path / "a.mp4", frames=40)
    asked, original = [], readers.read

    def counted(*given: object, **named: object) -> readers.Frames:
        asked.append(given)
        return original(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(readers, "read", counted)
    source = Videos(root=tmp_path, flip=True, augment=(Flip(),), repeats=2, sampling=Dense(stride=1))
    samples = source.as_test(clips=3, crops=3).open((4, 24, 32))
    one = samples.load(0, seeded(1)).pixels
    assert len(asked) == 1
    assert torch.equal(one, pickle.loads(pickle.dumps(samples)).load(0, seeded(2)).pixels)
    firsts = [numbers(view.transpose(0, 1).numpy())[0] for view in one]
    assert firsts == [0, 0, 0, 18, 18, 18, 36, 36, 36]  # clip by clip


def test_views_keep_to_the_intact_frames(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", frames=40)
    source = Videos(root=tmp_path, sampling=Dense(stride=1)).as_test(clips=2)
    pixels = source.load(str(path), (4, 32, 32), seeded(), intact=(10, 20))
    assert [numbers(view.transpose(0, 1).numpy()) for view in pixels] == [[10, 11, 12, 13], [16, 17, 18, 19]]


def test_views_and_what_is_drawn_at_random_exclude_each_other_by_name(tmp_path: Path) -> None:
    counting(tmp_path / "a.mp4")
    source = Videos(root=tmp_path, views=Views(clips=2), flip=True, augment=(Flip(),), repeats=3)
    said = "(?s)views=.*nothing at random, but has flip=True, augment=.*, repeats=3: .*as_test"
    with pytest.raises(ValueError, match=said):
        source.open((4, 32, 32))
    assert source.as_test(clips=2).open((4, 32, 32)).repeats == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Views(clips=0), "clips=0 is below 1"),
        (lambda: Views(crops=2), "crops=2 is not 1, the centre, or 3"),  # type: ignore[arg-type]
        (lambda: Videos().as_test(clips=-1), "clips=-1 is below 1"),
    ],
)
def test_impossible_views_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_views_are_kept_and_compared_as_values() -> None:
    source = Videos().as_test(clips=5, crops=3)
    assert from_plain(to_plain(source)) == source
    assert len(Views(clips=5, crops=3)) == 15
    assert eval(repr(source.views)) == source.views
    assert SomethingSomething(root=Path("x")).as_test(2, 3).sampling == Segments()


def test_a_video_in_a_shard_has_the_same_views(tmp_path: Path) -> None:
    path = counting(tmp_path / "videos" / "a.mp4")
    write_shard(tmp_path / "shards" / "0.tar", [("a", {"mp4": path.read_bytes(), "cls": b"4"})])
    of_file, of_shard = (
        source.as_test(clips=2, crops=3).open((4, 32, 32))
        for source in (Videos(root=tmp_path / "videos"), VideoShards(root=tmp_path / "shards"))
    )
    assert of_shard.repeats == 6
    sample = of_shard.load(0, seeded())
    assert sample.label == 4
    assert torch.equal(sample.pixels, of_file.load(0, seeded(1)).pixels)


@needs_media
def test_a_stream_gives_the_views_of_each_video_side_by_side() -> None:
    size = (4, 48, 48)
    samples = Videos(root=MEDIA / "clips").as_test(clips=2, crops=3).open(size)
    stream = Stream(samples, size, seed=0, batch_size=12, once=True)
    [[batch]] = stream.batches(1, 2, workers=0)
    assert batch.indices.tolist() == [2] * 6 + [3] * 6
    assert torch.equal(batch.pixels[6:], samples.load(3, seeded(5)).pixels)


def test_views_are_where_the_function_says() -> None:
    assert Views(clips=3).choose(Track(100, 25.0, 0, 0), 4, Dense(stride=4)) == views(
        Track(100, 25.0, 0, 0), 4, Dense(stride=4), 3
    )


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Darker:
    """Takes away so much, and up to as much again."""

    amount: int

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        less = self.amount + int(torch.randint(self.amount, (), generator=generator))
        return (pixels.int() - less).clamp(min=0).byte()


def ramp(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.linspace(60, 255, 80).astype(np.uint8)
    Image.fromarray(np.broadcast_to(columns[None, :, None], (60, 80, 3)).copy()).save(path)
    return path


def still_sources(root: Path) -> list[Stills]:
    path = ramp(root / "images" / "a" / "0.png")
    write_shard(root / "shards" / "0.tar", [("0", {"png": path.read_bytes(), "cls": b"0"})])
    return [ImageFolder(root=root / "images"), ImageShards(root=root / "shards")]


def test_images_are_augmented_after_the_flip_and_follow_from_the_generator(tmp_path: Path) -> None:
    for plain in still_sources(tmp_path):
        augments: tuple[Augment, ...] = (Darker(40), Darker(8))
        augmented = replace(plain, augment=augments)
        assert isinstance(plain, Source)
        assert isinstance(augmented, Source)
        for seed in range(6):
            random = seeded(seed)
            expected = plain.open((24, 24)).load(0, random).pixels
            for augment in augments:
                expected = augment(expected, random)
            assert torch.equal(augmented.open((24, 24)).load(0, seeded(seed)).pixels, expected)


def test_images_as_a_test_looks_at_them_are_their_centres(tmp_path: Path) -> None:
    for plain in still_sources(tmp_path):
        source = replace(plain, augment=(Darker(40),)).as_test()
        assert type(source) is type(plain)
        assert (source.crop, source.flip, source.augment) == (CentreCrop(), False, ())
        assert isinstance(source, Source)
        samples = source.open((24, 24))
        picture = read(tmp_path / "images" / "a" / "0.png")
        expected = window(cover(picture, (24, 24), mode="bicubic", ratio=256 / 224), (24, 24), 0.5)
        for seed in range(3):
            assert torch.equal(samples.load(0, seeded(seed)).pixels, expected)
        assert from_plain(to_plain(source)) == source


# --- splits -----------------------------------------------------------------------------------------------------------


def make_video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(("kind", "suffix"), [(ImageFolder, ".png"), (Videos, ".mp4")])
def test_classes_have_the_same_numbers_in_every_split(
    tmp_path: Path, kind: type[ImageFolder | Videos], suffix: str
) -> None:
    for name in ("train/ape/1", "train/cat/2", "val/bee/3", "val/cat/4", "extra/ant/5", "train/.hidden/6"):
        make_video(tmp_path / f"{name}{suffix}")
    (tmp_path / "val" / "dog").mkdir()  # nothing in it
    size = (8, 8) if kind is ImageFolder else (2, 8, 8)
    train, val = (kind(root=tmp_path, split=split).open(size) for split in ("train", "val"))
    assert train.classes == val.classes == ("ape", "bee", "cat", "dog")
    assert train.listing.labels.tolist() == [0, 2]
    assert val.listing.labels.tolist() == [1, 2]
    assert [val.name(index) for index in range(2)] == [str(tmp_path / f"val/{n}{suffix}") for n in ("bee/3", "cat/4")]
    assert kind(root=tmp_path / "val").open(size).classes == ("bee", "cat")
    for wrong in ("test", "..", "", "val/bee"):
        with pytest.raises(ValueError, match=f"has no subfolder split={wrong!r}, but extra, train, val"):
            kind(root=tmp_path, split=wrong).open(size)


def test_a_split_without_classes_is_unlabelled(tmp_path: Path) -> None:
    for name in ("train/ape/1.png", "test/7.png"):
        make_video(tmp_path / name)
    samples = ImageFolder(root=tmp_path, split="test").open((8, 8))
    assert (samples.classes, samples.listing.labels.tolist()) == ((), [-1])


def test_a_list_has_no_subfolders(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text("a.mp4,0\n")
    with pytest.raises(ValueError, match=r"split='val' is a subfolder of a folder, but root=.* a list"):
        Videos(root=tmp_path / "list.csv", split="val").open((2, 8, 8))


def test_the_manifest_of_the_whole_and_of_the_part_hold_for_a_split(tmp_path: Path) -> None:
    for name in ("train/a/1.mp4", "val/a/2.mp4", "val/a/3.mp4", "val/a/4.mp4"):
        make_video(tmp_path / name)

    def bad(name: str) -> manifest.Entry:
        return manifest.Entry(file=name, bytes=0, modified=0.0, usable=False, reason="empty file")

    manifest.write(manifest.beside(tmp_path), [bad("val/a/2.mp4")])
    manifest.write(manifest.beside(tmp_path / "val"), [bad("a/3.mp4")])
    samples = Videos(root=tmp_path, split="val").open((2, 8, 8))
    assert [os.path.basename(samples.name(index)) for index in range(len(samples))] == ["4.mp4"]


def test_a_manifest_of_images_leaves_out_what_is_unusable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "train/b/3.png"):
        ramp(tmp_path / name)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"")
    scan(tmp_path / "train", workers=1, pictures=True)
    for source in (ImageFolder(root=tmp_path / "train"), ImageFolder(root=tmp_path, split="train")):
        with caplog.at_level("INFO", "convmae.folder"):
            samples = source.open((8, 8))
        assert [os.path.basename(samples.name(index)) for index in range(len(samples))] == ["2.png", "3.png"]
        assert [sample.label for sample in (samples.load(0, seeded()), samples.load(1, seeded()))] == [1, 1]
        assert samples.left_out == (Unusable(str(tmp_path / "train/a/1.png"), "empty file", 0),)
        assert repr(samples).endswith("without 1 that are unusable")
        assert "left out, as the manifest has it: 1 x empty file" in caplog.messages
    elsewhere = (tmp_path / "train" / manifest.NAME).rename(tmp_path / "elsewhere")
    assert len(ImageFolder(root=tmp_path / "train").open((8, 8))) == 3
    assert len(ImageFolder(root=tmp_path / "train", manifest=elsewhere).open((8, 8))) == 2
    manifest.write(elsewhere, [replace(entry, usable=False) for entry in manifest.load(elsewhere).values()])
    with pytest.raises(ValueError, match=r"all 3 files in .* are unusable, as their manifest has it"):
        ImageFolder(root=tmp_path / "train", manifest=elsewhere).open((8, 8))
    with pytest.raises(ValueError, match=r"manifest='gone' is not there: `python -m video\.scan` writes one"):
        ImageFolder(root=tmp_path / "train", manifest=Path("gone")).open((8, 8))


@pytest.mark.slow
def test_the_demonstration_sets_have_a_part_to_validate_on() -> None:
    sizes: list[tuple[ImageFolder | Videos, tuple[int, ...], int]] = [
        (ImageFolder(split="val"), (32, 32), 120),
        (Videos(split="val"), (4, 32, 32), 80),
    ]
    for source, size, count in sizes:
        val, train = source.as_test().open(size), replace(source, split=None).open(size)
        assert (len(val), len(val.classes)) == (count, 8)
        assert val.classes == train.classes
        assert not {val.name(n) for n in range(len(val))} & {train.name(n) for n in range(len(train))}
        with pytest.raises(ValueError, match=re.escape("has no subfolder split='test', but train, val")):
            replace(source, split="test").open(size)


def test_every_source_has_a_test_form() -> None:
    for kind in (ImageFolder, ImageShards, Stills, Clips, Videos, VideoShards):
        assert callable(kind.as_test)
    assert ImageFolder(crop=RandomResizedCrop()).as_test() == ImageFolder(crop=CentreCrop(), flip=False)
