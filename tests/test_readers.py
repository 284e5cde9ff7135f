"""Frames of videos: those that were asked for, from every reader, of every file, or one clear reason why not."""

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import BAD, BEST_STREAM, CLIPS, MEDIA, UNUSABLE, counting, needs_media, numbers
from PIL import Image

from convmae.data import Packed, UnusableFileError
from convmae.images import resize
from video import readers
from video.demo import encode
from video.readers import Choice, Track

FRAMES_THAT_EXIST = {
    "drv_editlist_copycut.mp4": 165,
    "tc_discard_first_keyframe.mp4": 25,
    "corrupt_middle.mp4": 92,
    "decord_corrupted.mp4": 28,
    "trunc_faststart50.mp4": 103,
}


@pytest.fixture(params=["decord", "pyav", "torchcodec"])
def reader(request: pytest.FixtureRequest) -> Choice:
    """Every reader; where one is missing in CI, that is a failure."""
    choice: Choice = request.param
    if choice not in readers.installed():
        assert not os.environ.get("CI"), f"{choice} is not installed"
        pytest.skip(f"{choice} is not installed")
    return choice


def all_of(track: Track) -> range:
    return range(track.frames)


def at(*indices: int) -> Callable[[Track], list[int]]:
    return lambda track: [index % track.frames for index in indices]


def in_sequence(path: Path) -> list[np.ndarray]:
    """All frames, small, decoded one after the other as far as the file goes: what every reader is held to."""
    frames = []
    with av.open(path) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        try:
            for frame in container.decode(stream):
                small = frame.reformat(frame.width // 4, frame.height // 4, "rgb24", interpolation="AREA").to_ndarray()
                frames.append(np.rot90(small, round(frame.rotation / 90)).astype(float))
        except av.error.FFmpegError:
            pass
    return frames


def shrunk(frames: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return resize(pixels, (shape[0], shape[1]), "bilinear").permute(0, 2, 3, 1).numpy().astype(float)


# --- the frames that were asked for -----------------------------------------------------------------------------------


@needs_media
@pytest.mark.slow
@pytest.mark.parametrize("path", [*CLIPS, *(path for path in BAD if path.name not in UNUSABLE)], ids=lambda p: p.name)
def test_every_reader_returns_the_frames_of_a_decode_from_start_to_end(path: Path, reader: Choice) -> None:
    truth = in_sequence(path)
    for seed in range(3):
        chosen: list[int] = []

        def choose(track: Track, seed: int = seed, chosen: list[int] = chosen) -> list[int]:
            chosen[:] = random.Random(seed).choices(range(track.frames), k=6)
            return chosen

        frames = readers.read(path, choose, reader=reader)
        for index, frame in zip(chosen, shrunk(frames, truth[0].shape), strict=True):
            near = {
                other: np.abs(frame - truth[other]).mean()
                for other in range(max(index - 3, 0), index + 4)
                if other < len(truth)
            }
            assert near[index] <= min(near.values()) + 1.5, (index, near)
            assert near[index] < 20


@needs_media
def test_what_is_known_of_real_clips_is_what_a_reader_says_of_them(reader: Choice) -> None:
    for about in json.loads((MEDIA / "clips" / "index.json").read_text()):
        seen: list[Track] = []

        def choose(track: Track, seen: list[Track] = seen) -> list[int]:
            seen.append(track)
            return [0]

        frames = readers.read(MEDIA / "clips" / about["file"], choose, reader=reader)
        track = seen[-1]
        assert track.frames == BEST_STREAM.get(about["file"], (about["frames_decoded"],))[0], about["file"]
        if about["file"] not in BEST_STREAM:
            assert sorted(frames.shape[1:3]) == sorted([about["h"], about["w"]])
            assert track.fps == pytest.approx(float(Fraction(about["avg_fps"])), rel=0.06), about["file"]


def test_the_frames_asked_for_are_the_frames_returned(tmp_path: Path, reader: Choice) -> None:
    path = counting(tmp_path / "counting.mp4")
    asked, tracks = [0, 7, 3, 39, 39, 21], []
    frames = readers.read(path, lambda track: tracks.append(track) or asked, reader=reader)  # type: ignore[func-returns-value]
    assert tracks[-1][:2] == (40, 16.0)
    assert frames.shape == (6, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == asked


def test_far_apart_frames_of_a_long_video_are_found_without_decoding_all(tmp_path: Path, reader: Choice) -> None:
    path = tmp_path / "long.mp4"
    encode(path, np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2))
    truth = in_sequence(path)
    frames = readers.read(path, at(599, 3, 300), reader=reader)
    for index, frame in zip((599, 3, 300), shrunk(frames, truth[0].shape), strict=True):
        assert np.argmin([np.abs(frame - other).mean() for other in truth]) == index


def test_large_files_are_decoded_small(tmp_path: Path, reader: Choice) -> None:
    path = counting(tmp_path / "large.mp4", frames=3, height=180, width=320)
    small = (3, 180, 320, 3) if reader == "decord" else (3, 90, 160, 3)  # decord would have to open it twice
    assert readers.read(path, all_of, short_side=90, reader=reader).shape == small
    assert readers.read(path, all_of, short_side=91, reader=reader).shape == (3, 180, 320, 3)


@needs_media
def test_rotated_files_come_upright(reader: Choice) -> None:
    path = MEDIA / "clips" / "nasa_rot90_17frames.mp4"
    assert readers.read(path, at(-1), reader=reader).shape == (1, 480, 270, 3)
    small = (1, 480, 270, 3) if reader == "decord" else (1, 178, 100, 3)
    assert readers.read(path, at(0), short_side=100, reader=reader).shape == small


@needs_media
@pytest.mark.parametrize("name", FRAMES_THAT_EXIST)
def test_frames_that_do_not_exist_are_not_made_up(name: str, reader: Choice) -> None:
    tracks: list[Track] = []

    def last_three(track: Track) -> list[int]:
        tracks.append(track)
        return [track.frames - 3, track.frames - 2, track.frames - 1]

    frames = readers.read(next(MEDIA.glob(f"*/{name}")), last_three, reader=reader)
    assert tracks[-1].frames == FRAMES_THAT_EXIST[name]
    assert (frames[0] != frames[1]).any()
    assert (frames[1] != frames[2]).any()


@needs_media
def test_a_reader_is_not_used_where_it_is_known_to_be_wrong(caplog: pytest.LogCaptureFixture) -> None:
    wrong: dict[Choice, tuple[str, str]] = {
        "decord": ("drv_editlist_copycut.mp4", "it counts frames that an edit list cuts off"),
        "torchcodec": ("mm_test_mpeg4_mp3.avi", "off by one on AVI"),
    }
    for choice, (name, why) in wrong.items():
        with caplog.at_level(logging.DEBUG, "video"):
            readers.read(MEDIA / "clips" / name, at(0), reader=choice)
        assert any(f"{choice} gives up" in message and why in message for message in caplog.messages)
        caplog.clear()


@needs_media
def test_the_last_frame_of_an_avi_with_b_frames_is_the_last(reader: Choice) -> None:
    path = MEDIA / "clips" / "mm_test_mpeg4_mp3.avi"
    truth = in_sequence(path)
    for _ in range(8):
        [frame] = shrunk(readers.read(path, at(-1), reader=reader), truth[0].shape)
        assert np.argmin([np.abs(frame - other).mean() for other in truth]) == len(truth) - 1


# --- files inside files, and folders ----------------------------------------------------------------------------------


@needs_media
def test_the_bytes_of_a_file_read_as_the_file(reader: Choice) -> None:
    for name in ("kin_pancake.mkv", "drv_editlist_copycut.mp4", "mm_test_mpeg4_mp3.avi"):
        path = MEDIA / "clips" / name
        packed = Packed(f"shard.tar/{name}", path.read_bytes())
        frames = readers.read(path, at(5, 77, 60), reader=reader)
        assert (readers.read(packed, at(5, 77, 60), reader=reader) == frames).all()
    with pytest.raises(UnusableFileError, match=r"^shard\.tar/broken\.mp4: not a video"):
        readers.read(Packed("shard.tar/broken.mp4", (MEDIA / "bad" / "text.mp4").read_bytes()), at(0), reader=reader)
    with pytest.raises(UnusableFileError, match=r"^shard\.tar/empty\.mp4: empty file"):
        readers.read(Packed("shard.tar/empty.mp4", b""), at(0), reader=reader)


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (32, 24), (6 * number,) * 3).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").touch()
    tracks: list[Track] = []
    frames = readers.read(tmp_path, lambda track: tracks.append(track) or [10, 2, 9])  # type: ignore[func-returns-value]
    assert tracks == [Track(12, 0.0, 24, 32)]
    assert numbers(frames) == [10, 2, 9]
    assert readers.read(tmp_path, at(0), short_side=12).shape == (1, 12, 16, 3)


def test_a_folder_of_frames_that_is_damaged_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnusableFileError, match="a folder without frames"):
        readers.read(tmp_path, at(0))
    for number in range(3):
        Image.new("RGB", (32, 24 + 8 * (number == 2))).save(tmp_path / f"{number}.png")
    assert readers.read(tmp_path, at(0, 1)).shape == (2, 24, 32, 3)
    with pytest.raises(UnusableFileError, match=r"its frame 2\.png is of another size: \(32, 32\), not \(24, 32\)"):
        readers.read(tmp_path, at(0, 2))
    (tmp_path / "._0.png").write_bytes(b"what another system leaves")
    assert readers.read(tmp_path, at(0, 1)).shape == (2, 24, 32, 3)
    (tmp_path / "flow_x_1.png").touch()
    with pytest.raises(UnusableFileError, match=r"pictures of several kinds, not of one video: #\.png, flow_x_#\.png"):
        readers.read(tmp_path, at(0))
    (tmp_path / "flow_x_1.png").unlink()
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(UnusableFileError, match=r"1\.png: empty file"):
        readers.read(tmp_path, at(0, 1))


# --- files that cannot be read ----------------------------------------------------------------------------------------


@needs_media
def test_every_bad_file_gives_what_is_there_or_says_what_is_wrong(
    reader: Choice, capfd: pytest.CaptureFixture[str]
) -> None:
    reasons: dict[str, UnusableFileError] = {}
    for path in BAD:
        try:
            assert readers.read(path, at(0, 1), reader=reader).shape[0] == 2
        except UnusableFileError as error:
            reasons[path.name] = error
    assert reasons.keys() == UNUSABLE.keys()
    for name, raised in reasons.items():
        assert UNUSABLE[name] in raised.reason
        assert "\n" not in raised.reason
        assert raised.name == str(MEDIA / "bad" / name)
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) <= 4  # decord has one line on a file that it cannot open, and no switch for it


def test_a_missing_file_says_so(tmp_path: Path, reader: Choice) -> None:
    with pytest.raises(UnusableFileError, match=r"gone\.mp4: no such file"):
        readers.read(tmp_path / "gone.mp4", at(0), reader=reader)


def test_a_picture_is_not_a_video(tmp_path: Path, reader: Choice) -> None:
    path = counting(tmp_path / "still.mp4", frames=1)
    with pytest.raises(UnusableFileError, match="a picture, not a video"):
        readers.read(path, at(0), reader=reader)
    Image.new("RGB", (64, 48)).save(tmp_path / "picture.mp4", "JPEG")
    with pytest.raises(UnusableFileError, match="a picture, not a video"):
        readers.read(tmp_path / "picture.mp4", at(0), reader=reader)


def test_a_reader_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reader='opencv' is not known or not installed; there are auto, .*pyav"):
        readers.read(tmp_path, at(0), reader="opencv")  # type: ignore[arg-type]


def test_what_decord_cannot_decode_pyav_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    codec = next((name for name in ("libsvtav1", "libaom-av1") if name in av.codecs_available), None)
    if codec is None or "decord" not in readers.installed():
        pytest.skip("no AV1 encoder, or no decord")
    path = tmp_path / "av1.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for level in range(0, 120, 6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((96, 128, 3), level, np.uint8))))
        container.mux(stream.encode())
    readers._say_that_pyav_helps.cache_clear()
    with caplog.at_level(logging.INFO, "video"):
        for _ in range(2):
            assert numbers(readers.read(path, at(0, 5, 19))) == [0, 5, 19]
    assert sum("PyAV reads those" in message for message in caplog.messages) == 1


# --- what reading costs and leaves ------------------------------------------------------------------------------------


def test_decord_and_torchcodec_are_not_imported_before_a_file_is_read() -> None:
    code = "import sys, video.videos, video.readers; sys.exit(bool({'decord', 'torchcodec'} & set(sys.modules)))"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux's")
def test_memory_and_open_files_stay_flat(tmp_path: Path, reader: Choice) -> None:
    path = counting(tmp_path / "a.mp4", frames=60, height=180, width=320)

    def memory() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def read(times: int) -> None:
        for _ in range(times):
            readers.read(path, at(0, 10, 20), short_side=64, reader=reader)

    read(40)
    before, files = memory(), len(os.listdir("/proc/self/fd"))
    read(200)
    assert memory() - before < 25
    assert len(os.listdir("/proc/self/fd")) <= files


# A process forked from one that has used torch's threads has none of them, and torch would wait for them: with one
# thread it does not. torch's loader processes have one.
PROGRAM = """
import hashlib, multiprocessing, sys
import torch
from video import readers

def digest(name):
    frames = readers.read(name, lambda track: [0, 40, 9], reader=sys.argv[2])
    return hashlib.sha256(frames.tobytes()).hexdigest()

if __name__ == "__main__":
    names = sys.argv[3:]
    here = [digest(name) for name in names]
    with multiprocessing.get_context(sys.argv[1]).Pool(2, torch.set_num_threads, (1,)) as pool:
        there = pool.map_async(digest, 2 * names).get(timeout=200)
    sys.exit(there != 2 * here)
"""


@needs_media
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_has_read_videos_starts_others_that_read_the_same(
    method: str, reader: Choice, tmp_path: Path
) -> None:
    names = [str(MEDIA / "clips" / name) for name in ("kin_pancake.mkv", "ucf_basketball_mpeg4.avi", "drv_vp9.webm")]
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "program.py", method, reader, *names], timeout=300, check=False)
    assert done.returncode == 0
