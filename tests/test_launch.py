"""The launcher is run as a user runs it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO
from unittest import mock

import pytest
import torch
from lab import ROOT, Says, command, desk, lab, launcher, metrics, place, run_launcher, says, slurm
from runs import tiny

from convmae import checkpoint, launch
from convmae.evaluate import Evaluate
from convmae.finetune import Finetune
from convmae.images import ImageFolder
from video.videos import Videos

__all__ = ["desk", "lab", "says"]


# ---- a run, here -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_launcher_trains_in_this_process_and_the_same_command_finds_it_done(desk: Path) -> None:
    first = run_launcher("--recipe", "lab_recipes:tiny", "--epochs", "3")
    assert first.returncode == 0, first.stderr
    assert "debug: in this process, with no GPU, as there is no sbatch on the PATH" in first.stdout
    assert [line["step"] for line in metrics(desk / "runs" / "tiny")] == list(range(1, 13))
    again = run_launcher("--recipe", "lab_recipes:tiny", "--epochs", "3")
    assert again.returncode == 0
    assert "already finished" in again.stdout


@pytest.mark.slow
def test_a_run_with_other_settings_in_the_same_folder_is_refused_without_a_traceback(desk: Path) -> None:
    assert run_launcher("--recipe", "lab_recipes:tiny").returncode == 0
    other = run_launcher("--recipe", "lab_recipes:tiny", "--seed", "1")
    assert other.returncode == 2
    assert "holds another run's checkpoint" in other.stderr
    assert "seed: 0, now 1" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_it_also_runs_as_a_module_and_finds_recipes_in_the_current_directory(desk: Path, lab: Path) -> None:
    os.environ["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-P", "-m", "convmae.launch", "--recipe", "lab_recipes:tiny", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=lab, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nothing is done" in done.stdout


def test_importing_the_package_loads_neither_submitit_nor_tyro(desk: Path) -> None:
    code = "import sys, convmae, convmae.launch; sys.exit(str({'submitit', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stderr.strip() == "set()"


# ---- flags and recipes -----------------------------------------------------------------------------------------------


def test_help_lists_the_recipe_s_fields_with_its_defaults_and_fits_the_terminal(says: Says) -> None:
    code, out, _ = says("--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.replace("│", " ").split())
    assert "lab_recipes:tiny: Random pixels, in seconds." in text
    assert "--epochs FLOAT passes over the data. (default: 2)" in text
    assert "--batch-size INT" in text
    assert "--folder PATH" in text
    assert "(default: runs/tiny)" in text
    assert "--data PATH where the data are." in text
    assert "--gpus-per-node INT" in text
    for absent in ("--model", "--run.", "--launch.", "{None}", "tyro", "--no-dry-run"):
        assert absent not in out


def test_flags_change_the_run(says: Says) -> None:
    with mock.patch.object(launch, "carry_out") as fit:
        assert says("--epochs", "5", "--base-lr=1e-3", "--betas", "0.8", "0.9", "--micro-batch", "4")[0] == 0
    (run,), _ = fit.call_args
    assert (run.epochs, run.base_lr, run.betas, run.micro_batch, run.batch_size) == (5, 1e-3, (0.8, 0.9), 4, 8)
    assert run.device == "cpu"


def test_a_misspelt_flag_ends_with_exit_code_2_and_a_suggestion(says: Says) -> None:
    code, out, err = says("--epoch", "5")
    assert code == 2
    assert "--epochs" in out + err


@pytest.mark.parametrize(
    ("recipe", "complaints"),
    [
        (
            "lab_recipes:tinny",
            ["has no 'tinny'", "Recipes in lab_recipes: at_home,", "Did you mean --recipe lab_recipes:tiny?"],
        ),
        ("lab_recipe:tiny", ["there is no module 'lab_recipe'", "Did you mean lab_recipes?"]),
        ("video.recipe:demo", ["there is no module 'video.recipe' in video", "Did you mean video.recipes?"]),
        ("lab_recipes", ["names no function: write module:function", "placed, tiny"]),
        ("lab_recipes:Path", ["returned a PosixPath, not a run"]),
        ("lab_recipes:poem", ["returned a str, not a run", "Recipes in lab_recipes:"]),
        ("lab_recipes:scaled", ["a function of no arguments"]),
        ("lab_recipes:backwards", ["epochs must be positive; got -1"]),
        ("lab_broken:tiny", ["importing lab_broken failed at", "lab_broken.py, line 1", "not_there_at_all"]),
        ("json:tool", ["json has no 'tool'", "json has no recipes"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(says: Says, recipe: str, complaints: list[str]) -> None:
    code, out, err = says("--recipe", recipe)
    assert (code, out) == (2, "")
    assert err.startswith(f"slurm_pretrain.py: --recipe {recipe}")
    for complaint in complaints:
        assert complaint in err


def test_a_wrong_run_is_refused_before_anything_starts(desk: Path, says: Says) -> None:
    code, _, err = says("--epochs", "0.5", "--batch-size", "0")
    assert code == 2
    assert "batch_size must be 1 or more; got 0" in err
    assert "warmup_epochs must be 0 or more, and less than epochs, 0.5 (change both together); got 1" in err
    code, _, err = says(recipe="lab_recipes:odd")
    assert code == 2
    assert ".input(size=(30, 30)) is not a multiple of (16, 16)" in err
    code, _, err = says("--device", "cuda")
    assert code == 2
    assert "--device cuda: there is no GPU" in err
    (desk / "file").touch()
    code, _, err = says("--folder", "file/run")
    assert code == 2
    assert "--folder file/run" in err
    assert "is not a folder that can be written to" in err


# ---- data ------------------------------------------------------------------------------------------------------------


def test_the_data_are_the_flag_s_then_the_variable_s_then_the_recipe_s_then_the_demo_set(
    desk: Path, says: Says
) -> None:
    for name in ("flag", "variable", "clips"):
        (desk / name).mkdir()

    def root(*arguments: str, recipe: str = "lab_recipes:at_home") -> tuple[object, str]:
        with mock.patch.object(launch, "carry_out") as fit:
            _, out, _ = says(*arguments, recipe=recipe)
        (line,) = [line for line in out.splitlines() if line.startswith("data")]
        return fit.call_args[0][0].data.root, line

    os.environ["CONVMAE_DATA"] = "variable"
    assert root("--data", "flag") == (desk / "flag", f"data     {desk}/flag")
    assert root() == (desk / "variable", f"data     {desk}/variable, from $CONVMAE_DATA")
    del os.environ["CONVMAE_DATA"]
    assert root() == (desk / "clips", f"data     {desk}/clips, from the recipe")
    nothing, line = root(recipe="lab_recipes:placed")
    assert nothing is None
    assert "the recipe's, as neither --data nor $CONVMAE_DATA says where others are" in line


def test_data_that_are_not_there_or_cannot_be_replaced_are_refused(desk: Path, says: Says) -> None:
    code, _, err = says("--data", "nowhere", recipe="lab_recipes:placed")
    assert (code, err) == (2, f"slurm_pretrain.py: --data nowhere: there is no {desk}/nowhere\n")
    os.environ["CONVMAE_DATA"] = "elsewhere"
    code, _, err = says(recipe="lab_recipes:placed")
    assert (code, err) == (2, f"slurm_pretrain.py: $CONVMAE_DATA=elsewhere: there is no {desk}/elsewhere\n")
    code, _, err = says("--data", "nowhere")
    assert code == 2
    assert "Pixels, have no field `root` to replace (it has count)" in err


# ---- the choice of a place -------------------------------------------------------------------------------------------


def test_without_slurm_it_is_this_process_or_a_process_a_gpu(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(says("--dry-run")[1]) == "debug: in this process, with no GPU, as there is no sbatch on the PATH"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert place(says("--dry-run")[1]).startswith("debug: in this process, with 1 of 1 GPUs, as")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert place(says("--dry-run")[1]).startswith("local: processes on this machine: 4, with 4 of 4 GPUs, as there is")
    assert place(says("--dry-run", "--cluster", "debug")[1]).startswith("debug: in this process, with 1 of 4 GPUs")
    assert place(says("--dry-run", "--device", "cpu")[1]).startswith("debug: in this process, with no GPU")
    assert place(says("--dry-run", "--tasks-per-node", "2")[1]).startswith(
        "local: processes on this machine: 2, with no"
    )
    os.environ["WORLD_SIZE"], os.environ["RANK"] = "4", "0"
    assert place(says("--dry-run")[1]).startswith("debug: in this process, one of 4 that are started already")
    os.environ["RANK"] = "1"
    assert says("--dry-run")[1] == ""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--nodes 4", "--nodes"),
        ("--cluster slurm", "--cluster"),
        ("--cluster debug --gpus-per-node 2 --partition main --time 10", "--gpus-per-node, --partition, --time"),
    ],
)
def test_processes_that_are_started_already_are_not_placed_anew(says: Says, flags: str, told: str) -> None:
    os.environ["WORLD_SIZE"], os.environ["RANK"] = "2", "0"
    code, _, err = says(*flags.split())
    assert code == 2
    assert err.endswith(f": {told}: the processes are started already, as WORLD_SIZE says. Leave it out.\n")


@pytest.mark.slow
def test_torchrun_starts_the_processes_as_well(desk: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = launcher("--recipe", "lab_recipes:tiny")[1:]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cluster  debug: in this process, one of 2 that are started already") == 1
    assert "2 x CPU" in done.stdout
    assert len(metrics(desk / "runs" / "tiny")) == 8


def test_a_slurm_that_does_not_answer_is_not_chosen_and_the_reason_is_told(desk: Path, says: Says) -> None:
    slurm(desk)
    command(desk, "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1\n")
    out = says("--dry-run")[1]
    assert place(out).startswith("debug")
    assert "SLURM's controller does not answer (slurm_load_partitions: Unable to contact" in out
    code, _, err = says("--cluster", "slurm")
    assert code == 2
    assert "--cluster slurm: SLURM's controller does not answer" in err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--nodes 4", "--nodes 4 needs SLURM, but there is no sbatch on the PATH: local and debug have one node"),
        ("--cluster local --nodes 2", "--nodes 2 needs SLURM, but --cluster local was given: local and debug have"),
        ("--partition main --mem 3G", "--partition, --mem: for SLURM alone, but the run is for this machine, as there"),
        ("--gpus-per-node 2", "--gpus-per-node 2: this machine has 0. 0 is for CPUs alone."),
        ("--cluster debug --tasks-per-node 2", "--cluster debug is this process alone, not 2: use --cluster local"),
        ("--nodes 0", "--nodes 0: it is 1 or more"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(says: Says, flags: str, complaint: str) -> None:
    code, _, err = says(*flags.split())
    assert code == 2
    assert complaint in err


# ---- several processes on this machine -------------------------------------------------------------------------------


@pytest.mark.parametrize(("variable", "given"), [(None, "0,1"), ("4,5,6", "4,5")])
def test_processes_on_this_machine_get_the_gpus_that_the_launcher_sees(
    says: Says, monkeypatch: pytest.MonkeyPatch, variable: str | None, given: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if variable:
        os.environ["CUDA_VISIBLE_DEVICES"] = variable
    started = mock.Mock(side_effect=InterruptedError)
    with (
        mock.patch("submitit.local.local.start_controller", started),
        mock.patch.object(signal, "signal"),
        pytest.raises(InterruptedError),
    ):
        says("--cluster", "local", "--gpus-per-node", "2")
    assert (started.call_args.kwargs["cuda_devices"], started.call_args.kwargs["tasks_per_node"]) == (given, 2)


@pytest.mark.parametrize(("gpus", "policy"), [("0", "PASSIVE"), ("2", None)])
def test_threads_of_processes_on_cpus_sleep_while_they_wait(
    says: Says, monkeypatch: pytest.MonkeyPatch, gpus: str, policy: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        mock.patch("submitit.local.local.start_controller", side_effect=InterruptedError),
        mock.patch.object(signal, "signal"),
        pytest.raises(InterruptedError),
    ):
        says("--cluster", "local", "--gpus-per-node", gpus)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_gpus_named_by_uuid_stop_only_a_run_on_gpus(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = says("--cluster", "local")
    assert code == 2
    assert "--cluster local takes GPUs by number" in err
    started = mock.Mock(side_effect=InterruptedError)
    with (
        mock.patch("submitit.local.local.start_controller", started),
        mock.patch.object(signal, "signal"),
        pytest.raises(InterruptedError),
    ):
        says("--cluster", "local", "--gpus-per-node", "0", "--tasks-per-node", "2")


@pytest.mark.slow
def test_two_processes_on_this_machine_compute_what_one_does(desk: Path) -> None:
    pair = run_launcher("--recipe", "lab_recipes:tiny", "--cluster", "local", "--tasks-per-node", "2")
    assert pair.returncode == 0, pair.stderr
    assert f"logs     {desk}/runs/tiny/slurm/" in pair.stdout
    assert "finished: loss" in pair.stdout
    alone = run_launcher("--recipe", "lab_recipes:tiny", "--cluster", "local", "--folder", "runs/alone")
    assert alone.returncode == 0, alone.stderr
    both = metrics(desk / "runs" / "tiny"), metrics(desk / "runs" / "alone")
    assert [line["loss"] for line in both[0]] == pytest.approx([line["loss"] for line in both[1]], rel=1e-5)
    assert len(both[0]) == 8
    assert sorted(path.name[-10:] for path in (desk / "runs" / "tiny" / "slurm").glob("*/*.out")) == [
        "_0_log.out",
        "_1_log.out",
    ]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_tells_why(desk: Path) -> None:
    done = run_launcher("--recipe", "lab_recipes:crashing", "--cluster", "local", "--tasks-per-node", "2")
    assert done.returncode == 1
    assert "rank one has had enough" in done.stderr
    assert "process 1 failed: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--cluster", "debug"], ["--cluster", "local", "--tasks-per-node", "2"]])
def test_ctrl_c_finishes_the_step_and_saves(desk: Path, flags: list[str]) -> None:
    process = subprocess.Popen(
        launcher("--recipe", "lab_recipes:tiny", "--epochs", "100000", *flags),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the signal reaches all of the terminal's group, as Ctrl-C does
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stdout.read()
    code = process.wait(timeout=60)
    assert "the same command goes on from step" in rest
    assert (desk / "runs" / "tiny" / "last.pt").exists()
    assert code == 130
    assert not processes_of(desk)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(desk: Path) -> None:
    process, said = endless_run("logs")
    while not (tasks := processes_of(desk, "submitit.core._submit")):
        time.sleep(0.1)
    for task in tasks:
        os.kill(task, signal.SIGSTOP)  # they hear nothing
    for _ in range(2):
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
    said.read()
    assert process.wait(timeout=60) == 130
    assert not processes_of(desk)


@pytest.mark.slow
def test_with_its_launcher_killed_a_run_saves_and_ends(desk: Path) -> None:
    process, _ = endless_run("step")
    process.kill()
    process.wait(timeout=60)
    until = time.monotonic() + 60
    while processes_of(desk):
        assert time.monotonic() < until
        time.sleep(0.2)
    events = (desk / "runs" / "tiny" / "events.jsonl").read_text()
    assert '"stopping"' in events


def endless_run(until: str) -> tuple[subprocess.Popen[str], IO[str]]:
    """Two processes that train for long, and what their launcher says after a line that begins like this."""
    arguments = ["--recipe", "lab_recipes:tiny", "--epochs", "100000", "--cluster", "local", "--tasks-per-node", "2"]
    process = subprocess.Popen(launcher(*arguments), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(until):
        assert process.poll() is None
    return process, process.stdout


def processes_of(desk: Path, part: str = "") -> list[int]:
    """The processes whose command line has this folder in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:
            continue
        if str(desk) in line and part in line:
            found.append(int(path.parent.name))
    return found


# ---- finetuning and tests --------------------------------------------------------------------------------------------

FINETUNE = ("--recipe", "convmae.recipes:demo_finetune")


def asked(says: Says, *arguments: str) -> tuple[object, str]:
    """What would be carried out, and what is said before."""
    with mock.patch.object(launch, "carry_out") as done:
        code, out, err = says(*arguments)
    assert code == 0, err
    (task,), _ = done.call_args
    return task, out


def test_a_finetuning_run_says_where_it_starts_and_what_it_is_tested_on(desk: Path, says: Says) -> None:
    (desk / "before").mkdir()
    for split in ("train", "val"):
        (desk / "photos" / split).mkdir(parents=True)
    run, out = asked(says, *FINETUNE, "--checkpoint", "before", "--data", "photos", "--layer-decay", "0.6")
    assert isinstance(run, Finetune)
    assert run.checkpoint == desk / "before"
    assert run.layer_decay == 0.6
    assert isinstance(run.data, ImageFolder)
    assert isinstance(run.test, ImageFolder)
    assert (run.data, run.test) == (
        replace(run.data, root=desk / "photos", split="train"),
        replace(run.test, root=desk / "photos", split="val"),
    )
    assert f"weights  {desk}/before\n" in out
    assert f"test     {desk}/photos, val\n" in out
    _, out = asked(says, *FINETUNE)
    assert "weights  none: from scratch, as there is no --checkpoint\n" in out
    assert "test     the built-in demo set, val, as neither" in out


def test_a_test_s_own_place_is_taken_whole(desk: Path, says: Says) -> None:
    for name in ("learn/train", "judge"):
        (desk / name).mkdir(parents=True)
    run, out = asked(says, *FINETUNE, "--data", "learn", "--test", "judge")
    assert isinstance(run, Finetune)
    assert isinstance(run.test, ImageFolder)
    assert run.test == replace(run.test, root=desk / "judge", split=None)
    assert f"test     {desk}/judge\n" in out


@pytest.mark.parametrize("recipe", ["demo", "kinetics", "ssv2", "ucf101"])
def test_a_list_is_not_trained_and_tested_on_at_once(desk: Path, says: Says, recipe: str) -> None:
    for name in ("learn.txt", "judge.txt"):
        (desk / name).write_text("a.mp4 0\nb.mp4 1\n")
    words = ("--recipe", f"video.recipes:{recipe}_finetune", "--data", "learn.txt")
    code, _, err = says(*words)
    assert code == 2
    assert "--data learn.txt: the run would be tested on what it is trained on; say where to test with --test" in err
    run, _ = asked(says, *words, "--test", "judge.txt")
    assert isinstance(run, Finetune)
    assert isinstance(run.test, Videos)
    assert list(run.test.listing().files) == ["a.mp4", "b.mp4"]
    assert run.test.root == desk / "judge.txt"


def test_a_checkpoint_must_be_there_unless_a_job_is_to_make_it(desk: Path, says: Says) -> None:
    code, _, err = says(*FINETUNE, "--checkpoint", "later")
    assert code == 2
    assert f"--checkpoint later: there is no {desk}/later. One that a job is still to make is for --after JOB" in err


def test_a_run_that_goes_on_needs_the_checkpoint_it_began_with_no_more(desk: Path, says: Says) -> None:
    (desk / "run").mkdir()
    checkpoint.save(desk / "run" / "last.pt", tiny().classifier(3).build())
    run, out = asked(says, *FINETUNE, "--checkpoint", "lost", "--folder", "run")
    assert isinstance(run, Finetune)
    assert "weights  those of run, which goes on\n" in out


def test_help_of_finetuning_tells_all_its_fields(says: Says) -> None:
    code, out, _ = says(*FINETUNE, "--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    for told in (
        "--checkpoint PATH where to start from: a run's folder",
        "--layer-decay FLOAT factor between the learning rates",
        "--epochs FLOAT passes over the data. (default: 20)",
        "--workers INT loader processes of each process.",
        "--test PATH where the samples for tests are.",
    ):
        assert told in text, told
    for absent in ("--mixing", "--erasing", "--model"):
        assert absent not in out


def test_a_test_takes_its_flags(desk: Path, says: Says) -> None:
    (desk / "run").mkdir()
    (desk / "videos").mkdir()
    flags = ("--recipe", "convmae.recipes:evaluate", "--checkpoint", "run", "--data", "videos", "--clips", "10")
    task, out = asked(says, *flags)
    assert isinstance(task, Evaluate)
    assert (task.checkpoint, task.root, task.clips, task.crops) == (desk / "run", str(desk / "videos"), 10, None)
    assert f"data     {desk}/videos\n" in out
    os.environ["CONVMAE_DATA"] = str(desk / "learnt")  # which need not be what the checkpoint's run tests on
    task, _ = asked(says, "--recipe", "convmae.recipes:evaluate", "--checkpoint", "run")
    assert isinstance(task, Evaluate)
    assert task.root is None
    code, _, err = says("--recipe", "convmae.recipes:evaluate")
    assert code == 2
    assert "there is no classifier to test: give --checkpoint" in err
    code, _, err = says("--recipe", "convmae.recipes:evaluate", "--checkpoint", "run", "--data", "nowhere")
    assert (code, f"--data nowhere: there is no {desk}/nowhere" in err) == (2, True)
