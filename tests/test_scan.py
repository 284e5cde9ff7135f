"""What a scan says of files, and that it can be stopped, killed and gone on with."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import BEST_STREAM, MEDIA, UNUSABLE, needs_media
from PIL import Image

from convmae import manifest
from convmae.manifest import Entry
from video import readers
from video.demo import encode
from video.examine import examine
from video.scan import _Look, main, scan
from video.videos import Videos

PARTLY = {  # intact frames, of how many, and what is wrong with the rest
    "corrupt_middle.mp4": ((0, 91), 250, "damaged from frame 91 on"),
    "decord_corrupted.mp4": ((0, 28), 50, "damaged from frame 28 on"),
    "trunc.mkv": ((0, 150), 150, "cut short: it ends after 5.0 of 10.4 s"),
    "trunc_faststart50.mp4": ((0, 103), 106, "damaged from frame 103 on; cut short: it ends after 4.3 of 10.0 s"),
}
WHOLE = {
    "decord_unordered.mov": 4,
    "eight_frames.mp4": 8,
    "tc_discard_first_keyframe.mp4": 25,
    "tc_non_zero_start.mp4": 12,
}
NOT_FOR_DECORD = {"drv_editlist_copycut.mp4"}  # and AVI, of which decord may give a wrong last frame


# --- verdicts ---------------------------------------------------------------------------------------------------------


@needs_media
def test_every_bad_file_gets_its_verdict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = scan(MEDIA / "bad", path=tmp_path / "m.jsonl", workers=2).entries
    assert capfd.readouterr().err == ""  # what decoders say of damaged files is not for the terminal
    videos = dict(found)
    assert videos.keys() == UNUSABLE.keys() | PARTLY.keys() | WHOLE.keys()
    for name, reason in UNUSABLE.items():
        assert (videos[name].usable, reason in videos[name].reason) == (False, True), videos[name]
    for name, (intact, frames, reason) in PARTLY.items():
        entry = videos[name]
        assert (entry.usable, entry.intact, entry.frames) == (True, intact, frames)
        assert entry.partly
        assert entry.reason.startswith(reason)
    for name, frames in WHOLE.items():
        entry = videos[name]
        assert (entry.usable, entry.reason, entry.intact, entry.frames) == (True, "", (0, frames), frames)


@needs_media
@pytest.mark.parametrize("name", ["corrupt_middle.mp4", "trunc_faststart50.mp4"])
def test_the_part_called_intact_is_the_original_and_what_follows_is_not(name: str) -> None:
    """Both files were made from another, which is there too."""
    (first, stop), _, _ = PARTLY[name]

    def frames(path: Path, indices: list[int]) -> np.ndarray:
        return readers.read(path, lambda track: indices, reader="pyav").astype(float)

    original, damaged = MEDIA / "clips" / "kin_abseiling.mp4", MEDIA / "bad" / name
    sound = [*range(first, stop, 6), stop - 1]
    assert (frames(original, sound) == frames(damaged, sound)).all()


@needs_media
@pytest.mark.parametrize(
    ("name", "packet", "intact"),
    [
        ("mm_6fps.mp4", 0, (40, 57)),  # of the key frames 0 and 40, the first is lost
        ("mm_6fps.mp4", 3, (40, 57)),
        ("mm_6fps.mp4", 36, (0, 34)),
        ("mm_6fps.mp4", 40, (0, 38)),
        ("mm_32frames.mp4", 1, None),  # damaged while the key frame before it is still to come
        ("mm_32frames.mp4", 23, (0, 21)),
    ],
)
def test_wherever_a_packet_is_damaged_the_frames_called_intact_are_those_of_the_original(
    name: str, packet: int, intact: tuple[int, int] | None, tmp_path: Path
) -> None:
    original, path = MEDIA / "clips" / name, tmp_path / name
    with av.open(str(original)) as container:
        at, size = [(read.pos, read.size) for read in container.demux(video=0) if read.size][packet]
    assert at is not None
    data, start = bytearray(original.read_bytes()), at + min(8, size // 2)
    data[start : at + size] = random.Random(packet).randbytes(at + size - start)
    path.write_bytes(data)
    found = examine(str(path))
    assert found.reason.startswith("damaged from frame")
    assert "cut short" not in found.reason
    assert (found.intact if found.usable else None) == intact
    if intact is not None:

        def frames(of: Path) -> np.ndarray:
            return readers.read(of, lambda track: range(*intact), reader="pyav")

        assert (frames(path) == frames(original)).all()


def test_a_title_that_is_not_in_utf8_neither_ends_a_scan_nor_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a long title"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for level in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"a long title", b"\xe9 long title"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    found = scan(tmp_path, workers=1).entries["a.mp4"]
    assert (found.usable, found.reason, found.intact) == (True, "", (0, 9))


@needs_media
def test_every_real_clip_is_usable_as_a_whole_with_its_facts(tmp_path: Path) -> None:
    found = scan(MEDIA / "clips", path=tmp_path / "m.jsonl").entries
    about = {clip["file"]: clip for clip in json.loads((MEDIA / "clips" / "index.json").read_text())}
    assert found.keys() == about.keys()
    for name, entry in found.items():
        clip = about[name]
        frames, height, width = BEST_STREAM.get(name, (clip["frames_decoded"], clip["h"], clip["w"]))
        if clip["rotation"]:
            height, width = width, height
        assert (entry.usable, entry.reason, entry.intact) == (True, "", (0, frames)), entry
        assert (entry.frames, entry.height, entry.width) == (frames, height, width)
        rate, _, per = clip["avg_fps"].partition("/")
        if name not in BEST_STREAM:
            assert entry.fps == pytest.approx(int(rate) / int(per), rel=0.01)
            assert entry.seconds == pytest.approx(float(clip["duration"]), abs=0.15)
        assert entry.reader == ("pyav" if name in NOT_FOR_DECORD or name.endswith(".avi") else "")


@needs_media
def test_a_quick_look_finds_what_is_cut_short_but_not_what_is_damaged_in_between() -> None:
    assert examine(str(MEDIA / "bad" / "trunc.mkv"), quick=True).reason.startswith("cut short")
    assert not examine(str(MEDIA / "bad" / "zero_bytes.mp4"), quick=True).usable
    assert examine(str(MEDIA / "bad" / "corrupt_middle.mp4"), quick=True).intact == (0, 250)


def test_a_quick_look_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    assert scan(tmp_path, workers=1, quick=True).looked_at == 1
    assert scan(tmp_path, workers=1, quick=True).looked_at == 0
    assert scan(tmp_path, workers=1).looked_at == 1
    assert scan(tmp_path, workers=1, quick=True).looked_at == 0


def test_folders_of_frames_and_images_are_looked_at_too(tmp_path: Path) -> None:
    for number in range(6):
        for folder in ("whole", "part"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (32, 24), (number,) * 3).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "part" / "4.png").write_bytes(b"no picture")
    found = scan(tmp_path, path=tmp_path / "m.jsonl", workers=1).entries
    assert (found["whole"].intact, found["whole"].height, found["whole"].reason) == ((0, 6), 24, "")
    assert (found["part"].usable, found["part"].intact) == (True, (0, 4))
    assert "not an image" in found["part"].reason
    pictures = scan(tmp_path, path=tmp_path / "i.jsonl", workers=1, pictures=True).entries
    assert [name for name, entry in pictures.items() if not entry.usable] == ["part/4.png"]
    assert len(pictures) == 12


# --- files that end the process that looks at them --------------------------------------------------------------------


class Troublesome(_Look):
    """Does to its process what decoders do on some files."""

    def __call__(self, name: str) -> Entry:
        if "hangs" in name:
            time.sleep(1000)
        if "dies" in name:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(name)


def test_a_file_that_hangs_or_crashes_the_decoder_is_blamed_and_the_scan_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "dies.mp4", "hangs.mp4", "z.mp4"):
        video(tmp_path / name)
    monkeypatch.setattr("video.scan._Look", Troublesome)
    began = time.monotonic()
    found = scan(tmp_path, workers=2, seconds=15).entries
    assert time.monotonic() - began < 60
    assert {name: entry.usable for name, entry in found.items()} == {
        "a.mp4": True, "dies.mp4": False, "hangs.mp4": False, "z.mp4": True
    }  # fmt: skip
    assert found["hangs.mp4"].reason == "took more than 15 s"
    assert found["dies.mp4"].reason == "ended the process that read it (SIGSEGV)"


# --- stopped, killed, gone on with ------------------------------------------------------------------------------------


def video(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, np.random.default_rng(seed).integers(0, 256, (6, 16, 16, 3), np.uint8))
    return path


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "video.scan", str(root), "--workers", "2", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_scan_of_a_thousand_files_is_interrupted_killed_and_resumed_and_looks_at_none_twice(tmp_path: Path) -> None:
    originals = [video(tmp_path / "originals" / f"{seed}.mp4", seed) for seed in range(10)]
    originals.append(tmp_path / "originals" / "empty.mp4")
    originals[-1].touch()
    root = tmp_path / "root"
    for number in range(1000):
        path = root / f"class {number % 7}" / f"{number:04}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[number % len(originals)], path)
    written = manifest.beside(root)
    seen = 0
    for how in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        running = start(root)
        until = time.monotonic() + 120
        while count(written) < seen + 60:
            assert time.monotonic() < until
            assert running.poll() is None
            time.sleep(0.02)
        if how == signal.SIGKILL:
            os.killpg(running.pid, how)
        else:
            os.kill(running.pid, how)
        _, said = running.communicate(timeout=300)
        assert running.returncode == (-9 if how == signal.SIGKILL else 130)
        assert how == signal.SIGKILL or "the same command goes on from here" in said
        if how == signal.SIGKILL:
            with written.open("ab") as file:
                file.write(b'{"file": "class 0/0007.mp4", "byt')  # as a kill in the middle of a write leaves it
        names = [json.loads(line)["file"] for line in written.read_bytes().split(b"\n")[:-1]]
        assert len(set(names)) == len(names) < 1000  # none twice
        seen = len(names)
    finished = start(root)
    said, error = finished.communicate(timeout=300)
    assert finished.returncode == 0, error
    assert f"{seen} of 1000 files were known already" in said
    assert "1000 files: 910 usable, 0 partly, 90 not" in said
    assert "90 x empty file: class " in said
    other = tmp_path / "other.jsonl"
    scan(root, path=other, workers=2)
    assert other.read_bytes() == written.read_bytes()


def test_only_new_and_changed_files_are_looked_at_again(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        video(tmp_path / name)
    assert scan(tmp_path, workers=1).looked_at == 3
    assert scan(tmp_path, workers=1).looked_at == 0
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").unlink()
    video(tmp_path / "d.mp4")
    found = scan(tmp_path, workers=1)
    assert found.looked_at == 2
    verdicts = {name: entry.usable for name, entry in found.entries.items()}
    assert verdicts == {"a.mp4": False, "c.mp4": True, "d.mp4": True}
    assert manifest.load(found.path) == found.entries
    assert scan(tmp_path, workers=1, again=True).looked_at == 3
    samples = Videos(root=tmp_path).open((2, 16, 16))
    assert [Path(samples.name(index)).name for index in range(len(samples))] == ["c.mp4", "d.mp4"]
    assert samples.load(0, torch.Generator()).pixels.shape == (3, 2, 16, 16)


# --- what cannot be done ----------------------------------------------------------------------------------------------


def test_two_scans_do_not_write_one_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video(tmp_path / "a.mp4")
    with manifest.beside(tmp_path).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([str(tmp_path)]) == 2
    assert "another scan is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], "is not a folder of videos, nor a list"),
        (["empty"], "holds no file ending in"),
        ([".", "--manifest", "none/m.jsonl"], "Choose another place with --manifest"),
        ([".", "--workers", "0"], "--workers 0 is below 1"),
        ([".", "--seconds", "0"], "--seconds 0 is not positive"),
    ],
)
def test_what_cannot_be_scanned_is_said_in_a_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    video(tmp_path / "a.mp4")
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_where_nothing_is_usable_the_exit_code_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").touch()
    assert main([str(tmp_path), "--workers", "1"]) == 1
    assert "1 x empty file: a.mp4" in capsys.readouterr().out


def test_a_damaged_manifest_names_the_line_and_what_to_do(tmp_path: Path) -> None:
    known: dict[str, Any] = {"bytes": 1, "modified": 0.0, "usable": True}
    path = tmp_path / "m.jsonl"
    entries = [Entry(file="b", intact=(3, 9), **known), Entry(file="a", **known)]
    manifest.write(path, entries)
    assert manifest.load(path) == {"a": entries[1], "b": entries[0]}
    text = path.read_bytes()
    path.write_bytes(text + b'{"file": "c", "usab')
    assert manifest.load(path).keys() == {"a", "b"}
    path.write_bytes(b'{"file": "c"}\n' + text)
    with pytest.raises(ValueError, match=r"m\.jsonl, line 1: not an entry .* Remove the line"):
        manifest.load(path)
    path.write_bytes(text + text.replace(b'"usable": true', b'"usable": false, "new field": 1'))
    assert not manifest.load(path)["a"].usable  # the last line of a file is its newest
