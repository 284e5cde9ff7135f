"""What a run tells: progress on the console, and in its folder metrics, skipped files, TensorBoard, pictures, a page.

All of it is written by the first process alone. Metrics are lines of JSON that survive a stop: going on from a
checkpoint drops the lines of steps that will be done again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as ProgressTask
from rich.text import Text
from torch import Tensor

from . import pictures, report
from .builders import MAE
from .data import UnusableFileError, generator
from .targets import normalize
from .training import Pretrain, Start, Step

_log = logging.getLogger(__name__)

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"
STRIPS = 4  # samples in a picture
PAGE_SECONDS = 30  # least time between two writings of the page, longer where they take long


def describe(run: Pretrain) -> str:
    """A run as readable code, every field on its line and the model verb by verb."""
    lines = [f"{type(run).__name__}("]
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        if isinstance(value, MAE):
            lines.append(f"    {field.name}={type(value).__name__}()")
            for verb in value.verbs(defaults=True):
                lines.append("        " + re.sub(r", (?=ConvStage|AttentionStage)", ",\n            ", verb))
            lines[-1] += ","
        else:
            lines.append(f"    {field.name}={value!r},")
    return "\n".join([*lines, ")"]) + "\n"


class Journal:
    """Keeps a run's journal; a context manager, whose `record` takes each step in turn."""

    def __init__(self, run: Pretrain, console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console()
        self._closing = contextlib.ExitStack()
        self._desk: _Desk | None = None
        self._first = int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> Journal:
        if self._first:
            self._closing.enter_context(_logging_to(self.console))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._closing:
            if self._desk is not None:
                self._desk.close(finished=error is None)
            elif self._first and error is None:
                self.console.print(f"{self.run.folder} is already finished: nothing left to do")

    def record(self, step: Step) -> None:
        """Take a step: every process calls it, the first one writes."""
        if not self._first:
            return
        if self._desk is None:
            self._desk = _Desk(step.start, self.console, self._closing)
        self._desk.take(step)


class _Desk:
    """The first process's files and display, open from the first step to the last."""

    def __init__(self, start: Start, console: Console, closing: contextlib.ExitStack) -> None:
        self.start, self.folder, self.console = start, start.run.folder, console
        self.began = time.time()
        for name in (METRICS, SKIPPED):
            _forget_after(self.folder / name, start.first)
        for picture in (self.folder / "pictures").glob("step-*"):
            if int(picture.stem.removeprefix("step-")) > start.first:
                picture.unlink()  # of steps that will be done again
        _write(self.folder / "run.txt", describe(start.run))
        _write(self.folder / "environment.json", json.dumps(_environment(start), indent=1))
        self.before = _last_seconds(self.folder / METRICS)
        self.metrics = closing.enter_context((self.folder / METRICS).open("a"))
        self.skipped_lines = closing.enter_context((self.folder / SKIPPED).open("a"))
        self.board = self._open_board()
        self.skipped = collections.Counter((line["file"], line["reason"]) for line in _lines(self.folder / SKIPPED))
        self.recent: list[Step] = []
        self.saved = start.first
        self.last: dict[str, Any] = {}
        self.page_due = 0.0
        self.gallery = _Gallery(start)
        self.introduce()
        self.display = _Display(start, console)
        closing.enter_context(self.display)

    def _open_board(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start.first)

    def introduce(self) -> None:
        run, start = self.start.run, self.start
        parameters = sum(parameter.numel() for parameter in start.model.parameters())
        size = " x ".join(map(str, run.model.size))
        print_ = self.console.print
        print_(f"[bold]{type(run.model).__name__}[/] of {parameters / 1e6:.1f} M parameters on {size} pixels")
        print_(f"{start.stream.samples!r}", highlight=False, markup=False, soft_wrap=True)
        print_(f"{run.batch_size} samples a step, {start.total} steps, {_where(start)}")
        if start.first:
            print_(f"going on after step {start.first}")
        print_(f"everything goes to {self.folder}", highlight=False)

    def take(self, step: Step) -> None:
        self._note_skipped(step)
        self.recent.append(step)
        self.saved = step.saved
        last = step.number == self.start.total or step.stopping
        if step.number % self.start.run.log_every == 0 or last or step.number == self.start.first + 1:
            self._write_metrics()
        self.display.advance(step, self.last)
        if self._picture_due(step.number):
            self._draw(step.number)
        if time.time() > self.page_due:
            self._write_page()

    def _write_metrics(self) -> None:
        steps, step = self.recent, self.recent[-1]
        seconds = sum(one.seconds for one in steps)
        samples = sum(one.samples for one in steps)
        self.last = {
            "step": step.number,
            "steps": self.start.total,
            "epoch": round(step.epoch, 4),
            "samples": step.number * self.start.run.batch_size,
            "loss": sum(one.loss * one.samples for one in steps if one.samples) / samples if samples else None,
            "learning_rate": step.learning_rate,
            "gradient_norm": max(one.gradient_norm for one in steps),
            "samples_per_second": samples / seconds,
            "data_wait": sum(one.data_seconds for one in steps) / seconds,
            "skipped": sum(self.skipped.values()),
            "seconds": round(self.before + time.time() - self.began, 2),
            "time": round(time.time(), 2),
        }
        self.recent = []
        _append(self.metrics, self.last)
        for name in ("loss", "learning_rate", "gradient_norm", "samples_per_second", "data_wait"):
            if self.last[name] is not None:
                self.board.add_scalar(name, self.last[name], step.number)

    def _note_skipped(self, step: Step) -> None:
        for problem in step.skipped:
            key = (problem.name, problem.reason)
            if not self.skipped[key]:
                _log.warning("skipped %s", problem)
            self.skipped[key] += 1
            _append(self.skipped_lines, {"file": problem.name, "reason": problem.reason, "step": step.number})

    def _picture_due(self, number: int) -> bool:
        count, total = self.start.run.pictures, self.start.total
        return count > 0 and (number == total or number * count // total > (number - 1) * count // total)

    def _draw(self, number: int) -> None:
        paths = self.gallery.draw(self.folder / "pictures" / f"step-{number:08d}")
        if paths:
            self.board.add_image("reconstructions", _png(paths[0]), number, dataformats="HWC")

    def _write_page(self) -> None:
        began = time.time()
        report.write(self.folder)
        self.page_due = time.time() + max(PAGE_SECONDS, 50 * (time.time() - began))

    def close(self, *, finished: bool) -> None:
        self.display.stop()
        self.board.close()
        self._write_page()
        if self.skipped:
            files = len({name for name, _ in self.skipped})
            self.console.print(
                f"[yellow]{files} files could not be used, {sum(self.skipped.values())} samples skipped:"
            )
            for (name, reason), count in self.skipped.most_common():
                self.console.print(f"  {count} x {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
        done = self.last.get("step", self.start.first)
        if finished and done == self.start.total:
            self.console.print(f"finished: loss {_number(self.last['loss'])} after {done} steps")
        else:
            at = f"stopped after step {done} of {self.start.total}"
            self.console.print(f"{at}: the same command goes on from step {self.saved}, the last that was saved")
        for name in ("last.pt", "report.html"):
            self.console.print(f"  {self.folder / name}", highlight=False)


class _Gallery:
    """The same few samples under the same masks, so that a run's pictures can be compared."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.x, self.mask = self._choose() if start.run.pictures else (None, None)

    def _choose(self) -> tuple[Tensor | None, Tensor | None]:
        samples, model, seed = self.start.stream.samples, self.start.model, self.start.run.seed
        chosen = []
        for place in torch.randperm(len(samples), generator=generator(seed, 2)).tolist():
            with contextlib.suppress(UnusableFileError):
                chosen.append(samples.load(place, generator(seed, 3, place)).pixels)
            if len(chosen) == STRIPS:
                break
        if not chosen:
            return None, None
        return normalize(torch.stack(chosen)), model.draw_masks(len(chosen), generator(seed, 4))

    def draw(self, stem: Path) -> list[Path]:
        """Reconstruct and save; nothing where the target cannot be turned back into pixels."""
        model, device = self.start.model, self.start.world.device
        if self.x is None or self.mask is None or not hasattr(model.target, "invert"):
            return []
        stem.parent.mkdir(parents=True, exist_ok=True)
        training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            x = self.x.to(device)
            out = model(x, mask=self.mask)
            rebuilt = model.reconstruct(x, out["prediction"], out["mask"])
        model.train(training)
        return pictures.save(stem, x.cpu(), out["mask"].cpu(), rebuilt.cpu(), rows=STRIPS)


class _Display(contextlib.AbstractContextManager["_Display"]):
    """A progress bar on a terminal; a line every few seconds elsewhere."""

    def __init__(self, start: Start, console: Console) -> None:
        self.start, self.console = start, console
        self.printed = 0.0
        self.spent = 0.0
        self.bar = Progress(
            TextColumn("[bold]step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            _Status(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=start.total, completed=start.first, status="")

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.bar.stop()

    def advance(self, step: Step, metrics: dict[str, Any]) -> None:
        if step.number == self.start.first + 1:
            self.bar.start()
        self.spent += step.seconds
        left = self.spent / (step.number - self.start.first) * (self.start.total - step.number)
        status = (
            f"loss {_number(metrics['loss'])}  lr {metrics['learning_rate']:.2e}  "
            f"{metrics['samples_per_second']:.1f} samples/s  data {metrics['data_wait']:.0%}  {_duration(left)} left"
        )
        self.bar.update(self.task, completed=step.number, status=status)
        fresh = metrics["step"] == step.number
        if (
            not self.console.is_terminal
            and fresh
            and (time.time() - self.printed > 5 or step.number == self.start.total)
        ):
            self.printed = time.time()
            self.console.print(f"step {step.number}/{self.start.total}  {status}", highlight=False, soft_wrap=True)


class _Status(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        return Text(str(task.fields["status"]), no_wrap=True)


def _where(start: Start) -> str:
    device = torch.cuda.get_device_name(start.world.device) if start.world.device.type == "cuda" else "CPU"
    return f"{start.world.size} x {device}" if start.world.size > 1 else f"on {device}"


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def _environment(start: Start) -> dict[str, str | int]:
    from . import __version__

    return {
        "convmae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": socket.gethostname(),
        "device": _where(start),
        "processes": start.world.size,
        "command": " ".join(sys.argv),
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _append(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                yield json.loads(line)


def _forget_after(path: Path, step: int) -> None:
    """Keep the lines up to a step."""
    _write(path, "".join(json.dumps(line) + "\n" for line in _lines(path) if line["step"] <= step))


def _last_seconds(path: Path) -> float:
    return max((float(line["seconds"]) for line in _lines(path)), default=0.0)


def _png(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@contextlib.contextmanager
def _logging_to(console: Console) -> Iterator[None]:
    """The framework's log lines on this console, above the progress bar, unless the user set up logging."""
    logs = [logging.getLogger(name) for name in ("convmae", "video")]
    if logging.getLogger().handlers:
        yield
        return
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=None)
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log in logs:
            log.removeHandler(handler)
            log.setLevel(logging.NOTSET)
