"""Probes: their laws, what they see of a set, and that they go along with a run."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import TinyRun, several, tiny
from timm.optim.lars import Lars
from torch import nn

from convmae import checkpoint, demo, probe, recipes
from convmae.data import Sample, Samples, UnusableFileError, generator
from convmae.distributed import World
from convmae.files import lines
from convmae.lars import LARS
from convmae.probe import Embedded, Few, Probe, Probing, accuracy, attentive, embed, knn, linear
from convmae.targets import normalize
from convmae.training import fit
from video import VideoConvMAE
from video import demo as video_demo
from video import probe as video_probe

ALONE = World(0, 1, torch.device("cpu"))


def clouds(count: int, *, classes: int = 3, width: int = 16, spread: float = 0.3, seed: int = 0) -> Embedded:
    """Points around a centre for each class; tokens of which one alone knows the class."""
    random = generator(seed, 99)
    centres = torch.randn(classes, width, generator=generator(99))
    labels = torch.randint(classes, (count,), generator=random)
    features = centres[labels] + spread * torch.randn(count, width, generator=random)
    tokens = torch.randn(count, 5, width, generator=random)
    tokens[torch.arange(count), torch.randint(5, (count,), generator=random)] = 3 * centres[labels]
    return Embedded(features, tokens.half(), labels, 0)


# --- laws -------------------------------------------------------------------------------------------------------------


def test_neighbours_vote_as_in_a_loop_in_float64() -> None:
    train, test = clouds(50, spread=2), clouds(31, spread=2, seed=1)
    mean = train.features.double().mean(0)
    right = 0
    for point, label in zip(test.features.double(), test.labels.tolist(), strict=True):
        cosines = [
            float(torch.dot(point - mean, other - mean) / ((point - mean).norm() * (other - mean).norm()))
            for other in train.features.double()
        ]
        votes = np.zeros(3)
        for index in sorted(range(50), key=lambda index: (-cosines[index], index))[:7]:
            votes[train.labels[index]] += math.exp(cosines[index] / 0.07)
        right += int(votes.argmax()) == label
    assert knn(train, test, neighbours=7).top1 == pytest.approx(right / 31)
    assert 0.3 < right / 31 < 0.95


def test_neighbours_do_not_care_for_scale_or_shift_and_all_vote_where_there_are_few() -> None:
    train, test = clouds(40, spread=1.5), clouds(30, spread=1.5, seed=1)
    moved = [each._replace(features=7 * each.features + 3) for each in (train, test)]
    assert knn(train, test) == knn(*moved)
    assert knn(train, test, neighbours=1000) == knn(train, test, neighbours=40)
    with pytest.raises(ValueError, match="neighbours=0 is below 1"):
        knn(train, test, neighbours=0)


def test_the_first_five_count_where_there_are_five_classes_and_ties_go_to_the_lower_one() -> None:
    votes = torch.tensor([[0.0, 1, 1, 0, 0, 0], [9, 8, 7, 6, 5, 4]])
    assert accuracy(votes, torch.tensor([1, 5])) == (0.5, 0.5)
    assert accuracy(votes, torch.tensor([2, 4])) == (0.0, 1.0)
    assert accuracy(votes[:, :3], torch.tensor([1, 0])) == (1.0, None)


@pytest.mark.parametrize("count", [2, 3, 9, 10, 15, 17, 18])
def test_a_linear_probe_takes_few_samples_and_refuses_one(count: int) -> None:
    train, test = clouds(count), clouds(30, seed=1)
    assert 0 <= linear(train, test)[0].top1 <= 1
    with pytest.raises(ValueError, match="it needs 2 or more, not 1"):
        linear(clouds(1), test)


def test_neighbours_are_the_same_however_many_are_sorted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clouds(50, spread=2), clouds(31, spread=2, seed=1)
    whole = knn(train, test)
    monkeypatch.setattr(probe, "_SORTED", 120)
    assert knn(train, test) == whole


def test_a_linear_probe_separates_what_can_be_and_does_not_care_for_scale() -> None:
    train, test = clouds(120), clouds(60, seed=1)
    found, rate = linear(train, test)
    assert found.top1 == 1.0
    assert rate in probe.RATES
    scales = torch.logspace(-3, 3, 16)
    scaled = [each._replace(features=each.features * scales) for each in (train, test)]
    assert linear(*scaled, rates=[rate])[0].top1 == 1.0
    assert linear(train, test) == (found, rate), "the same from the same seed"


def test_the_rate_is_chosen_without_a_look_at_the_test_samples() -> None:
    train, test = clouds(80, spread=2), clouds(40, spread=2, seed=1)
    wrong = test._replace(labels=(test.labels + 1) % 3)
    assert linear(train, test)[1] == linear(train, wrong)[1]


def test_an_attentive_probe_finds_what_a_mean_does_not_show() -> None:
    train, test = clouds(300, width=16), clouds(90, width=16, seed=1)
    assert train.tokens is not None
    assert test.tokens is not None
    assert attentive(train, test, heads=5).top1 > 0.9
    with pytest.raises(ValueError, match="tokens=True"):
        attentive(train._replace(tokens=None), test)


def test_samples_without_labels_are_refused() -> None:
    train = clouds(20)
    for do in (knn, linear):
        with pytest.raises(ValueError, match="a probe needs labels"):
            do(train._replace(labels=torch.full((20,), -1)), train)


def test_lars_is_timm_s_and_its_formula() -> None:
    def trained(optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> nn.Linear:
        torch.manual_seed(0)
        model, x = nn.Linear(6, 4, bias=False), torch.randn(32, 6, generator=generator(3))
        steps = optimiser(list(model.parameters()))
        for _ in range(5):
            steps.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), torch.arange(32) % 4))
            steps.step()
        return model

    ours = trained(lambda weights: LARS(weights, lr=2.0, trust=0.01))
    theirs = trained(lambda weights: Lars(weights, lr=2.0, momentum=0.9, trust_coeff=0.01, eps=0.0, always_adapt=True))
    torch.testing.assert_close(ours.weight, theirs.weight)

    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[1.0, 0.0]])
    LARS([weight], lr=0.5, weight_decay=0.5, trust=0.1).step()
    decayed = torch.tensor([[2.5, 2.0]])
    torch.testing.assert_close(weight.data, torch.tensor([[3.0, 4.0]]) - 0.5 * 0.1 * 5 / decayed.norm() * decayed)
    with pytest.raises(ValueError, match=r"LARS: lr=-1"):
        LARS([weight], lr=-1)


# --- features of a set ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shades:
    """Pictures of three classes that differ in brightness; those in `bad` cannot be loaded."""

    count: int = 13
    bad: tuple[int, ...] = ()

    def open(self, size: tuple[int, ...]) -> Samples:
        return ShadeSamples(self, size)


class ShadeSamples:
    classes = ("dark", "grey", "light")

    def __init__(self, source: Shades, size: tuple[int, ...]) -> None:
        self.source, self.size = source, size
        self.labels = [index % 3 for index in range(source.count)]

    def __len__(self) -> int:
        return self.source.count

    def name(self, index: int) -> str:
        return f"shade-{index}"

    def load(self, index: int, random: torch.Generator) -> Sample:
        if index in self.source.bad:
            raise UnusableFileError(self.name(index), "it is bad")
        pixels = torch.randint(60, (3, *self.size), generator=generator(index), dtype=torch.uint8)
        return Sample(pixels + 90 * (index % 3), index % 3)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return tiny().build()


def test_features_are_the_mean_of_the_last_tokens_of_what_could_be_loaded() -> None:
    model, source = a_model().train(), Shades(bad=(4,))
    samples = source.open((32, 32))
    before = torch.get_rng_state()
    found = embed(model, samples, size=(32, 32), world=ALONE, batch_size=4, tokens=True)
    assert found.unusable == 1
    assert found.labels.tolist() == [index % 3 for index in range(13) if index != 4]
    assert model.training, "it is left as it was"
    assert torch.equal(before, torch.get_rng_state())
    pixels = torch.stack([samples.load(index, generator(0)).pixels for index in range(13) if index != 4])
    with torch.no_grad():
        tokens = model.eval().get_submodule("trunk")(normalize(pixels)).tokens
    torch.testing.assert_close(found.features, tokens.mean(1))
    assert found.tokens is not None
    torch.testing.assert_close(found.tokens.float(), tokens, atol=2e-3, rtol=2e-3)


def test_tokens_that_would_not_fit_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"would keep .* GiB of tokens.*--per-class"):
        embed(a_model(), Shades().open((32, 32)), size=(32, 32), world=ALONE, batch_size=4, tokens=True)
    wanted = Probe(train=Shades(count=3), test=Shades(count=900), kinds=("attentive",))
    monkeypatch.setattr(probe, "MOST_BYTES", 100_000)
    with pytest.raises(ValueError, match="of 900 samples"):  # and not after all others were looked at
        Probing(wanted, a_model(), size=(32, 32), world=ALONE)


def test_where_nothing_can_be_loaded_it_says_so() -> None:
    with pytest.raises(ValueError, match="none of 3 samples can be used"):
        embed(a_model(), Shades(count=3, bad=(0, 1, 2)).open((32, 32)), size=(32, 32), world=ALONE, batch_size=4)


def test_a_few_of_each_class_are_always_the_same_ones() -> None:
    samples = Shades(count=30).open((32, 32))
    few = Few(samples, 4, seed=0)
    assert len(few) == 12
    assert sorted(index % 3 for index in few.chosen) == [0] * 4 + [1] * 4 + [2] * 4
    assert few.chosen == Few(samples, 4, seed=0).chosen != Few(samples, 4, seed=1).chosen
    assert few.load(2, generator(0)).label == few.chosen[2] % 3
    assert few.name(2) == f"shade-{few.chosen[2]}"


def test_a_probe_that_cannot_be_is_refused() -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"neighbours": 0}, "neighbours=0"),
        ({"kinds": ("svm",)}, "svm"),
        ({"every": 0}, "every=0"),
    )
    for changes, told in wrong:
        with pytest.raises(ValueError, match=told):
            Probe(train=Shades(), test=Shades(), **changes)


def all_figures(world: World) -> dict[str, Any]:
    """What a process of several finds."""
    wanted = Probe(train=Shades(count=40, bad=(4,)), test=Shades(count=13), kinds=("knn", "linear", "attentive"))
    probing = Probing(replace(wanted, batch_size=3, neighbours=5), a_model(), size=(32, 32), world=world)
    found = embed(probing.model, probing.samples[0], size=(32, 32), world=world, batch_size=3)
    return {"figures": probing.take(), "sum": found.features.double().sum().item(), "count": len(found.labels)}


@pytest.mark.slow
def test_any_number_of_processes_finds_the_same(tmp_path: Path) -> None:
    code = """
import json, sys, torch
torch.set_num_threads(1)
from convmae.distributed import join
from test_probe import all_figures
with join("cpu") as world:
    found = all_figures(world)
    open(f"{sys.argv[1]}/{world.size}-{world.rank}.json", "w").write(json.dumps(found))
"""
    for size in (1, 2, 3):
        codes, said = several(size, "-c", code, tmp_path)
        assert codes == [0] * size, "\n".join(said)
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(found) == 6
    for one in found[1:]:
        assert one["figures"] == found[0]["figures"]
        assert one["sum"] == pytest.approx(found[0]["sum"], rel=1e-6)
        assert one["count"] == 39
    assert found[0]["figures"]["linear_top1"] > 0.8
    assert found[0]["figures"]["unusable"] == 1


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_probed_from_its_start_on_and_a_stop_changes_nothing(tmp_path: Path) -> None:
    wanted = Probe(train=Shades(count=30), test=Shades(), every=1)
    run = replace(TinyRun(folder=tmp_path / "run").run(), probe=wanted, pictures=0)
    assert fit(run)
    found = list(lines(run.folder / "scores.jsonl"))
    assert [line["epoch"] for line in found] == [0, 1, 2]
    assert {"knn_top1", "linear_top1", "unusable"} <= found[0].keys()
    assert "knn_top1" in (run.folder / "report.html").read_text()
    plain = replace(run, folder=tmp_path / "plain", probe=None)
    assert fit(plain)
    one, other = (torch.load(each.folder / "last.pt", weights_only=True)["weights"] for each in (run, plain))
    assert all(torch.equal(one[name], other[name]) for name in one), "to be probed changes no bit"


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert fit(replace(TinyRun(folder=folder).run(), pictures=0))
    out = tmp_path / "figures.json"
    flags = ["--kinds", "knn", "linear", "--per-class", "5", "--workers", "0", "--json", str(out)]
    assert probe.main([str(folder), *flags]) == 0
    said = capsys.readouterr().out
    assert "knn_top1" in said
    assert json.loads(out.read_text())["linear_top1"] > 0
    assert probe.main([str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def figures(main: Callable[[Sequence[str]], int], model: Path, *flags: str) -> dict[str, float]:
    """What a command found, by k-NN, on one sample of each class."""
    out = model / "figures.json"
    assert main([str(model), *flags, "--kinds", "knn", "--per-class", "1", "--workers", "0", "--json", str(out)]) == 0
    found: dict[str, float] = json.loads(out.read_text())
    del found["options"]
    return found


def refusal(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Why a command would not."""
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_the_command_probes_on_the_sets_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny().build()
    checkpoint.save(tmp_path / "last.pt", model)
    given = recipes.demo_finetune()
    assert given.test is not None
    turned = replace(given, data=given.test, test=given.data)
    monkeypatch.setattr(recipes, "turned", lambda: turned, raising=False)
    wanted = Probe(train=given.test, test=given.data, kinds=("knn",), per_class=1)
    assert figures(probe.main, tmp_path, "--recipe", "convmae.recipes:turned") == pytest.approx(
        Probing(wanted, model, size=(32, 32), world=ALONE).take()
    )
    recipe = ("--recipe", "convmae.recipes:demo_finetune")
    assert figures(probe.main, tmp_path, *recipe) == figures(probe.main, tmp_path)
    there = ("--data", str(demo.make()), "--test", str(demo.make() / "train"))
    found = figures(probe.main, tmp_path, *recipe, *there)
    assert found == figures(probe.main, tmp_path, *there) != figures(probe.main, tmp_path)
    told = refusal(probe.main, capsys, tmp_path, "--recipe", "convmae.recipes:demo")
    assert "--recipe convmae.recipes:demo does not say what to train and test on" in told
    assert "Did you mean" in refusal(probe.main, capsys, tmp_path, "--recipe", "convmae.recipes:demo_finetun")


def test_the_command_probes_on_lists_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "last.pt", VideoConvMAE.inflate(tiny(), frames=4).build())
    clips = video_demo.make()
    for split in ("train", "val"):
        found = sorted((clips / split).glob("*/000.mp4"))
        assert len(found) == 8
        (tmp_path / f"{split}.txt").write_text("".join(f"{path} {path.parent.name}\n" for path in found))
    train, val = (str(tmp_path / f"{split}.txt") for split in ("train", "val"))
    assert figures(video_probe.main, tmp_path, "--data", train, "--test", val)["unusable"] == 0
    told = refusal(video_probe.main, capsys, tmp_path, "--data", train)
    assert f"--data {train} has no part for tests: say where they are with --test" in told
    told = refusal(video_probe.main, capsys, tmp_path, "--recipe", "video.recipes:ssv2_finetune", "--stride", "2")
    assert "with --recipe, its sets choose the frames" in told
