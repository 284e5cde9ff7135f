"""The benchmarks that train: their settings can be run, their sums are right, their tables and pictures are drawn."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convmae import CMAE
from convmae.demo import make
from convmae.probe import Few

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import contrast
import motions
import transfer
from motions import Motions


@pytest.fixture
def few_motions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(motions, "COUNTS", {"train": 2, "val": 1})
    monkeypatch.setenv("CONVMAE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("few_motions")
def test_motions_are_drawn_once_and_cut_as_files_are() -> None:
    train, val = Motions().open((8, 32, 32)), Motions(split="val").as_test().open((8, 32, 32))
    assert (len(train), len(val), len(train.classes)) == (16, 8, 8)
    assert train.labels.tolist() == [number // 2 for number in range(16)]
    assert (train.name(3), val.name(7)) == ("train/circle_right/001", "val/up/000")
    sample = train.load(5, torch.Generator().manual_seed(0))
    assert (sample.pixels.shape, sample.pixels.dtype, sample.label) == ((3, 8, 32, 32), torch.uint8, 2)
    assert torch.equal(sample.pixels, train.load(5, torch.Generator().manual_seed(0)).pixels)
    assert not torch.equal(sample.pixels, train.load(5, torch.Generator().manual_seed(1)).pixels)
    middle = val.load(0, torch.Generator()).pixels
    drawn = np.load(motions.drawn() / "val.npy")[0, 1:30:4]  # 8 frames at stride 4, from the middle of 32
    assert middle.float().mean((0, 2, 3)) == pytest.approx(drawn.mean((1, 2, 3)), abs=1)
    assert len(Few(train, 1, 0)) == 8


@pytest.mark.parametrize("kind", ["video", "images"])
def test_runs_of_a_seed_can_begin_and_differ_only_in_what_is_compared(kind: str, tmp_path: Path) -> None:
    setting = transfer.for_video() if kind == "video" else transfer.for_images(make())
    before = transfer.pretraining(setting, 0, tmp_path, 1)
    tuned = transfer.finetuning(setting, 0, tmp_path, 1, tmp_path / "pretrained-0", 1)
    scratch = transfer.finetuning(setting, 0, tmp_path, 1, None, 1)
    plain, cmae = contrast.both(setting, 0, tmp_path, 1)
    for run in (before, tuned, scratch, plain, cmae):
        run.check()
    same = {"checkpoint": None, "layer_decay": 1.0, "drop_path": 0.0, "folder": scratch.folder}
    assert replace(tuned, **same) == scratch  # type: ignore[arg-type]
    longer = transfer.finetuning(setting, 0, tmp_path, 1, tmp_path / "pretrained-0", 5)
    assert longer.epochs == 5 * scratch.epochs
    assert len({run.folder for run in (before, tuned, scratch, longer)}) == 4
    assert isinstance(cmae.model, CMAE)
    assert cmae.model.mae == plain.model == before.model
    assert replace(cmae, model=plain.model, data=plain.data, folder=plain.folder) == plain


@pytest.mark.usefixtures("few_motions")
def test_both_sides_of_contrast_see_the_same_pixels(tmp_path: Path) -> None:
    sides = [run.data.open(run.model.size) for run in contrast.both(transfer.for_video(), 0, tmp_path, 1)]
    plain, cmae = (side.load(3, torch.Generator().manual_seed(0)) for side in sides)
    assert torch.equal(plain.pixels, cmae.pixels)
    assert plain.second is None
    assert cmae.second is not None
    assert cmae.second.shape == cmae.pixels.shape
    assert not torch.equal(cmae.second, cmae.pixels)


def probes(knn: float, linear: float) -> list[dict[str, Any]]:
    return [
        {"epoch": 0.0, "knn_top1": knn / 2, "linear_top1": linear / 2},
        {"epoch": 4.0, "knn_top1": knn, "linear_top1": linear},
    ]


def test_the_table_and_the_picture_of_transfer(tmp_path: Path) -> None:
    tests = [{"epoch": 1.0, "top1": 0.2}, {"epoch": 2.0, "top1": 0.3}]
    found = [
        {
            "top1": dict(zip(transfer.ROWS, (first, 0.4, 0.45), strict=True)),
            "probes": probes(0.5, 0.6),
            "tests": dict.fromkeys(transfer.ROWS, tests),
            "times": times,
        }
        for first, times in ((0.5, 5.0), (0.6, 6.0))
    ]
    rows = transfer.table(found).splitlines()
    assert rows[2] == "| pretrained, finetuned | 55.0 ± 7.1 | 50.0, 60.0 |"
    assert rows[5:7] == [
        "| knn at its start | 25.0 ± 0.0 | 25.0, 25.0 |",
        "| knn at its end | 50.0 ± 0.0 | 50.0, 50.0 |",
    ]
    assert rows[-1] == "As much time is 5, 6 times the epochs of finetuning."
    transfer.draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_table_and_the_picture_of_contrast(tmp_path: Path) -> None:
    metrics = [
        {"epoch": epoch, "loss": 1.0, "reconstruction": 0.8, "contrast": 0.2, "agreement": 0.5, "spread": 0.9}
        for epoch in (0.5, 1.0, 1.5, 2.0)
    ]
    plain = {"probes": probes(0.5, 0.6), "metrics": [{"epoch": line["epoch"], "loss": 0.8} for line in metrics]}
    cmae = {"probes": probes(0.4, 0.7), "metrics": metrics}
    rows = contrast.table([[plain, cmae], [plain, cmae]]).splitlines()
    assert rows[2:] == [
        "| knn at the start | 25.0 ± 0.0 | 25.0, 25.0 |",
        "| knn, without contrast | 50.0 ± 0.0 | 50.0, 50.0 |",
        "| knn, CMAE | 40.0 ± 0.0 | 40.0, 40.0 |",
        "| linear at the start | 30.0 ± 0.0 | 30.0, 30.0 |",
        "| linear, without contrast | 60.0 ± 0.0 | 60.0, 60.0 |",
        "| linear, CMAE | 70.0 ± 0.0 | 70.0, 70.0 |",
    ]
    contrast.draw([[plain, cmae], [plain, cmae]], tmp_path / "contrast.png")
    assert (tmp_path / "contrast.png").stat().st_size > 10_000


def test_time_of_a_run_is_that_of_its_median_step(tmp_path: Path) -> None:
    run = replace(transfer.pretraining(transfer.for_video(), 0, tmp_path, 1), folder=tmp_path)
    lines = [
        '{"step": 1, "since": 1, "samples": 32, "samples_per_second": 1.0}',  # one step alone: it warms up
        '{"step": 3, "since": 2, "samples": 96, "samples_per_second": 50.0}',
        '{"step": 6, "since": 4, "samples": 192, "samples_per_second": 64.0}',
        '{"step": 9, "since": 7, "samples": 288, "samples_per_second": 96.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert transfer.seconds(run) == 288 / 64
