"""A run's progress from another shell: `python -m convmae.watch RUN [RUN ...]`, on this machine or across a cluster.

It reads the run's folder and writes nothing; where the run is a job of SLURM's, it asks squeue as well. Files may be
missing, cut off or growing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .pictures import series, smoothed
from .run_folder import CHECKPOINTS, EVENTS, FAILURES, LAST, LOCK, METRICS, SCORES, SKIPPED, SLURM

_PARTS = (METRICS, EVENTS, "run.txt", LOCK, LAST, CHECKPOINTS, FAILURES, SLURM)
_SECONDS, _ASK_EVERY, _ANSWER_WITHIN = 2, 10, 5  # between two looks; between two calls of squeue, and each one's limit
_WHOLE, _END, _PLACES, _PLACE = 2**20, 2**18, 256, 2**11  # bytes: read whole, else the end, and so many places
_RECENT = 20  # lines of metrics that tell the pace
_PATIENCE, _PATIENCE_AT_START = 30, 600  # least seconds without news to remark on; and before the first line

_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_PENDING |= {"SUSPENDED", "STOPPED"}
_RUNNING = {"RUNNING", "RESIZING", "SIGNALING"}
_ENDING = {"COMPLETING", "STAGE_OUT"}
_GONE = "GONE"  # ours: SLURM answered, and no longer knows the job

_STYLES = {
    "waiting": ("◌", "cyan"),
    "running": ("●", "green"),
    "hung?": ("●", "yellow"),
    "stopped": ("■", "yellow"),
    "failed": ("✗", "bold red"),
    "finished": ("✓", "green"),
}
_UNKNOWN = "-"
_LABEL, _WIDE, _LONGEST = 14, 100, 240  # characters: of a label, of a wide terminal, of an error shown
_LONG_WAIT = 0.3  # share of the time waiting for data that deserves a look
_BRAILLE = np.array([0x01, 0x08, 0x02, 0x10, 0x04, 0x20, 0x40, 0x80])  # the bits of a character's dots, row by row


# ---- what the folder says --------------------------------------------------------------------------------------------


class Growing:
    """The lines of a file of JSON lines that grows, and that its run cuts or replaces when it goes on.

    A file of up to a megabyte is read whole; of a longer one the end, and a few lines at places spread over the rest.
    After that only what is new is read, and of old lines every other one forgotten where they are too many.
    """

    def __init__(self, path: Path, *, kept: int) -> None:
        self.path, self.kept = path, kept
        self.lines: list[dict[str, Any]] = []
        self.whole = True
        self._inode, self._at = -1, 0

    def read(self) -> None:
        """Take what is new; nothing where there is no file, or it cannot be read just now."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            self._take(file)
        while len(self.lines) > self.kept:
            del self.lines[: -self.kept // 2 : 2]
            self.whole = False

    def _take(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._at:
            self.lines, self._inode, self._at = [], status.st_ino, 0
            self.whole = status.st_size <= _WHOLE
            if not self.whole:
                self._at = status.st_size - _END
                for place in range(_PLACES):
                    file.seek(place * self._at // _PLACES)
                    self.lines += map(_object, file.read(_PLACE).split(b"\n"))
        file.seek(self._at)
        ended, newline, _ = file.read().rpartition(b"\n")
        self._at += len(ended + newline)
        self.lines = [line for line in (*self.lines, *map(_object, ended.split(b"\n"))) if line]


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object; empty where the text is cut off, or something else."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def _number(line: dict[str, Any], name: str) -> float | None:
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _time(line: dict[str, Any], name: str = "time") -> float:
    return _number(line, name) or 0.0


@dataclass(frozen=True)
class State:
    """In a word what a run is doing, and how that is known."""

    word: str
    why: str


class Watched:
    """A run's folder, and what was read of it at the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = Growing(folder / METRICS, kept=2**11)
        self.scores = Growing(folder / SCORES, kept=2**7)
        self.events = Growing(folder / EVENTS, kept=2**16)
        self.skipped = Growing(folder / SKIPPED, kept=2**16)

    def look(self) -> None:
        """Read what is new."""
        for file in (self.metrics, self.scores, self.events, self.skipped):
            file.read()
        self.now = time.time()
        self.last = self.metrics.lines[-1] if self.metrics.lines else {}
        self.lock = _read(self.folder / LOCK)
        begins = [_time(event) for event in self.events.lines if event.get("event") in ("started", "resumed")]
        self.begun = max([_time(self.lock, "since"), *begins])
        self.news = max([_time(self.last), self.begun, *map(_time, self.events.lines[-1:])])
        failures = sorted(map(_read, (self.folder / FAILURES).glob("*.json")), key=_time)
        self.failures = [failure for failure in failures if failure and _time(failure) >= self.begun]
        self._find_job()

    def _find_job(self) -> None:
        """The job that the run is or will be, and its log: the lock's, unless one was submitted since."""
        jobs = [path for path in (self.folder / SLURM).glob("*") if path.name[0].isdigit()]
        newest = max(jobs, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)], default=None)
        self.log = newest / f"{newest.name}_0_log.out" if newest else None
        self.job, self.submitted = str(self.lock.get("job") or "") or None, 0.0
        with contextlib.suppress(OSError):
            # a job of this machine's own, not SLURM's, has no submission file
            if newest and newest.stat().st_mtime > _time(self.lock, "since") and any(newest.glob("*_submission.sh")):
                self.job, self.submitted = newest.name, newest.stat().st_mtime

    def state(self, queue: Queue) -> State:
        """Decide from facts: events, failures, SLURM's word, the process where it is ours to see, and the silence."""
        word = self._last_word()
        step, steps = _number(self.last, "step"), _number(self.last, "steps")
        if word == "finished" or (not word and step and steps and step >= steps and not self.failures):
            return State("finished", _ago(self.now - self.news))
        job, (slurm, reason) = f"job {self.job}", queue.state(self.job)
        over = bool(slurm) and slurm not in _PENDING | _RUNNING | _ENDING
        ended = f"{job} left SLURM's queue" if slurm == _GONE else f"{job} ended as {slurm.lower()}"
        if slurm in _PENDING:
            return State("waiting", f"{job} is {slurm.lower()} {reason}".strip())
        if slurm in _RUNNING and self.submitted > self.news:
            return State("waiting", f"{job} has begun, training not yet")
        if word == "requeued" or not (self.begun or self.metrics.lines or self.failures):
            return State("stopped", ended) if over else State("waiting", word or "training has not begun")
        if self.failures:
            return State("failed", _ago(self.now - _time(self.failures[0])))
        if word == "stopping":
            return State("stopped", f"as asked, {_ago(self.now - self.news)}; the same command goes on")
        if word == "testing" and not over and not self._process_is_gone():
            return State("running", f"in its last test, for {_span(self.now - self.news)}")
        silence, late = self.now - self.news, self.now - self.news > self._patience()
        if over or (late and self._process_is_gone()):
            return State("stopped", f"{ended if over else 'its process is gone'}; the same command goes on")
        if late:
            return State("hung?", f"no news for {_span(silence)}" + f", but {job} is running" * (slurm in _RUNNING))
        return State("running", f"last news {_ago(silence)}" if self.last else "no step yet")

    def _last_word(self) -> str:
        """The last event that tells how things stand; one from before the run last began counts only as the end."""
        words = {"started", "resumed", "testing", "stopping", "requeued", "finished"}
        last: dict[str, Any] = next((event for event in reversed(self.events.lines) if event.get("event") in words), {})
        word = str(last.get("event", ""))
        return word if word == "finished" or _time(last) >= self.begun else "started"

    def _patience(self) -> float:
        """Seconds without news that are no cause for concern: a few times the longest of the recent pauses."""
        if _time(self.last) <= self.begun:
            return _PATIENCE_AT_START
        times = [_time(line, "seconds") for line in self.metrics.lines[-_RECENT:]]
        return max(_PATIENCE, 3 * max(np.diff(times), default=_PATIENCE_AT_START / 3))

    def _process_is_gone(self) -> bool:
        """Whether the run's first process was on this machine, and is no more."""
        host, pid = self.lock.get("host"), self.lock.get("pid")
        if host != socket.gethostname() or not isinstance(pid, int):
            return False
        try:
            os.kill(pid, 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False

    def left(self) -> float | None:
        """Seconds to the end at the recent pace; None where there is none."""
        recent = self.metrics.lines[-_RECENT:]
        step, steps = _number(self.last, "step"), _number(self.last, "steps")
        if len(recent) < 2 or step is None or steps is None:
            return None
        seconds = _time(self.last, "seconds") - _time(recent[0], "seconds")
        done = step - (_number(recent[0], "step") or 0)
        return (steps - step) * seconds / done if done > 0 and seconds > 0 else None


class Queue:
    """What SLURM says of jobs: asked seldom, never waited for long, and no answer is no trouble."""

    def __init__(self) -> None:
        self._due = 0.0
        self._said: dict[str, tuple[str, str]] = {}

    def ask(self, jobs: Collection[str]) -> None:
        """Ask squeue for the states of jobs, where there is one and the last time is long enough ago."""
        if not jobs or time.monotonic() < self._due or not shutil.which("squeue"):
            return
        self._said = {}
        command = ["squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i|%A|%T|%R"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN, check=False)
            if answer.returncode == 0 or "Invalid job id" in answer.stderr:
                self._said = dict.fromkeys(jobs, (_GONE, ""))
            for name, number, state, reason in re.findall(r"^(.+?)\|(.+?)\|(.+?)\|(.*)$", answer.stdout, re.MULTILINE):
                self._said |= {name: (state, reason), number: (state, reason)}
        self._due = time.monotonic() + _ASK_EVERY

    def state(self, job: str | None) -> tuple[str, str]:
        """SLURM's word for a job's state, and its reason or nodes; both empty where they are not known."""
        return self._said.get(job or "", ("", ""))


# ---- how it is shown -------------------------------------------------------------------------------------------------


def _page(run: Watched, state: State, console: Console, rows: int) -> RenderableType:
    """One run, in so many rows where that is possible: events make room for the curve, which takes what is left."""
    name = Text(str(run.folder), "bold", overflow="fold")
    above = [name, Text.assemble(_badge(state), "  ", (state.why, "dim")), *_failures(run), Text(), _progress(run)]
    for events in (5, 2):
        below = [Text(), *_figures(run, console.width), _details(run, events)]
        height = min(8, rows - 3 - len(console.render_lines(Group(*above, *below))))
        if height >= 3:
            break
    return Group(*above, *_curve(run, console.width, height), *below)


def _badge(state: State) -> Text:
    sign, style = _STYLES[state.word]
    return Text(f"{sign} {state.word}", style)


def _progress(run: Watched) -> RenderableType:
    step, steps = _number(run.last, "step"), _number(run.last, "steps")
    if step is None or not steps:
        return Text("no step yet", "dim")
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    bar = ProgressBar(steps, step, style="dim", complete_style="blue", finished_style="green")
    grid.add_row(f"step {step:,.0f} of {steps:,.0f}", bar, f"{min(1, step / steps):.0%}")
    return grid


def _curve(run: Watched, width: int, height: int) -> list[RenderableType]:
    """The loss so far: its value now, and the curve with its highest and lowest value and its first and last step."""
    steps, loss = series(run.metrics.lines, "loss")
    if not len(steps):
        return []
    title = [Text(), Text.assemble(("loss ", "dim"), (_digits(loss[-1]), "bold"), *_scores(run))]
    if len(steps) < 2 or height < 2:
        return [*title]
    values = _spread(steps, loss, 2 * max(1, width - 9))
    labels = [_digits(values.max()), *[""] * (height - 2), _digits(values.min())]
    lines = [
        Text.assemble((f"{label:>8} ", "dim"), (line, "blue"))
        for label, line in zip(labels, _braille(values, height), strict=True)
    ]
    first, last = f"{steps[0]:,.0f}", f"{steps[-1]:,.0f}"
    return [*title, *lines, Text(" " * 9 + first + last.rjust(width - 9 - len(first)), "dim")]


def _scores(run: Watched) -> Iterator[tuple[str, str]]:
    """The latest score of each kind, beside the loss."""
    line = run.scores.lines[-1] if run.scores.lines else {}
    for name in line:
        value = _number(line, name)
        if value is not None and name.endswith("top1"):
            yield f"   {name} ", "dim"
            yield f"{value:.1%}", "bold"


def _spread(steps: NDArray[np.float64], values: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Values over steps as so many columns of equally many steps: the means, smoothed, drawn through where empty."""
    places = ((steps - steps[0]) / (steps[-1] - steps[0]) * (columns - 1)).round().astype(int)
    counts = np.bincount(places, minlength=columns)
    there = np.flatnonzero(counts)
    means = np.bincount(places, values, columns)[there] / counts[there]
    return smoothed(np.interp(np.arange(columns), there, means))


def _braille(values: NDArray[np.float64], height: int) -> list[str]:
    """A curve in lines of braille characters, two values wide and four dots tall each, without gaps."""
    if values.min() > 0 and values.max() > 20 * values.min():
        values = np.log(values)
    low, high = values.min(), values.max()
    levels = ((values - low) / (high - low or 1) * (4 * height - 1)).round()
    before = np.concatenate([levels[:1], levels[:-1]])
    bottom = np.where(levels < before, levels, np.minimum(before + 1, levels))
    top = np.where(levels > before, levels, np.maximum(before - 1, levels))
    rows = np.arange(4 * height)[::-1, None]
    dots = rearrange((rows >= bottom) & (rows <= top), "(h four) (w two) -> h w (four two)", four=4, two=2)
    return ["".join(chr(0x2800 + bits) for bits in line) for line in (dots * _BRAILLE).sum(-1)]


def _figures(run: Watched, width: int) -> list[RenderableType]:
    last, bad, waited = run.last, _number(run.last, "bad_steps"), _number(run.last, "data_wait")
    if not last:
        return []
    speeds = [speed for line in run.metrics.lines[-_RECENT:] if (speed := _number(line, "samples_per_second"))]
    pairs: list[tuple[RenderableType, RenderableType]] = [
        ("epoch", _shown(_number(last, "epoch"), ".2f")),
        ("learning rate", _shown(_number(last, "learning_rate"), ".2e")),
        ("gradient norm", _shown(_number(last, "gradient_norm"), "#.3g")),
        ("bad steps", Text(_shown(bad, ",.0f"), "yellow" if bad else "")),
        ("time spent", _span(_time(last, "seconds"))),
        ("time left", _left(run)),
        ("samples/s", _shown(float(np.median(speeds)) if speeds else None, ",.4g")),
        ("data wait", Text(_shown(waited, ".0%"), "yellow" if (waited or 0) > _LONG_WAIT else "")),
    ]
    groups = 4 if width >= _WIDE else 2
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(groups):
        grid.add_column(style="dim", no_wrap=True, width=_LABEL)
        grid.add_column(ratio=1, no_wrap=True)
    rows = len(pairs) // groups
    for row in range(rows):
        grid.add_row(*itertools.chain(*pairs[row::rows]))
    return [grid, Text()]


def _details(run: Watched, events: int) -> RenderableType:
    """What else there is to know, the most pressing first; what is not there is left out."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True, width=_LABEL)
    grid.add_column(overflow="fold")
    rows = [
        ("checkpoint", Text(_checkpoint(run))),
        ("unusable", Text(_unusable(run))),
        ("where", Text(", ".join(filter(None, [str(run.lock.get("host") or ""), run.job and f"job {run.job}"])))),
        ("log", Text(str(run.log or ""))),
        *_events(run, events),
    ]
    for label, text in rows:
        if text:
            grid.add_row(label, text)
    return grid


def _failures(run: Watched) -> list[RenderableType]:
    """The errors of the ranks that failed first, as others often fail of that; each error once."""
    firsts: dict[str, dict[str, Any]] = {}
    for failure in run.failures:
        firsts.setdefault(str(failure.get("error")), failure)
    rows: list[RenderableType] = []
    for error, failure in itertools.islice(firsts.items(), 3):
        step = _number(failure, "step")
        when = "before training" if step is None else f"at step {step:,.0f}"
        where = f"rank {failure.get('rank')} on {failure.get('host')}, {when}: "
        rows.append(Text.assemble((where, "red"), _short(error)))
    if more := len(run.failures) - len(rows):
        rows.append(Text(f"and {more} more, in {run.folder / FAILURES}", "dim"))
    return rows


def _events(run: Watched, most: int) -> list[tuple[str, Text]]:
    """The last events; that a checkpoint was saved has a line of its own."""
    told = [event for event in run.events.lines if event.get("event") != "saved"][-most:]
    labels = ["events", *[""] * len(told)]
    return [
        (
            label,
            Text.assemble(
                (f"{datetime.fromtimestamp(_time(event)):%d %b %H:%M}  ", "dim"),
                f"{str(event.get('event')).replace('_', ' '):<12}",
                _short(str(event.get("text") or "")),
            ),
        )
        for label, event in zip(labels, told, strict=False)
    ]


def _checkpoint(run: Watched) -> str:
    kept = sorted((run.folder / CHECKPOINTS).glob("*.pt"))
    newest = kept[-1] if kept else run.folder / LAST
    try:
        status = newest.stat()
    except OSError:
        return ""
    step = f"step {int(digits[0]):,}, " if (digits := re.findall(r"\d+", newest.stem)) else ""
    count = f"; {len(kept)} kept" if len(kept) > 1 else ""
    return f"{step}{_ago(run.now - status.st_mtime)}, {_size(status.st_size)}{count}"


def _unusable(run: Watched) -> str:
    """How many samples could not be used, of how many files, and the most frequent reasons with their shares."""
    lines = run.skipped.lines
    if not lines:
        return ""
    samples = max(len(lines), int(_number(run.last, "skipped") or 0))
    files = len({str(line.get("file")) for line in lines})
    reasons = Counter(str(line.get("reason")) for line in lines)
    shares = [f"{_short(reason)} {count / len(lines):.0%}" for reason, count in reasons.most_common(3)]
    many = f"{files:,} {'file' if files == 1 else 'files'}" if run.skipped.whole else f"{files:,} or more files"
    return f"{samples:,} {'sample' if samples == 1 else 'samples'} of {many}: {', '.join(shares)}"


def _table(runs: Sequence[Watched], states: Sequence[State], rows: int, *, wide: bool) -> RenderableType:
    """Several runs, a line each; in so many rows."""
    most = rows - 4
    above = Path(os.path.commonpath([run.folder.absolute().parent for run in runs]))
    counts = Counter(state.word for state in states)
    summary = ", ".join(f"{counts[word]} {word}" for word in _STYLES if counts[word])
    place = above.relative_to(Path.cwd()) if above.is_relative_to(Path.cwd()) else above
    title = Text.assemble((f"{len(runs)} runs", "bold"), f": {summary}", (f"  in {place}", "dim"))
    title.no_wrap, title.overflow = True, "ellipsis"
    table = Table(box=None, expand=True, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("run", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    for name in ("step", "", "loss", "", "left", *["samples/s"] * wide):
        table.add_column(name, justify="right", no_wrap=True)
    for run, state in itertools.islice(zip(runs, states, strict=True), most):
        table.add_row(Text(os.path.relpath(run.folder.absolute(), above)), _badge(state), *_row(run, wide=wide))
    more = [Text(f"and {len(runs) - most} more: in a taller window, or with --once", "dim")] * (len(runs) > most)
    return Group(title, Text(), table, *more)


def _row(run: Watched, *, wide: bool) -> list[RenderableType]:
    step, steps = _number(run.last, "step"), _number(run.last, "steps")
    at, loss = series(run.metrics.lines, "loss")
    return [
        _shown(step, ",.0f"),
        f"{min(1, step / steps):.0%}" if step is not None and steps else "",
        _digits(loss[-1]) if len(loss) else _UNKNOWN,
        Text(_braille(_spread(at, loss, 32 if wide else 16), 1)[0] if len(at) > 1 else "", "blue"),
        _left(run),
        *[_shown(_number(run.last, "samples_per_second"), ",.3g")] * wide,
    ]


def _left(run: Watched) -> str:
    left = run.left()
    return _span(left) if left else _UNKNOWN


def _shown(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _short(text: str) -> str:
    """Text without line breaks, and the beginning of a long one."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _digits(value: float) -> str:
    return f"{value:#.4g}"


def _span(seconds: float) -> str:
    seconds = max(0, round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if not hours:
        return f"{minutes} min" if minutes else f"{seconds} s"
    return f"{days} d {hours % 24:02} h" if days else f"{hours} h {minutes % 60:02} min"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


# ---- the command -----------------------------------------------------------------------------------------------------


def _view(runs: Sequence[Watched], below: Sequence[Text], queue: Queue, console: Console, rows: int) -> RenderableType:
    """Look at the runs and show them, with lines below, in so many rows where that is possible."""
    for run in runs:
        run.look()
    queue.ask({run.job for run in runs if run.job})
    states = [run.state(queue) for run in runs]
    rows -= len(below)
    if len(runs) == 1:
        return Group(_page(runs[0], states[0], console, rows), *below)
    return Group(_table(runs, states, rows, wide=console.width >= _WIDE), *below)


def _follow(runs: Sequence[Watched], below: Sequence[Text], queue: Queue, console: Console) -> None:
    """Show the runs again and again, until q or Ctrl-C; the last view stays."""
    view: RenderableType = ""
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as key,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            view = _view(runs, below, queue, console, console.height - 1)
            live.update(Group(view, Text("q ends", "dim", justify="right")), refresh=True)
            if key(_SECONDS) == "q":
                break
    console.print(view)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key: the key, or nothing; q where the terminal is gone."""
    terminals = [sys.stdin.fileno()] if sys.stdin.isatty() else []
    before = [termios.tcgetattr(terminal) for terminal in terminals]

    def key(seconds: float) -> str:
        ready, _, _ = select.select(terminals, [], [], seconds)
        return os.read(ready[0], 1).decode(errors="replace") or "q" if ready else ""

    try:
        for terminal in terminals:
            tty.setcbreak(terminal)
        yield key
    finally:
        for terminal, attributes in zip(terminals, before, strict=True):
            termios.tcsetattr(terminal, termios.TCSADRAIN, attributes)


def _refusal(folder: Path) -> str | None:
    """Why this is no run's folder."""
    if not folder.is_dir():
        return f"{folder}: there is no such folder"
    if any(os.path.lexists(folder / part) for part in _PARTS):
        return None
    within = [path for path in sorted(folder.iterdir()) if path.is_dir() and _refusal(path) is None]
    hint = f"; but there are runs in it, such as {within[0]}" if within else ""
    return f"{folder} is no run's folder: it has none of {', '.join(_PARTS)}{hint}"


def main() -> None:
    """The command line: `python -m convmae.watch RUN [RUN ...]`."""
    parser = argparse.ArgumentParser(
        prog="python -m convmae.watch", description="Show the progress of runs, from their folders alone; q ends."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; several: a line each")
    parser.add_argument("--once", action="store_true", help="print once and end, as where there is no terminal")
    given = parser.parse_args()
    others = {folder: refusal for folder in given.runs if (refusal := _refusal(folder))}
    runs = [Watched(folder) for folder in given.runs if folder not in others]
    if not runs:
        parser.error("\n".join(others.values()))
    left_out = Text(f"left out, as no runs: {', '.join(map(str, others))}", "dim", no_wrap=True, overflow="ellipsis")
    below, queue, console = [left_out] * bool(others), Queue(), Console(highlight=False)
    if given.once or not console.is_terminal:
        console.print(_view(runs, below, queue, console, sys.maxsize))
    else:
        _follow(runs, below, queue, console)


if __name__ == "__main__":
    main()
