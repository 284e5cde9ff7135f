"""On a real SLURM of four nodes: the launcher as typed, and runs that go on by themselves whatever happens to them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from killing import same, told

from convmae import checkpoint
from convmae.files import lines

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

SMALL = ("--cpus-per-task", "4", "--mem", "8G")  # so that several jobs run at the same time


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    Cluster.require()
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    with Cluster(folder, nodes=4, gpu_nodes=1) as up:
        before = {name: value for name, value in os.environ.items() if name.startswith("SLURM")}
        os.environ.update(up.environment)
        try:
            yield up
        finally:
            for name in up.environment:
                del os.environ[name]
            os.environ.update(before)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working directory: the launchers, and recipes of their own."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "launchers").symlink_to(ROOT / "launchers")
    shutil.copy(Path(__file__).with_name("marathon.py"), folder)
    return folder


def launch(desk: Path, *flags: str, launcher: str = "slurm_pretrain.py", **environment: str) -> str:
    """Type the launcher's command: the job's id."""
    command = ["python", f"launchers/{launcher}", *flags]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(command, cwd=desk, env=ours, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = re.findall(r"^job +(\d+)", done.stdout, re.MULTILINE)
    for said in (f"scancel {job}", "tail -F ", "python -m convmae.watch ", f"squeue -j {job}"):
        assert said in done.stdout
    return str(job)


def marathon(desk: Path, name: str, *flags: str) -> tuple[str, Path]:
    folder = desk / "runs" / name
    given = ("--nodes", "4", "--recipe", "marathon:marathon", "--folder", f"runs/{name}", *SMALL, *flags)
    return launch(desk, *given), folder


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def state(job: str) -> str:
    """A job's, as SLURM's controller has it; the queue forgets jobs some minutes after their end."""
    found = re.search(r"JobState=(\S+)", ask("scontrol", "show", "job", job))
    assert found is not None
    return found[1]


def restarts(job: str) -> int:
    found = re.search(r"Restarts=(\d+)", ask("scontrol", "show", "job", job))
    assert found is not None
    return int(found[1])


def wait(what: str, happened: Callable[[], Any], *, seconds: float, folder: Path) -> Any:
    until = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > until:
            logs = "\n".join(f"== {path}\n{path.read_text()[-4000:]}" for path in folder.glob("slurm/*/*_log.out"))
            pytest.fail(f"{what} did not come in {seconds:g} s. {ask('squeue')}\n{logs}")
        time.sleep(0.5)
    return found


def reached(folder: Path) -> int:
    return max((int(line["step"]) for line in lines(folder / "metrics.jsonl")), default=0)


def until_step(step: int, folder: Path) -> None:
    wait(f"step {step}", lambda: reached(folder) >= step, seconds=300, folder=folder)


def until_over(job: str, folder: Path, *, seconds: float = 600) -> str:
    def over() -> str:
        found = state(job)
        if found in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"):
            time.sleep(10)  # a job that is about to be queued again shows one of these for a moment
        return found if found == state(job) and found not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else ""

    return str(wait(f"the end of job {job}", over, seconds=seconds, folder=folder))


def events(folder: Path) -> list[str]:
    return [line["event"] for line in lines(folder / "events.jsonl")]


def newest(folder: Path) -> dict[str, Any]:
    return checkpoint.read(folder / "last.pt")


@pytest.fixture(scope="module")
def undisturbed(desk: Path) -> Path:
    """The folder of a run to which nothing happened."""
    job, folder = marathon(desk, "undisturbed")
    assert until_over(job, folder) == "COMPLETED"
    assert restarts(job) == 0
    return folder


def assert_equal(folder: Path, undisturbed: Path) -> None:
    """Nothing about the result shows that a run was ever stopped."""
    one, other = newest(folder), newest(undisturbed)
    assert one["progress"]["step"] == other["progress"]["step"] == 60
    assert same(one["weights"], other["weights"])
    assert same(one["optimiser"], other["optimiser"])
    assert told(folder / "metrics.jsonl") == told(undisturbed / "metrics.jsonl")
    assert not list(folder.rglob(".*.tmp"))


# --- as typed ---------------------------------------------------------------------------------------------------------


def test_the_command_as_typed_trains_the_demo_on_four_nodes(desk: Path) -> None:
    """For its first tenth: to the end it takes minutes, and runs that go there are below."""
    job = launch(desk, "--nodes", "4")
    folder = desk / "runs" / "demo"
    asked = ask("scontrol", "show", "job", job)
    assert re.search(r"\bNumNodes=4(-4)? ", asked)  # a range of nodes, as long as the job waits
    assert "NumTasks=4 " in asked
    assert "gres/gpu" not in asked
    until_step(100, folder)
    ask("scancel", job)
    assert until_over(job, folder) == "CANCELLED"
    trained = list(lines(folder / "metrics.jsonl"))
    assert trained[-1]["steps"] == 1000
    assert trained[-1]["loss"] < 0.7 * trained[0]["loss"]
    assert newest(folder)["progress"]["step"] >= 100
    assert json.loads((folder / "environment.json").read_text())["processes"] == 4
    assert (folder / "report.html").stat().st_size > 10_000
    hosts = {path.name for path in (folder / "slurm" / job).glob("*_log.out")}
    assert hosts == {f"{job}_{rank}_log.out" for rank in range(4)}


def test_on_nodes_with_gpus_all_of_them_are_asked_for_with_a_process_each(desk: Path) -> None:
    job = launch(desk, "--partition", "gpu", "--recipe", "marathon:marathon", "--folder", "runs/gpus")
    asked = ask("scontrol", "show", "job", job)
    ask("scancel", job)
    assert "gres/gpu=8" in asked or "gres:gpu:8" in asked
    assert "NumTasks=8 " in asked
    assert "CPUs/Task=8 " in asked
    assert "Requeue=1" in asked


# --- what happens to jobs ---------------------------------------------------------------------------------------------


def test_after_its_time_limit_a_job_goes_on(desk: Path, undisturbed: Path) -> None:
    job, folder = marathon(desk, "limited", "--time", "3", "--recipe", "marathon:stroll")
    assert until_over(job, folder) == "COMPLETED"
    assert restarts(job) >= 1
    assert "stopping" in events(folder)
    assert_equal(folder, undisturbed)


def test_preempted_with_a_signal_a_job_goes_on(desk: Path, undisturbed: Path) -> None:
    job, folder = marathon(desk, "preempted", "--partition", "preempt", "--cpus-per-task", "40")
    until_step(12, folder)
    ask(
        "sbatch",
        "--partition=urgent",
        "--nodes=4",
        "--ntasks=4",
        "--cpus-per-task=40",
        "--mem=1G",
        "--output=/dev/null",
        "--wrap=sleep 5",
    )
    assert until_over(job, folder) == "COMPLETED"
    assert restarts(job) >= 1
    assert "stopping" in events(folder)
    assert_equal(folder, undisturbed)


def test_requeued_without_a_signal_of_its_own_a_job_goes_on(desk: Path, undisturbed: Path) -> None:
    job, folder = marathon(desk, "requeued")
    until_step(12, folder)
    ask("scontrol", "requeue", job)
    assert until_over(job, folder) == "COMPLETED"
    assert restarts(job) == 1
    assert_equal(folder, undisturbed)


def test_with_a_process_killed_a_job_goes_on(desk: Path, cluster: Cluster, undisturbed: Path) -> None:
    job, folder = marathon(desk, "killed")
    until_step(12, folder)
    processes = cluster.processes("node3").items()
    (pid,) = [pid for pid, command in processes if "submitit.core._submit" in command and job_of(pid, job)]
    os.kill(pid, signal.SIGKILL)
    assert until_over(job, folder) == "COMPLETED"
    assert restarts(job) == 1
    assert "failed" in events(folder)
    assert_equal(folder, undisturbed)


def job_of(pid: int, job: str) -> bool:
    return f"SLURM_JOB_ID={job}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_with_a_node_dead_a_job_goes_on_when_there_are_nodes(desk: Path, cluster: Cluster, undisturbed: Path) -> None:
    job, folder = marathon(desk, "powerless")
    until_step(12, folder)
    cluster.kill("node2")
    wait("its end", lambda: state(job) != "RUNNING", seconds=120, folder=folder)
    cluster.start("node2")
    assert until_over(job, folder) == "COMPLETED"
    assert restarts(job) >= 1
    assert_equal(folder, undisturbed)


def test_a_cancelled_job_saves_and_stays_cancelled_and_the_same_command_goes_on(desk: Path, undisturbed: Path) -> None:
    job, folder = marathon(desk, "cancelled")
    until_step(7, folder)
    ask("scancel", job)
    assert until_over(job, folder) == "CANCELLED"
    saved = newest(folder)["progress"]["step"]
    assert saved >= 7
    again, _ = marathon(desk, "cancelled")
    assert until_over(again, folder) == "COMPLETED"
    assert_equal(folder, undisturbed)


def test_a_job_that_crashes_again_and_again_is_given_up_and_one_that_must_fail_is_not_repeated(desk: Path) -> None:
    jobs = {}
    for name in ("unlucky", "mistaken"):
        flags = ("--nodes", "2", "--recipe", f"marathon:{name}", "--folder", f"runs/{name}", *SMALL)
        jobs[name] = launch(desk, *flags)
    for name, times in (("mistaken", 0), ("unlucky", 3)):
        folder = desk / "runs" / name
        assert until_over(jobs[name], folder) == "FAILED"
        assert restarts(jobs[name]) == times
        log = (folder / "slurm" / jobs[name] / f"{jobs[name]}_0_log.out").read_text()
        assert "rank one has had enough" in log, "what another process said is in the log that is followed"
        assert "is not queued again" in log


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_any_layout_has_the_same_global_batches_and_losses(desk: Path) -> None:
    found = {}
    for nodes, tasks in ((4, 1), (2, 2), (1, 1)):
        name = f"layout-{nodes}x{tasks}"
        record = desk / name
        record.mkdir()
        layout = ("--nodes", str(nodes), "--tasks-per-node", str(tasks), "--folder", f"runs/{name}", *SMALL)
        job = launch(desk, "--recipe", "marathon:sprint", *layout, RECORD=str(record))
        found[nodes, tasks] = job, desk / "runs" / name, record
    batches, losses = {}, {}
    for (nodes, tasks), (job, folder, record) in found.items():
        assert until_over(job, folder) == "COMPLETED"
        loaded = [[(line["index"], line["digest"]) for line in lines(path)] for path in sorted(record.glob("rank-*"))]
        share = 8 // (nodes * tasks)
        assert len(loaded) == nodes * tasks
        batches[nodes, tasks] = [
            sorted(sample for own in loaded for sample in own[share * step : share * (step + 1)]) for step in range(10)
        ]
        losses[nodes, tasks] = [line["loss"] for line in lines(folder / "metrics.jsonl")]
    assert batches[4, 1] == batches[2, 2] == batches[1, 1]
    assert losses[4, 1] == pytest.approx(losses[1, 1], rel=1e-5)
    assert losses[2, 2] == pytest.approx(losses[1, 1], rel=1e-5)
    assert len(losses[1, 1]) == 10


# --- several jobs -----------------------------------------------------------------------------------------------------


def test_pretraining_finetuning_and_its_test_are_three_commands_each_after_the_one_before(desk: Path) -> None:
    """On the demo set, as the README has them, but for less than an epoch, and in folders of their own."""
    taught, tuned, tested = (desk / "runs" / name for name in ("taught", "tuned", "tested"))
    four = ("--nodes", "4", *SMALL)
    short = (*four, "--epochs", "0.3", "--warmup-epochs", "0.1")
    launch(desk, *short, "--folder", "runs/taught")
    start = ("--checkpoint", "runs/taught", "--after", "runs/taught")
    launch(desk, *short, *start, "--folder", "runs/tuned", launcher="slurm_finetune.py")
    what = ("--checkpoint", "runs/tuned", "--after", "runs/tuned")
    job = launch(desk, *four, *what, "--folder", "runs/tested", launcher="slurm_evaluate.py")
    assert until_over(job, tested, seconds=900) == "COMPLETED"
    told = [list(lines(folder / "events.jsonl")) for folder in (taught, tuned)]
    assert [events[-1]["event"] for events in told] == ["finished", "finished"]
    assert told[1][0]["time"] > told[0][-1]["time"]
    assert (tested / "scores.json").stat().st_mtime > told[1][-1]["time"]
    one, other = (json.loads((folder / "scores.json").read_text()) for folder in (tuned / "test", tested))
    assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-5)
    assert one == other
    assert (one["samples"], one["views"], one["unusable"], one["classes"]) == (80, 2, 0, 8)


def test_a_sweep_is_an_array_whose_elements_go_on_by_themselves(desk: Path) -> None:
    code = """
from dataclasses import replace
from pathlib import Path
from convmae.slurm import Slurm, sweep
from marathon import marathon
run = replace(marathon(), epochs=6, warmup_epochs=1)
runs = [replace(run, base_lr=lr, folder=Path(f"runs/sweep/{lr:g}")) for lr in (1e-3, 2e-3)]
print("ids", *sweep(runs, nodes=2, slurm=Slurm(cpus_per_task=4, mem="8G")))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids = done.stdout.splitlines()[-1].split()[1:]
    assert [one.partition("_")[2] for one in ids] == ["0", "1"]
    folders = [desk / "runs/sweep" / name for name in ("0.001", "0.002")]
    until_step(6, folders[1])
    ask("scancel", "--signal=USR2", ids[1])
    for job, folder in zip(ids, folders, strict=True):
        assert until_over(job, folder) == "COMPLETED"
        assert reached(folder) == 30
    assert "requeued" not in events(folders[0])
    assert "requeued" in events(folders[1])
