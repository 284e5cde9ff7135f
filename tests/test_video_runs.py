"""A pretraining run from a list of real videos, some of them broken, ends well and says which they were."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from media import MEDIA, needs_media

from convmae.files import lines

ROOT = Path(__file__).parent.parent
pytestmark = [
    needs_media,
    pytest.mark.slow,
]

UNUSABLE = {
    "zero_bytes.mp4": "empty file",
    "text.mp4": "not a video",
    "corrupt_moov.mp4": "not a video",
    "audio_only.mp4": "no video stream",
    "one_frame.mp4": "a single frame",
    "gone.mp4": "no such file",
}
PARTLY = ("corrupt_middle.mp4", "trunc_faststart50.mp4", "trunc.mkv")
SOUND = ("kin_abseiling.mp4", "ucf_basketball_mpeg4.avi", "drv_editlist_copycut.mp4", "mm_32frames.mp4", "drv_vp9.webm")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list as Kinetics has them, `path label` a line; some paths absolute, some relative to the list."""
    rows = [f"{MEDIA / 'clips' / name} {place % 2}" for place, name in enumerate(SOUND)]
    for name in (*PARTLY, *UNUSABLE):
        if (MEDIA / "bad" / name).exists():
            (tmp_path / "videos").mkdir(exist_ok=True)
            (tmp_path / "videos" / name).symlink_to(MEDIA / "bad" / name)
        rows.append(f"videos/{name} 2")
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "train.csv"


def command(*arguments: str, folder: Path, module: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-m", module] if module else [str(ROOT / "launchers" / "slurm_pretrain.py")]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def pretrain(listed: Path, folder: str) -> subprocess.CompletedProcess[str]:
    given = ("--cluster", "debug", "--data", str(listed), "--epochs", "4", "--warmup-epochs", "1", "--batch-size", "7")
    return command(*given, "--folder", folder, "--workers", "2", "--pictures", "1", folder=listed.parent)


def test_a_list_of_partly_broken_files_is_trained_on_and_they_are_reported(listed: Path) -> None:
    done = pretrain(listed, "runs/a")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"{len(UNUSABLE)} files could not be used, {4 * len(UNUSABLE)} samples skipped" in said
    for name, reason in UNUSABLE.items():
        assert re.search(rf"4 x \S*{re.escape(name)}: .*{reason}", said), name
    skipped = list(lines(listed.parent / "runs" / "a" / "skipped.jsonl"))
    assert {Path(line["file"]).name for line in skipped} == set(UNUSABLE)
    last = list(lines(listed.parent / "runs" / "a" / "metrics.jsonl"))[-1]
    assert last["step"] == last["steps"] == 8
    assert last["skipped"] == 4 * len(UNUSABLE)
    assert last["loss"] > 0
    assert 0 <= last["data_wait"] <= 1
    assert re.search(r"step 8/8 .* data \d+%", said)


def test_after_a_scan_what_is_broken_is_not_tried_and_what_is_partly_so_gives_its_sound_part(listed: Path) -> None:
    scanned = command(str(listed), "--workers", "2", folder=listed.parent, module="video.scan")
    assert scanned.returncode == 0, scanned.stderr
    assert (
        f"{len(SOUND + PARTLY) + len(UNUSABLE)} files: {len(SOUND)} usable, 3 partly, {len(UNUSABLE)} not"
        in scanned.stdout
    )
    entries = [json.loads(line) for line in (listed.parent / "train.csv.manifest.jsonl").read_text().splitlines()]
    intact = {Path(entry["file"]).name: entry["intact"] for entry in entries if entry["reason"] and entry["usable"]}
    assert intact == {"corrupt_middle.mp4": [0, 91], "trunc_faststart50.mp4": [0, 103], "trunc.mkv": [0, 150]}
    done = pretrain(listed, "runs/b")
    assert done.returncode == 0, done.stderr
    assert f"without {len(UNUSABLE)} that are unusable" in done.stdout
    assert "could not be used" not in done.stdout
    assert not list(lines(listed.parent / "runs" / "b" / "skipped.jsonl"))
    last = list(lines(listed.parent / "runs" / "b" / "metrics.jsonl"))[-1]
    assert last["skipped"] == 0
