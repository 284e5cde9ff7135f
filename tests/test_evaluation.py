"""The test of a classifier: its arithmetic by hand, the same scores on any number of processes, and what it writes.

RANK=0 WORLD_SIZE=2 python test_evaluation.py OUT "[dict(name=..., root=...)]"        is one of two processes of a test
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import CLIPS, MEDIA, UNUSABLE, counting, needs_media
from PIL import Image
from runs import several
from torch import Tensor, nn

from convmae import AttentionStage, ConvMAE, ConvStage, confusion, evaluation, manifest
from convmae.data import Sample, UnusableFileError, generator
from convmae.distributed import World, join
from convmae.evaluation import Scores, as_tested, evaluate, glanced, write
from convmae.folder import Unusable
from convmae.images import CentreCrop, ImageFolder
from convmae.listing import Names
from convmae.targets import normalize
from video import VideoConvMAE
from video.clips import Dense
from video.videos import Videos

ALONE = World(0, 1, torch.device("cpu"))
SIZE = (4, 32, 32)
CLASSES = 6


# --- a network and samples whose probabilities are known --------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Samples, each of a few views, whose pixels say which view of which sample they are; `bad` ones do not load."""

    labels: tuple[int, ...]
    repeats: int = 1
    bad: tuple[int, ...] = ()
    hangs: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"sample {index}"

    def load(self, index: int, generator: torch.Generator) -> Sample:
        if index in self.bad:
            raise UnusableFileError(self.name(index), "it is bad")
        if index in self.hangs:
            time.sleep(1000)
        pixels = torch.zeros(self.repeats, 3, 2, 2, dtype=torch.uint8)
        pixels[:, 0], pixels[:, 1] = index, torch.arange(self.repeats).view(-1, 1, 1).byte()
        return Sample(pixels if self.repeats > 1 else pixels[0], self.labels[index])


class Lookup(nn.Module):
    """Logits `(samples, views, classes)`, by what the pixels say; it notes the shapes of its inputs."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.shapes = logits, list[torch.Size]()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not self.dropout.training
        assert not torch.is_grad_enabled()
        self.shapes.append(x.shape)
        black = normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
        white = normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
        which = ((x - black) / (white - black) * 255).round().long()[:, :, 0, 0]
        out: Tensor = self.dropout(self.logits)[which[:, 0], which[:, 1]]
        return out


def known(
    samples: int = 23, views: int = 1, classes: int = 7, seed: int = 0, **more: Any
) -> tuple[Lookup, Known, Tensor]:
    random = generator(seed)
    logits = 3 * torch.randn(samples, views, classes, generator=random)
    labels = torch.randint(classes, (samples,), generator=random).tolist()
    return Lookup(logits), Known(tuple(labels), repeats=views, **more), logits


def scored(network: nn.Module, samples: Any, **how: Any) -> Scores:
    settings = {"size": (2, 2), "classes": 7, "world": ALONE, "batch_size": 4, "shown": False, **how}
    return evaluate(network, samples, **settings)


# --- metrics, by hand -------------------------------------------------------------------------------------------------


def by_hand(probabilities: Sequence[Sequence[float]], labels: Sequence[int], classes: int) -> dict[str, Any]:
    """The same figures, one sample after the other."""
    hits: dict[int, int] = {1: 0, 5: 0}
    table = [[0] * classes for _ in range(classes)]
    loss = 0.0
    for row, label in zip(probabilities, labels, strict=True):
        order = sorted(range(classes), key=lambda one: (-row[one], one))
        for k in hits:
            hits[k] += label in order[:k]
        table[label][order[0]] += 1
        loss -= math.log(row[label])
    accuracies = [row[number] / sum(row) for number, row in enumerate(table) if sum(row)]
    count = len(labels)
    return {
        "top1": hits[1] / count,
        "top5": hits[5] / count,
        "mean_class": sum(accuracies) / len(accuracies),
        "loss": loss / count,
        "confusion": table,
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_metrics_are_those_that_one_counts_by_hand(seed: int) -> None:
    network, samples, logits = known(samples=61, classes=7, seed=seed)
    scores = scored(network, samples)
    expected = by_hand(torch.softmax(logits[:, 0].double(), 1).tolist(), samples.labels, 7)
    assert scores.confusion.tolist() == expected.pop("confusion")
    figures = scores.figures()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-6), name
    assert (scores.labels.tolist(), list(scores.files)) == (
        list(samples.labels),
        [f"sample {index}" for index in range(61)],
    )
    assert (figures["samples"], figures["views"], figures["unusable"], figures["classes"]) == (61, 1, 0, 7)
    assert scores.counts.tolist() == [samples.labels.count(number) for number in range(7)]
    assert scores.probabilities.sum(1) == pytest.approx(np.ones(61), abs=1e-5)


def test_probabilities_are_averaged_over_views_not_logits() -> None:
    network, samples, logits = known(samples=9, views=15)
    scores = scored(network, samples, batch_size=60)
    expected = np.zeros((9, 7))
    for sample in range(9):
        for view in range(15):
            powers = [math.exp(value) for value in logits[sample, view].tolist()]
            expected[sample] += np.array(powers) / sum(powers) / 15
    assert scores.probabilities == pytest.approx(expected, abs=1e-6)
    assert scores.views == 15
    by_logits = torch.softmax(logits.mean(1), 1).numpy()
    assert np.abs(by_logits - expected).max() > 0.05


def test_of_equal_probabilities_the_lower_class_comes_first() -> None:
    logits = torch.tensor([[0.0, 1, 1, 0, 1, 1, 1]] * 4)[:, None]
    scores = scored(Lookup(logits), Known((1, 2, 6, 0)))
    assert scores.ranks.tolist() == [0, 1, 4, 5]
    assert scores.best.tolist() == [[1, 2, 4, 5, 6]] * 4
    assert (scores.top1, scores.top5) == (0.25, 0.75)
    assert scores.confusion[:, 1].tolist() == [1, 1, 1, 0, 0, 0, 1]


def test_few_classes_have_no_top5_and_a_class_without_samples_no_accuracy() -> None:
    logits = torch.eye(4)[[0, 0, 1, 1]][:, None]
    scores = scored(Lookup(logits), Known((0, 1, 1, 1)), classes=4)
    assert scores.top5 is None
    assert scores.top5_of_all is None
    assert scores.mean_class == pytest.approx((1 + 2 / 3) / 2)
    assert scores.counts.tolist() == [1, 3, 0, 0]
    assert scores.figures()["top5"] is None


def test_a_tiny_probability_has_a_finite_loss() -> None:
    logits = torch.tensor([[[500.0, -500.0]]])
    assert scored(Lookup(logits), Known((1,)), classes=2).loss == pytest.approx(1000)


# --- every sample once ------------------------------------------------------------------------------------------------


def test_unusable_samples_are_counted_and_never_replaced() -> None:
    network, samples, logits = known(samples=11, views=3, bad=(0, 4, 10))
    scores = scored(network, samples, batch_size=9)
    kept = [index for index in range(11) if index not in samples.bad]
    assert list(scores.files) == [f"sample {index}" for index in kept]
    assert [problem.name for problem in scores.unusable] == ["sample 0", "sample 10", "sample 4"]
    assert {problem.reason for problem in scores.unusable} == {"it is bad"}
    expected = by_hand(
        torch.softmax(logits[kept].double(), 2).mean(1).tolist(), [samples.labels[index] for index in kept], 7
    )
    assert scores.top1 == expected["top1"]
    assert scores.top1_of_all == pytest.approx(expected["top1"] * 8 / 11)
    assert scores.top5_of_all == pytest.approx(expected["top5"] * 8 / 11)
    with pytest.raises(ValueError, match=r"sample 0: it is bad.*unusable='count'"):
        scored(network, samples, batch_size=9, unusable="error")
    assert len(scored(*known(samples=11)[:2], unusable="error")) == 11


def test_what_a_manifest_has_left_out_counts_as_unusable(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "ab" for number in range(3)]
    images(tmp_path, *names)
    bad = manifest.Entry(file="b/1.png", bytes=0, modified=0.0, usable=False, reason="cut short")
    manifest.write(manifest.beside(tmp_path), [bad])
    samples = ImageFolder(root=tmp_path).as_test().open((2, 2))
    (tmp_path / "a" / "2.png").write_bytes(b"")
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    scores = scored(network, samples, classes=2)
    assert [(Path(one.name).name, one.reason, one.label) for one in scores.unusable] == [
        ("1.png", "cut short", 1),
        ("2.png", "empty file", 0),
    ]
    assert len(scores) == 4
    assert scores.top1_of_all == pytest.approx(scores.top1 * 4 / 6)
    with pytest.raises(ValueError, match=r"b/1\.png: cut short\. A test with unusable='error'"):
        scored(network, samples, classes=2, unusable="error")


def test_a_sample_over_which_its_loader_hangs_is_unusable(caplog: pytest.LogCaptureFixture) -> None:
    network, samples, _ = known(samples=9, hangs=(3,))
    scores = scored(network, samples, workers=1, seconds=1.0)
    assert [(problem.name, problem.reason) for problem in scores.unusable] == [
        ("sample 3", "took more than 1 s to load")
    ]
    assert len(scores) == 8


@pytest.mark.parametrize(
    ("views", "batch_size", "at_once"), [(1, 4, 4), (3, 8, 6), (15, 4, 4), (15, 32, 30), (2, 1, 1)]
)
def test_every_forward_pass_has_the_same_shape_and_at_most_the_views_asked_for(
    views: int, batch_size: int, at_once: int
) -> None:
    network, samples, logits = known(samples=7, views=views, bad=(2,))
    scores = scored(network, samples, batch_size=batch_size)
    assert {shape[0] for shape in network.shapes} == {at_once}
    kept = [0, 1, 3, 4, 5, 6]
    assert scores.probabilities == pytest.approx(torch.softmax(logits[kept].double(), 2).mean(1).numpy(), abs=1e-6)


def test_the_network_and_the_random_state_are_left_as_they_were() -> None:
    network, samples, _ = known()
    network.train()
    network.frozen.eval()
    before = torch.get_rng_state()
    beats: list[int] = []
    scored(network, samples, workers=1, beat=lambda: beats.append(1))
    assert (network.training, network.dropout.training, network.frozen.training) == (True, True, False)
    assert torch.get_rng_state().equal(before)
    assert torch.is_grad_enabled()
    assert len(beats) == math.ceil(23 / 4)


# --- what is refused --------------------------------------------------------------------------------------------------


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (len(name) * 9, 40, 90)).save(root / name)
    return root


def test_labels_that_are_no_classes_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    loose = ImageFolder(root=images(tmp_path, "a/1.png", "b/2.png", "4.png")).as_test().open((2, 2))
    with pytest.raises(ValueError, match=r"labels from 0 to 1.*classes=2; not so: .*4\.png \(no label\)$"):
        scored(nn.Identity(), loose, classes=2)
    (tmp_path / "list.csv").write_text("".join(f"{number}.mp4\n" for number in range(9)))
    (tmp_path / "0.mp4").touch()  # one is there, and never opened
    listed = Videos(root=tmp_path / "list.csv").as_test().open((2, 2, 2))
    with pytest.raises(ValueError, match=r"not so: .*/0\.mp4 \(no label\), .* and 4 more$"):
        scored(nn.Identity(), listed, classes=2)


def test_labels_that_no_listing_has_are_refused_when_they_come() -> None:
    network, _, _ = known()
    with pytest.raises(ValueError, match=r"not so: sample 1 \(no label\)"):
        scored(network, Known((0, -1, 3)))
    with pytest.raises(ValueError, match=r"not so: sample 2 \(7\)"):
        scored(network, Known((0, 1, 7)))


@pytest.mark.parametrize(
    ("theirs", "names", "said"),
    [
        (
            ("a", "b"),
            ("a", "b", "c"),
            "trained with 3 classes, and these data have 2 others .1 only there: c.*split='val'",
        ),
        (("a", "b", "d"), ("a", "b", "c"), "1 only there: c; 1 only here: d"),
        (("a", "c", "b"), ("a", "b", "c"), "the same ones, in another order"),
        (("0", "1", "2"), ("0", "10", "2"), "1 only there: 10; 1 only here: 1"),  # folders, sorted as text
        (("0", "10", "2"), ("0", "1", "2"), "1 only there: 1; 1 only here: 10"),
        (("a", "b", "c", "d"), (), "the data have 4 classes, but classes=3"),
        ((), ("a", "b"), "there are 2 names of classes=3"),
    ],
)
def test_classes_of_other_names_are_refused(theirs: tuple[str, ...], names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scored(Lookup(torch.zeros(3, 1, 3)), Known((0, 1, 2), classes=theirs), classes=3, names=names)


@pytest.mark.parametrize(
    ("theirs", "names", "shown"),
    [
        (("a", "b", "c"), ("a", "b", "c"), ("a", "b", "c")),
        (("a", "b", "c"), (), ("a", "b", "c")),
        ((), ("a", "b", "c"), ("a", "b", "c")),
        (("0", "1"), ("a", "b", "c"), ("a", "b", "c")),  # a list numbers its classes, up to the last that it has
        (("a", "b", "c"), ("0", "1", "2"), ("a", "b", "c")),
        (("a", "b"), (), ("a", "b", "2")),
        (("0", "1"), ("00", "01", "02"), ("00", "01", "02")),
        ((), (), ("0", "1", "2")),
    ],
)
def test_classes_have_the_best_names_that_are_known(
    theirs: tuple[str, ...], names: tuple[str, ...], shown: tuple[str, ...]
) -> None:
    samples = Known((0, 1, 2), classes=theirs)
    assert scored(Lookup(torch.zeros(3, 1, 3)), samples, classes=3, names=names).classes == shown


class Own:
    """A source of somebody's own, that knows how a test looks at it and nothing else."""

    def as_test(self) -> str:
        return "in one view"


def test_a_test_draws_nothing_and_keeps_what_draws_nothing_already() -> None:
    images = ImageFolder(root=Path("photos"))
    assert as_tested(images) == glanced(images) == images.as_test()
    whole = ImageFolder(root=Path("photos"), crop=CentreCrop(ratio=1), flip=False)
    assert as_tested(whole) == glanced(whole) == whole
    videos = Videos(root=Path("videos"), flip=True)
    assert as_tested(videos) == glanced(videos) == videos.as_test()
    views = videos.as_test(clips=5, crops=3)
    assert as_tested(views) == views
    assert glanced(views) == videos.as_test()
    bare = Known((0, 1))
    assert as_tested(bare) is glanced(bare) is bare
    own = Own()
    assert as_tested(own) is own  # it may be a test of many views already
    assert glanced(own) == "in one view"


def test_what_the_network_gives_is_looked_at() -> None:
    network, samples, logits = known()
    with pytest.raises(ValueError, match="the network gives 7 logits, but classes=8"):
        scored(network, samples, classes=8)
    for wrong in (math.nan, math.inf):
        logits[5, 0, 2] = wrong
        with pytest.raises(FloatingPointError, match="not finite for sample 5"):
            scored(network, samples)


def test_nothing_to_test_on_is_an_error() -> None:
    network, _, _ = known()
    with pytest.raises(ValueError, match="none of 2 samples can be used, the first is sample 0: it is bad"):
        scored(network, Known((0, 1), bad=(0, 1)))
    with pytest.raises(ValueError, match="none of 0 samples"):
        scored(network, Known(()))


# --- how far it is ----------------------------------------------------------------------------------------------------


def test_the_first_process_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "EVERY", 0.0)
    network, samples, _ = known(samples=6, bad=(1,))
    scored(network, samples, shown=True)
    said = capfd.readouterr().err.splitlines()
    assert said == ["test: 4 of 6 samples, 1 unusable, 0 min left", "test: 6 of 6 samples, 1 unusable, 0 min left"]
    scored(network, samples, shown=False)
    assert capfd.readouterr().err == ""


# --- real clips, in several processes ---------------------------------------------------------------------------------


def classifier() -> nn.Module:
    """A small video classifier that is sure of itself, the same one each time."""
    torch.manual_seed(3)
    image = (
        ConvMAE()
        .input(32)
        .stages(
            ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
            AttentionStage(dim=16, depth=1, stride=(4, 4), heads=2),
        )
    )
    network = VideoConvMAE.inflate(image, frames=4).classifier(CLASSES).build()
    nn.init.normal_(network.head.weight, std=2)
    return network


def clips(root: Path, *, count: int | None = None) -> Path:
    """Real clips in some classes, damaged ones among them: all, or the first few."""
    paths = sorted([*CLIPS, *(MEDIA / "bad" / name for name in UNUSABLE)], key=lambda path: path.name)
    small = [path for path in paths if "1080p" not in path.name and "720p" not in path.name]
    for place, path in enumerate(small[:count]):
        folder = root / f"class {place % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
    return root


def source(root: Path) -> Videos:
    return Videos(root=root, sampling=Dense(stride=2), reader="pyav").as_test(clips=2, crops=3)


def together(out: Path, world: int, *jobs: dict[str, Any]) -> list[tuple[int, str]]:
    """Carry out tests in so many processes: their exit codes and output; each leaves its scores in the folder."""
    return list(zip(*several(world, __file__, out, repr(jobs)), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with join("cpu", minutes=2) as world:
        for how in eval(sys.argv[2]):
            name, root, share = how.pop("name"), Path(how.pop("root")), how.pop("share", None)
            network = classifier()
            if share is not None:
                network = world.share(network, sharded=share == "fsdp")
            samples = source(root).open(SIZE)
            settings = {"batch_size": 7, "workers": 1, **how}
            scores = evaluate(network, samples, size=SIZE, classes=CLASSES, world=world, **settings)
            folder = out / name / f"{world.rank} of {world.size}"
            write(scores, folder, probabilities=True)
            np.savez(folder / "more.npz", likelihoods=scores.likelihoods, confusion=scores.confusion)


def left_behind(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What one process has written: arrays, and files."""
    arrays: dict[str, Any] = {}
    for path in folder.glob("*.npz"):
        with np.load(path) as kept:
            arrays |= dict(kept)
    return arrays, {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


@needs_media
@pytest.mark.slow
def test_scores_are_identical_on_one_two_and_three_processes_and_every_video_counts_once(tmp_path: Path) -> None:
    roots = {"many": clips(tmp_path / "many"), "few": clips(tmp_path / "few", count=5)}  # of 3, one process has none
    plain = [{"name": name, "root": str(root)} for name, root in roots.items()]
    shared = [{**job, "name": f"{job['name']}, {how}", "share": how} for job in plain for how in ("ddp", "fsdp")]
    for world in (1, 2, 3):
        ended = together(tmp_path / "out", world, *plain, *(shared if world > 1 else ()))
        assert [code for code, _ in ended] == [0] * world, ended
    for name, root in roots.items():
        arrays, files = left_behind(tmp_path / "out" / name / "0 of 1")
        there = {path.name for path in root.glob("*/*")}
        usable = there - UNUSABLE.keys()
        assert sorted(Path(path).name for path in arrays["files"]) == sorted(usable)
        figures = json.loads(files["scores.json"])
        assert (figures["samples"], figures["unusable"], figures["views"]) == (len(usable), len(there - usable), 6)
        assert figures["unusable"] > 0
        assert len({tuple(row) for row in arrays["probabilities"].tolist()}) == len(usable)  # it tells clips apart
        others = [path for path in (tmp_path / "out").glob(f"{name}*/*") if path.name != "0 of 1"]
        assert len(others) == 3 * 5
        for other in others:
            theirs, written = left_behind(other)
            assert written == files, other
            assert theirs.keys() == arrays.keys()
            for key, values in theirs.items():
                assert np.array_equal(values, arrays[key]), (other, key)


@needs_media
def test_the_scores_of_real_clips_are_those_of_a_loop_over_videos_and_views(tmp_path: Path) -> None:
    network, samples = classifier().eval(), source(clips(tmp_path, count=16)).open(SIZE)
    views = replace(source(tmp_path), views=None).as_test(clips=5, crops=3).open(SIZE)
    for looked_at, count in ((samples, 6), (views, 15)):
        scores = evaluate(network, looked_at, size=SIZE, classes=CLASSES, world=ALONE, batch_size=20, shown=False)
        place, missing = 0, list[str]()
        for index in range(len(looked_at)):
            try:
                pixels = looked_at.load(index, torch.Generator()).pixels
            except UnusableFileError:
                missing.append(looked_at.name(index))
                continue
            total = np.zeros(CLASSES)
            assert len(pixels) == count
            for view in pixels:
                with torch.no_grad():
                    logits = network(normalize(view[None]))[0].tolist()
                powers = np.exp(np.array(logits) - max(logits))
                total += powers / powers.sum()
            np.testing.assert_allclose(scores.probabilities[place], total / count, atol=2e-6)
            assert scores.files[place] == looked_at.name(index)
            assert scores.classes[scores.labels[place]] == Path(looked_at.name(index)).parent.name
            place += 1
        assert place == len(scores) > 3
        assert sorted(missing) == [problem.name for problem in scores.unusable]
        for problem in scores.unusable:
            assert scores.classes[problem.label] == Path(problem.name).parent.name


@needs_media
@pytest.mark.slow
def test_what_one_process_meets_ends_all_with_the_same_error(tmp_path: Path) -> None:
    root = tmp_path / "clips"
    for name in ("a/1.mp4", "b/2.mp4", "c/3.mp4"):
        counting(root / name)
    (root / "b" / "2.mp4").write_bytes(b"")
    ended = together(tmp_path / "out", 2, {"name": "a", "root": str(root), "unusable": "error", "batch_size": 6})
    assert [code for code, _ in ended] == [1, 1]
    for _, said in ended:
        assert "2.mp4: empty file. A test with unusable='error' takes whole data only" in said


# --- files ------------------------------------------------------------------------------------------------------------


def some_scores(classes: int = 8, samples: int = 40) -> Scores:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 2, (samples, classes)))
    labels = random.integers(classes, size=samples)
    probabilities = logits.softmax(1).numpy()
    return Scores(
        classes=tuple(f'class, "{number}"' for number in range(classes)),
        files=Names.of([f"/d/a,b {index}.mp4" for index in range(samples - 1)] + ["/d/\udce9.mp4"]),
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        likelihoods=np.log(probabilities[range(samples), labels]),
        unusable=(Unusable("/d/x.mp4", "empty file", 3), Unusable("/d/y.mp4", "empty file", -1)),
        views=15,
    )


def table(path: Path) -> list[dict[str, str]]:
    text = path.read_bytes().decode(errors="surrogateescape")
    return list(csv.DictReader(io.StringIO(text)))


def test_the_files_say_what_the_scores_say(tmp_path: Path) -> None:
    scores = some_scores()
    written = write(scores, tmp_path / "deep" / "test", probabilities=True)
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "deep" / "test").iterdir())
    figures = json.loads((tmp_path / "deep" / "test" / "scores.json").read_text())
    assert figures.pop("reasons") == {"empty file": 2}
    assert figures == scores.figures()
    lines = table(tmp_path / "deep" / "test" / "predictions.csv")
    assert [line["path"] for line in lines] == [*scores.files, "/d/x.mp4", "/d/y.mp4"]
    for line, label, row in zip(lines[:-2], scores.labels, scores.probabilities, strict=True):
        order = sorted(range(8), key=lambda one: -row[one])
        assert line["class"] == scores.classes[label]
        assert int(line["place"]) == order.index(label) + 1
        assert [line[f"class {place}"] for place in range(1, 6)] == [scores.classes[one] for one in order[:5]]
        shown = [float(line[f"probability {place}"]) for place in range(1, 6)]
        assert shown == pytest.approx([row[one] for one in order[:5]], rel=1e-5)
        assert line["unusable"] == ""
    assert [(line["class"], line["unusable"], line["place"]) for line in lines[-2:]] == [
        ('class, "3"', "empty file", ""),
        ("", "empty file", ""),
    ]
    assert sum(line["place"] == "1" for line in lines) == round(scores.top1 * 40)
    per_class = table(tmp_path / "deep" / "test" / "classes.csv")
    assert [int(line["samples"]) for line in per_class] == np.bincount(scores.labels, minlength=8).tolist()
    assert [int(line["unusable"]) for line in per_class] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert sum(int(line["correct"]) for line in per_class) == round(scores.top1 * 40)
    means = [float(line["accuracy"]) for line in per_class if line["accuracy"]]
    assert sum(means) / len(means) == pytest.approx(scores.mean_class, abs=1e-5)
    with np.load(tmp_path / "deep" / "test" / "probabilities.npz") as kept:
        assert np.array_equal(kept["probabilities"], scores.probabilities)
        assert np.array_equal(kept["labels"], scores.labels)
    assert "top1=" in repr(scores)


def test_a_table_of_few_classes_shows_as_many_as_there_are(tmp_path: Path) -> None:
    write(some_scores(classes=3), tmp_path)
    assert list(table(tmp_path / "predictions.csv")[0]) == [
        *("path", "class", "place"),
        *(f"{what} {place}" for place in (1, 2, 3) for what in ("class", "probability")),
        "unusable",
    ]


def test_files_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(some_scores(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(some_scores(samples=20), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("classes", [1, 2, 8, 30, 400])
def test_the_picture_of_mistakes_shows_where_they_are(classes: int) -> None:
    matrix = np.diag(np.full(classes, 20))
    names = [f"a class with $ and a name that is long, {number}" for number in range(classes)]

    def pixels(matrix: Any) -> Any:
        with Image.open(io.BytesIO(confusion.draw(matrix, names))) as picture:
            assert min(picture.size) > 1000
            return np.asarray(picture.convert("L")).astype(int)

    right = pixels(matrix)
    if classes == 1:
        return
    matrix[classes - 1, 0] = 1  # at the lower left
    changed = np.argwhere(pixels(matrix)[:, : right.shape[1] // 2] < right[:, : right.shape[1] // 2] - 10)
    assert len(changed)
    assert np.median(changed[:, 0]) > right.shape[0] * 0.6


def test_the_scores_of_images_are_the_same_through_their_own_source(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "ab" for number in range(3)]
    samples = ImageFolder(root=images(tmp_path, *names)).as_test().open((32, 32))
    torch.manual_seed(0)
    network = (
        ConvMAE()
        .input(32)
        .stages(
            ConvStage(dim=8, depth=1, stride=(8, 8), kernel=(3, 3)),
            AttentionStage(dim=8, depth=1, stride=(2, 2), heads=2),
        )
        .classifier(2)
        .build()
    )
    how: dict[str, Any] = {"size": (32, 32), "classes": 2, "world": ALONE, "shown": False}
    rough = torch.autocast("cpu", torch.bfloat16)
    one, again = (evaluate(network, samples, batch_size=size, **how) for size in (1, 4))
    assert one.classes == ("a", "b")
    np.testing.assert_allclose(one.probabilities, again.probabilities, atol=1e-6)
    other = evaluate(network, samples, batch_size=4, autocast=rough, **how)
    assert other.probabilities.dtype == np.float32
    assert np.array_equal(other.labels, again.labels)


if __name__ == "__main__":
    importlib.import_module("test_evaluation").main()
