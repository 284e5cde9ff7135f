"""The launcher is run as a user runs it; SLURM is played by scripts that answer as its commands do."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from convmae import launch
from convmae.launch import Job, count_gpus, main, parse_partitions

ROOT = Path(__file__).parent.parent
RECIPES = '''
"""Recipes of a lab."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from convmae import AttentionStage, ConvMAE, ConvStage
from convmae.data import Sample
from convmae.training import Pretrain


@dataclass(frozen=True)
class Pixels:
    count: int = 32

    def open(self, size):
        return Opened(self.count, size)


@dataclass(frozen=True)
class Placed(Pixels):
    root: Path | None = None


@dataclass(frozen=True)
class Crashing(Pixels):
    def open(self, size):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("rank one has had enough")
        return super().open(size)


@dataclass(frozen=True)
class Opened:
    count: int
    size: tuple[int, ...]

    def __len__(self):
        return self.count

    def name(self, index):
        return str(index)

    def load(self, index, generator):
        return Sample(torch.randint(0, 256, (3, *self.size), dtype=torch.uint8, generator=generator))


def tiny() -> Pretrain:
    """Random pixels, in seconds."""
    stages = [
        ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
        AttentionStage(dim=16, depth=1, stride=(4, 4), heads=2),
    ]
    model = ConvMAE().input(32).stages(*stages).decode(dim=16, depth=1, heads=2)
    return Pretrain(
        model=model, data=Pixels(), epochs=2, batch_size=8, warmup_epochs=1, workers=0, pictures=0, log_every=1,
        folder=Path("runs/tiny"),
    )


def placed() -> "Pretrain":
    return replace(tiny(), data=Placed())


def at_home() -> Pretrain:
    return replace(tiny(), data=Placed(root=Path("clips")))


def crashing() -> Pretrain:
    return replace(tiny(), data=Crashing())


def odd() -> Pretrain:
    return replace(tiny(), model=tiny().model.input(30))


def backwards() -> Pretrain:
    return replace(tiny(), epochs=-1)


def scaled(factor: float) -> Pretrain:
    return tiny()


def poem() -> str:
    return "no run"
'''


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab_recipes.py").write_text(RECIPES)
    (folder / "lab_broken.py").write_text("import not_there_at_all\n")
    return folder


@pytest.fixture(autouse=True)
def desk(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, a PATH and an environment of one's own, without SLURM; no GPU."""
    (tmp_path / "bin").mkdir()
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [str(lab), *sys.path]):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) or name in ("CONVMAE_DATA", "WORLD_SIZE", "RANK"):
                del os.environ[name]
        os.environ["PATH"] = str(tmp_path / "bin")
        os.environ["PYTHONPATH"] = f"{lab}{os.pathsep}{ROOT}"
        os.environ["COLUMNS"] = "100"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        yield tmp_path


Says = Callable[..., tuple[int, str, str]]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """Run the launcher in this process: exit code, what it printed, what it complained about."""

    def run(*arguments: str, recipe: str = "lab_recipes:tiny") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slurm_pretrain.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(recipe)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def launcher(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launchers" / "slurm_pretrain.py"), *arguments]


def run_launcher(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(launcher(*arguments), capture_output=True, text=True, timeout=300)


def slurm(desk: Path, sinfo: str = "main*|4|128|1000|7-00:00:00|gpu:8\npreempt|4|128|1000|30:00|gpu:8\n") -> None:
    """A SLURM whose sinfo says this and whose sbatch takes everything."""
    command(desk, "sinfo", f"while read -r line; do echo \"$line\"; done <<'END'\n{sinfo}END\n")
    command(desk, "sbatch", f'echo "$@" > {desk}/asked; echo "Submitted batch job 123"\n')
    command(desk, "srun", "exit 1\n")


def command(desk: Path, name: str, does: str) -> None:
    path = desk / "bin" / name
    path.write_text(f"#!/bin/sh\n{does}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def asked(out: str) -> dict[str, str]:
    """What a dry run says would be asked of SLURM."""
    lines = out.partition("dry run")[2].splitlines()[1:]
    pairs = (line.split(maxsplit=1) for line in lines)
    return {name: value.strip() for name, value in pairs}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    with mock.patch.object(launch, "fit") as fit:
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
        ("lab_recipes:Path", ["returned a PosixPath, not a Pretrain"]),
        ("lab_recipes:poem", ["returned a str, not a Pretrain", "Recipes in lab_recipes:"]),
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
        with mock.patch.object(launch, "fit") as fit:
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
    assert "the built-in demo set, as neither --data nor $CONVMAE_DATA says where others are" in line


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


def place(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("cluster")]
    return line.removeprefix("cluster").strip()


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


# ---- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:8(S:0-1),nvme:1", 8),
        ("craynetwork:4,gpu:a100:2,gpu:v100:1", 3),
        ("shard:gpu:8", 0),
        ("gpu:nvidia_h100_80gb:8(IDX:0-7)", 8),
    ],
)
def test_gpus_are_counted_in_every_form_sinfo_writes(gres: str, gpus: int) -> None:
    assert count_gpus(gres) == gpus


def test_a_partition_of_several_kinds_of_nodes_is_read_from_several_lines() -> None:
    mixed, quick = parse_partitions("a*|2|64|500|infinite|gpu:4\nb|1|8|100|30:00|(null)\na*|6|32|250|infinite|(null)\n")
    assert (mixed.name, mixed.default, mixed.limit) == ("a", True, None)
    assert [tuple(alike) for alike in mixed.nodes] == [(2, 4, 64, 500), (6, 0, 32, 250)]
    assert (mixed.count(4), mixed.count(0)) == (2, 8)
    assert (quick.name, quick.default, quick.limit) == ("b", False, 30)


def test_slurm_is_asked_for_all_that_the_nodes_of_the_default_partition_have(desk: Path, says: Says) -> None:
    slurm(desk)
    code, out, _ = says("--nodes", "4", "--dry-run")
    assert code == 0
    assert place(out) == "slurm: it answers; 4 of partition main's nodes, with 8 GPUs each"
    wanted = {"nodes": "4", "tasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "16", "mem": "0"}
    assert wanted.items() <= asked(out).items()
    assert asked(out)["partition"] == "main"
    assert asked(out)["timeout-min"] == "1440"
    assert not (desk / "asked").exists()
    assert not (desk / "runs").exists()


def test_a_part_of_a_node_comes_with_its_share_of_cpus_and_memory(desk: Path, says: Says) -> None:
    slurm(desk)
    half = asked(says("--gpus-per-node", "4", "--partition", "preempt", "--dry-run")[1])
    assert {"gpus-per-node": "4", "cpus-per-task": "16", "mem": "500M", "timeout-min": "30"}.items() <= half.items()
    cpus = asked(says("--gpus-per-node", "0", "--tasks-per-node", "2", "--dry-run")[1])
    assert {"tasks-per-node": "2", "cpus-per-task": "64", "mem": "0"}.items() <= cpus.items()
    assert "gpus-per-node" not in cpus


def test_nodes_without_gpus_get_one_process_with_all_their_cpus(desk: Path, says: Says) -> None:
    slurm(desk, "cpu*|4|128|1000|1-00:00:00|(null)\n")
    out = says("--nodes", "4", "--dry-run")[1]
    assert place(out) == "slurm: it answers; 4 of partition cpu's nodes, without GPUs"
    assert {"tasks-per-node": "1", "cpus-per-task": "128"}.items() <= asked(out).items()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "gpus-per-node" not in asked(out)


def test_as_many_gpus_are_asked_for_as_enough_nodes_have(desk: Path, says: Says) -> None:
    slurm(desk, "main*|2|64|1000|infinite|gpu:8\nmain*|4|32|500|infinite|gpu:a100:4(S:0-1)\n")
    assert asked(says("--nodes", "2", "--dry-run")[1])["gpus-per-node"] == "8"
    wide = asked(says("--nodes", "3", "--dry-run")[1])
    assert (wide["gpus-per-node"], wide["cpus-per-task"]) == ("4", "8")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("1-12", 2160), ("1-12:30", 2190), ("1-12:00:00", 2160)],
)
def test_times_are_minutes_or_slurm_s_forms(desk: Path, says: Says, text: str, minutes: int) -> None:
    slurm(desk)
    assert asked(says("--time", text, "--dry-run")[1])["timeout-min"] == str(minutes)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--partition man", "--partition man: there is no 'man', but main, preempt. Did you mean main?"),
        ("--nodes 5", "--nodes 5: partition main has 4"),
        ("--gpus-per-node 9", "--gpus-per-node 9: partition main has 4 nodes with 8"),
        ("--cpus-per-task 17", "the nodes of partition main have 128 CPUs"),
        ("--time tomorrow", "--time tomorrow: write minutes"),
        ("--time 8-00:00:00", "it can be 5 minutes to the 10080 minutes of partition main"),
        ("--partition preempt --time 31", "it can be 5 minutes to the 30 minutes of partition preempt"),
        ("--tasks-per-node 2 --gpus-per-node 8", "with 8 GPUs there are 8"),
        ("--gpus-per-node 0 --device cuda", "--device cuda: there is no GPU"),
    ],
)
def test_what_slurm_would_refuse_or_leave_waiting_is_refused_before(
    desk: Path, says: Says, flags: str, complaint: str
) -> None:
    slurm(desk)
    code, _, err = says(*flags.split())
    assert code == 2
    assert complaint in err
    assert not (desk / "asked").exists()


def test_a_job_is_submitted_with_what_makes_it_survive_and_the_ways_to_follow_it_are_told(
    desk: Path, says: Says
) -> None:
    slurm(desk)
    code, out, _ = says(
        "--nodes", "2", "--qos", "high", "--account", "lab", "--job-name", "x", recipe="lab_recipes:tiny"
    )
    assert code == 0
    folder = desk / "runs" / "tiny" / "slurm" / "123"
    script = (folder / "123_submission.sh").read_text()
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    wanted = {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "16", "signal": "USR2@120"}
    assert wanted.items() <= flags.items()
    named = {"qos": "high", "account": "lab", "job-name": "x", "partition": "main", "requeue": "", "time": "1440"}
    assert named.items() <= flags.items()
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=16" in srun
    assert 'trap "" USR2' in srun
    log = folder / "123_0_log.out"
    for line in (f"tail -F {log}", "squeue -j 123", "scancel 123", f"run      {desk}/runs/tiny"):
        assert line in out


def test_what_is_submitted_is_the_run_and_queues_itself_again(desk: Path, says: Says) -> None:
    from submitit.core.utils import DelayedSubmission

    slurm(desk)
    (desk / "mine").mkdir()
    assert says("--epochs", "7", "--data", "mine", recipe="lab_recipes:placed")[0] == 0
    submitted = DelayedSubmission.load(desk / "runs" / "tiny" / "slurm" / "123" / "123_submitted.pkl")
    job = submitted.function
    assert isinstance(job, Job)
    assert (job.run.epochs, job.run.folder, job.run.data.root) == (7, desk / "runs" / "tiny", desk / "mine")  # type: ignore[attr-defined]
    assert submitted._timeout_countdown == 100
    assert job.checkpoint().function == job


def test_a_signal_while_python_starts_does_not_kill_the_process(desk: Path, says: Says) -> None:
    slurm(desk)
    says("--nodes", "2")
    script = (desk / "runs" / "tiny" / "slurm" / "123" / "123_submission.sh").read_text()
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    start = srun[srun.index("sh -c") : srun.index(" -u -m submitit")]
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('alive')"
    done = subprocess.run(["/bin/sh", "-c", f'PATH=/usr/bin:/bin; {start} -c "{code}"'], capture_output=True, text=True)
    assert done.stdout == "alive\n"


def test_a_refusal_by_sbatch_is_told(desk: Path, says: Says) -> None:
    slurm(desk)
    command(desk, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1\n")
    code, _, err = says("--account", "x")
    assert code == 2
    assert "SLURM did not take the job" in err
    assert "Invalid account" in err


def test_a_process_of_a_job_knows_the_others_and_sees_its_own_gpu() -> None:
    job = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "CUDA_VISIBLE_DEVICES": "4,5",
    }
    run = launch.find_recipe("lab_recipes:tiny")[0]
    with (
        mock.patch.dict(os.environ, job),
        mock.patch.object(launch, "fit") as fit,
        mock.patch.object(os, "cpu_count", return_value=2),
        mock.patch.object(torch, "set_num_threads") as threads,
    ):
        Job(run)()
        given = dict(os.environ)
    fit.assert_called_once_with(run)
    threads.assert_called_once_with(1)
    assert (given["RANK"], given["WORLD_SIZE"], given["LOCAL_RANK"]) == ("3", "4", "1")
    assert (given["MASTER_ADDR"], given["CUDA_VISIBLE_DEVICES"]) == ("node1", "5")
    assert 1024 < int(given["MASTER_PORT"]) < 65536


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
    arguments = ["--recipe", "lab_recipes:tiny", "--epochs", "100000", "--cluster", "local", "--tasks-per-node", "2"]
    process = subprocess.Popen(launcher(*arguments), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("logs"):
            break
    while not (tasks := processes_of(desk, "submitit.core._submit")):
        time.sleep(0.1)
    for task in tasks:
        os.kill(task, signal.SIGSTOP)  # they hear nothing
    for _ in range(2):
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert not processes_of(desk)


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
