"""The search for the largest micro-batch, and the benchmarks that take tiny steps: that they run, and their sums."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TinyRun

import convmae.recipes
import video.recipes
from convmae import ConvMAE, micro_batch
from convmae.micro_batch import Rehearsal, Trial, predicted, search

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory
import plan
import profile_step
import scaling
from sides import sides, tiny

# ---- the largest micro-batch ---------------------------------------------------------------------------------------


def stepping(base: int, per_sample: float, room: int) -> tuple[Callable[[int], int | None], list[int]]:
    """Peaks that rise with the samples, and None where there is no room; and the samples asked for."""
    asked: list[int] = []

    def peak(samples: int) -> int | None:
        asked.append(samples)
        taken = int(base + per_sample * samples)
        return taken if taken <= room else None

    return peak, asked


@pytest.mark.parametrize("first", [1, 8, 100])
@pytest.mark.parametrize("holds", [1, 2, 7, 8, 9, 63, 500, 4000])
def test_the_search_ends_within_a_thirtysecond_below_what_fits(holds: int, first: int) -> None:
    peak, asked = stepping(base=1000, per_sample=10, room=1000 + 10 * holds)
    trials = search(peak, limit=1000 + 10 * holds, at_most=100_000, first=first)
    best = max(trial.samples for trial in trials if trial.peak_bytes is not None)
    assert holds - max(1, holds // 32) < best <= holds
    assert [trial.samples for trial in trials] == asked
    assert len(set(asked)) == len(asked) <= 16


def test_the_search_holds_where_peaks_are_not_linear() -> None:
    trials = search(lambda samples: samples**2, limit=90_000, at_most=100_000)
    assert 290 < max(trial.samples for trial in trials if trial.peak_bytes and trial.peak_bytes <= 90_000) <= 300
    assert len(trials) < 25


def test_the_search_tries_no_more_than_it_may() -> None:
    peak, asked = stepping(base=0, per_sample=1, room=10**9)
    assert search(peak, limit=10**9, at_most=100, first=8)[-1].samples == 100
    assert max(asked) == 100


def test_the_search_ends_where_nothing_fits() -> None:
    peak, asked = stepping(base=100, per_sample=1, room=50)
    assert all(trial.peak_bytes is None for trial in search(peak, limit=50, at_most=64, first=8))
    assert asked == [8, 4, 2, 1]


def test_a_straight_line_foretells_from_two_trials_and_from_no_fewer() -> None:
    trials = [Trial(samples=2, peak_bytes=120), Trial(samples=4, peak_bytes=140), Trial(samples=64, peak_bytes=None)]
    assert predicted(trials, 1000) == 90
    assert predicted(trials[1:], 1000) is None
    assert predicted([Trial(samples=2, peak_bytes=9), Trial(samples=4, peak_bytes=9)], 10) is None


def test_memory_that_ran_out_is_known_by_class_or_words() -> None:
    assert micro_batch.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert micro_batch.ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not micro_batch.ran_out(RuntimeError("shapes cannot be multiplied"))
    assert not micro_batch.ran_out(ValueError("out of memory"))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rehearsal_takes_steps_that_teach_nothing(tmp_path: Path, recompute: bool) -> None:
    run = replace(TinyRun(folder=tmp_path).run(), recompute=recompute)
    rehearsal = Rehearsal(run, torch.device("cpu"))
    before = [parameter.clone() for parameter in rehearsal.model.parameters()]
    rehearsal.step(3)
    moments = rehearsal.optimiser.state[next(rehearsal.model.decoder.head.parameters())]
    assert moments["step"] == 1
    assert moments["exp_avg"].abs().sum() > 0
    assert all(torch.equal(was, now) for was, now in zip(before, rehearsal.model.parameters(), strict=True))
    rehearsal.clear()
    assert all(parameter.grad is None for parameter in rehearsal.model.parameters())


def test_without_a_gpu_there_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the error of machines without a GPU")
    assert micro_batch.main(["convmae.recipes:imagenet_pretrain", "--size", "large", "--recompute"]) == 2
    assert "a GPU" in capsys.readouterr().err
    assert micro_batch.main(["convmae.recipes:no_such"]) == 2
    assert "imagenet_pretrain" in capsys.readouterr().err


def test_options_change_the_recipe(tmp_path: Path) -> None:
    from convmae.recipes import imagenet_pretrain

    options = micro_batch._Options(
        recipe="", size="large", input=(192,), recompute=True, at_most=64, precision="float32"
    )
    run = options.changed(imagenet_pretrain())
    assert isinstance(run.model, ConvMAE)
    large = ConvMAE.large()
    assert (run.model.trunk, run.model.size, run.model.masking) == (large.trunk, (192, 192), large.masking)
    assert (run.recompute, run.compile, run.batch_size, run.precision) == (True, False, 64, "float32")


# ---- memory --------------------------------------------------------------------------------------------------------


def test_live_bytes_count_each_storage_while_it_lives() -> None:
    with memory.LiveBytes() as counter:
        x = torch.ones(256)
        y = x.view(2, 128)
        assert counter.live == 1024
        z = y + 1
        assert (counter.live, counter.peak) == (2048, 2048)
        del z
        assert (counter.live, counter.peak) == (1024, 2048)
        del x, y
    assert counter.live == 0


def test_the_memory_benchmark_fills_the_budget_that_it_is_given(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("counts tensors on the CPU")
    options = memory.Options(models=("ConvMAE",), quick=True, budget_gib=0.01, json=tmp_path / "memory.json")
    (plain,) = memory.main(replace(options, recompute=("nothing",)))
    plain, convolutions, recomputed = [plain, *memory.main(replace(options, verify=False))[1:]]
    assert {row.failure for row in (plain, convolutions, recomputed)} == {None}
    assert plain.largest is not None
    assert plain.foretold is not None
    assert convolutions.foretold is not None
    assert recomputed.foretold is not None
    assert 0.9 * plain.foretold <= plain.largest <= plain.foretold < convolutions.foretold < recomputed.foretold
    assert plain.largest_bytes is not None
    assert 0.8 < plain.largest_bytes / (0.01 * 2**30) <= 1
    assert plain.peak_bytes is not None
    assert plain.state_bytes == 16 * plain.parameters < plain.peak_bytes
    assert len(json.loads((tmp_path / "memory.json").read_text())) == 3


def test_a_model_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "Rehearsal", fail)
    if torch.cuda.is_available():
        pytest.skip("counts tensors on the CPU")
    rows = memory.main(memory.Options(models=("ConvMAE",), quick=True))
    assert [row.failure for row in rows] == ["out of memory"] * 3
    assert capsys.readouterr().out.count("out of memory") == 3


# ---- scaling -------------------------------------------------------------------------------------------------------


def test_the_scaling_benchmark_has_a_row_for_each_point_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = scaling.main(
        scaling.Options(
            device="cpu",
            quick=True,
            panels=("shown", "frames"),
            ratios=(0.9, 0.5, 0.01),
            frames=(4,),
            rounds=1,
            json=tmp_path / "scaling.json",
            plot=tmp_path / "scaling.png",
        )
    )
    assert [point.failure is None for point in points] == [True] * 4 + [False] * 2 + [True] * 2
    assert [point.tokens for point in points[:4]] == [4, 4, 16, 16]
    assert points[0].seconds == points[6].seconds, "the published point is measured once"
    assert "hides nothing" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "scaling.json").read_text())) == 8
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_exponents_are_slopes_of_logarithms() -> None:
    points = [
        scaling.Point(panel="frames", value=0, model="m", tokens=tokens, batch=2, seconds=(2 * seconds,))
        for tokens, seconds in ((100, 1.0), (200, 4.0), (400, 8.0))
    ]
    failed = replace(points[1], failure="out of memory")
    assert scaling.exponents(points) == [None, pytest.approx(2), pytest.approx(1)]
    assert scaling.exponents([points[0], failed, points[2]]) == [None, None, None]


def test_a_point_that_does_not_fit_is_tried_with_fewer_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(point: scaling.Point, *given: Any, count: int) -> scaling.Point:
        asked.append(point.batch)
        if point.batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replace(point, seconds=(1.0,))

    monkeypatch.setattr(scaling, "_measured", measured)
    step = scaling.Options(device="cpu").step()
    point = scaling.Point(panel="frames", value=0, model="m", tokens=1, batch=12)
    builder = tiny().clips
    assert scaling.measure(point, builder, step, count=1).per_clip == 1 / 3
    assert asked == [12, 6, 3]
    monkeypatch.setattr(scaling, "_measured", lambda *given, count: 1 / 0)
    assert "ZeroDivisionError" in str(scaling.measure(point, builder, step, count=1).failure)


# ---- profile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "around", "kind"),
    [
        ("multi_tensor_apply_kernel<FusedAdam>", ["Optimizer.step#AdamW.step"], "optimiser"),
        ("sm90_xmma_gemm_bf16bf16", ["aten::linear", "aten::addmm"], "matmul"),
        ("nvjet_hsh_128x256", [], "matmul"),
        ("sm90_xmma_gemm", ["_TileConvolutionBackward", "aten::mm"], "tile convolution"),
        ("vectorized_elementwise_kernel", ["convmae::tile_convolution"], "tile convolution"),
        ("pytorch_flash::flash_fwd_kernel", [], "attention"),
        ("triton_poi_fused__to_copy_addmm_gelu_3", ["Torch-Compiled Region"], profile_step.REST),
        ("triton_tem_fused_addmm_1", [], "matmul"),
        ("Memcpy HtoD (Pinned -> Device)", [], "copies"),
        ("void at::native::reduce_kernel<512, 1>", ["aten::sum"], profile_step.REST),
    ],
)
def test_a_kernel_has_the_kind_of_what_launched_it_or_of_its_name(name: str, around: list[str], kind: str) -> None:
    assert profile_step.kind_of(name, around) == kind


def test_names_are_short() -> None:
    long = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >"
        "(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)"
    )
    assert profile_step.short(long) == "vectorized_elementwise_kernel<CUDAFunctor_add>"
    assert len(profile_step.short("k" * 200)) == 60


def test_a_trace_of_a_gpu_gives_kernels_kinds_and_idle_time() -> None:
    def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid, "args": args}

    events = [
        event("cpu_op", "convmae::tile_convolution", 0, 10),
        event("cpu_op", "aten::mul", 2, 5),
        event("cuda_runtime", "cudaLaunchKernel", 3, 1, correlation=1),
        event("cpu_op", "aten::mm", 12, 5),
        event("cuda_driver", "cuLaunchKernelEx", 13, 1, correlation=2),
        event("kernel", "elementwise_kernel", 10, 20, 7, correlation=1),
        event("kernel", "some_gemm", 40, 60, 7, correlation=2),
        event("gpu_memcpy", "Memcpy DtoD", 20, 10, 8, correlation=3),
    ]
    found = profile_step.summarise(sides(tiny())[0], 4, events, steps=2, device="cuda")
    assert found.microseconds == 45
    assert found.idle == pytest.approx(10 / 90)
    assert found.kinds() == {"matmul": (0.5, 30), "tile convolution": (0.5, 10), "copies": (0.5, 5)}


def test_the_profile_of_a_tiny_step_shows_its_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = profile_step.Options(
        sides=("convmae", "mae"), device="cpu", quick=True, steps=1, json=tmp_path / "profile.json"
    )
    ours, plain = profile_step.main(options)
    assert (ours.failure, plain.failure) == (None, None)
    assert {"tile convolution", "matmul", "attention", "optimiser"} <= set(ours.kinds())
    assert "tile convolution" not in plain.kinds()
    assert sum(time for _, time in ours.kinds().values()) == pytest.approx(ours.microseconds)
    assert "share" in capsys.readouterr().out
    assert [each["side"] for each in json.loads((tmp_path / "profile.json").read_text())] == ["convmae", "mae"]
    with pytest.raises(ValueError, match="no such side; there are"):
        profile_step.main(replace(options, sides=("nothing",)))


# ---- plan ----------------------------------------------------------------------------------------------------------


def rows(**changes: Any) -> Iterator[plan.Row]:
    options = plan.Options(gpus=(8, 64), reached=1.0, **changes)
    (kinetics,) = (one for one in plan.PLANS if one.title == "kinetics_pretrain, 800 epochs")
    return plan.project(kinetics, 0.004, options)


def test_a_plan_adds_up() -> None:
    nvlink, infiniband, ethernet = rows(hidden=0.0)
    parameters = nvlink.exchange / (2 * 7 / 8 * 4 / 450e9)
    assert 85e6 < parameters < 105e6
    assert nvlink.share == 256
    assert nvlink.compute == pytest.approx(1.024)
    assert infiniband.exchange == pytest.approx(2 * 63 / 64 * 4 * parameters / 400e9)
    assert ethernet.exchange == pytest.approx(32 * infiniband.exchange)
    assert nvlink.steps == round(800 * 240_000 / 2048)
    assert nvlink.hours == pytest.approx(nvlink.steps * (1.024 + nvlink.exchange) / 3600)
    assert ethernet.efficiency == pytest.approx(0.128 / (0.128 + ethernet.exchange))


def test_what_is_hidden_is_at_most_the_backward_pass_and_fewer_bytes_take_less() -> None:
    *_, infiniband, ethernet = rows(hidden=1.0)
    assert infiniband.exposed == 0
    assert infiniband.efficiency == 1
    assert ethernet.exposed == pytest.approx(max(0, ethernet.exchange - 2 / 3 * ethernet.compute), abs=1e-12)
    for whole, half in zip(rows(), rows(gradient_bytes=2), strict=True):
        assert half.exchange == pytest.approx(whole.exchange / 2)


def test_every_published_pretraining_recipe_is_planned_by_its_own_numbers() -> None:
    wanted = {
        name
        for module in (convmae.recipes, video.recipes)
        for name in vars(module)
        if name.endswith(("_pretrain", "_cmae")) and not name.startswith("demo")
    }
    assert wanted | {"kinetics_half_decoded"} == {one.recipe.__name__ for one in plan.PLANS}
    assert {one.side for one in plan.PLANS} <= {side.name for side in sides(tiny())}
    (fast,) = (one for one in plan.PLANS if one.recipe is convmae.recipes.imagenet_fast_pretrain)
    (row,) = plan.project(fast, 0.001, plan.Options(gpus=(8,)))
    assert (row.plan, row.share, row.steps) == ("imagenet_fast_pretrain, 50 epochs", 64, round(50 * 1_281_167 / 512))


def test_a_side_that_hides_something_else_than_the_recipe_stands_in_and_it_is_said() -> None:
    (line,) = plan.stand_ins(plan.PLANS)
    assert line.startswith("- mae-cmae stands in for imagenet_cmae: it hides masking.BlockMasking(ratio=0.75")
    assert "the recipe masking.BlockMasking(ratio=0.65, block=(2, 2)" in line


def test_times_are_read_from_what_the_step_benchmark_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    file.write_text(
        json.dumps(
            {
                "device": "a GPU",
                "quick": True,
                "results": [
                    {"side": "convmae", "samples": 64, "seconds": [0.5, 0.1, 0.2]},
                    {"side": "convmae", "samples": 640, "seconds": [1.0, 1.28, 2.0]},
                    {"side": {"name": "videoconvmae-k3"}, "samples": 10, "seconds": 0.1},
                    {"side": "videomae", "samples": 64, "seconds": None, "failure": "out of memory"},
                ],
            }
        )
    )
    assert plan.read_seconds(file) == {"convmae": (640, 0.002), "videoconvmae-k3": (10, 0.01)}
    found = plan.main(plan.Options(read=file, step_seconds=("convmae=0.001",)))
    assert len(found) == 5 * 5
    assert found[0].compute == pytest.approx(0.128)
    out = capsys.readouterr().out
    assert "Taken for granted" in out
    assert "tiny models" in out
    assert "CMAE's exchange of keys and of BatchNorm's sums is left out" in out
    assert "4000" in out
    with pytest.raises(ValueError, match="--step-seconds"):
        plan.main(plan.Options())
    with pytest.raises(ValueError, match="write SIDE=SECONDS"):
        plan.main(plan.Options(step_seconds=("convmae",)))
