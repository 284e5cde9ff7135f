"""What a run survives, and what shows of it: kills, damaged files, a full disk, NaN, a hang, other layouts."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import same, told
from rich.console import Console
from runs import Noise, NotOfWhite, TinyRun, TwoNoises, losses, tiny, together

from convmae import CMAE, MAE, AttentionStage, checkpoint
from convmae.files import lines
from convmae.journal import Journal
from convmae.run_folder import failures, occupied
from convmae.training import Pretrain, Session, Step, fit, opened, steps

TESTS = Path(__file__).parent


def a_run(folder: Path, **changes: Any) -> Pretrain:
    return replace(TinyRun(folder=folder).run(), pictures=0, **changes)


def newest(folder: Path) -> dict[str, Any]:
    return checkpoint.read(folder / "last.pt")


def events(folder: Path) -> list[str]:
    return [line["event"] for line in lines(folder / "events.jsonl")]


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "killing.py", str(tmp_path), "--kills", "20"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["while_writing"] >= 3
    assert len(set(found["steps_reached"])) > 4, "the kills were to be spread over the run"
    for name in ("weights", "optimiser", "metrics", "skipped", "pictures"):
        assert found[f"{name}_equal"], name
    assert not found["temporary_files"]
    assert not found["orphans"]


@dataclass(frozen=True, kw_only=True)
class Interrupted(Pretrain):
    """A run that the cluster asks to stop in every step."""

    def rate(self, step: int, total: int) -> float:
        os.kill(os.getpid(), signal.SIGUSR2)
        return super().rate(step, total)


def test_metrics_of_a_run_that_was_stopped_after_every_step_are_those_of_one_that_was_not(tmp_path: Path) -> None:
    whole = a_run(tmp_path / "whole", log_every=3, data=Noise(bad=(3,)))
    fit(whole)
    broken = Interrupted(**{**vars(whole), "folder": tmp_path / "broken"})
    assert [fit(broken) for _ in range(8)] == [False] * 7 + [True]
    for name in ("metrics.jsonl", "skipped.jsonl"):
        assert told(whole.folder / name) == told(broken.folder / name)
    assert [line["step"] for line in lines(whole.folder / "metrics.jsonl")] == [1, 3, 6, 8]
    assert [line["since"] for line in lines(whole.folder / "metrics.jsonl")] == [1, 2, 4, 7]
    assert events(broken.folder).count("resumed") == 7
    assert same(newest(whole.folder)["weights"], newest(broken.folder)["weights"])


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    bad = {
        "truncated": content[: len(content) // 2],
        "zeroed": bytes(len(content)),
        "text": b"not a checkpoint\n",
        "empty": b"",
    }
    path.write_bytes(bad[how])


@pytest.mark.parametrize("how", ["truncated", "zeroed", "text", "empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_line(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = a_run(tmp_path / "whole")
    list(steps(whole))
    broken = replace(whole, folder=tmp_path / "broken")
    for step in steps(broken):
        if step.number == 5:
            break
    damage(broken.folder / "last.pt", how)
    numbers = [step.number for step in steps(broken)]
    assert numbers[0] == 5, "step 5 is done again from the checkpoint of step 4"
    assert "step-00000005.pt cannot be read as a checkpoint" in caplog.text
    assert "trying the checkpoint before it" in caplog.text
    assert same(newest(whole.folder)["weights"], newest(broken.folder)["weights"])


def test_where_all_checkpoints_are_damaged_the_run_does_not_begin_anew_in_silence(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    list(steps(run))
    for path in (tmp_path / "checkpoints").iterdir():
        damage(path, "zeroed")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be read:\n(.|\n)*Remove them to begin"):
        list(steps(run))


def test_the_last_few_and_every_so_manieth_checkpoint_are_kept(tmp_path: Path) -> None:
    list(steps(a_run(tmp_path, keep_last=2, keep_every=3)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}.pt" for step in (3, 6, 7, 8)
    ]
    assert os.readlink(tmp_path / "last.pt") == "checkpoints/step-00000008.pt"


def test_checkpoints_come_by_steps_and_by_time(tmp_path: Path) -> None:
    list(steps(a_run(tmp_path / "steps", checkpoint_minutes=60, checkpoint_steps=3, keep_last=9)))
    found = sorted(int(path.stem[5:]) for path in (tmp_path / "steps/checkpoints").iterdir())
    assert found == [0, 3, 6, 8]


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    mounted = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if mounted.returncode:
        if os.environ.get("CI"):
            pytest.fail(mounted.stderr)
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_after_an_error_nothing_waits_for_loader_processes(small_disk: Path) -> None:
    fill(small_disk / "ballast")
    began = time.monotonic()
    codes, said = together(small_disk / "run", 1, workers=2)
    assert time.monotonic() - began < 90
    assert codes == [1]
    assert "No space left on device" in said[0]


def test_a_full_disk_is_an_error_that_keeps_the_checkpoints_and_the_run_goes_on_later(small_disk: Path) -> None:
    run = a_run(small_disk / "run")
    ballast = small_disk / "ballast"

    def fill_the_disk() -> None:
        for step in steps(run):
            if step.number >= 4:
                fill(ballast)

    with pytest.raises(OSError, match=r"No space left on device: this checkpoint cannot be written: .*step-\d+\.pt"):
        fill_the_disk()
    assert not list(run.folder.rglob(".*.tmp"))
    for path in (run.folder / "checkpoints").iterdir():
        assert checkpoint.read(path)["progress"]["step"] >= 1
    ballast.unlink()
    assert [step.number for step in steps(run)][-1] == 8


def fill(path: Path) -> None:
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# --- numbers that are not finite --------------------------------------------------------------------------------------


def test_a_step_with_a_bad_sample_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = a_run(tmp_path, model=tiny().predict(NotOfWhite()), data=Noise(white=(7,)))
    assert fit(run)
    last = list(lines(tmp_path / "metrics.jsonl"))[-1]
    assert last["bad_steps"] == 2, "once an epoch"
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "metrics.jsonl") if line["loss"] is not None)
    assert all(weight.isfinite().all() for weight in newest(tmp_path)["weights"].values())
    assert "noise-7" in caplog.text
    assert "left out: step" in caplog.text
    assert events(tmp_path).count("bad_step") == 2


def poisoned(run: Pretrain, bad: range, *, lives: int) -> Iterator[Step]:
    with opened(run) as session:
        yield from poisoned_session(session, bad, lives=lives)


def poisoned_session(session: Session, bad: range, *, lives: int = 1) -> Iterator[Step]:
    """The run's steps; in those numbered so its gradient is infinite, the first few times that it comes there."""
    hook: Any = None
    for step in session:
        if hook is not None:
            hook.remove()
            hook = None
        yield step
        lives -= step.back_to is not None
        number = (step.number if step.back_to is None else step.back_to) + 1
        if number in bad and lives > 0:
            first: Any = next(step.start.model.parameters())
            hook = first.register_hook(lambda gradient: gradient * math.inf)


def test_too_many_bad_steps_take_the_run_back_to_go_on_with_the_data_in_another_order(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"bad_steps": 3, "checkpoint_steps": 2, "checkpoint_minutes": 60, "epochs": 4}
    orders = {}
    for name, lives in (("whole", 0), ("poisoned", 1)):
        (tmp_path / name).mkdir()
        run = a_run(tmp_path / name, data=Noise(record=tmp_path / name), **changes)
        found = list(poisoned(run, range(4, 12), lives=lives))
        orders[name] = [line["is"][0] for line in lines(tmp_path / name / "rank-0.jsonl")]
    numbers = [step.number for step in found]
    assert numbers == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert [step.back_to for step in found if step.back_to is not None] == [2]
    assert found[-1].progress.bad_steps == 3
    assert found[-1].progress.detours == 1
    assert all(weight.isfinite().all() for weight in newest(run.folder)["weights"].values())
    # a batch is 5 of 20 samples: after 6 steps it is back at step 2, and in another order
    assert orders["whole"][:30] == orders["poisoned"][:30]
    assert orders["whole"][10:30] != orders["poisoned"][30:50]
    assert sorted(orders["poisoned"][-20:]) == list(range(20)), "a whole epoch has every sample once again"


def test_a_run_that_is_bad_again_stops_with_step_samples_and_norm_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    run = a_run(tmp_path, bad_steps=2, rollbacks=2, checkpoint_steps=2, checkpoint_minutes=60)
    with pytest.raises(FloatingPointError) as stopped:
        list(poisoned(run, range(4, 99), lives=99))
    said = str(stopped.value)
    assert "2 steps in a row were not finite, also after going back (--rollbacks 2)" in said
    assert "step 5: loss 1." in said
    assert "gradient norm inf" in said or "gradient norm nan" in said
    assert "noise-" in said
    assert "--base-lr" in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000000.pt",
        "step-00000002.pt",
    ]


def test_going_back_from_the_last_step_is_no_end(tmp_path: Path) -> None:
    run = a_run(tmp_path, bad_steps=2, checkpoint_steps=2, checkpoint_minutes=60)
    found = list(poisoned(run, range(7, 99), lives=1))
    assert [step.number for step in found] == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8]
    assert newest(tmp_path)["progress"]["step"] == 8
    assert newest(tmp_path)["progress"]["detours"] == 1


def test_a_journal_goes_back_with_the_run(tmp_path: Path) -> None:
    run = a_run(tmp_path, bad_steps=2, checkpoint_steps=2, checkpoint_minutes=60, log_every=3, data=Noise(bad=(1, 2)))
    with opened(run) as session, Journal(session.start, Console(quiet=True)) as journal:
        for step in poisoned_session(session, range(6, 99)):
            journal.record(step)
        counted = sum(journal.skipped.values())
    told_of = list(lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in told_of] == [1, 3, 6, 8]
    skipped = [(line["file"], line["step"]) for line in lines(tmp_path / "skipped.jsonl")]
    assert len(skipped) == len(set(skipped)) == told_of[-1]["skipped"] == counted
    assert events(tmp_path).count("rolled_back") == 1


# --- a hang -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_in_the_stated_time_and_says_where(tmp_path: Path) -> None:
    began = time.monotonic()
    codes, said = together(tmp_path, 2, data=Noise(stuck=(13,)), hang_minutes=0.2)
    assert time.monotonic() - began < 60
    assert codes[0]
    assert codes[1]
    assert any("no step in 0.2 minutes" in text and "runs.py" in text for text in said), said
    words = failures(tmp_path)
    assert any("no step in 0.2 minutes" in word["error"] for word in words)
    assert not any(word["final"] for word in words)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_stopped_and_gone_on_end_with_the_bits_of_four_that_were_not(tmp_path: Path) -> None:
    """DDP arranges its buckets in the second pass of a session: this fails without the rehearsal."""
    model = tiny().decode(dim=128, depth=2, heads=2)
    changes: dict[str, Any] = {"model": model, "epochs": 3, "pictures": 0}
    assert together(tmp_path / "whole", 4, **changes)[0] == [0] * 4
    assert together(tmp_path / "broken", 4, interrupt_at=2, **changes)[0] == [0] * 4
    reached = newest(tmp_path / "broken")["progress"]["step"]
    assert reached < 12, "it was to be interrupted"
    assert together(tmp_path / "broken", 4, **changes)[0] == [0] * 4
    assert same(newest(tmp_path / "whole")["weights"], newest(tmp_path / "broken")["weights"])
    assert told(tmp_path / "whole/metrics.jsonl") == told(tmp_path / "broken/metrics.jsonl")


@pytest.mark.slow
def test_sharded_and_copied_models_learn_the_same_and_go_on_from_each_other(tmp_path: Path) -> None:
    model = tiny().drop_path(0)
    assert together(tmp_path / "one", 1, model=model)[0] == [0]
    changes: dict[str, Any] = {"model": model, "parallel": "fsdp", "pictures": 2, "recompute": True, "micro_batch": 2}
    assert together(tmp_path / "shared", 2, interrupt_at=3, **changes)[0] == [0, 0]
    assert together(tmp_path / "shared", 3, model=model, pictures=2)[0] == [0, 0, 0]
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert list((tmp_path / "shared/pictures").iterdir())
    assert fit(a_run(tmp_path / "shared", model=model)), "and it is finished for a single process, too"


def test_recomputing_changes_no_bit(tmp_path: Path) -> None:
    list(steps(a_run(tmp_path / "kept")))
    for name, changes in (("all", {"recompute": True}), ("convolutions", {"recompute_stages": (0,)})):
        list(steps(a_run(tmp_path / name, **changes)))
        assert same(newest(tmp_path / "kept")["weights"], newest(tmp_path / name)["weights"])


def test_stages_that_cannot_be_recomputed_are_refused(tmp_path: Path) -> None:
    for stages, recompute in (((0, 0), False), ((-1,), False), ((2,), False), ((0,), True)):
        with pytest.raises(ValueError, match="recompute_stages"):
            a_run(tmp_path, recompute_stages=stages, recompute=recompute)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path: Path) -> None:
    model = tiny().drop_path(0)
    eager = [step.loss for step in steps(a_run(tmp_path / "eager", model=model, epochs=1))]
    compiled = [step.loss for step in steps(a_run(tmp_path / "compiled", model=model, epochs=1, compile=True))]
    assert compiled == pytest.approx(eager, rel=1e-4)


PLAIN = MAE().input(32).stages(AttentionStage(dim=16, depth=1, stride=(8, 8), heads=2)).decode(dim=16, depth=1, heads=2)
CONTRASTIVE = CMAE(mae=PLAIN).decode_features(dim=16, depth=1, heads=2).project(hidden=24, dim=8)
COMPILED: dict[str, dict[str, Any]] = {
    "ConvMAE": {"model": tiny().drop_path(0)},
    "CMAE": {"model": CONTRASTIVE, "data": TwoNoises(), "pictures": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_compiled_processes_learn_the_same(parallel: str, what: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 1, "parallel": parallel, **COMPILED[what]}
    for name, compiled in (("eager", False), ("compiled", True)):
        codes, said = together(tmp_path / name, 2, compile=compiled, **changes)
        assert codes == [0, 0], said
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_a_deterministic_run_has_the_same_bits_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    list(steps(a_run(tmp_path / "free")))
    list(steps(a_run(tmp_path / "fixed", deterministic=True)))
    assert same(newest(tmp_path / "free")["weights"], newest(tmp_path / "fixed")["weights"])
    assert not torch.are_deterministic_algorithms_enabled()


# --- whose folder it is -----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_with_the_name_of_who_uses_it(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    list(steps(run))
    with occupied(tmp_path):
        assert f"process {os.getpid()} on {socket.gethostname()}, trains there" in (run.refusal() or "")
        with pytest.raises(ValueError, match="is in use"), occupied(tmp_path, patience=0):
            pass
    assert run.refusal() is None


def test_another_runs_folder_is_known_before_anything_starts(tmp_path: Path) -> None:
    list(steps(a_run(tmp_path, epochs=1)))
    assert "seed: 0, now 1" in (a_run(tmp_path, seed=1).refusal() or "")
    assert a_run(tmp_path, epochs=3, keep_last=1).refusal() is None


def test_data_may_move_and_may_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in steps(a_run(tmp_path)):
        if step.number == 2:
            break
    moved = a_run(tmp_path, data=Noise(root=Path("elsewhere")))
    assert moved.refusal() is None
    assert next(iter(steps(moved))).number == 3

    monkeypatch.setenv("NOISE_MISSING", "1")
    with pytest.raises(ValueError, match="20 samples then, 19 now"):
        list(steps(moved))


def test_a_failure_leaves_its_last_words_and_the_next_start_tells_them(tmp_path: Path) -> None:
    run = a_run(tmp_path, data=Noise(count=6, bad=tuple(range(6))))
    with pytest.raises(ValueError, match="no sample could be loaded"):
        fit(run)
    (words,) = failures(tmp_path)
    assert words["final"]
    assert words["error"].startswith("ValueError: no sample could be loaded in a whole epoch")
    with pytest.raises(ValueError, match="no sample"):
        fit(run)
    assert events(tmp_path).count("failed") == 1


def test_a_process_refused_in_a_folder_leaves_no_word_there(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    list(steps(run))
    with occupied(tmp_path), pytest.raises(ValueError, match="is in use"):
        fit(run)
    assert not failures(tmp_path)


def test_a_lock_that_outlived_this_jobs_last_attempt_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with occupied(tmp_path):
        with occupied(tmp_path, patience=0):
            assert "still locked by this job's last attempt" in caplog.text
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        with pytest.raises(ValueError, match="SLURM job 77, trains there"), occupied(tmp_path, patience=0):
            pass


def test_a_disk_that_fails_in_reading_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    list(steps(run))

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(OSError, match="Input/output error"):
        list(steps(run))


def test_weights_and_biases_get_the_metrics_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert fit(a_run(tmp_path, epochs=1, wandb="tests"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
