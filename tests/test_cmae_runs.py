"""Runs of CMAE: bits over a stop, equality over processes, the target once a step, and what comes of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import same, told
from runs import Noise, NotOfWhite, TinyRun, TwoNoises, tiny, together

import video.recipes
from convmae import CMAE, checkpoint, masking, recipes, report
from convmae.data import Stream
from convmae.files import lines
from convmae.finetune import Finetune
from convmae.images import ImageFolder
from convmae.learners import Contrast
from convmae.nn.contrast import ContrastiveMaskedAutoencoder
from convmae.probe import Probe
from convmae.training import Pretrain, fit, steps
from convmae.two_views import TwoViews
from convmae.weights import load
from video import VideoConvMAE


def contrastive(**changes: Any) -> CMAE:
    built = CMAE(mae=tiny().drop_path(0.0)).decode_features(dim=16, depth=1, heads=2).project(hidden=24, dim=8)
    return replace(built, **changes)


def a_run(folder: Path, **changes: Any) -> Pretrain:
    base = TinyRun(folder=folder).run()
    return replace(base, **{"model": contrastive(momentum=0.9), "data": TwoNoises(), "pictures": 0, **changes})


def newest(folder: Path) -> dict[str, Any]:
    return checkpoint.read(folder / "last.pt")


NOISE = {"feature_decoder.norm.bias", "feature_decoder.head.bias", "projector.0.bias", "predictor.0.bias"}
"""Their gradients are zero but for rounding, which AdamW scales up: BatchNorm takes away what is the same for all."""

WATCHED = {"reconstruction", "contrast", "agreement", "spread"}


def test_what_is_watched_is_in_the_metrics_and_on_the_page(tmp_path: Path) -> None:
    assert fit(a_run(tmp_path, pictures=2, log_every=3))
    found = list(lines(tmp_path / "metrics.jsonl"))
    assert found
    for line in found:
        assert line.keys() == WATCHED | set(report.ALWAYS), "what a page draws beside the loss is the learner's own"
        assert line["loss"] == pytest.approx(line["reconstruction"] + line["contrast"], rel=1e-5)
        assert -1 <= line["agreement"] <= 1
        assert 0 <= line["spread"] <= 1 + 1e-6
        assert 0 < line["contrast"] <= 2 * 0.07 * math.log(5) + 2 * 2
    assert "reconstruction, contrast, agreement, spread over steps" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "pictures").glob("*.png")), "reconstructions are drawn as of any masked autoencoder"
    assert (
        "\n    model=CMAE(\n        mae=ConvMAE()\n            .input((32, 32))\n" in (tmp_path / "run.txt").read_text()
    )


def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole, broken = a_run(tmp_path / "whole"), a_run(tmp_path / "broken")
    assert fit(whole)
    for stop in (3, 5):
        for step in steps(broken):
            if step.number == stop:
                break
    assert fit(broken)
    one, other = newest(whole.folder), newest(broken.folder)
    for part in ("weights", "optimiser"):
        assert same(one[part], other[part]), part
    assert told(whole.folder / "metrics.jsonl")[5:] == told(broken.folder / "metrics.jsonl")[-3:]
    names = [name for name in one["weights"] if name.startswith("target_encoder.")]
    assert any("running_var" in name for name in names)
    start = contrastive().build().state_dict()
    assert any(not torch.equal(one["weights"][name], start[name]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_that_are_stopped_end_with_the_bits_of_several_that_are_not(
    tmp_path: Path, parallel: str
) -> None:
    for name, interrupt_at in (("whole", None), ("broken", 2), ("broken", None)):
        in_processes(tmp_path / name, 2, interrupt_at=interrupt_at, parallel=parallel)
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "broken")
    assert same(one["weights"], other["weights"])
    assert same(one["optimiser"], other["optimiser"])


def in_processes(folder: Path, world: int, *, interrupt_at: int | None = None, **changes: Any) -> None:
    run = a_run(folder)
    mine: dict[str, Any] = {"model": run.model, "data": run.data, "pictures": 0, "device": "cpu"}
    codes, said = together(folder, world, interrupt_at=interrupt_at, **{**mine, **changes})
    assert codes == [0] * world, "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel", "bad"), [(2, "ddp", (3, 8)), (2, "fsdp", ()), (4, "ddp", ())])
def test_several_processes_learn_what_one_learns(
    tmp_path: Path, world: int, parallel: str, bad: tuple[int, ...]
) -> None:
    """Uneven shares, and samples that cannot be loaded: the same loss, the same weights, the same statistics."""
    data = TwoNoises(bad=bad, count=24)
    probe = Probe(train=ImageFolder(split="train"), test=ImageFolder(split="val"), per_class=1, kinds=("knn",))
    options: dict[str, Any] = {"data": data, "batch_size": 7, "epochs": 1, "clip_gradient": 1.0, "pictures": 2}
    options["probe"] = probe
    assert fit(a_run(tmp_path / "one", **options))
    in_processes(tmp_path / "several", world, parallel=parallel, **options)
    one, several = newest(tmp_path / "one"), newest(tmp_path / "several")
    for name in one["weights"].keys() - NOISE:
        wrong = (several["weights"][name] - one["weights"][name]).abs().max()
        assert wrong <= 2e-4, f"{name}: {wrong}"
    for first, other in zip(*(list(lines(tmp_path / n / "metrics.jsonl")) for n in ("one", "several")), strict=True):
        for name in (*WATCHED, "loss"):
            assert other[name] == pytest.approx(first[name], rel=2e-3, abs=2e-4), name
    scores = [list(lines(tmp_path / name / "scores.jsonl")) for name in ("one", "several")]
    assert [line["step"] for line in scores[1]] == [line["step"] for line in scores[0]] == [0, 3]
    assert scores[1][0]["knn_top1"] == scores[0][0]["knn_top1"]
    assert len(list((tmp_path / "several" / "pictures").glob("*.png"))) == 2


def test_the_target_follows_once_a_step_whatever_is_accumulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[float] = []
    update = ContrastiveMaskedAutoencoder.update_target

    def counted(model: ContrastiveMaskedAutoencoder, momentum: float) -> None:
        followed.append(momentum)
        update(model, momentum)

    monkeypatch.setattr(ContrastiveMaskedAutoencoder, "update_target", counted)
    run = a_run(tmp_path, micro_batch=2, model=contrastive(momentum=0.8, momentum_end=1.0))
    taken = list(steps(run))
    assert len(followed) == len(taken) == 8
    built = contrastive(momentum=0.8, momentum_end=1.0).build()
    assert followed == pytest.approx([built.momentum(number / 8) for number in range(8)])
    assert followed[0] == 0.8
    assert followed == sorted(followed)


def test_a_step_that_is_not_finite_changes_nothing_not_even_running_statistics(tmp_path: Path) -> None:
    plain = contrastive().mae.predict(NotOfWhite())
    run = a_run(tmp_path, model=contrastive(mae=plain), data=TwoNoises(white=(2,)), bad_steps=100, keep_last=100)
    bad = [step.number for step in steps(run) if any(event.kind == "bad_step" for event in step.events)]
    assert bad
    for number in bad:
        after = newest(tmp_path)["weights"] if number == 8 else None
        path = tmp_path / "checkpoints" / f"step-{number:08d}.pt"
        if path.exists():
            after = checkpoint.read(path)["weights"]
        before = checkpoint.read(tmp_path / "checkpoints" / f"step-{number - 1:08d}.pt")["weights"]
        if after is not None:
            assert same(before, after)
    assert all(bool(torch.isfinite(one).all()) for one in newest(tmp_path)["weights"].values())


def test_another_micro_batch_is_another_run_for_keys_are_those_of_one(tmp_path: Path) -> None:
    for step in steps(a_run(tmp_path)):
        if step.number == 2:
            break
    with pytest.raises(ValueError, match="micro_batch: None, now 2"):
        list(steps(a_run(tmp_path, micro_batch=2)))


def test_single_views_are_refused_with_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two views of each sample, Noise gives one: data=TwoViews\(source"):
        list(steps(a_run(tmp_path, data=Noise())))


def test_two_views_are_refused_where_one_is_taken(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"TwoNoises gives two views of each sample, ConvMAE takes one: data=data.source"
    ):
        list(steps(a_run(tmp_path, model=tiny())))


def test_a_sample_by_itself_is_refused_for_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes one at a time: raise --batch-size or --micro-batch"):
        list(steps(a_run(tmp_path, micro_batch=1)))


def test_rows_are_filled_up_to_the_share_and_no_further() -> None:
    samples = TwoNoises(count=20).open((32, 32))
    for world, micro_batch, most in ((1, None, 8), (2, None, 4), (3, None, 3), (8, 8, 1), (2, 3, 2)):
        stream = Stream(samples, (32, 32), 0, 8, world=world, micro_batch=micro_batch)
        assert stream.most == most == max(len(share) for share in stream.share(0))


def test_samples_that_promise_a_second_view_must_give_it() -> None:
    learner = Contrast(contrastive().build())
    learner.begin(2)
    with pytest.raises(ValueError, match="must give Sample"):
        learner.inputs(learner.nothing(2)._replace(second=None), torch.device("cpu"), torch.Generator())


def test_a_micro_batch_without_a_usable_sample_moves_no_statistics(tmp_path: Path) -> None:
    """In a world of one: its step is learnt from, and its black row does not count."""
    options: dict[str, Any] = {"batch_size": 4, "micro_batch": 2, "epochs": 1, "warmup_epochs": 0}
    run = a_run(tmp_path, data=TwoNoises(count=8), **options)
    stream = Stream(run.data.open((32, 32)), (32, 32), run.seed, batch_size=4, micro_batch=2)
    bad = [int(stream.order(0)[number]) for number in stream.share(0)[0]]
    taken = list(steps(replace(run, data=TwoNoises(count=8, bad=tuple(bad)))))
    assert [step.samples for step in taken] == [2, 4]
    kept = newest(tmp_path)["weights"]
    counts = {name: int(kept[name]) for name in kept if name.endswith("num_batches_tracked")}
    assert counts == dict.fromkeys(counts, 3)
    assert len(counts) == 3


def test_the_rows_of_processes_are_filled_up_with_some_that_do_not_count() -> None:
    learner = Contrast(contrastive().build())
    learner.rows = 5
    batch = learner.nothing(3)._replace(indices=torch.tensor([4, 0, 2]))
    x, shown, second, valid = learner.inputs(batch, torch.device("cpu"), torch.Generator())
    assert len(x) == len(second) == len(shown.index) == 5
    assert valid.tolist() == [True, True, True, False, False]
    _, _, _, none = learner.inputs(learner.nothing(), torch.device("cpu"), torch.Generator())
    assert not none.any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contrastive")
    assert fit(a_run(folder, base_lr=0.5, model=contrastive(momentum=0.5)))
    return folder


@pytest.mark.parametrize("encoder", ["online", "target"])
def test_a_checkpoint_is_finetuned_from_either_encoder(tmp_path: Path, trained: Path, encoder: Any) -> None:
    kept = newest(trained)["weights"]
    run = Finetune(
        model=contrastive().mae,
        data=ImageFolder(split="train"),
        epochs=1,
        warmup_epochs=0,
        batch_size=16,
        workers=0,
        checkpoint=trained,
        encoder=encoder,
        folder=tmp_path,
    )
    learner = run.learner(run.data.open((32, 32)))
    prefix = "trunk." if encoder == "online" else "target_encoder.trunk."
    for name, tensor in learner.model.get_submodule("trunk").state_dict().items():
        assert torch.equal(tensor, kept[prefix + name]), name
    assert not same(
        {name: kept["trunk." + name] for name in learner.model.get_submodule("trunk").state_dict()},
        {name: kept["target_encoder.trunk." + name] for name in learner.model.get_submodule("trunk").state_dict()},
    )


def test_weights_of_either_encoder_give_their_features_and_others_have_none(tmp_path: Path, trained: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    online, target = load(trained), load(trained, encoder="target")
    assert isinstance(online, ContrastiveMaskedAutoencoder)
    assert not torch.allclose(online.trunk(x).tokens, target.trunk(x).tokens, atol=1e-4)
    assert torch.equal(target.trunk(x).tokens, online.target_encoder.trunk(x).tokens)
    checkpoint.save(tmp_path / "plain.pt", tiny().build())
    with pytest.raises(ValueError, match="has no target encoder: CMAE has"):
        load(tmp_path / "plain.pt", encoder="target")
    with pytest.raises(ValueError, match='encoder is "online" or "target"'):
        load(trained, encoder="both")  # type: ignore[arg-type]


def test_a_run_is_probed_meanwhile(tmp_path: Path) -> None:
    probe = Probe(train=ImageFolder(split="train"), test=ImageFolder(split="val"), every=1, per_class=4, kinds=("knn",))
    assert fit(a_run(tmp_path, probe=probe))
    assert [line["step"] for line in lines(tmp_path / "scores.jsonl")] == [0, 4, 8]


def test_the_recipes_have_the_published_numbers_and_can_be_carried_out() -> None:
    images, clips = recipes.imagenet_cmae(), video.recipes.kinetics_cmae()
    for run in (images, clips, recipes.demo_cmae(), video.recipes.demo_cmae()):
        run.check()
    assert (images.batch_size, images.epochs, images.warmup_epochs, images.base_lr) == (4096, 300, 40, 1.5e-4)
    assert (images.betas, images.weight_decay, images.min_lr) == ((0.9, 0.95), 0.05, 0)
    assert isinstance(images.model, CMAE)
    model = images.model
    assert (model.features.dim, model.features.depth, model.features.heads) == (512, 2, 16)
    assert (model.hidden, model.dim, model.temperature) == (1536, 256, 0.07)
    assert (model.momentum, model.momentum_end) == (0.996, 0.996)
    assert (model.reconstruction_weight, model.contrast_weight) == (1, 1)
    shown = (~model.mae.masking(2, (14, 14), torch.Generator())).flatten(1).sum(1)
    assert shown.tolist() == [4 * int(49 * 0.35)] * 2
    paper = model.mae.mask(masking.block(0.75, 2)).masking(1, (14, 14), torch.Generator())
    assert int((~paper).sum()) == 4 * int(49 * 0.25)
    assert isinstance(images.data, TwoViews)
    assert images.data.shift == (32, 32)
    assert isinstance(clips.model, CMAE)
    assert clips.model.mae == VideoConvMAE.base()
    assert isinstance(clips.data, TwoViews)
    assert clips.data.shift == (16, 0, 0)
    finetune = recipes.imagenet_finetune()
    assert (finetune.batch_size, finetune.epochs, finetune.base_lr) == (1024, 100, 5e-4)
    assert (finetune.layer_decay, finetune.drop_path) == (0.65, 0.1)
