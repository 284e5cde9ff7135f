"""Finetuning: what a batch becomes, where a run starts, that it survives, and that it is tested."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import needs_shared, tensors, under
from numpy.typing import NDArray
from PIL import Image
from runs import several, tiny
from test_golden import pair_names
from torch import Tensor

from convmae import checkpoint, official, recipes
from convmae.augmentation import Erasing, Mixing, RandAugment
from convmae.builders import Classifier
from convmae.data import Batch, generator
from convmae.distributed import World
from convmae.files import lines
from convmae.finetune import Finetune
from convmae.images import ImageFolder
from convmae.learners import Classification, Examination, Learner
from convmae.nn.classifier import Classifier as ClassifierModule
from convmae.run import Pretrain
from convmae.targets import normalize
from convmae.training import fit, steps
from video import VideoConvMAE
from video import recipes as video_recipes

SIZE = (32, 32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes, dark, grey and bright: 8 of each to learn, 3 to test; one of these is broken."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("bright", "dark", "grey")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                level = (200, 20, 110)[label]
                pixels: NDArray[Any] = np.clip(level + random.normal(0, 12, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    (root / "val" / "grey" / "2.png").write_bytes(b"no picture")
    return root


def a_run(folder: Path, root: Path, **changes: Any) -> Finetune:
    plain = Finetune(
        model=tiny(),
        data=ImageFolder(root=root, split="train"),
        test=ImageFolder(root=root, split="val").as_test(),
        epochs=6,
        batch_size=6,
        folder=folder,
        base_lr=0.2,
        warmup_epochs=1,
        workers=0,
        log_every=1,
        test_every=2,
        mixing=None,
        erasing=None,
        layer_decay=0.9,
        checkpoint_minutes=0,
    )
    return replace(plain, **changes)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- a batch ----------------------------------------------------------------------------------------------------------


def batch(count: int, *, labels: list[int] | None = None) -> Batch:
    pixels = torch.randint(256, (count, 3, *SIZE), generator=generator(0), dtype=torch.uint8)
    wanted = torch.tensor(labels if labels is not None else [n % 3 for n in range(count)])
    return Batch(pixels, wanted, None, [], torch.arange(count))


def classifier(classes: int = 3, **changes: Any) -> ClassifierModule:
    torch.manual_seed(0)
    return replace(tiny().drop_path(0).classifier(classes), head_std=0.5, **changes).build()


def test_without_mixing_the_loss_is_the_cross_entropy_of_normalised_pixels() -> None:
    model = classifier()
    learner = Classification(model)
    given = batch(5)
    x, targets = learner.inputs(given, torch.device("cpu"), generator(1))
    assert torch.equal(x, normalize(given.pixels))
    loss = learner.losses(model, (x, targets))["loss"]
    assert loss.item() == pytest.approx(F.cross_entropy(model(x), given.labels).item())
    assert torch.equal(model(given.pixels), model(x)), "a classifier takes pixels, too"


def test_mixing_and_erasing_are_drawn_from_the_generator_alone() -> None:
    learner = Classification(classifier(), mixing=Mixing(), erasing=Erasing(probability=1))
    given, before = batch(6), torch.get_rng_state()
    first, again = (learner.inputs(given, torch.device("cpu"), generator(7)) for _ in range(2))
    other = learner.inputs(given, torch.device("cpu"), generator(8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before, torch.get_rng_state())
    assert first[1].sum(1).allclose(torch.ones(6))
    erased = Classification(classifier(), erasing=Erasing(probability=1))
    x, _ = erased.inputs(given, torch.device("cpu"), generator(7))
    changed = (x != normalize(given.pixels)).any(1).flatten(1).float().mean(1)
    assert bool(((changed > 0.01) & (changed < 0.5)).all())


@pytest.mark.parametrize(("labels", "told"), [([0, -1], "no label"), ([0, 3], "label 3")])
def test_labels_that_are_no_classes_are_refused(labels: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=rf"{told}.*classes 0 to 2"):
        Classification(classifier()).inputs(batch(2, labels=labels), torch.device("cpu"), generator(0))


@needs_shared
def test_loss_and_gradients_of_finetuning_are_the_authors() -> None:
    content = tensors("convvit_tiny")
    state = {name: one for name, one in under(content, "state.").items() if not name.startswith("norm.")}
    model = official.load(state, heads=4)
    assert isinstance(model, ClassifierModule)
    names = pair_names(state, model)
    learner = Classification(model.double())
    targets = F.one_hot(content["in.labels"].long(), 10).double()
    loss = learner.losses(model, (content["in.imgs"].double(), targets))["loss"]
    assert loss.item() == pytest.approx(content["out.gp1.loss"].item(), rel=1e-6)
    torch.autograd.backward(loss)
    theirs = under(content, "grad_gp1.")
    assert {names[name].split(".")[0] for name in theirs} == {"trunk", "head"}  # the first stage, positions, head
    for name, gradient in theirs.items():
        ours = model.get_parameter(names[name]).grad
        assert ours is not None
        assert float((ours.flatten() - gradient.flatten()).abs().max()) < 1e-6, name


@pytest.mark.parametrize(
    ("recipe", "epochs", "rate", "samples", "repeats", "decay", "drop_path", "dropout", "flip", "views"),
    [
        (recipes.imagenet_finetune, 100, 5e-4, 1024, 1, 0.65, 0.1, 0.0, True, 1),
        (video_recipes.kinetics_finetune, 100, 1e-3, 512, 1, 0.75, 0.1, 0.0, True, 15),
        (video_recipes.kinetics_finetune_long, 75, 5e-4, 384, 2, 0.75, 0.1, 0.0, True, 15),
        (video_recipes.ssv2_finetune, 50, 5e-4, 512, 1, 0.75, 0.1, 0.0, False, 6),
        (video_recipes.ucf101_finetune, 100, 5e-4, 128, 2, 0.7, 0.2, 0.5, True, 15),
    ],
)
def test_recipes_have_the_published_numbers(
    recipe: Callable[[], Finetune],
    epochs: int,
    rate: float,
    samples: int,
    repeats: int,
    decay: float,
    drop_path: float,
    dropout: float,
    flip: bool,
    views: int,
) -> None:
    run, data = recipe(), cast(Any, recipe().data)
    assert (run.epochs, run.warmup_epochs, run.min_lr) == (epochs, 5, 1e-6)
    assert run.peak_lr == pytest.approx(rate * samples / 256)
    assert (run.batch_size, getattr(data, "repeats", 1)) == (samples * repeats, repeats)
    assert (run.layer_decay, run.drop_path, run.dropout) == (decay, drop_path, dropout)
    assert (run.betas, run.weight_decay, run.head_std) == ((0.9, 0.999), 0.05, 2e-5)
    assert run.mixing == Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1)
    assert run.erasing == Erasing(probability=0.25)
    assert run.pooling == "mean"
    assert data.flip == flip
    ops, magnitude = (2, 9.0) if recipe is recipes.imagenet_finetune else (4, 7.0)
    assert data.augment == (RandAugment(ops=ops, magnitude=magnitude, deviation=0.5),)
    assert len(getattr(run.test, "views", None) or (1,)) == views


# --- where a run starts -----------------------------------------------------------------------------------------------


def pretrained(folder: Path, root: Path, size: int = 32) -> Path:
    run = Pretrain(
        model=tiny().input(size),
        data=ImageFolder(root=root, split="train"),
        epochs=1,
        warmup_epochs=0,
        batch_size=8,
        base_lr=1e-2,
        folder=folder,
        workers=0,
        pictures=0,
    )
    assert fit(run)
    return folder


def first_weights(run: Finetune) -> dict[str, Tensor]:
    for _ in steps(replace(run, checkpoint_steps=1, keep_every=1)):
        break
    content: dict[str, Tensor] = checkpoint.read(run.folder / "checkpoints" / "step-00000000.pt")["weights"]
    return content


def test_a_run_starts_from_the_trunk_of_its_checkpoint(tmp_path: Path, pictures: Path) -> None:
    before = checkpoint.read(pretrained(tmp_path / "before", pictures) / "last.pt")["weights"]
    for name, path in (("folder", tmp_path / "before"), ("file", tmp_path / "before" / "last.pt")):
        after = first_weights(a_run(tmp_path / name, pictures, checkpoint=path))
        trunk = [name for name in after if name.startswith("trunk.")]
        assert trunk
        assert all(torch.equal(before[name], after[name]) for name in trunk)
        assert not any(name.startswith(("decoder", "fusion")) for name in after)


def test_a_larger_input_resizes_positions_alone(tmp_path: Path, pictures: Path) -> None:
    before = checkpoint.read(pretrained(tmp_path / "before", pictures) / "last.pt")["weights"]
    after = first_weights(a_run(tmp_path / "after", pictures, checkpoint=tmp_path / "before", model=tiny().input(64)))
    assert after["trunk.stages.1.positions"].shape == (8, 8, 16)
    trunk = [name for name in after if name.startswith("trunk.") and not name.endswith("positions")]
    assert all(torch.equal(before[name], after[name]) for name in trunk)


def test_classes_and_their_names_come_from_the_data_and_stay_with_the_classifier(
    tmp_path: Path, pictures: Path
) -> None:
    assert fit(a_run(tmp_path / "run", pictures, epochs=1, warmup_epochs=0))
    model = checkpoint.load(tmp_path / "run" / "last.pt")
    assert model.builder.names == ("bright", "dark", "grey")
    assert model.head.out_features == 3
    assert fit(a_run(tmp_path / "more", pictures, epochs=1, warmup_epochs=0, classes=5, test=None))
    more = checkpoint.load(tmp_path / "more" / "last.pt")
    assert (more.head.out_features, more.builder.names) == (5, ())


def test_data_without_classes_or_with_more_than_the_run_has_are_refused(tmp_path: Path, pictures: Path) -> None:
    unlabelled = ImageFolder(root=pictures / "train" / "grey")
    with pytest.raises(ValueError, match=r"has no classes.*--classes"):
        fit(a_run(tmp_path / "run", pictures, data=unlabelled, test=None))
    with pytest.raises(ValueError, match=r"--classes 2: the data have 3"):
        fit(a_run(tmp_path / "run", pictures, classes=2))


def test_a_checkpoint_that_is_not_there_or_for_other_axes_is_refused(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"--checkpoint .*nowhere: no checkpoint at"):
        fit(a_run(tmp_path / "run", pictures, checkpoint=tmp_path / "nowhere"))
    clips = VideoConvMAE.inflate(tiny(), frames=2)
    checkpoint.save(tmp_path / "clips.pt", clips.build())
    with pytest.raises(ValueError, match=r"\(2, 32, 32\) pixels, this run one of \(32, 32\).*inflate"):
        fit(a_run(tmp_path / "run", pictures, checkpoint=tmp_path / "clips.pt"))


def test_a_run_that_cannot_be_is_refused_with_all_that_is_wrong(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)drop_path must be.*layer_decay must be.*average must be"):
        a_run(tmp_path, pictures, drop_path=1.5, layer_decay=0.0, average=1.0)


# --- learning, surviving, being tested --------------------------------------------------------------------------------


def test_it_learns_and_is_tested_on_what_can_be_read(tmp_path: Path, pictures: Path) -> None:
    run = a_run(tmp_path / "run", pictures, average=0.5)
    assert fit(run)
    scores = list(lines(run.folder / "scores.jsonl"))
    assert [line["epoch"] for line in scores] == [2, 4, 6]
    assert scores[-1]["top1"] == 1.0
    assert scores[-1]["average_top1"] == 1.0
    assert [line["unusable"] for line in scores] == [1, 1, 1]
    told = json.loads((run.folder / "test" / "scores.json").read_text())
    assert (told["samples"], told["unusable"], told["top1"]) == (8, 1, 1.0)
    assert (run.folder / "test" / "confusion.png").is_file()
    assert (run.folder / "test_average" / "predictions.csv").is_file()
    assert "top1" in (run.folder / "report.html").read_text()


@dataclass(frozen=True, kw_only=True)
class Stopped(Finetune):
    """A run that is asked to stop in every third step."""

    def rate(self, step: int, total: int) -> float:
        if step % 3 == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().rate(step, total)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_bits_and_the_same_scores(tmp_path: Path, pictures: Path) -> None:
    changes: dict[str, Any] = {"average": 0.9, "mixing": Mixing(), "erasing": Erasing(), "dropout": 0.2}
    whole = a_run(tmp_path / "whole", pictures, **changes)
    assert fit(whole)
    module = importlib.import_module("test_finetune")  # found by name when the run is read from its checkpoint
    broken = module.Stopped(**{**vars(whole), "folder": tmp_path / "broken"})
    times = 0
    while not fit(broken):
        times += 1
        assert times < 20
    assert times >= 5
    one, other = (checkpoint.read(run.folder / "last.pt") for run in (whole, broken))
    assert same(one["weights"], other["weights"])
    assert same(one["average"], other["average"])
    assert not same(one["weights"], one["average"])

    def told(folder: Path) -> list[dict[str, Any]]:
        return [{**line, "seconds": 0} for line in lines(folder / "scores.jsonl")]

    assert told(whole.folder) == told(broken.folder)


def test_a_run_goes_on_without_the_checkpoint_it_began_with(tmp_path: Path, pictures: Path) -> None:
    start = pretrained(tmp_path / "before", pictures)
    run = a_run(tmp_path / "run", pictures, checkpoint=start)
    for step in steps(run):
        if step.number == 3:
            break
    (start / "last.pt").unlink()
    assert [step.number for step in steps(run)][-1] == step.start.total


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path: Path, pictures: Path) -> None:
    pretrained(tmp_path / "before", pictures)
    run = a_run(tmp_path / "before", pictures)
    assert "holds a Pretrain, this run is a Finetune" in (run.refusal() or "")
    with pytest.raises(ValueError, match="holds a Pretrain"):
        fit(run)


def test_a_builder_of_a_classifier_keeps_its_names() -> None:
    builder = tiny().classifier(2)
    named = replace(builder, names=("cat", "dog"))
    assert eval(repr(named), {**vars(importlib.import_module("convmae")), "Classifier": Classifier}) == named
    with pytest.raises(ValueError, match="as many names as classes=2"):
        replace(builder, names=("cat",))


@dataclass(frozen=True, kw_only=True)
class StoppedInTests(Finetune):
    """A run that is asked to stop in the middle of its tests, and once more in the last of them."""

    def examination(self, learner: Learner, world: World, beat: Callable[[], None]) -> Examination | None:
        left = self.folder / "stops"

        def interrupting() -> None:
            stops = int(left.read_text()) if left.exists() else 3
            if stops:
                left.write_text(str(stops - 1))
                os.kill(os.getpid(), signal.SIGTERM)
            beat()

        return super().examination(learner, world, interrupting)


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_test_is_obeyed_and_the_test_made_up_for(tmp_path: Path, pictures: Path) -> None:
    whole = a_run(tmp_path / "whole", pictures, checkpoint_minutes=60)
    assert fit(whole)
    module = importlib.import_module("test_finetune")
    broken = module.StoppedInTests(**{**vars(whole), "folder": tmp_path / "broken"})
    for _ in range(3):
        assert not fit(broken)
        assert [line["event"] for line in lines(broken.folder / "events.jsonl")][-1] == "stopping"
    assert fit(broken)
    one, other = ([{**line, "seconds": 0} for line in lines(run.folder / "scores.jsonl")] for run in (whole, broken))
    assert one == other
    assert same(*(checkpoint.read(run.folder / "last.pt")["weights"] for run in (whole, broken)))


# --- several processes ------------------------------------------------------------------------------------------------


def in_processes(world: int, folder: Path, root: Path, **changes: Any) -> None:
    """Fit the run in so many processes."""
    code = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from convmae.training import fit
from test_finetune import a_run
changes = eval(sys.argv[3])
assert fit(a_run(Path(sys.argv[1]), Path(sys.argv[2]), device="cpu", **changes))
"""
    codes, said = several(world, "-c", code, folder, root, repr(changes))
    assert codes == [0] * world, "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (3, "ddp"), (2, "fsdp")])
def test_several_processes_learn_and_are_tested_as_one(
    tmp_path: Path, pictures: Path, world: int, parallel: str
) -> None:
    """Without what each process draws by itself; the average of weights, and the tests, are shared, too."""
    same_for_all: dict[str, Any] = {"drop_path": 0.0, "average": 0.5, "epochs": 2, "test_every": 1}
    assert fit(a_run(tmp_path / "one", pictures, **same_for_all))
    in_processes(world, tmp_path / "several", pictures, parallel=parallel, **same_for_all)
    one, several = (checkpoint.read(tmp_path / name / "last.pt") for name in ("one", "several"))
    for kind in ("weights", "average"):
        assert one[kind].keys() == several[kind].keys()
        for name, tensor in one[kind].items():
            torch.testing.assert_close(several[kind][name], tensor, rtol=1e-4, atol=1e-5)
    told = [list(lines(tmp_path / name / "scores.jsonl")) for name in ("one", "several")]
    assert len(told[0]) == len(told[1]) == 2
    for first, other in zip(*told, strict=True):
        for name in first.keys() - {"seconds"}:
            assert other[name] == pytest.approx(first[name], rel=1e-3), name
