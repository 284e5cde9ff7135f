"""Run folders made by hand, complete and broken, as `python -m convmae.watch` tells of them."""

import contextlib
import itertools
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from convmae import watch
from convmae.watch import Growing, Queue, State, Watched, main

Show = Callable[..., str]


@pytest.fixture(autouse=True)
def no_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """What the command prints, once."""

    def run(*folders: Path, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["watch", "--once", *map(str, folders)])
        main()
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= columns
        return printed

    return run


def line(step: int, *, ago: float = 0, **more: Any) -> dict[str, Any]:
    known = {"step": step, "steps": 1000, "since": step - 9, "epoch": step / 50, "samples": 8 * step, "loss": 1 / step}
    pace = {"learning_rate": 1e-3, "gradient_norm": 1.5, "samples_per_second": 16.0, "data_wait": 0.07}
    counts = {"bad_steps": 0, "skipped": 0, "seconds": step / 2, "time": time.time() - ago}
    return {**known, **pace, **counts, **more}


def lines(last: int, *, ago: float = 0, **more: Any) -> list[dict[str, Any]]:
    """Metrics every ten steps, of half a second each."""
    return [line(step, ago=ago + (last - step) / 2, **more) for step in range(10, last + 1, 10)]


def event(name: str, *, ago: float, text: str = "") -> dict[str, Any]:
    return {"time": time.time() - ago, "step": 0, "event": name, "text": text}


def write(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))


def lock(folder: Path, *, ago: float, job: str | None = None, pid: int = 1, host: str = "node7") -> None:
    write(folder / ".lock", [{"host": host, "pid": pid, "job": job, "since": time.time() - ago}])


def going(folder: Path, *, ago: float = 0, job: str | None = None) -> Path:
    """A run that is under way, with news so many seconds ago."""
    lock(folder, ago=ago + 200, job=job)
    write(folder / "events.jsonl", [event("started", ago=ago + 199)])
    write(folder / "metrics.jsonl", lines(300, ago=ago))
    return folder


def failing(folder: Path, *, rank: int, ago: float, error: str) -> None:
    words = {
        "time": time.time() - ago,
        "rank": rank,
        "host": "node8",
        "pid": 5,
        "job": "42",
        "step": 301,
        "error": error,
    }
    write(folder / "failures" / f"rank-{rank:05d}.json", [words])


def submitted(folder: Path, job: str) -> None:
    write(folder / "slurm" / job / f"{job}_submission.sh", [])


def squeue(folder: Path, script: str) -> None:
    """Put a squeue on the PATH that notes that it was called, and then does what the script says."""
    path = folder / "bin" / "squeue"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{script}\n')
    path.chmod(0o755)


def state(folder: Path) -> State:
    run, queue = Watched(folder), Queue()
    run.look()
    queue.ask({run.job} if run.job else set())
    return run.state(queue)


def test_a_run_under_way_is_told_in_full(tmp_path: Path, show: Show) -> None:
    run = going(tmp_path / "run", job="42")
    write(run / "metrics.jsonl", lines(300, bad_steps=2, skipped=4))
    reasons = ["no video stream", "cut off", "cut off", "cut off"]
    write(run / "skipped.jsonl", [{"file": "a.mp4", "reason": reason, "step": 3} for reason in reasons])
    (run / "checkpoints").mkdir()
    for step in (100, 200):
        (run / "checkpoints" / f"step-{step:08d}.pt").write_bytes(bytes(2_500_000))
    submitted(run, "42")
    page = " ".join(show(run).split())
    for said in (
        "● running last news 0 s ago",
        "step 300 of 1,000",
        "30%",
        "loss 0.003333",
        "epoch 6.00",
        "learning rate 1.00e-03",
        "gradient norm 1.50",
        "samples/s 16",
        "data wait 7%",
        "time spent 2 min",
        "time left 5 min",
        "bad steps 2",
        "4 samples of 1 file: cut off 75%, no video stream 25%",
        "checkpoint step 200, 0 s ago, 2.5 MB; 2 kept",
        "node7, job 42",
        "started",
    ):
        assert said in page
    assert "slurm/42/42_0_log.out" in page.replace(" ", "")


def test_the_loss_is_drawn_from_its_highest_to_its_lowest(tmp_path: Path, show: Show) -> None:
    for columns in (40, 80, 120):
        drawn = [
            row for row in show(going(tmp_path), columns=columns).splitlines() if re.search("[\u2801-\u28ff]", row)
        ]
        assert len(drawn) >= 2
        places = [row.index(re.findall("[\u2801-\u28ff]", row)[0]) for row in drawn]
        assert places == sorted(places), "a falling loss runs down to the right"
        assert re.search("[\u2801-\u28ff]$", drawn[-1]), "to the last column"


@pytest.mark.parametrize("columns", [20, 60])
def test_an_empty_or_narrow_page_is_still_a_page(tmp_path: Path, show: Show, columns: int) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "last.pt").symlink_to("checkpoints/step-00000100.pt")
    assert "waiting" in show(tmp_path, columns=columns)
    assert "running" in show(going(tmp_path), columns=columns)


def test_half_written_files_are_read_as_far_as_they_go(tmp_path: Path, show: Show) -> None:
    run = going(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl", "skipped.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'\0\xff\n[1]\n{"step": "x", "time": null, "loss": NaN}\n{"step": 31')
    for name in (".lock", "failures/rank-00001.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text('{"host": "no')
    assert "loss 0.003333" in show(run)


def test_each_state_follows_from_facts(tmp_path: Path) -> None:
    run = going(tmp_path)
    assert state(run).word == "running"
    write(run / "events.jsonl", [event("started", ago=199), event("stopping", ago=1), event("saved", ago=1)])
    assert state(run).word == "stopped"
    write(run / "events.jsonl", [event("started", ago=199), event("stopping", ago=2), event("requeued", ago=1)])
    assert state(run).word == "waiting"
    lock(run, ago=0.5)
    assert state(run).word == "running", "it has begun again"
    failing(run, rank=3, ago=900, error="RuntimeError: of the session before")
    assert state(run).word == "running"
    failing(run, rank=3, ago=0.1, error="RuntimeError: now")
    assert state(run).word == "failed"
    write(run / "events.jsonl", [event("started", ago=199), event("finished", ago=100)])
    assert state(run).word == "finished", "running it again does nothing"
    write(run / "events.jsonl", [event("finished", ago=100), event("resumed", ago=0.2)])
    (run / "failures" / "rank-00003.json").unlink()
    assert state(run).word == "running", "with more epochs"


def test_a_run_without_news_for_long_may_hang(tmp_path: Path) -> None:
    assert state(going(tmp_path, ago=20)).word == "running"
    assert state(going(tmp_path, ago=720)) == State("hung?", "no news for 12 min")
    slow = [line(step, ago=720 + (300 - step) * 60, seconds=step * 60) for step in range(10, 301, 10)]
    write(tmp_path / "metrics.jsonl", slow)
    assert state(tmp_path).word == "running", "its lines are ten minutes apart"
    lock(tmp_path, ago=300)
    assert state(tmp_path).word == "running", "the first step of a session takes its time"


def test_a_process_that_died_on_this_machine_is_known_to_be_gone(tmp_path: Path) -> None:
    run = going(tmp_path, ago=60)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock(run, ago=300, pid=dead.pid, host=socket.gethostname())
    assert state(run) == State("stopped", "its process is gone; the same command goes on")
    lock(run, ago=300, pid=os.getpid(), host=socket.gethostname())
    assert state(run).word == "hung?"


def test_slurm_is_asked_about_the_newest_job(tmp_path: Path) -> None:
    run = going(tmp_path / "run", job="42")
    for job in ("42", "100"):
        submitted(run, job)
    squeue(tmp_path, 'echo "100|100|PENDING|(Resources)"')
    assert state(run) == State("waiting", "job 100 is pending (Resources)")
    assert "-j 100 " in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("script", "word", "why"),
    [
        ("echo '42|42|RUNNING|node7'", "hung?", "no news for 12 min, but job 42 is running"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "stopped", "job 42 left SLURM's queue"),
        ("echo '42|42|TIMEOUT|None'", "stopped", "job 42 ended as timeout"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "hung?", "no news for 12 min"),
        ("", "stopped", "job 42 left SLURM's queue"),
        ("echo '42|4'", "stopped", "job 42 left SLURM's queue"),
        ("exec /bin/sleep 9", "hung?", "no news for 12 min"),
    ],
)
def test_slurm_tells_a_hung_run_from_one_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, word: str, why: str
) -> None:
    monkeypatch.setattr(watch, "_ANSWER_WITHIN", 0.2)
    run = going(tmp_path / "run", ago=720, job="42")
    squeue(tmp_path, script)
    found = state(run)
    assert found.word == word
    assert why in found.why


def test_slurm_is_asked_once_for_all_runs_and_seldom(tmp_path: Path) -> None:
    squeue(tmp_path, "")
    queue = Queue()
    for _ in range(3):
        queue.ask(["1", "2_3"])
    assert (tmp_path / "asked").read_text().count("\n") == 1
    assert queue.state("2_3") == ("GONE", "")
    assert queue.state("7") == queue.state(None) == ("", ""), "not asked about"


def test_a_job_of_this_machine_is_not_asked_of_slurm(tmp_path: Path) -> None:
    squeue(tmp_path, "echo '42|42|RUNNING|node7'")
    (tmp_path / "run" / "slurm" / "42").mkdir(parents=True)
    assert state(tmp_path / "run").word == "waiting"
    assert not (tmp_path / "asked").exists()


def test_the_error_that_came_first_is_told_first_and_each_once(tmp_path: Path, show: Show) -> None:
    run = going(tmp_path)
    for rank in range(8):
        failing(run, rank=rank, ago=5 - rank / 10, error="RuntimeError: connection [closed]")
    failing(run, rank=6, ago=6, error="ValueError: a mask\n of nothing")
    page = " ".join(show(run).split())
    assert "✗ failed 6 s ago rank 6 on node8, at step 301: ValueError: a mask of nothing" in page
    assert page.count("connection [closed]") == 1
    assert "and 6 more" in page


def test_runs_of_a_sweep_are_a_line_each(tmp_path: Path, show: Show) -> None:
    for rate in ("1e-4", "2e-4"):
        going(tmp_path / "sweep" / f"lr={rate}")
    (tmp_path / "sweep" / "later" / "slurm").mkdir(parents=True)
    for columns in (80, 120):
        title, *rows = show(*sorted((tmp_path / "sweep").iterdir()), columns=columns).splitlines()
        assert title.startswith("3 runs: 1 waiting, 2 running  in ")
        assert [row.split()[0] for row in rows[-3:]] == ["later", "lr=1e-4", "lr=2e-4"]
        assert re.search(r"lr=2e-4 +● running +300 +30% +0.003333 .* 5 min", rows[-1])


def test_of_several_what_is_no_run_is_left_out_and_told(tmp_path: Path, show: Show) -> None:
    for rate in ("1e-4", "2e-4"):
        going(tmp_path / "sweep" / f"lr={rate}")
    (tmp_path / "sweep" / "logs").mkdir()
    (tmp_path / "sweep" / "notes.txt").touch()
    *rows, last = show(*sorted((tmp_path / "sweep").iterdir()), columns=400).splitlines()
    assert rows[0].startswith("2 runs: 2 running")
    assert last.strip() == f"left out, as no runs: {tmp_path}/sweep/logs, {tmp_path}/sweep/notes.txt"
    page = show(tmp_path / "sweep" / "lr=1e-4", tmp_path / "sweep" / "logs")
    assert "step 300 of 1,000" in page
    assert page.splitlines()[-1].startswith("left out, as no runs: ")


def test_a_long_file_is_read_in_part_and_then_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(line(step)) + "\n" for step in range(1, 10_001))
    path.write_text(text)
    file = Growing(path, kept=10_000)
    file.read()
    steps = [found["step"] for found in file.lines]
    assert not file.whole
    assert len(steps) < 5000
    assert steps[-1] == 10_000
    assert steps[0] == 1
    assert max(after - before for before, after in itertools.pairwise(steps)) < 100, "all parts are seen"
    with path.open("a") as more:
        more.write(json.dumps(line(10_001)) + '\n{"step": 100')
        more.flush()
        file.read()
        assert [found["step"] for found in file.lines] == [*steps, 10_001]
        more.write("02}\n")
    file.read()
    assert file.lines[-1] == {"step": 10_002}


def test_a_file_that_its_run_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, lines(300))
    file = Growing(path, kept=100)
    file.read()
    write(tmp_path / "new", [*lines(200), *lines(310)[20:]])
    (tmp_path / "new").replace(path)
    file.read()
    assert [found["step"] for found in file.lines] == list(range(10, 311, 10))
    write(path, lines(20))
    file.read()
    assert [found["step"] for found in file.lines] == [10, 20]


def test_of_many_lines_old_ones_thin_out_and_recent_ones_stay(tmp_path: Path) -> None:
    write(tmp_path / "m", ({"step": step} for step in range(1000)))
    file = Growing(tmp_path / "m", kept=100)
    file.read()
    steps = [found["step"] for found in file.lines]
    assert len(steps) <= 100
    assert steps[-50:] == list(range(950, 1000))
    assert steps[0] < 100


def test_what_is_no_run_is_refused_with_what_was_expected(
    tmp_path: Path, show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    going(tmp_path / "runs" / "a")
    (tmp_path / "runs" / ".slurm" / "123_0").mkdir(parents=True)  # a sweep's logs
    with pytest.raises(SystemExit) as ended:
        show(tmp_path / "runs", tmp_path / "none")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "runs is no run's folder: it has none of metrics.jsonl, events.jsonl" in said
    assert f"there are runs in it, such as {tmp_path / 'runs' / 'a'}" in said
    assert f"{tmp_path / 'none'}: there is no such folder" in said


def test_in_a_terminal_the_view_stays_until_q(tmp_path: Path) -> None:
    going(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "convmae.watch", str(tmp_path)]
    environment = os.environ | {"COLUMNS": "80", "LINES": "30", "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=Path(__file__).parents[1]
    )
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while "q ends" not in shown and select.select([ours], [], [], 60)[0]:
            shown += os.read(ours, 2**16).decode(errors="replace")
        os.write(ours, b"q")
        while os.read(ours, 2**16):
            pass
    assert process.wait(10) == 0, shown
    os.close(ours)
    assert "running" in shown
    assert "30%" in shown


def test_scores_stand_beside_the_loss_and_a_long_last_test_is_not_a_silence(tmp_path: Path, show: Show) -> None:
    folder = going(tmp_path / "run", ago=5000)
    write(folder / "scores.jsonl", [{"step": 10, "epoch": 1, "top1": 0.5}, {"step": 20, "epoch": 2, "top1": 0.625}])
    assert "top1 62.5%" in show(folder)
    assert state(folder).word == "hung?"
    write(folder / "events.jsonl", [event("started", ago=9000), event("testing", ago=4000)])
    assert state(folder).word == "running"
    assert "in its last test, for" in state(folder).why
