"""The step benchmark: its peers are what they are called, and nothing that a side does ends the run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convmae import MAE
from convmae.nn.contrast import ContrastiveMaskedAutoencoder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import measure
import operator_calls
import pretrain_step
from hiera import HieraMAE
from measure import OUT_OF_MEMORY, Result, Step, Work
from pretrain_step import ON_GPU, Options, Report
from sides import Pretraining, Side, sides, tiny

HERE = Step(device="cpu", dtype=torch.float32, compiled=False, threads=1)
KNOWN = {side.name: side for side in sides(tiny())}
HIERAS = [pytest.param(KNOWN[name], id=name) for name in ("hiera-video", "hiera")]


class OutOfMemory(nn.Module):
    """A model that the device is too small for, from two samples on."""

    def __init__(self, source: MAE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return self.weight * x.mean()


def crash(source: MAE) -> nn.Module:
    os._exit(3)


def hang(source: MAE) -> nn.Module:
    time.sleep(60)
    raise AssertionError


def side(name: str, make: object) -> Side:
    known = KNOWN["mae"]
    assert callable(make)
    return Side(name=name, title=name, family="video", source=known.source, make=make, peer="mae")


def result(name: str, clips: int, seconds: float = 1.0, memory: int = 1) -> Result:
    return Result(name=name, clips=clips, samples=clips, seconds=(seconds, seconds), memory=memory)


def report(*results: Result, peak: float | None = None) -> Report:
    step = Step(device="cuda", dtype=torch.bfloat16, compiled=True, threads=1)
    works = {name: Work(forward=10**9, encoder=1, parameters=1) for name in KNOWN}
    return Report(sides=list(KNOWN.values()), step=step, peak=peak, works=works, results=results, quick=False)


@pytest.mark.parametrize("of", HIERAS)
def test_a_hiera_has_a_finite_loss_and_a_gradient_everywhere(of: Side) -> None:
    module = of.build()
    loss = module(*measure.inputs(of, 2, "cpu"))
    loss.backward()
    assert loss.isfinite()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("of", HIERAS)
def test_hieras_encoder_is_timms_of_the_shown_units(of: Side) -> None:
    module = of.build()
    assert isinstance(module, HieraMAE)
    x, mask = measure.inputs(of, 2, "cpu")
    shown = mask.flatten(1).int().argsort(dim=1, stable=True)[:, : module.shown]
    maps: list[Tensor] = []
    handle = module.fusion.register_forward_pre_hook(lambda _, given: maps.extend(given[0]))
    with torch.no_grad():
        ours = module.encode(x, mask, shown)
        theirs = module.encoder.forward_features(x, mask=~mask.flatten(1))
        hidden = torch.nn.functional.interpolate(mask[:, None].float(), size=x.shape[2:]).bool()
        moved = module.encode(torch.where(hidden, x + 1, x), mask, shown)
    handle.remove()
    torch.testing.assert_close(maps[3].squeeze(1), theirs)
    assert ours.equal(moved)


def test_both_hieras_for_images_do_the_same_work() -> None:
    ours, theirs = (measure.count_work(KNOWN[name]) for name in ("hiera", "hiera-transformers"))
    assert (ours.encoder, ours.parameters) == (theirs.encoder, theirs.parameters)


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("name", ["convmae-cmae", "mae-cmae", "videoconvmae-cmae"])
def test_a_contrastive_steps_target_follows_where_an_optimiser_steps(name: str, optimised: bool) -> None:
    step = replace(HERE, optimised=optimised)
    module = step.prepare(KNOWN[name])
    assert isinstance(module, Pretraining)
    assert isinstance(module.model, ContrastiveMaskedAutoencoder)
    before = [averaged.clone() for averaged, _ in module.model.followed()]
    step.run(module, *measure.inputs(KNOWN[name], 2, "cpu"), step.optimiser(module))
    after = [averaged for averaged, _ in module.model.followed()]
    assert all(averaged.grad is None for averaged in after)
    assert any(not was.equal(now) for was, now in zip(before, after, strict=True)) == optimised


def test_a_feature_decoder_counts_as_decoder_and_a_target_as_encoder() -> None:
    plain, contrastive = (measure.count_work(KNOWN[name]) for name in ("convmae", "convmae-cmae"))
    assert contrastive.forward - contrastive.encoder > 2 * (plain.forward - plain.encoder)
    assert contrastive.encoder > 2 * plain.encoder


@pytest.mark.parametrize(
    "name", ["convmae-finetune-dense", "convmae-finetune-dense-last", "videoconvmae-finetune-dense"]
)
def test_the_published_forms_of_finetuning_agree_with_ours_and_have_its_gradients(name: str) -> None:
    dense, ours = KNOWN[name], KNOWN[KNOWN[name].peer]
    found = measure.agreement(dense, "cpu")
    assert found is not None
    assert max(found) < 1e-5
    assert measure.agreement(ours, "cpu") is None
    gradients = []
    for side in (dense, ours):
        module = side.build()
        module.zero_grad()
        module(*measure.inputs(side, 2, "cpu")).backward()
        gradients.append([p.grad for p in module.parameters()])
    for theirs, our in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, our, rtol=1e-3, atol=1e-6)


def test_contrastive_and_finetuning_steps_are_taken_only_where_they_are_named() -> None:
    usual = {side.name for side in Options(quick=True).selected()}
    named = set(KNOWN) - usual
    assert {name for name in KNOWN if name.endswith("-cmae") or "-finetune" in name} <= named
    assert {side.name for side in Options(quick=True, sides=tuple(named)).selected()} == named


def test_every_peer_is_a_side_of_the_same_family() -> None:
    assert all(KNOWN[side.peer].family == side.family for side in KNOWN.values())


def test_a_ratio_is_to_each_sides_own_peer() -> None:
    made = report(result("mae", 8, 1.0), result("convmae", 8, 2.0), result("convmae-cmae", 8, 5.0))
    (ratios, peers) = (list(made.costs(8).columns[number].cells) for number in (4, 7))
    assert ratios == ["2.00", "1.00", "2.50"]
    assert peers == ["mae", "mae", "convmae"]


def test_a_run_that_was_ended_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.json"
    options = Options(device="cpu", sides=("convmae-dense", "mae"), quick=True, batch_sizes=(1, 2), json=file)
    asked: list[object] = []
    left = [1]  # results until the run is ended

    def measured(chosen: Sequence[Side], sizes: Sequence[int], *given: object, **named: object) -> Iterator[Result]:
        asked.append(([side.name for side in chosen], list(sizes)))
        for size in sizes:
            for each in chosen:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                yield replace(result(each.name, size, float(len(asked))), agreement=(1e-7, 1e-8))

    def counted(chosen: Sequence[Side]) -> dict[str, Future[Work]]:
        asked.append([side.name for side in chosen])
        futures: dict[str, Future[Work]] = {side.name: Future() for side in chosen}
        for future in futures.values():
            future.set_result(Work(forward=2, encoder=1, parameters=1))
        return futures

    monkeypatch.setattr(pretrain_step, "measure", measured)
    monkeypatch.setattr(pretrain_step, "count_works", counted)
    with pytest.raises(KeyboardInterrupt):
        pretrain_step.main(options)
    assert set(json.loads(file.read_text())["work"]) == {"convmae-dense", "mae"}
    assert asked == [["convmae-dense", "mae"], (["convmae-dense", "mae"], [1, 2])]
    asked.clear()
    left[0] = 100
    pretrain_step.main(replace(options, sides=("convmae-dense", "mae", "convmae")))
    assert asked == [["convmae"], (["convmae", "mae"], [1, 2]), (["convmae-dense"], [2])]
    assert "1 results are taken over" in capsys.readouterr().out
    asked.clear()
    pretrain_step.main(replace(options, sides=("mae",)))
    assert asked == [[]], "nothing is left to measure"
    figures = json.loads(file.read_text())
    assert len(figures["results"]) == 6
    assert len(figures["header"]) == 6, "of three runs"
    assert (figures["results"][0]["name"], figures["results"][0]["agreement"]) == ("convmae-dense", [1e-7, 1e-8])
    with pytest.raises(ValueError, match=r"another kind \(dtype float32, not bfloat16\)"):
        pretrain_step.main(replace(options, dtype="bfloat16"))


def test_the_calls_of_the_tile_convolution_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "calls.json"
    calls = operator_calls.main(operator_calls.Options(device="cpu", quick=True, seconds=0.0, json=file))
    assert {(call.form, call.does) for call in calls} == {
        ("plain torch", "forward"),
        ("plain torch", "weight gradient"),
        *((form, does) for form in ("operator", "channels first", "channels last") for does in ("forward", "backward")),
    }
    assert len(calls) == len(json.loads(file.read_text())) == 4 * 2 + 4 * 6
    assert all(call.seconds > 0 and call.map_bytes > 0 for call in calls)
    out = capsys.readouterr().out
    assert "Over shown tiles, 1 clips or 2 images, microseconds" in out
    assert "video, stage 1: 1 x 4 x 4 x 16, kernel 3 x 5 x 5" in out


def test_a_quick_run_prints_and_writes_every_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("videoconvmae-k3", "videoconvmae-dense-k3", "hiera-video")
    file = tmp_path / "step.json"
    pretrain_step.main(
        Options(device="cpu", sides=names, quick=True, rounds=1, batch_sizes=(2, 1), json=file, optimiser=True)
    )
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert [(row["name"], row["clips"]) for row in figures["results"]] == [(n, size) for size in (1, 2) for n in names]
    assert all(row["failure"] is None and row["median"] > 0 and row["memory"] > 0 for row in figures["results"])
    assert all(figures["work"][name]["forward"] > figures["work"][name]["encoder"] > 0 for name in names)
    for name in names:
        assert printed.count(KNOWN[name].title.strip()) >= 3, "two batch sizes, and the work"
    assert "Forward, backward and AdamW, 1 clips a step" in printed


def test_a_side_that_runs_out_of_memory_is_a_row_and_the_others_go_on() -> None:
    chosen = [side("large", OutOfMemory), KNOWN["mae"]]
    results = list(measure.measure_here(chosen, [1, 2, 4], HERE, count=1))
    assert [r.failure for r in results if r.name == "mae"] == [None, None, None]
    assert [r.failure for r in results if r.name == "large"] == [None, OUT_OF_MEMORY, f"{OUT_OF_MEMORY} (not tried)"]
    assert all(len(r.seconds) == (r.failure is None) for r in results)


@pytest.mark.parametrize(
    ("make", "limit", "why"), [(crash, 60, "its process ended with exit code 3"), (hang, 3, "no result within 3 s")]
)
def test_a_side_whose_process_dies_or_hangs_is_a_row(make: object, limit: float, why: str) -> None:
    results = list(measure._in_a_process(side("bad", make), [1, 2], HERE, count=1, limit=limit))
    assert [(r.clips, r.failure) for r in results] == [(1, why), (2, why)]


def test_a_side_measured_in_a_process_gives_its_figures() -> None:
    (one,) = measure._in_a_process(KNOWN["mae"], [1], HERE, count=2, limit=120)
    assert (one.failure, len(one.seconds), one.memory > 0) == (None, 2, True)


def test_any_failure_is_told_in_a_line() -> None:
    assert measure.reason(ValueError("first\nsecond")) == "ValueError: first"
    assert measure.reason(RuntimeError("CUDA error: out of memory\nmore")) == OUT_OF_MEMORY


def test_utilisation_counts_the_backward_twice_and_a_multiply_accumulate_as_two_operations() -> None:
    work = Work(forward=10**9, encoder=1, parameters=1)
    assert measure.utilisation(work, 50, 0.5, 1e12) == pytest.approx(6 * 50 * 1e9 / 0.5 / 1e12)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_go_by_the_devices_name(device: str, peak: float | None) -> None:
    assert measure.peak_flops(device, torch.bfloat16) == peak
    assert measure.peak_flops(device, torch.float32) is None


def test_demands_on_a_gpu_are_judged_at_the_largest_batch_that_all_took() -> None:
    results = [
        result("videoconvmae-k3", 8, 1.0),
        result("videomae", 8, 1.0),
        result("convmae", 8, 0.1, 40),
        result("convmae-dense", 8, 0.3, 100),
        Result(name="vitmae", clips=8, samples=8, failure="ValueError: never works"),
        result("videoconvmae-k3", 16, 5.0),
        result("videomae", 16, 1.0),
        result("convmae", 16, 1.0),
        Result(name="convmae-dense", clips=16, samples=16, failure=OUT_OF_MEMORY),
    ]
    made = report(*results, peak=1e11)
    assert made.judged() == 8
    values = {demand.text: value for demand, value in made.demands()}
    assert values.pop("time: VideoConvMAE, half decoded / VideoMAE") is None
    assert values == pytest.approx(
        {
            "time: VideoConvMAE, kernel 3 / VideoMAE": 1.0,
            "time: dense-masked ConvMAE / ConvMAE": 3.0,
            "peak memory: ConvMAE / dense-masked ConvMAE": 0.4,
            "MFU: VideoConvMAE, kernel 3": 0.48,
            "MFU: ConvMAE": 4.8,
        }
    )
    assert all(demand.met(value) for demand, value in made.demands() if value is not None)
    assert [str(demand) for demand in ON_GPU][-1] == "at least 45%"


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    made = report(result("convmae", 8))
    assert made.utilisation(made.results[0]) is None
    assert all(value is None for demand, value in made.demands() if demand.of == "utilisation")


def test_nothing_measured_is_still_a_report() -> None:
    made = report(Result(name="convmae", clips=8, samples=64, failure="RuntimeError: no"))
    assert made.judged() is None
    assert [table.title for table in made.tables()][-1] == "To reach on one GPU, bfloat16, compiled, Base"
    assert json.loads(json.dumps(made.figures([], {})))["results"][0]["failure"] == "RuntimeError: no"


@pytest.mark.parametrize(("flags", "message"), [({"sides": ("nope",)}, "no such side"), ({"batch_sizes": (0,)}, "0")])
def test_wrong_flags_are_refused(flags: dict[str, tuple[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain_step.main(Options(device="cpu", quick=True, **flags))  # type: ignore[arg-type]
