"""The test of a classifier as a task: what it takes from the run that made it, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import a_run, pictures, pretrained

from convmae import checkpoint
from convmae.evaluate import Evaluate, test
from convmae.files import lines
from convmae.images import ImageFolder
from convmae.job import carry_out
from convmae.plain import to_plain
from convmae.training import fit

__all__ = ["pictures"]
test.__test__ = False  # type: ignore[attr-defined]  # it is what is tested, not a test


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert fit(a_run(folder, pictures, average=0.5))
    return folder


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


def test_a_run_s_classifier_is_tested_on_what_the_run_was(
    tmp_path: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carry_out(Evaluate(checkpoint=tuned, folder=tmp_path, workers=0))
    assert told(tmp_path)["top1"] == list(lines(tuned / "scores.jsonl"))[-1]["top1"]
    assert (tmp_path / "predictions.csv").read_text() == (tuned / "test" / "predictions.csv").read_text()
    said = capsys.readouterr().out
    assert "8 samples, 1 views of each, 1 unusable" in said
    assert "top-1 100.00%" in said
    assert "counted as wrong: top-1 88.89%" in said
    assert "2.png: not an image" in said
    assert "Evaluate(" in (tmp_path / "test.txt").read_text()


def test_a_checkpoint_s_file_will_do(tmp_path: Path, tuned: Path) -> None:
    assert carry_out(Evaluate(checkpoint=tuned / "last.pt", folder=tmp_path, workers=0))
    assert told(tmp_path)["top1"] == 1.0


def test_averaged_weights_are_tested_where_asked_for_and_kept(tmp_path: Path, tuned: Path) -> None:
    assert carry_out(Evaluate(checkpoint=tuned, folder=tmp_path / "average", workers=0, average=True))
    predictions = (tmp_path / "average" / "predictions.csv").read_text()
    assert predictions == (tuned / "test_average" / "predictions.csv").read_text()
    content = checkpoint.read(tuned / "last.pt")
    del content["average"]
    torch.save({**content, "builder": to_plain(content["builder"])}, tmp_path / "without.pt")
    with pytest.raises(ValueError, match="has no averaged weights"):
        carry_out(Evaluate(checkpoint=tmp_path / "without.pt", folder=tmp_path / "b", workers=0, average=True))


def test_data_elsewhere_are_taken_as_the_run_took_its_own(tmp_path: Path, tuned: Path, pictures: Path) -> None:
    shutil.copytree(pictures, tmp_path / "moved")
    (tmp_path / "moved" / "val" / "grey" / "2.png").unlink()
    assert carry_out(Evaluate(checkpoint=tuned, root=tmp_path / "moved", folder=tmp_path / "out", workers=0))
    assert (told(tmp_path / "out")["samples"], told(tmp_path / "out")["unusable"]) == (8, 0)


def test_what_cannot_be_tested_is_refused(tmp_path: Path, tuned: Path, pictures: Path) -> None:
    plain = Evaluate(checkpoint=tuned, folder=tmp_path / "out", workers=0)
    before = pretrained(tmp_path / "before", pictures)
    others = ImageFolder(root=pictures).as_test()  # the classes are train and val
    for task, complaint in (
        (replace(plain, checkpoint=None), "give --checkpoint"),
        (replace(plain, checkpoint=tmp_path / "lost.pt"), r"--checkpoint .*lost\.pt: no checkpoint at"),
        (replace(plain, checkpoint=before), r"is no classifier, but a MaskedAutoencoder: finetune it first"),
        (replace(plain, clips=5), "--clips and --crops are for videos"),
        (replace(plain, unusable="error"), r"2\.png: not an image"),
        (replace(plain, data=others), "was trained with 3 classes"),
        (replace(plain, root=tmp_path / "nowhere"), "there is no"),
    ):
        data = task.data if task.checkpoint != before else ImageFolder(root=pictures, split="val").as_test()
        with pytest.raises(ValueError, match=complaint):
            test(replace(task, data=data))
    torch.save({"not": "ours"}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="checkpoint"):
        test(replace(plain, checkpoint=tmp_path / "foreign.pt"))


def test_a_checkpoint_that_says_nothing_of_data_needs_a_recipe(tmp_path: Path, tuned: Path) -> None:
    checkpoint.save(tmp_path / "bare.pt", checkpoint.load(tuned / "last.pt"))
    with pytest.raises(ValueError, match="does not say what it is to be tested on: give a recipe"):
        test(Evaluate(checkpoint=tmp_path / "bare.pt", folder=tmp_path / "out", workers=0))
