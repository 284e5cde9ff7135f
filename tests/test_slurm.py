"""What is asked of SLURM, which is played by scripts that answer as its commands do."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lab import Says, asked, command, desk, lab, metrics, place, says, slurm
from submitit.core.utils import DelayedSubmission

from convmae import job, snapshot
from convmae.job import CRASHES, CRASHES_IN_ALL, Job
from convmae.launch import find_recipe
from convmae.place import LaunchError
from convmae.run import Run
from convmae.slurm import Slurm, count_gpus, parse_partitions, sweep

__all__ = ["desk", "lab", "says"]


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
    assert "gpus-per-node" not in asked(out)
    assert "OMP_WAIT_POLICY" not in os.environ


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
        ("--time 8-00:00:00", "it can be 3 minutes to the 10080 minutes of partition main"),
        ("--partition preempt --time 31", "it can be 3 minutes to the 30 minutes of partition preempt"),
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
    flags = submitted(desk)
    wanted = {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "16", "signal": "USR2@120"}
    assert wanted.items() <= flags.items()
    named = {"qos": "high", "account": "lab", "job-name": "x", "partition": "main", "requeue": "", "time": "1440"}
    assert named.items() <= flags.items()
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=16" in srun
    assert 'trap "" USR2' in srun
    log = folder / "123_0_log.out"
    for line in (f"tail -F {log}", "squeue -j 123", "scancel 123", f"python -m convmae.watch {desk}/runs/tiny"):
        assert line in out


def submitted(desk: Path) -> dict[str, str]:
    """The flags for sbatch in the batch script."""
    (script,) = (desk / "runs").glob("**/*slurm/123*/123_submission.sh")
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))


def test_what_is_submitted_is_the_run_and_queues_itself_again(desk: Path, says: Says) -> None:
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
    environment = {
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
    run = find_recipe("lab_recipes:tiny")[0]
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(job, "fit") as fit,
        mock.patch.object(torch, "set_num_threads"),
    ):
        Job(run)()
        given = dict(os.environ)
    fit.assert_called_once_with(run)
    assert (given["RANK"], given["WORLD_SIZE"], given["LOCAL_RANK"]) == ("3", "4", "1")
    assert (given["MASTER_ADDR"], given["CUDA_VISIBLE_DEVICES"]) == ("node1", "5")
    assert 1024 < int(given["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    ("executor", "environment", "here", "expected"),
    [
        ("slurm", {"SLURM_CPUS_PER_TASK": "3"}, 8, 3),
        ("slurm", {"SLURM_CPUS_PER_TASK": "3"}, 64, 3),  # on a larger node, with the same bits
        ("slurm", {"SLURM_CPUS_PER_TASK": "64"}, 2, 2),  # SLURM believes in CPUs that are not there
        ("slurm", {}, 8, 4),
        ("local", {"SLURM_CPUS_PER_TASK": "3"}, 2, 1),  # of a job that the launcher is in
    ],
)
def test_a_process_has_as_many_threads_as_cpus_were_asked_for(
    executor: str, environment: dict[str, str], here: int, expected: int
) -> None:
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(os, "sched_getaffinity", return_value=set(range(here))),
        mock.patch.object(torch, "get_num_threads", return_value=6),
    ):
        assert job._threads(2, local=executor == "local") == expected


# ---- jobs that come after others -------------------------------------------------------------------------------------


@pytest.fixture
def knows(desk: Path) -> None:
    """A SLURM that knows a running job 7, a finished 8, a failed 9, and an array 6 with a cancelled element."""
    slurm(desk)
    squeue = 'case "$*" in *jobs=7*) echo RUNNING;; *jobs=6*) printf "RUNNING\\nCANCELLED\\n";; *) exit 1;; esac\n'
    command(desk, "squeue", squeue)
    command(desk, "sacct", 'case "$*" in *jobs=8*) echo COMPLETED;; *jobs=9*) echo "FAILED";; esac\n')


@pytest.mark.usefixtures("knows")
def test_a_job_comes_after_others_that_run_or_are_done_and_not_at_all_where_they_fail(desk: Path, says: Says) -> None:
    assert says("--after", "7,8")[0] == 0
    flags = submitted(desk)
    assert (flags["dependency"], flags["kill-on-invalid-dep"]) == ("afterok:7:8", "yes")


@pytest.mark.usefixtures("knows")
def test_a_job_comes_after_the_last_one_of_a_run_s_folder(desk: Path, says: Says) -> None:
    for number, age in (("9", 20), ("7", 10)):
        folder = desk / "runs" / "before" / "slurm" / number
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    assert says("--after", "8,runs/before")[0] == 0
    assert submitted(desk)["dependency"] == "afterok:8:7"
    code, _, err = says("--after", "runs/nothing")
    assert code == 2
    assert "'runs/nothing' is not a job id; write 123" in err
    assert "or the folder of a run" in err


@pytest.mark.usefixtures("knows")
@pytest.mark.parametrize(
    ("after", "complaint"),
    [
        ("5", "--after 5: SLURM knows no job 5"),
        ("7,9", "--after 7,9: job 9 is FAILED, and this one would never start"),
        ("6", "--after 6: job 6 is CANCELLED"),
        ("7 8", "'7 8' is not a job id; write 123"),
    ],
)
def test_jobs_that_can_never_be_followed_are_refused(desk: Path, says: Says, after: str, complaint: str) -> None:
    code, _, err = says("--after", after)
    assert code == 2
    assert complaint in err
    assert not (desk / "asked").exists()


# ---- a job that goes on by itself ------------------------------------------------------------------------------------


def scontrol(desk: Path, state: str = "RUNNING", *, reason: str = "None", preempted: str = "None") -> None:
    """An scontrol that shows the job in this state, and notes what it is to queue again in `requeued`."""
    job = f"JobId=123 JobState={state} Reason={reason} Dependency=(null) PreemptEligibleTime=2026-01-01T00:00:00"
    shows = f"echo '{job} PreemptTime={preempted} Requeue=1'"
    command(desk, "scontrol", f'case "$*" in *show*) {shows};; *) echo "$@" >> {desk}/requeued;; esac\n')


def batch(desk: Path, srun: str, *, state: str = "RUNNING", **environment: str) -> subprocess.CompletedProcess[str]:
    """Carry out the submitted batch script as SLURM would, with an srun that does this."""
    command(desk, "srun", srun)
    scontrol(desk, state)
    (script,) = (desk / "runs").glob("**/*slurm/123*/123*_submission.sh")
    environment = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "2", **environment}
    path = f"{os.environ['PATH']}:/usr/bin:/bin"
    given = {**os.environ, "PATH": path, **environment}
    return subprocess.run(["/bin/bash", script], capture_output=True, text=True, env=given, timeout=300)


def leaves(desk: Path, folder: Path, **words: object) -> str:
    """A script in which process 1 leaves these last words and srun ends with 1."""
    told = {"time": 1.0, "rank": 1, "host": "node1", "job": "123", "step": 7, "final": False}
    told["error"] = "RuntimeError: enough"
    (desk / "words").write_text(json.dumps({**told, "traceback": "line one\nline two\n", **words}))
    return f"mkdir -p {folder}/failures; cp {desk}/words {folder}/failures/rank-00001.json; exit 1\n"


def events(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(line["event"], line["text"]) for line in lines]


@pytest.fixture
def queued(desk: Path, says: Says) -> Path:
    """The folder of a submitted run."""
    slurm(desk)
    assert says("--nodes", "2", "--gpus-per-node", "0")[0] == 0
    return desk / "runs" / "tiny"


def test_a_batch_script_whose_processes_end_well_asks_nothing(desk: Path, queued: Path) -> None:
    done = batch(desk, f'echo "$PYTHONPATH" > {desk}/path; echo "$PYTHONSAFEPATH" >> {desk}/path\n')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (desk / "requeued").exists()
    path, safe = (desk / "path").read_text().splitlines()
    (code,) = (queued / "code").iterdir()
    assert path.split(os.pathsep)[:2] == [str(code), str(desk)]
    assert safe == "1"


def test_threads_that_wait_sleep_where_processes_are_on_cpus_unless_the_user_says_otherwise(
    desk: Path, queued: Path
) -> None:
    policy = f'echo "$OMP_WAIT_POLICY" >> {desk}/policy\n'
    batch(desk, policy)
    batch(desk, policy, OMP_WAIT_POLICY="ACTIVE")
    assert (desk / "policy").read_text() == "PASSIVE\nACTIVE\n"


def test_with_gpus_threads_wait_as_they_do(desk: Path, says: Says) -> None:
    slurm(desk)
    assert says("--nodes", "2")[0] == 0
    batch(desk, f'echo "$OMP_WAIT_POLICY" >> {desk}/policy\n')
    assert (desk / "policy").read_text() == "\n"


def test_the_code_of_all_that_a_run_is_made_of_goes_with_it(desk: Path, says: Says) -> None:
    slurm(desk)
    assert says(recipe="lab_recipes:masked")[0] == 0
    (code,) = (desk / "runs" / "tiny" / "code").iterdir()
    assert {"lab_recipes.py", "lab_masks.py", "convmae"} <= {path.name for path in code.iterdir()}


def test_what_a_killed_attempt_left_is_removed_before_the_next(desk: Path, queued: Path) -> None:
    logs = queued / "slurm" / "123"
    for name in ("123_submitted.pkl.save_tmp", "123_0_result.pkl", "123_1_result.pkl.save_tmp"):
        (logs / name).touch()
    assert batch(desk, "exit 0\n").returncode == 0
    assert sorted(path.name for path in logs.iterdir()) == ["123_submission.sh", "123_submitted.pkl"]


def test_a_crash_is_told_and_the_job_is_queued_again(desk: Path, queued: Path) -> None:
    done = batch(desk, leaves(desk, queued))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "process 1 on node1 failed after step 7: RuntimeError: enough"
    assert [line.strip() for line in lines[1:3]] == ["line one", "line two"]
    assert lines[3] == "process 0 failed: killed, or ended without a word; srun's exit code is 1"
    assert lines[4] == "job 123 is queued again: after a crash, 1 of 3 without a newer checkpoint"
    assert (desk / "requeued").read_text() == "requeue 123\n"
    assert [event for event, _ in events(queued)] == ["failed", "failed", "requeued"]
    assert not list(queued.glob("failures/*"))


def test_a_killed_process_leaves_no_word_and_its_signal_is_told(desk: Path, queued: Path) -> None:
    done = batch(desk, "exit 137\n")
    assert done.returncode == 137
    assert "process 0, 1 failed: killed, or ended without a word; srun's exit code is 137, SIGKILL" in done.stdout
    assert (desk / "requeued").exists()


def test_a_failure_outside_training_is_found_where_submitit_keeps_it(desk: Path, queued: Path) -> None:
    (desk / "result").write_bytes(pickle.dumps(("error", "Traceback:\n  here\nImportError: no lab\n")))
    done = batch(desk, f"cp {desk}/result {queued}/slurm/123/123_1_result.pkl; exit 1\n")
    assert "process 1 failed: ImportError: no lab" in done.stdout


def test_a_final_failure_is_not_repeated(desk: Path, queued: Path) -> None:
    done = batch(desk, leaves(desk, queued, final=True))
    assert done.returncode == 1
    assert (
        f"not queued again: it would fail again in the same way. The same command goes on from {queued}" in done.stdout
    )
    assert not (desk / "requeued").exists()


def test_what_another_job_said_in_the_folder_is_not_this_one_s_failure(desk: Path, queued: Path) -> None:
    leaves(desk, queued, job="99", rank=0, final=True)
    other = f"mkdir -p {queued}/failures; cp {desk}/words {queued}/failures/rank-00000.json; exit 1\n"
    done = batch(desk, other)
    assert "process 0, 1 failed: killed, or ended without a word" in done.stdout
    assert (desk / "requeued").exists()
    assert [path.name for path in queued.glob("failures/*")] == ["rank-00000.json"]


def crash(desk: Path, folder: Path) -> bool:
    """Have a process of the job crash: whether the job is queued again."""
    scontrol(desk)
    (desk / "requeued").unlink(missing_ok=True)
    with mock.patch.dict(os.environ, SLURM_JOB_ID="123"), mock.patch.object(signal, "signal"):
        job.ended(folder, 1)
    return (desk / "requeued").exists()


def gets_to(folder: Path, step: int) -> None:
    (folder / "last.pt").unlink(missing_ok=True)
    (folder / "last.pt").symlink_to(f"checkpoints/step-{step:08d}.pt")


def test_a_job_that_crashes_without_getting_any_further_is_given_up(
    desk: Path, queued: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(crash(desk, queued) for _ in range(CRASHES))
    gets_to(queued, 10)  # the count begins anew
    assert all(crash(desk, queued) for _ in range(CRASHES))
    assert not crash(desk, queued)
    assert f"not queued again: it has crashed {CRASHES + 1} times without a newer" in capsys.readouterr().out


def test_a_job_that_crashes_for_ever_is_given_up_however_far_it_gets(
    desk: Path, queued: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(CRASHES_IN_ALL):
        gets_to(queued, step)
        assert crash(desk, queued)
    gets_to(queued, CRASHES_IN_ALL)
    assert not crash(desk, queued)
    assert f"not queued again: it has crashed {CRASHES_IN_ALL + 1} times. The same" in capsys.readouterr().out


def test_processes_that_slurm_itself_ends_have_not_crashed(desk: Path, queued: Path) -> None:
    done = batch(desk, leaves(desk, queued), state="COMPLETING")
    assert (done.returncode, done.stdout) == (1, "")
    assert not (desk / "requeued").exists()


def test_a_refusal_to_queue_again_is_told_and_the_job_has_failed(desk: Path, queued: Path) -> None:
    refusal = "echo 'Requested operation disabled' >&2; exit 1"
    done = batch(desk, f'echo "{refusal}" >> {desk}/bin/scontrol; exit 1\n')
    assert done.returncode == 1
    assert "job 123 is not queued again: Requested operation disabled. The same command goes on from" in done.stdout
    assert events(queued)[-1] == ("failed", "SLURM did not queue job 123 again: Requested operation disabled")


def test_a_job_that_is_queued_again_already_is_no_failure(desk: Path, queued: Path) -> None:
    pending = "echo 'Job is pending execution for job 123' >&2; exit 1"
    done = batch(desk, f'echo "{pending}" >> {desk}/bin/scontrol; exit 1\n')
    assert "is not queued again" not in done.stdout
    assert events(queued)[-1][0] == "requeued"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops_by", "state", "more", "asks"),
    [
        (signal.SIGUSR2, "RUNNING", {}, True),
        (signal.SIGTERM, "RUNNING", {}, True),
        (signal.SIGTERM, "COMPLETING", {"reason": "TimeLimit"}, True),
        (signal.SIGTERM, "COMPLETING", {"preempted": "2026-01-01T00:10:00"}, True),
        (signal.SIGTERM, "COMPLETING", {}, False),
    ],
)
def test_a_job_told_to_stop_saves_and_is_queued_again_unless_slurm_ends_it_itself(
    desk: Path, stops_by: signal.Signals, state: str, more: dict[str, str], asks: bool
) -> None:
    ends = "SLURM ends job 123_4: cancelled, or queued again already"
    told = "job 123_4 is queued again: stopped and saved" if asks else ends
    scontrol(desk, state, **more)
    code = "from lab_recipes import endless; from convmae.job import Job; Job(endless())()"
    environment = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "127",
        "SLURM_ARRAY_JOB_ID": "123",
        "SLURM_ARRAY_TASK_ID": "4",
        "SLURM_JOB_NODELIST": "localhost",
    }
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        next(line for line in process.stdout if line.startswith("step "))
        process.send_signal(stops_by)
        assert next(line for line in process.stdout if line.startswith(("job", "SLURM"))).strip() == told
        if asks:
            while not (desk / "requeued").exists():
                time.sleep(0.1)
            assert (desk / "requeued").read_text() == "requeue 123_4\n"
        time.sleep(0.5)
        assert process.poll() is None  # it waits for SLURM to end it
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
    assert (desk / "requeued").exists() == asks
    assert (desk / "runs" / "tiny" / "last.pt").exists()


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def rates(desk: Path, **changes: Any) -> list[Run]:
    run = replace(find_recipe("lab_recipes:tiny")[0], **changes)
    assert isinstance(run, Run)
    return [replace(run, base_lr=rate, folder=Path(f"runs/lr-{rate:g}")) for rate in (1e-4, 2e-4)]


def test_a_sweep_is_one_array_whose_elements_have_folders_logs_and_lives_of_their_own(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(desk)
    assert sweep(rates(desk), nodes=2, slurm=Slurm(qos="high"), at_once=1) == ["123_0", "123_1"]
    flags = submitted(desk)
    assert {"array": "0-1%1", "nodes": "2", "qos": "high", "job-name": "runs", "requeue": ""}.items() <= flags.items()
    out = capsys.readouterr().out
    for line in (
        "123, of 2 runs",
        f"{desk}/runs/lr-0.0001, as 123_0",
        f"tail -F {desk}/runs/.slurm/123_*/123_*_0_log.out",
        "squeue -j 123",
        "scancel 123_0",
    ):
        assert line in out
    done = batch(desk, "exit 1\n", SLURM_ARRAY_JOB_ID="123", SLURM_ARRAY_TASK_ID="1", SLURM_JOB_ID="124")
    assert "job 123_1 is queued again" in done.stdout
    assert (desk / "requeued").read_text() == "requeue 123_1\n"
    assert not (desk / "runs" / "lr-0.0001" / "events.jsonl").exists()
    assert [event for event, _ in events(desk / "runs" / "lr-0.0002")] == ["failed", "requeued"]
    for element, run in enumerate(("lr-0.0001", "lr-0.0002")):
        logs = desk / "runs" / run / "slurm" / f"123_{element}"
        function = DelayedSubmission.load(logs / f"123_{element}_submitted.pkl").function
        assert isinstance(function, Job)
        assert function.run.folder == desk / "runs" / run


def test_runs_of_a_sweep_share_no_folder(desk: Path) -> None:
    first, second = rates(desk)
    with pytest.raises(ValueError, match=f"need a folder each; several have {desk}/runs/lr-0.0001"):
        sweep([first, replace(second, folder=first.folder.absolute())])
    with pytest.raises(ValueError, match="several have none"):
        sweep([])


def test_all_runs_of_a_sweep_have_the_code_that_was_there_when_it_was_submitted(desk: Path) -> None:
    slurm(desk)
    with mock.patch.object(snapshot, "take", wraps=snapshot.take) as take:
        sweep(rates(desk))
    take.assert_called_once()
    one, other = ([path.name for path in (run.folder / "code").iterdir()] for run in rates(desk))
    assert one == other != []


def test_a_sweep_without_a_folder_for_its_logs_is_refused(desk: Path) -> None:
    slurm(desk)
    first, second = rates(desk)
    with pytest.raises(LaunchError, match=r"but share nothing below /\. Give them folders in one"):
        sweep([replace(first, folder=Path("/first/run")), replace(second, folder=Path("/second/run"))])
    (desk / "runs").touch()
    with pytest.raises(LaunchError, match=rf"above the folders of its runs: {desk}/runs is not a folder that can be"):
        sweep([first, second])
    assert not (desk / "asked").exists()


def test_nothing_of_a_sweep_is_queued_where_one_run_cannot_be(desk: Path) -> None:
    slurm(desk)
    first, second = rates(desk)
    with pytest.raises(LaunchError, match="is not a multiple of"):
        sweep([first, replace(second, model=second.model.input(30))])
    assert not (desk / "asked").exists()


def test_without_slurm_a_sweep_is_carried_out_here_in_turn(desk: Path) -> None:
    assert sweep(rates(desk, epochs=0.25, warmup_epochs=0)) == []
    assert [len(metrics(desk / "runs" / run)) for run in ("lr-0.0001", "lr-0.0002")] == [1, 1]
    with pytest.raises(LaunchError, match="nodes=2 needs SLURM, but there is no sbatch"):
        sweep(rates(desk), nodes=2)
