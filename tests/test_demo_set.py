"""The demonstration set."""

import multiprocessing
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

import video.demo
from convmae import demo
from convmae.images import ImageFolder
from video.clips import Dense
from video.videos import Videos


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video.demo.make(tmp_path_factory.mktemp("demo") / "videos")


def test_first_frames_are_equal_for_all_motions_and_last_ones_differ() -> None:
    clips = [demo.clip(motion, rng(1)) for motion in demo.MOTIONS]
    assert all((clip[0] == clips[0][0]).all() for clip in clips)
    assert len({clip[-1].tobytes() for clip in clips}) == len(clips)


def test_no_moment_has_places_or_orientations_of_its_own() -> None:
    time = np.arange(32, dtype=np.float32) / 32
    for motion in demo.MOTIONS:
        random = rng(2)
        places, turns = [], []
        for _ in range(400):
            shift, turn = demo._motion(motion, random, time)
            places.append((random.uniform(0, 1, 2) + shift) % 1)
            turns.append((random.uniform(0, 2 * np.pi) + turn) % (2 * np.pi))
        for moment in (0, 15, 31):
            for drawn in (np.array(places)[:, moment, 0], np.array(places)[:, moment, 1]):
                assert np.histogram(drawn, 4, (0, 1))[0].min() > 70
            assert np.histogram(np.array(turns)[:, moment], 4, (0, 2 * np.pi))[0].min() > 70


def test_shapes_move_as_their_class_says() -> None:
    time = np.array([0.0, 0.25], np.float32)
    signs = {motion: np.sign(demo._motion(motion, rng(3), time)[0][1]).tolist() for motion in demo.MOTIONS}
    assert [signs[motion] for motion in ("left", "right", "up", "down")] == [[-1, 0], [1, 0], [0, -1], [0, 1]]
    assert demo._motion("turn_left", rng(3), time)[1][1] < 0 < demo._motion("turn_right", rng(3), time)[1][1]
    with pytest.raises(ValueError, match="motion='jump'"):
        demo._motion("jump", rng(3), time)


def test_pictures_are_the_same_each_time_and_shapes_differ() -> None:
    stills = [demo.still(shape, rng(4)) for shape in demo.SHAPES]
    assert len({still.tobytes() for still in stills}) == len(stills)
    assert all(still.shape == (96, 96, 3) and still.std() > 10 for still in stills)
    assert (demo.still("star", rng(4)) == demo.still("star", rng(4))).all()
    with pytest.raises(ValueError, match="shape='blob'"):
        demo.still("blob", rng(4))


def test_the_set_is_small_complete_and_labelled_by_motion(videos: Path) -> None:
    for split, count in (("train", 320), ("val", 80)):
        samples = Videos(root=videos / split, sampling=Dense(stride=2)).open((16, 64, 64))
        assert len(samples) == count
        assert samples.listing.classes == demo.MOTIONS
        assert np.bincount(samples.listing.labels).tolist() == [count // 8] * 8
    assert sum(path.stat().st_size for path in videos.rglob("*.mp4")) < 8e6
    pixels = samples.load(3, torch.Generator().manual_seed(0)).pixels
    assert pixels.shape == (3, 16, 64, 64)
    assert (pixels[:, 0] != pixels[:, -1]).any()


def test_a_file_holds_what_was_drawn(videos: Path) -> None:
    from video import readers

    drawn = demo.clip("left", np.random.default_rng([demo.SEED, 0, demo.MOTIONS.index("left"), 7]))
    read = readers.read(videos / "train" / "left" / "007.mp4", lambda track: range(track.frames))
    assert read.shape == drawn.shape
    assert np.abs(read.astype(float) - drawn).mean() < 6


def test_a_set_that_is_there_is_not_made_again(videos: Path) -> None:
    before = os.stat(videos / "train" / "left" / "000.mp4").st_mtime_ns
    assert video.demo.make(videos) == videos
    assert os.stat(videos / "train" / "left" / "000.mp4").st_mtime_ns == before


def test_no_root_means_the_set_in_the_cache(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVMAE_CACHE", str(tmp_path))
    (tmp_path / "demo-videos-v1").symlink_to(videos)
    assert len(Videos().open((8, 32, 32))) == 320
    monkeypatch.setattr(demo, "still", lambda shape, random: random.integers(0, 256, (96, 96, 3), np.uint8))
    samples = ImageFolder().open((32, 32))
    assert (len(samples), samples.listing.classes) == (480, demo.SHAPES)
    assert stat.S_IMODE((tmp_path / "demo-images-v1").stat().st_mode) == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-images-v1", "demo-videos-v1"]


def _make(folder: Path, barrier: object) -> None:
    def fill(making: Path) -> None:
        (making / "half").write_text("half")
        barrier.wait(60)  # type: ignore[attr-defined]
        (making / "whole").write_text(str(os.getpid()))

    assert (demo.cached("set", fill, folder) / "whole").exists()


def test_two_processes_may_make_it_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    both = [fork.Process(target=_make, args=(tmp_path / "set", barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(making: Path) -> None:
        (making / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.cached("set", fail, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONVMAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set CONVMAE_CACHE to a folder"):
        video.demo.make()
