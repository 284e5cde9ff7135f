"""The training loop: its order, its arithmetic, what it keeps, and how it ends."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Noise, TinyRun, losses, tiny, together
from torch import Tensor

from convmae import MAE, checkpoint, masking
from convmae.data import Stream
from convmae.optimisation import learning_rate, parameter_groups
from convmae.targets import normalize
from convmae.training import Pretrain, fit, steps


def a_run(folder: Path, **changes: object) -> Pretrain:
    return replace(TinyRun(folder=folder).run(), **changes)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = checkpoint.read(folder / "last.pt")["weights"]
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# --- schedule and groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [0, 0.05, 0.1, 0.3, 0.77, 0.999])
def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine(progress: float) -> None:
    expected = (
        2e-3 * progress / 0.1
        if progress < 0.1
        else 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2
    )
    assert learning_rate(progress, peak=2e-3, floor=1e-5, warmup=0.1) == pytest.approx(expected, rel=1e-9)


def test_only_weights_of_matrices_and_convolutions_decay() -> None:
    model = MAE().input(32).stages(*tiny().trunk).with_class_token().decode(dim=16, depth=1, heads=2).build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = ([names[id(one)] for one in group["params"]] for group in parameter_groups(model, 0.05))
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert all(name.endswith(("bias", "mask_token", "class_token")) or "norm" in name for name in undecayed)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(decayed + undecayed) == sorted(trained)
    assert not any("positions" in name for name in trained)


# --- order --------------------------------------------------------------------------------------------------------


def global_batch(step: int, *, world: int, workers: int = 0, micro_batch: int | None = None) -> dict[int, Tensor]:
    """Sample number to pixels and mask of a step, over all processes."""
    found: dict[int, Tensor] = {}
    for rank in range(world):
        stream = Stream(
            Noise(count=7).open((8, 8)),
            (8, 8),
            seed=3,
            batch_size=5,
            rank=rank,
            world=world,
            micro_batch=micro_batch,
            draw_mask=lambda generator: masking.random(0.5)(1, (2, 2), generator),
        )
        (batches,) = stream.batches(step, step + 1, workers=workers)
        numbers = [number for share in stream.share(step) for number in share]
        for batch in batches:
            assert batch.mask is not None
            for pixels, mask in zip(batch.pixels, batch.mask, strict=True):
                found[numbers.pop(0)] = torch.cat([pixels.flatten().float(), mask.flatten().float()])
    return found


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (2, None), (3, 1), (8, None)])
def test_a_step_has_the_same_samples_crops_and_masks_on_any_number_of_processes(
    world: int, micro_batch: int | None
) -> None:
    for step in (0, 1, 4):
        alone, shared = global_batch(step, world=1), global_batch(step, world=world, micro_batch=micro_batch)
        assert sorted(alone) == sorted(shared) == list(range(step * 5, step * 5 + 5))
        assert all(alone[number].equal(shared[number]) for number in alone)


def test_an_epoch_takes_every_sample_once() -> None:
    stream = Stream(Noise(count=7).open((8, 8)), (8, 8), seed=0, batch_size=7)
    loaded = [batches[0].pixels for batches in stream.batches(0, 3, workers=0)]
    for pixels in loaded:
        assert len({tuple(one.flatten().tolist()) for one in pixels}) == 7


@pytest.mark.slow
def test_loader_processes_change_nothing() -> None:
    stream = Stream(Noise(count=7).open((8, 8)), (8, 8), seed=0, batch_size=5)
    here = [batches[0].pixels for batches in stream.batches(1, 5, workers=0)]
    there = [batches[0].pixels for batches in stream.batches(1, 5, workers=2)]
    assert all(one.equal(other) for one, other in zip(here, there, strict=True))


def test_the_optimiser_is_adamw_from_the_first_step_on(tmp_path: Path) -> None:
    """A checkpoint of the beginning must not count as a step."""
    run = a_run(tmp_path, model=tiny().drop_path(0), epochs=0.5, warmup_epochs=0)
    session_steps = iter(steps(run))
    torch.manual_seed(run.seed)
    model = run.model.build()
    optimiser = torch.optim.AdamW(parameter_groups(model, run.weight_decay), lr=0.0, betas=run.betas)
    stream = Stream(run.data.open((32, 32)), (32, 32), run.seed, 5, draw_mask=lambda g: model.masking(1, (4, 4), g))
    for (batch,) in stream.batches(0, 2, workers=0):
        step = next(session_steps)
        loss = model(normalize(batch.pixels), mask=batch.mask)["loss"]
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = step.learning_rate
        optimiser.step()
        optimiser.zero_grad()
        assert step.loss == pytest.approx(float(loss), rel=1e-6)
    for name, weight in step.start.model.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=1e-5)


# --- going on -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_left_and_run_again_equals_one_that_was_not_bit_for_bit(tmp_path: Path) -> None:
    whole = [step.loss for step in steps(a_run(tmp_path / "whole"))]
    broken = a_run(tmp_path / "broken")
    first = []
    for step in steps(broken):
        first.append(step.loss)
        if step.number == 3:
            break
    second = [step.loss for step in steps(broken)]
    assert first + second == whole
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))


def test_accumulating_micro_batches_gives_the_same_losses(tmp_path: Path) -> None:
    model = tiny().drop_path(0)
    whole = [step.loss for step in steps(a_run(tmp_path / "whole", model=model))]
    parts = [step.loss for step in steps(a_run(tmp_path / "parts", model=model, micro_batch=2))]
    assert parts == pytest.approx(whole, rel=1e-4)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    assert len(list(steps(a_run(tmp_path)))) == 8
    assert list(steps(a_run(tmp_path))) == []


def test_another_runs_folder_is_refused_and_the_differences_are_named(tmp_path: Path) -> None:
    list(steps(a_run(tmp_path, epochs=1)))
    with pytest.raises(ValueError, match=r"another run's checkpoint(.|\n)*seed: 0, now 1(.|\n)*--folder"):
        list(steps(a_run(tmp_path, seed=1)))


def test_ctrl_c_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    run = a_run(tmp_path, checkpoint_minutes=60)
    seen = []
    for step in steps(run):
        seen.append(step)
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGINT)
    assert [step.number for step in seen] == [1, 2, 3]
    assert seen[-1].stopping
    assert checkpoint.read(tmp_path / "last.pt")["progress"]["step"] == 3


# --- what cannot be -----------------------------------------------------------------------------------------------


def test_bad_samples_are_skipped_counted_and_named_and_the_rest_counts(tmp_path: Path) -> None:
    seen = list(steps(a_run(tmp_path, data=Noise(bad=(3, 4)))))
    assert sum(step.samples for step in seen) == 8 * 5 - 2 * 2
    assert sorted(problem.name for step in seen for problem in step.skipped) == [
        "noise/noise-3",
        "noise/noise-3",
        "noise/noise-4",
        "noise/noise-4",
    ]
    assert all(math.isfinite(step.loss) for step in seen)


def test_a_source_with_nothing_usable_ends_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in a whole epoch; the last: noise/noise-\d: it is bad"):
        list(steps(a_run(tmp_path, data=Noise(count=6, bad=tuple(range(6))))))


def test_a_run_that_no_checkpoint_could_keep_is_refused_at_once(tmp_path: Path) -> None:
    class Local(Noise):
        pass

    with pytest.raises(ValueError, match=r"could not keep this run.*inside a function"):
        list(steps(a_run(tmp_path, data=Local())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be positive; got 0"),
        ({"warmup_epochs": 2.0}, "warmup_epochs must be 0 or more, and less than epochs, 2"),
        ({"batch_size": 0, "workers": -1}, r"workers must be 0 or more; got -1\n  - batch_size"),
    ],
)
def test_an_impossible_run_is_refused_with_every_problem(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        a_run(tmp_path, **change)


# --- journal ------------------------------------------------------------------------------------------------------


def test_the_journal_of_a_run_that_was_stopped_has_every_step_once(tmp_path: Path) -> None:
    run = a_run(tmp_path, data=Noise(bad=(3,)))
    for step in steps(run):
        if step.number == 3:
            break
    assert fit(run)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [3, 4, 5, 6, 7, 8]  # a step that was saved and not told is told now
    assert {path.suffix for path in (tmp_path / "pictures").iterdir()} == {".png"}
    page = (tmp_path / "report.html").read_text()
    assert "noise-3" in page
    assert "it is bad" in page
    assert list((tmp_path / "tensorboard").iterdir())
    assert "base_lr=0.01" in (tmp_path / "run.txt").read_text()


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_processes_with_uneven_shares_and_bad_samples_train_as_one(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": tiny().drop_path(0), "data": Noise(bad=(3, 4))}
    for world in (1, 3):
        assert together(tmp_path / str(world), world, **changes)[0] == [0] * world
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
