"""Two views of a sample: how far apart they are, in place and in time, and what is done to which."""

import os
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import CLIPS, MEDIA, counting, needs_media, numbers
from PIL import Image

from convmae import location
from convmae.augmentation import ColourJitter, Flip, GaussianBlur, ReverseChannels
from convmae.data import Batch, Sample, Stream
from convmae.images import ImageFolder, RandomResizedCrop
from convmae.launch import _told, _with_data
from convmae.shards import main, write_shard
from convmae.two_views import COLOUR, TwoViews
from video import readers
from video.clips import Dense, Segments, Twice
from video.datasets import Kinetics
from video.readers import Choice, Track
from video.recipes import demo_cmae
from video.shards import VideoShards
from video.videos import Videos


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apart(first: torch.Tensor, second: torch.Tensor, most: int) -> list[tuple[int, int]]:
    """By which shifts down and right the second view is the first's part."""
    height, width = first.shape[-2:]
    return [
        (y, x)
        for y in range(most)
        for x in range(most)
        if torch.equal(first[..., y:, x:], second[..., : height - y, : width - x])
    ]


# --- in place ---------------------------------------------------------------------------------------------------------


def test_views_of_pictures_are_a_drawn_shift_apart_and_all_shifts_are_drawn_alike() -> None:
    samples = TwoViews(source=ImageFolder(), shift=(4, 3), colour=()).open((32, 32))
    assert samples.views == 2
    drawn: Counter[tuple[int, int]] = Counter()
    for seed in range(360):
        sample = samples.load(seed % 40, seeded(seed))
        assert sample.second is not None
        assert sample.pixels.shape == sample.second.shape == (3, 32, 32)
        assert sample.pixels.is_contiguous()
        [shift] = apart(sample.pixels, sample.second, 6)
        drawn[shift] += 1
    assert set(drawn) == {(y, x) for y in range(4) for x in range(3)}
    chi_square = sum((count - 30) ** 2 / 30 for count in drawn.values())
    assert chi_square < 31.3, "11 degrees of freedom, one in a thousand"


def test_the_first_view_is_the_corner_of_what_the_source_loads() -> None:
    source = ImageFolder(augment=(Flip(probability=1),))
    first = TwoViews(source=source, shift=(32, 32)).open((64, 64)).load(7, seeded(1)).pixels
    assert torch.equal(first, source.open((96, 96)).load(7, seeded(1)).pixels[:, :64, :64])


def test_no_shift_gives_equal_views_and_loads_no_margin() -> None:
    for shift in ((0, 0), (1, 1)):
        sample = TwoViews(source=ImageFolder(), shift=shift, colour=()).open((32, 32)).load(3, seeded())
        assert sample.second is not None
        assert torch.equal(sample.pixels, sample.second)
    assert torch.equal(
        TwoViews(source=ImageFolder(), shift=(0, 0)).open((32, 32)).load(3, seeded()).pixels,
        ImageFolder().open((32, 32)).load(3, seeded()).pixels,
    )


@needs_media
def test_photographs_of_all_kinds_come_in_two_views() -> None:
    samples = TwoViews(source=ImageFolder(root=MEDIA / "images"), colour=()).open((96, 96))
    for index in range(min(6, len(samples))):
        sample = samples.load(index, seeded(index))
        assert sample.second is not None
        assert apart(sample.pixels, sample.second, 32)


# --- colours ----------------------------------------------------------------------------------------------------------


def test_colours_change_the_second_view_alone() -> None:
    plain = TwoViews(source=ImageFolder(), shift=(0, 0), colour=()).open((32, 32))
    coloured = TwoViews(source=ImageFolder(), shift=(0, 0)).open((32, 32))
    changed = 0
    for index in range(20):
        one, other = plain.load(index, seeded(index)), coloured.load(index, seeded(index))
        assert torch.equal(one.pixels, other.pixels)
        assert one.second is not None
        assert other.second is not None
        changed += not torch.equal(one.second, other.second)
    assert changed > 12
    jitter, blur = COLOUR
    assert jitter == ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8, grayscale=0.2)
    assert blur == GaussianBlur(sigma=(0.1, 2.0), probability=0.5)


def test_a_blur_is_pillows_and_keeps_what_is_flat() -> None:
    from PIL import ImageFilter

    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).permute(2, 0, 1)
    blurred = GaussianBlur(sigma=(1.5, 1.5 + 1e-9), probability=1)(picture, seeded())
    pillow = Image.fromarray(picture.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1.5))
    theirs = torch.from_numpy(np.asarray(pillow).copy()).permute(2, 0, 1)
    inside = (slice(None), slice(8, -8), slice(8, -8))
    wrong = (blurred[inside].float() - theirs[inside].float()).abs()
    assert wrong.mean() < 2, "Pillow's is made of boxes"
    flat = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(GaussianBlur(probability=1)(flat, seeded()), flat)
    assert torch.equal(GaussianBlur(probability=0)(picture, seeded()), picture)
    assert GaussianBlur(sigma=(2.0, 3.0), probability=1)(picture[:, :4, :4], seeded()).shape == (3, 4, 4)


def test_a_blur_is_the_same_in_all_frames_and_drawn_from_the_generator_alone() -> None:
    clip = torch.randint(0, 256, (3, 3, 24, 32), generator=seeded()).to(torch.uint8)
    blurred, unchanged = [], 0
    for seed in range(40):
        before = torch.random.get_rng_state()
        blurred.append(GaussianBlur()(clip, seeded(seed)))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(GaussianBlur()(clip[frame], seeded(seed)), blurred[-1][frame]) for frame in range(3))
        unchanged += torch.equal(blurred[-1], clip)
    assert 8 < unchanged < 32, "half of 40, four deviations to either side"
    spread = {float(pixels.float().std().round()) for pixels in blurred}
    assert len(spread) > 5, "of many widths"
    for wrong in ((2.0, 1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match=r"sigma=\(.*: must be the least and the largest"):
            GaussianBlur(sigma=wrong)


def test_channels_are_reversed() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert torch.equal(ReverseChannels()(pixels, seeded()), pixels[:, [2, 1, 0]])


# --- in time ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 40 frames that tell their numbers."""
    folder = tmp_path_factory.mktemp("counted")
    counting(folder / "a.mp4")
    return folder


@pytest.mark.parametrize(("sampling", "most"), [(Dense(stride=4), 6), (Dense(stride=1), 6), (Segments(), 5)])
def test_the_second_clip_begins_a_drawn_number_of_frames_later(counted: Path, sampling: Any, most: int) -> None:
    """Segments of five frames are left by no shift."""
    source = Videos(root=counted, sampling=sampling, crop=RandomResizedCrop(area=(1, 1), aspect=(1, 1)))
    samples = TwoViews(source=source, shift=(6, 0, 0), colour=()).open((8, 64, 64))
    later: Counter[int] = Counter()
    for seed in range(60):
        sample = samples.load(0, seeded(seed))
        assert sample.second is not None
        assert sample.pixels.shape == sample.second.shape == (3, 8, 64, 64)
        first, second = (numbers(view.permute(1, 2, 3, 0).numpy()) for view in (sample.pixels, sample.second))
        [shift] = {b - a for a, b in zip(first, second, strict=True)}
        later[shift] += 1
    assert set(later) == set(range(most))
    assert min(later.values()) >= 2


def test_both_clips_lie_in_the_video_where_they_can() -> None:
    for frames, by in ((30, 8), (29, 8), (40, 8), (5, 8), (1, 3)):
        track = Track(frames, 25.0, 64, 64)
        found = set()
        for seed in range(200):
            chosen = Twice(sampling=Dense(stride=4), by=by)(track, 16, seeded(seed))
            first, second = chosen[:8], chosen[8:]
            assert min(chosen) >= 0
            assert max(chosen) < frames
            [later] = {b - a for a, b in zip(first, second, strict=True)}
            found.add(later)
            if frames >= 29:
                assert np.diff(first).tolist() == [4] * 7, "the stride is not lowered for the later clip"
        assert found == set(range(min(by, max(frames - 28, 1)) if frames >= 29 else len(found)))


def test_all_shifts_in_time_are_drawn_alike_wherever_the_first_clip_begins() -> None:
    """13 frames of 40 make a clip: 24 to 28 places for the first, by how much later the second is."""
    twice, track = Twice(sampling=Dense(stride=4), by=5), Track(40, 25.0, 64, 64)
    drawn = [twice(track, 8, seeded(seed)) for seed in range(1000)]
    later = Counter(chosen[4] - chosen[0] for chosen in drawn)
    assert set(later) == set(range(5))
    assert sum((count - 200) ** 2 / 200 for count in later.values()) < 18.5, "4 degrees of freedom, one in a thousand"
    for shift in range(5):
        firsts = {chosen[0] for chosen in drawn if chosen[4] - chosen[0] == shift}
        assert min(firsts) == 0
        assert max(firsts) == 27 - shift, "up to where the later clip ends with the video"
    assert twice(track, 8, None) == 2 * Dense(stride=4)(track, 4, None)


@pytest.mark.parametrize("sampling", [Dense(), Dense(windows=True), Segments()], ids=repr)
def test_clips_of_one_frame_may_be_apart_in_time(counted: Path, sampling: Any) -> None:
    samples = TwoViews(source=Videos(root=counted, sampling=sampling), shift=(4, 0, 0), colour=()).open((1, 32, 32))
    later = set()
    for seed in range(40):
        sample = samples.load(0, seeded(seed))
        assert sample.second is not None
        [first], [second] = (numbers(view.permute(1, 2, 3, 0).numpy()) for view in (sample.pixels, sample.second))
        later.add(second - first)
    assert later == set(range(4))


@needs_media
def test_real_clips_are_a_drawn_shift_apart_in_time_and_place() -> None:
    samples = TwoViews(
        source=Videos(root=MEDIA / "clips", sampling=Dense(stride=1), flip=True), shift=(3, 4, 4), colour=()
    ).open((6, 48, 48))
    assert len(samples) > 20
    found = set()
    for index in range(0, len(samples), 2):
        sample = samples.load(index, seeded(index))
        assert sample.second is not None
        shifts = [
            (later, *shift)
            for later in range(3)
            for shift in apart(sample.pixels[:, later:], sample.second[:, : 6 - later], 4)
        ]
        assert shifts, samples.name(index)
        found.add(shifts[0])
    assert len(found) > 4


@needs_media
@pytest.mark.parametrize("reader", ["decord", "pyav", "torchcodec"])
@pytest.mark.parametrize(
    "name", ["skv_carphone_qcif.mp4", "drv_vp9.webm", "mm_6fps.mp4", "ucf_basketball_mpeg4.avi", "drv_vfr.mp4"]
)
def test_one_read_of_two_clips_gives_what_two_reads_give(name: str, reader: Choice) -> None:
    """Also where the clips share frames, as they do at stride 2 where one is 2 or 4 frames later."""
    if reader not in readers.installed():
        assert not os.environ.get("CI"), f"{reader} is not installed"
        pytest.skip(f"{reader} is not installed")
    [path] = [clip for clip in CLIPS if clip.name == name]

    def both(track: Track) -> list[int]:
        drawn = (Twice(sampling=Dense(stride=2), by=5)(track, 8, seeded(seed)) for seed in range(99))
        return next(chosen for chosen in drawn if len({*chosen}) in (5, 6, 7))

    def one(track: Track) -> list[int]:
        return both(track)[:4]

    def other(track: Track) -> list[int]:
        return both(track)[4:]

    together, *alone = (readers.read(path, choose, reader=reader) for choose in (both, one, other))
    assert np.array_equal(together, np.concatenate(alone))


def test_shards_and_data_sets_give_the_clips_that_their_files_give(tmp_path: Path) -> None:
    for number in range(4):
        counting(tmp_path / "files" / "train" / f"{number % 2}" / f"{number}.mp4", frames=20 + number)
    files = sorted((tmp_path / "files").rglob("*.mp4"))
    write_shard(
        tmp_path / "shards" / "0.tar",
        ((path.stem, {"mp4": path.read_bytes(), "cls": path.parent.name.encode()}) for path in files),
    )
    assert main([str(tmp_path / "shards")]) == 0
    sources = (
        Videos(root=tmp_path / "files" / "train"),
        Kinetics(root=tmp_path / "files"),
        VideoShards(root=tmp_path / "shards", lanes=2, window=2),
    )
    opened = [TwoViews(source=source, shift=(3, 4, 4)).open((4, 32, 32)) for source in sources]
    for seed in range(4):
        by_name = [
            {Path(samples.name(index)).stem: samples.load(index, seeded(seed)) for index in range(len(samples))}
            for samples in opened
        ]
        for name, sample in by_name[0].items():
            assert sample.second is not None
            for others in by_name[1:]:
                other = others[name]
                assert other.second is not None
                assert torch.equal(sample.pixels, other.pixels)
                assert torch.equal(sample.second, other.second)
                assert sample.label == other.label
    orders = [Stream(samples, (4, 32, 32), 2, batch_size=1).order(0) for samples in (opened[2], opened[2].samples)]
    assert torch.equal(*orders), "that of the shards"


def test_crop_and_flip_are_the_same_in_both_clips() -> None:
    source = Videos(split="train", sampling=Dense(stride=1), flip=True, augment=(Flip(),))
    samples = TwoViews(source=source, shift=(3, 0, 0), colour=()).open((8, 32, 32))
    agreed = 0
    for seed in range(12):
        sample = samples.load(seed, seeded(seed))
        assert sample.second is not None
        agreed += any(torch.equal(sample.pixels[:, later:], sample.second[:, : 8 - later]) for later in range(3))
    assert agreed == 12


def test_frames_of_a_clip_change_colour_alike() -> None:
    flat = replace(Videos(split="train"), augment=(_Flat(),))
    sample = TwoViews(source=flat, shift=(2, 4, 4)).open((4, 32, 32)).load(0, seeded(5))
    assert sample.second is not None
    assert bool((sample.second == sample.second[:, :1]).all()), "what was equal in all frames stays so"


@dataclass(frozen=True)
class _Flat:
    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        colour = torch.tensor([200, 100, 30], dtype=torch.uint8)
        return colour.view(3, 1, 1).expand(pixels.shape).contiguous()


def test_repeated_clips_have_views_of_their_own() -> None:
    source = Videos(split="train", sampling=Dense(stride=2), repeats=3)
    samples = TwoViews(source=source, shift=(2, 4, 4), colour=()).open((4, 32, 32))
    sample = samples.load(0, seeded(1))
    assert sample.second is not None
    assert sample.pixels.shape == sample.second.shape == (3, 3, 4, 32, 32)
    assert not torch.equal(sample.pixels[0], sample.pixels[1])
    apart_by = {clip: apart(sample.pixels[clip, :, :1], sample.second[clip, :, :1], 4) for clip in range(3)}
    assert len({tuple(shifts) for shifts in apart_by.values()}) > 1, "each is drawn by itself"


def test_second_views_of_repeated_clips_stay_beside_the_first_in_a_batch() -> None:
    source = Videos(split="train", sampling=Dense(stride=2), repeats=2)
    samples = TwoViews(source=source, shift=(0, 0, 0), colour=()).open((4, 32, 32))
    [[batch]] = list(Stream(samples, (4, 32, 32), 0, batch_size=6).batches(0, 1, workers=0))
    assert batch.second is not None
    assert batch.pixels.shape == (6, 3, 4, 32, 32)
    assert torch.equal(batch.second, batch.pixels), "which no shift and no colours leave equal"


# --- as a source ------------------------------------------------------------------------------------------------------


def a_stream(**options: Any) -> Stream:
    samples = TwoViews(source=ImageFolder(), shift=(4, 4)).open((32, 32))
    return Stream(**{"samples": samples, "size": (32, 32), "seed": 3, "batch_size": 8, **options})


def batches(stream: Stream, workers: int) -> list[Batch]:
    return [batch for step in stream.batches(0, 2, workers=workers) for batch in step]


def test_batches_have_the_second_views_whatever_workers_and_processes() -> None:
    alone, by_workers = batches(a_stream(), 0), batches(a_stream(), 2)
    shared = [batches(a_stream(rank=rank, world=2), 0) for rank in range(2)]
    for number, (one, other) in enumerate(zip(alone, by_workers, strict=True)):
        assert one.second is not None
        assert other.second is not None
        assert one.second.shape == one.pixels.shape == (8, 3, 32, 32)
        assert torch.equal(one.second, other.second)
        for rank in range(2):
            part = shared[rank][number].second
            assert part is not None
            assert torch.equal(part, one.second[rank::2])


def test_damaged_files_are_skipped_and_a_batch_of_none_has_empty_views(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    samples = TwoViews(source=ImageFolder(root=tmp_path), shift=(4, 4)).open((32, 32))
    [[batch]] = list(Stream(samples, (32, 32), 0, batch_size=2).batches(0, 1, workers=0))
    assert len(batch.skipped) == 2
    assert batch.second is not None
    assert batch.second.shape == (0, 3, 32, 32)
    assert Sample(torch.zeros(3, 1, 1)).second is None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_second_views_of_a_batch_are_of_those_that_could_be_loaded(tmp_path: Path, workers: int) -> None:
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    samples = TwoViews(source=ImageFolder(root=tmp_path), shift=(4, 4), colour=()).open((32, 32))
    [[batch]] = list(Stream(samples, (32, 32), 0, batch_size=6).batches(0, 1, workers=workers))
    assert [Path(problem.name).name for problem in batch.skipped] == ["2.png"]
    assert batch.second is not None
    assert batch.second[:, 0, 0, 0].tolist() == [40 * index for index in batch.indices.tolist()]
    assert sorted(batch.indices.tolist()) == [0, 1, 3, 4, 5]


def test_a_batch_of_single_views_has_no_second(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    stream = Stream(ImageFolder(root=tmp_path).open((32, 32)), (32, 32), 0, batch_size=1)
    found = [batch for step in stream.batches(0, 2, workers=0) for batch in step]
    assert sorted(len(batch.pixels) for batch in found) == [0, 1]
    assert all(batch.second is None for batch in found)


def test_what_the_samples_know_is_passed_on() -> None:
    source = TwoViews(source=ImageFolder(split="train"))
    samples = source.open((32, 32))
    own = ImageFolder(split="train").open((64, 64))
    assert samples.classes == own.classes
    assert samples.name(3) == own.name(3)
    assert len(samples) == len(own)
    assert not hasattr(samples, "order")
    assert repr(samples).endswith(", cut to two views of (32, 32) up to (31, 31) apart")
    again = pickle.loads(pickle.dumps(samples))
    one, other = (each.load(2, seeded(2)).second for each in (samples, again))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    assert source.as_test() == ImageFolder(split="train").as_test()


def test_data_are_pointed_elsewhere_through_the_views(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    source = TwoViews(source=ImageFolder(split="val"))
    assert location.has_root(source)
    moved = location.located(source, tmp_path)
    assert moved.root == tmp_path
    assert isinstance(moved.source, ImageFolder)
    assert location.whole(moved).split is None
    assert _told(moved, ", from there") == f"{tmp_path}, val, from there"
    with pytest.raises(ValueError, match="there is no"):
        location.located(source, tmp_path / "nowhere")


def test_the_launchers_flag_and_variable_reach_the_source_of_the_views(
    counted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = demo_cmae()
    assert isinstance(run.data, TwoViews)
    monkeypatch.delenv("CONVMAE_DATA", raising=False)
    assert _with_data(run, None, None) == run
    assert "the built-in demo set" in capsys.readouterr().out
    by_flag = _with_data(run, str(counted), None)
    assert isinstance(run.data.source, Videos)
    assert by_flag.data == replace(run.data, source=replace(run.data.source, root=counted))
    monkeypatch.setenv("CONVMAE_DATA", str(counted))
    assert _with_data(run, None, None) == by_flag
    assert f"{counted}, from $CONVMAE_DATA" in capsys.readouterr().out
    assert len(by_flag.data.open(run.model.size)) == 1


def test_what_cannot_be_is_refused_with_what_to_change() -> None:
    with pytest.raises(ValueError, match="from 0 for each axis; got 32"):
        TwoViews(source=ImageFolder(), shift=32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from 0 for each axis; got \(-1, 3\)"):
        TwoViews(source=ImageFolder(), shift=(-1, 3))
    with pytest.raises(ValueError, match=r"shift=\(32, 32\) has 2 axes, the model's input \(8, 32, 32\) has 3"):
        TwoViews(source=Videos()).open((8, 32, 32))
    with pytest.raises(ValueError, match=r"ImageFolder has no `twice`.*give shift=\(0, 4, 4\)"):
        TwoViews(source=ImageFolder(), shift=(3, 4, 4)).open((8, 32, 32))
    with pytest.raises(ValueError, match="is a test, which looks at single clips"):
        TwoViews(source=Videos().as_test(), shift=(3, 4, 4)).open((8, 32, 32))
    with pytest.raises(ValueError, match=r"loads two clips of T frames: \(2 \* T, H, W\), not \(5, 32, 32\)"):
        Videos().twice(2).open((5, 32, 32))
    with pytest.raises(ValueError, match="by=0"):
        Twice(sampling=Dense(), by=0)
