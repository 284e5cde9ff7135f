"""The command that measures loading on a user's data, and the benchmark of the loader."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from video import readers, throughput
from video.demo import encode
from video.throughput import Rate, recommend
from video.videos import Videos

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for seed in range(3):
        encode(tmp_path / f"{seed}.mp4", np.random.default_rng(seed).integers(0, 256, (20, 48, 64, 3), np.uint8))
    return tmp_path


def test_readers_and_workers_are_compared_and_the_fewest_good_ones_recommended(
    clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    given = [str(clips), "--frames", "4", "--side", "32", "--stride", "2", "--clips", "6", "--workers", "1", "2"]
    assert throughput.main(given) == 0
    said = capsys.readouterr().out
    for reader in readers.installed():
        assert f"decoding alone, {reader}" in said
    assert "whole loader,   1 workers" in said
    assert "whole loader,   2 workers" in said
    assert "short side 48 pixels, 20 frames (medians)" in said
    assert "recommended: --workers " in said
    assert torch.get_num_threads() == threads


def test_few_workers_are_preferred_where_more_bring_little() -> None:
    rates = {1: Rate(100, 10.0), 2: Rate(100, 5.1), 4: Rate(100, 5.0), 8: Rate(100, 5.05)}
    assert recommend(rates) == 2


def test_decoding_and_loading_count_the_clips_that_there_are(clips: Path) -> None:
    (clips / "empty.mp4").touch()
    samples = Videos(root=clips, repeats=2).open((4, 32, 32))
    for rate in (throughput.decode(samples, range(4)), throughput.load(samples, range(4))):
        assert rate.clips == 6
        assert 0 < rate.clips_per_second < 1e5
        assert 0 < rate.clips_per_cpu_second < 1e5
    assert throughput.stream(samples, 8, workers=0).clips >= 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["gone"], "is not a folder of videos, nor a list"),
        ([".", "--clips", "0"], "are 1 or more"),
        (["broken"], "none of these videos can be read: `python -m video.scan` says why"),
    ],
)
def test_what_cannot_be_measured_is_said(
    given: list[str], said: str, clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clips)
    (clips / "broken").mkdir()
    (clips / "broken" / "a.mp4").touch()
    assert throughput.main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="/proc/PID/smaps_rollup is Linux's")
def test_the_benchmark_of_the_loader_prints_every_side_and_its_memory(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    given = ["--clips", "3", "--rounds", "1", "--memory-clips", "80", "--json", str(clips / "out.json")]
    monkeypatch.setattr(sys, "argv", ["loader.py", str(clips), *given])
    runpy.run_path(str(ROOT / "benchmarks" / "loader.py"), run_name="__main__")
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    for side in ("decord (bare)", *readers.installed(), "load", "loader"):
        assert f"| {side} |" in said
    measured = json.loads((clips / "out.json").read_text())
    for base in ("decord (bare)", readers.in_turn()[0].name):
        assert 0.1 < measured[f"load / {base}"]["processor"] < 1.5
        assert measured[f"loader / {base}"]["clock"] > 0
    assert len(measured["memory"]) == 20
    assert all(megabytes > 10 for _, megabytes in measured["memory"])
