"""Preparation: the same frames at the same times, small and quick to decode; resumable; originals are only read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import MEDIA, needs_media

from convmae.data import generator
from convmae.demo import clip
from convmae.images import resize
from convmae.shards import load_index, look_into
from video import readers
from video.clips import Dense
from video.demo import encode as encode_frames
from video.in_parallel import LostError, in_processes
from video.prepare import Encoding, Made, Task, encode, main, prepare, work
from video.readers import Choice
from video.shards import VideoShards
from video.videos import Videos

ROOT = Path(__file__).parents[1]
CLIPS = sorted(path for path in (MEDIA / "clips").glob("*") if path.suffix != ".json")
QUICK = {  # each of another kind: cut by an edit list, of variable rate, rotated, AVI
    "drv_editlist_copycut.mp4",
    "drv_vfr.mp4",
    "nasa_rot90_17frames.mp4",
    "ucf_basketball_mpeg4.avi",
}


def look(path: Path, reader: Choice = "pyav") -> tuple[int, readers.Frames]:
    """How many frames a video has, and the first, the middle and the last one."""
    count = 0

    def choose(track: readers.Track) -> list[int]:
        nonlocal count
        count = track.frames
        return [0, count // 2, count - 1]

    frames = readers.read(path, choose, reader=reader)
    return count, frames


def times(path: Path) -> list[Fraction]:
    """When frames are shown, in seconds after the first."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        assert stream.time_base is not None
        found = [frame.pts * stream.time_base for frame in container.decode(stream) if frame.pts is not None]
    return [time - found[0] for time in found]


def keys(path: Path) -> list[int]:
    """The places of key frames, and the number of frames."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        return [*(place for place, packet in enumerate(packets) if packet.is_keyframe), len(packets)]


# ---- one video -------------------------------------------------------------------------------------------------------


@needs_media
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if path.name in QUICK else pytest.mark.slow, id=path.name) for path in CLIPS]
)
def test_a_video_keeps_its_frames_and_their_times_and_gets_small_and_upright(path: Path, tmp_path: Path) -> None:
    before, target = path.stat(), tmp_path / "new" / "video.mp4"
    assert encode(str(path), target, Encoding()) == Made()
    frames, pictures = look(path)
    for reader in readers.installed():
        count, made = look(target, reader)
        assert count == frames
        height, width = pictures.shape[1:3]
        assert min(made.shape[1:3]) == min(320, height // 2 * 2, width // 2 * 2)
        assert abs(made.shape[2] / made.shape[1] - width / height) < 0.01
        small = resize(torch.from_numpy(pictures).permute(0, 3, 1, 2), made.shape[1:3], "bicubic").permute(0, 2, 3, 1)
        assert (small.float() - torch.from_numpy(made).float()).abs().mean() < 4
    if path.suffix != ".avi":  # whose times are made up, not rising or missing
        assert times(target) == pytest.approx(times(path), abs=1e-6)
    rising = times(target)
    assert len(rising) == frames
    assert all(early < late for early, late in pairwise(rising))
    assert max(np.diff(keys(target))) <= 32
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size, before.st_ino) == (after.st_mtime_ns, after.st_size, after.st_ino)
    assert [entry.name for entry in target.parent.iterdir()] == ["video.mp4"]


@needs_media
def test_a_video_that_is_good_already_is_copied_and_else_encoded(tmp_path: Path) -> None:
    good = MEDIA / "clips" / "mm_32frames.mp4"
    encode(str(good), tmp_path / "same.mp4", Encoding(short_side=256))
    assert (tmp_path / "same.mp4").read_bytes() == good.read_bytes()
    encode(str(good), tmp_path / "smaller.mp4", Encoding(short_side=128))
    count, frames = look(tmp_path / "smaller.mp4")
    assert (count, frames.shape[1:3]) == (32, (128, 170))
    # What was made is good: a second time changes nothing, though it has been cut to another name.
    encode(str(tmp_path / "smaller.mp4"), tmp_path / "again.mp4", Encoding(short_side=128))
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "smaller.mp4").read_bytes()


@needs_media
def test_a_video_that_breaks_off_is_kept_as_far_as_it_goes_and_that_is_noted(tmp_path: Path) -> None:
    made = encode(str(MEDIA / "bad" / "corrupt_middle.mp4"), tmp_path / "a.mp4", Encoding())
    assert made.note.startswith("92 of 250 frames could be decoded (Invalid data")
    assert look(tmp_path / "a.mp4")[0] == 92


@needs_media
@pytest.mark.parametrize("sound", [False, True])
def test_sound_is_kept_where_that_is_asked_for_and_begins_with_the_pictures(tmp_path: Path, sound: bool) -> None:
    path, target = MEDIA / "clips" / "drv_editlist_copycut.mp4", tmp_path / "a.mp4"
    encode(str(path), target, Encoding(keep_audio=sound))
    with av.open(str(target)) as container:
        assert len(container.streams.audio) == sound
        for stream in container.streams.audio:
            assert stream.duration is not None
            assert stream.time_base is not None
            assert float(stream.duration * stream.time_base) == pytest.approx(6.63, abs=0.05)
            assert abs((stream.start_time or 0) * stream.time_base) < 0.05
    assert look(target)[0] == 165


# ---- many videos -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips in two classes, one of them in an AVI of the same name as another, and a file that is no video."""
    root = tmp_path_factory.mktemp("originals")
    for number in range(8):
        path = root / ("down", "up")[number % 2] / f"clip.{number}.{'avi' if number == 7 else 'mp4'}"
        path.parent.mkdir(exist_ok=True)
        encode_frames(path, clip("up", np.random.default_rng(number), frames=10, size=64 if number else 48))
    shutil.copy(root / "up" / "clip.7.avi", root / "up" / "clip.5.avi")
    (root / "up" / "broken.mp4").write_bytes(b"no video" * 500)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


def test_a_folder_becomes_one_that_trains_and_a_second_time_costs_nothing(originals: Path, tmp_path: Path) -> None:
    before, out = (contents(originals), written(originals)), tmp_path / "small"
    summary = prepare(originals, out, encoding=Encoding(short_side=48), workers=2)
    assert (summary.videos, summary.before) == (9, 0)
    assert [(Path(one.name).name, one.reason) for one in summary.failed] == [
        ("broken.mp4", "not a video, or its header is lost or damaged (a file cut short?)")
    ]
    assert json.loads((out / "failed.jsonl").read_text())["file"] == str(originals / "up" / "broken.mp4")
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.mp4"))
    assert files == [
        *(f"down/clip.{number}.mp4" for number in (0, 2, 4, 6)),
        "up/clip.1.mp4",
        "up/clip.3.mp4",
        "up/clip.5-avi.mp4",
        "up/clip.5-mp4.mp4",
        "up/clip.7.mp4",
    ]
    assert sorted((out / "list.csv").read_text().split()) == [f"{file},{file.split('/')[0]}" for file in files]
    for root in (out, out / "list.csv"):
        opened = Videos(root=root, sampling=Dense(stride=2)).open((4, 32, 32))
        assert [int(label) for label in opened.listing.labels] == [0] * 4 + [1] * 5
        assert opened.load(6, generator(0)).pixels.shape == (3, 4, 32, 32)

    lost = out / "up" / "clip.3.mp4"
    lost.unlink()
    (out / "up" / ".clip.3.mp4.123.tmp").write_bytes(b"of a process that was killed")
    made = written(out)
    again = prepare(originals, out, encoding=Encoding(short_side=48), workers=1)
    assert (again.videos, again.before, len(again.failed)) == (9, 8, 1)
    changed = {name for name, time in written(out).items() ^ made.items()}
    assert changed == {"up/clip.3.mp4", "up/.clip.3.mp4.123.tmp", "list.csv", "failed.jsonl"}
    assert (contents(originals), written(originals)) == before


def test_a_list_is_prepared_with_its_labels(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(f"{originals}/up/clip.1.mp4 3\n{originals}/down/clip.2.mp4 1\n")
    prepare(tmp_path / "train.txt", tmp_path / "out", encoding=Encoding(short_side=48), workers=1)
    assert (tmp_path / "out" / "list.csv").read_text() == "up/clip.1.mp4,3\ndown/clip.2.mp4,1\n"


@pytest.mark.parametrize("copy", [False, True])
def test_shards_hold_all_videos_mixed_and_train(originals: Path, tmp_path: Path, copy: bool) -> None:
    encoding = Encoding(short_side=48)
    summary = prepare(originals, tmp_path / "out", encoding=encoding, shards_mb=0.01, copy=copy, workers=2)
    assert (summary.videos, len(summary.failed)) == (9, 1)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [name for name in names if name.endswith("tar")]
    assert names == ["failed.jsonl", "index.json", "prepare.json", *shards]
    assert len(shards) > 1
    opened = VideoShards(root=tmp_path / "out", sampling=Dense(stride=2)).open((4, 32, 32))
    assert opened.members.classes == ("down", "up")
    found = {opened.members.names[index]: opened.members.labels[index] for index in range(9)}
    assert len(found) == 9
    assert all(("down", "up")[label] == name.split("/")[0] for name, label in found.items())
    assert list(found) != sorted(found)
    for index, name in enumerate(found):
        assert opened.load(index, generator(0)).pixels.shape == (3, 4, 32, 32)
        if copy:
            stem, ending = name.removesuffix("-avi.avi").removesuffix("-mp4.mp4"), name[-3:]
            stem = stem.removesuffix(f".{ending}").replace("_", ".")
            assert opened.members.read(index).data == (originals / f"{stem}.{ending}").read_bytes()


def command(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "video.prepare", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what: str, folder: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 60
    while not list(folder.glob(what)):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until, what
        time.sleep(0.005)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    below = [
        int(word) for task in Path(f"/proc/{process}/task").glob("*/children") for word in task.read_text().split()
    ]
    return below + [further for child in below for further in descendants(child)]


def packed(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """The videos of all shards, with their labels, in order; and what failed."""
    index = load_index(str(folder / "index.json"))
    assert index is not None
    assert index.shards == {path.name: look_into(path) for path in sorted(folder.glob("*.tar"))}
    videos = [(member.name, member.label) for _, shard in sorted(index.shards.items()) for member in shard.members]
    return videos, (folder / "failed.jsonl").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_by_a_signal_the_same_command_goes_on_to_the_same_shards(
    originals: Path, tmp_path: Path, how: signal.Signals
) -> None:
    many = tmp_path / "many"
    for copy in range(6):
        shutil.copytree(originals, many / f"{copy}")
    encoding = Encoding(short_side=48)
    prepare(many, tmp_path / "whole", encoding=encoding, shards_mb=0.03, workers=2)
    out = tmp_path / "out"
    arguments = (many, out, "--short-side", 48, "--shards-mb", 0.03, "--workers", 1)
    process = command(*arguments)
    wait_for("shard-000001.tar", out, process)
    others = descendants(process.pid)
    process.send_signal(how)
    out_text, err = process.communicate(timeout=300)
    if how == signal.SIGINT:
        assert process.returncode == 130, out_text + err
        assert "the same command goes on" in err
        assert "Traceback" not in err
    assert not (out / "index.json").exists()
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{other}") and alive(other) for other in others):
        assert time.monotonic() < until, "processes are left"
        time.sleep(0.05)
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    process = command(*arguments)
    out_text, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "54 videos" in out_text
    assert "6 could not be used" in out_text
    # x264 does not always give the same bytes for pictures as small as these, so neither are the shards' limits equal
    whole, resumed = packed(tmp_path / "whole"), packed(out)
    assert [sorted(one) for one in resumed] == [sorted(one) for one in whole]
    assert len(set(resumed[0])) == len(resumed[0]) == 54
    assert {name: time_ for name, time_ in written(out).items() if name in first} == first


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@needs_media
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("how", "seconds", "reason"),
    [
        (signal.SIGSTOP, 15, "took more than 15 s"),
        (signal.SIGSEGV, 100, "ended the process that read it (SIGSEGV)"),
    ],
)
def test_a_file_over_which_a_process_hangs_or_crashes_is_blamed_and_the_next_goes_well(
    tmp_path: Path, how: signal.Signals, seconds: float, reason: str
) -> None:
    long, short = MEDIA / "clips" / "intel_bottle_2983.mp4", MEDIA / "clips" / "mm_32frames.mp4"
    tasks = [
        Task(number, str(source), str(tmp_path / f"{number}.mp4"), Encoding())
        for number, source in enumerate((long, short))
    ]
    before = set(descendants(os.getpid()))

    def strike() -> None:
        while not (begun := list(tmp_path.glob(".0.mp4.*"))):
            time.sleep(0.01)
        worker = int(begun[0].name.split(".")[-2])
        assert worker in set(descendants(os.getpid())) - before
        os.kill(worker, how)

    thread = threading.Thread(target=strike)
    thread.start()
    results = {task.number: result for task, result in in_processes(work, tasks, workers=1, seconds=seconds)}
    thread.join()
    assert isinstance(results[0], LostError)
    assert str(results[0]) == reason
    assert results[1] == Made()


def test_a_full_disk_is_said_and_leaves_nothing_half_written(originals: Path, tmp_path: Path) -> None:
    out = tmp_path / "small disk"
    out.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(out)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(ValueError, match="the disk is full; make room, and the same command goes on"):
            prepare(originals, out / "new", encoding=Encoding(short_side=48), workers=1)
        assert not list(out.rglob(".*.tmp"))
        for path in out.rglob("*.mp4"):
            assert look(path)[0] == 10
    finally:
        subprocess.run(["umount", str(out)], check=True)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_originals_stay_alone(originals: Path, tmp_path: Path) -> None:
    for out in (originals, originals / "small", originals / "up" / ".." / "small"):
        with pytest.raises(ValueError, match="the originals stay alone"):
            prepare(originals, out)
    (tmp_path / "list.txt").write_text(f"{originals}/up/clip.1.mp4\n")
    with pytest.raises(ValueError, match=r"holds originals, .*clip\.1\.mp4"):
        prepare(tmp_path / "list.txt", originals)
    with pytest.raises(ValueError, match="holds originals"):
        prepare(originals / "up", originals)
    assert not (originals / "prepare.json").exists()


def test_a_folder_that_was_not_begun_here_or_otherwise_is_refused(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 'photo\.jpg' and was not begun by this command"):
        prepare(originals, tmp_path)
    out = tmp_path / "out"
    prepare(originals / "down", out, encoding=Encoding(short_side=48), workers=1)
    with pytest.raises(ValueError, match="short_side was 48, now 64"):
        prepare(originals / "down", out, encoding=Encoding(short_side=64))


def test_two_at_once_are_refused(originals: Path, tmp_path: Path) -> None:
    import fcntl

    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process writes to"):
            prepare(originals, tmp_path)
    finally:
        os.close(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"copy": True}, "it takes shards_mb"),
        ({"shards_mb": 0}, "shards_mb=0 is not above 0"),
        ({"workers": -1}, "workers=-1 is not above 0"),
        ({"encoding": Encoding(short_side=1)}, "short_side=1 is below 2"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    originals: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(originals, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_command_fails_where_no_video_could_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--shards-mb", "1", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "0 videos" in out
    assert "a.mp4: empty file" in out
    assert load_index(str(tmp_path / "out" / "index.json")) is None
