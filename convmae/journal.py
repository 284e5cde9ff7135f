"""What a run tells: progress on the console, and in its folder metrics, skipped files, TensorBoard, pictures, a page.

All of it is written by the first process alone. Metrics are lines of JSON that survive a stop or a kill: a run
that goes on drops the lines of steps that it does again, and writes the very lines it would have written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.progress import Task as ProgressTask
from rich.text import Text

from . import report, snapshot
from .builders import MAE
from .cmae import CMAE
from .files import append_line, lines, write_whole
from .gallery import Gallery
from .nn.masked_autoencoder import MaskedAutoencoder
from .progress import Progress, Start, Step
from .run import Pretrain, Run
from .run_folder import LAST, METRICS, SCORES, SKIPPED, job_id, note

_log = logging.getLogger(__name__)

SHOWN = ("loss", "learning_rate", "gradient_norm", "bad_steps", "samples_per_second", "data_wait", "skipped")
PAGE_SECONDS = 30  # least time between two writings of the page, longer where they take long


def describe(run: Run) -> str:
    """A run as readable code, every field on its line and the model verb by verb."""
    lines = [f"{type(run).__name__}("]
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        if isinstance(value, MAE | CMAE):
            lines.append(f"    {field.name}={_verbs(value, '    ')},")
        else:
            lines.append(f"    {field.name}={value!r},")
    return "\n".join([*lines, ")"]) + "\n"


def _verbs(builder: MAE | CMAE, margin: str) -> str:
    """A builder verb by verb, each on a line of its own below."""
    inner = f"{margin}    "
    within = f"\n{inner}mae={_verbs(builder.mae, inner)}\n{margin}" if isinstance(builder, CMAE) else ""
    verbs = [
        re.sub(r", (?=ConvStage|AttentionStage)", f",\n{inner}    ", verb) for verb in builder.verbs(defaults=True)
    ]
    return "".join([f"{type(builder).__name__}({within})", *(f"\n{inner}{verb}" for verb in verbs)])


class Journal:
    """Keeps a run's journal; a context manager, whose `record` every process calls after each step.

    Only the first process writes and speaks. The others take part where a picture needs the whole model.
    """

    def __init__(self, start: Start, console: Console) -> None:
        self.start, self.run, self.folder, self.console = start, start.run, start.run.folder, console
        self.pictures = start.run.pictures if isinstance(start.run, Pretrain) else 0
        draws = self.pictures > 0 and isinstance(start.model, MaskedAutoencoder)
        self.gallery = Gallery(start) if draws and (start.world.first or start.sharded) else None
        self.examination = start.run.examination(start.learner, start.world, start.beat)
        self.closing = contextlib.ExitStack()
        self.number, self.saved = start.first, start.first
        self.untested = False
        self.last: dict[str, Any] = {}
        self.page_due = 0.0

    def __enter__(self) -> Journal:
        if self.start.world.first:
            with contextlib.ExitStack() as closing:
                self._open(closing)
                self.closing = closing.pop_all()
        self._draw_if_due(self.start.first, missing_only=True)
        return self

    def _open(self, closing: contextlib.ExitStack) -> None:
        start = self.start
        untold = self._forget_after(start.progress)
        write_whole(self.folder / "run.txt", describe(start.run))
        write_whole(self.folder / "environment.json", json.dumps(_environment(start), indent=1))
        self.board = self._open_board(start.first)
        closing.callback(lambda: self.board.close())
        self.wandb = _open_wandb(start)
        self._introduce()
        self.display = _Display(start, self.console)
        closing.enter_context(self.display)
        if untold:
            self._write_line(start.first, start.progress)

    def _forget_after(self, progress: Progress) -> bool:
        """Forget what will be told again; whether the last line is missing, as the run was killed before it came."""
        window, step = progress.window, progress.step
        told = _keep(self.folder / METRICS, step)
        _keep(self.folder / SCORES, step)
        untold = window.closed and step > 0 and all(line["step"] != step for line in told)
        skipped = _keep(self.folder / SKIPPED, step if window.closed and not untold else window.since - 1)
        self.skipped = collections.Counter((line["file"], line["reason"]) for line in skipped)
        self.skipped.update((name, reason) for name, reason, _ in window.skipped if untold or not window.closed)
        for picture in (self.folder / "pictures").glob("step-*"):
            if int(picture.stem.removeprefix("step-")) > step:
                picture.unlink()
        return untold

    def _open_board(self, first: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=first + 1)

    def _introduce(self) -> None:
        run, start = self.run, self.start
        target = getattr(start.model, "target_encoder", None)
        kept = 0 if target is None else sum(parameter.numel() for parameter in target.parameters())
        parameters = sum(parameter.numel() for parameter in start.model.parameters()) - kept
        size = " x ".join(map(str, run.model.size))
        print_ = self.console.print
        if start.first >= start.total:
            done = f"{self.folder} is already finished: nothing left to do, after {start.first} of {start.total} steps"
            print_(done, highlight=False, markup=False, soft_wrap=True)
            return
        print_(f"[bold]{_name(run.model)}[/] of {parameters / 1e6:.1f} M parameters on {size} pixels")
        print_(f"{start.samples!r}", highlight=False, markup=False, soft_wrap=True)
        print_(f"{run.batch_size} samples a step, {start.total} steps, {_where(start)}")
        if start.first:
            print_(f"going on after step {start.first}")
        print_(f"everything goes to {self.folder}", highlight=False, markup=False, soft_wrap=True)
        event = "resumed" if start.first else "started"
        note(self.folder, event, start.first, f"{_where(start)}, {socket.gethostname()}")

    def record(self, step: Step) -> None:
        """Take a step."""
        self.number, self.saved = step.number, step.saved
        if self.start.world.first:
            self._write(step)
        if step.back_to is not None:
            self._go_back(step.progress)
        else:
            self._draw_if_due(step.number)
            self._examine_if_due(step.number)

    def _write(self, step: Step) -> None:
        for event in step.events:
            note(self.folder, event.kind, step.number, event.text)
        self._warn_of_skipped(step)
        if step.back_to is None and step.progress.window.closed:
            self._write_line(step.number, step.progress)
        self.display.advance(step, self._line(step.number, step.progress))
        if time.time() > self.page_due:
            self._write_page()

    def _go_back(self, progress: Progress) -> None:
        self.number = progress.step
        if self.start.world.first:
            self._forget_after(progress)
            self.board.close()
            self.board = self._open_board(progress.step)

    def _line(self, number: int, progress: Progress) -> dict[str, Any]:
        window = progress.window
        return {
            "step": number,
            "steps": self.start.total,
            "since": window.since,
            "epoch": round(number * self.run.batch_size / self.start.epoch, 4),
            "samples": number * self.run.batch_size,
            "loss": window.loss / window.samples if window.samples else None,
            **{name: value / window.samples for name, value in window.watched.items()},
            "learning_rate": self.run.rate(number - 1, self.start.total),
            "gradient_norm": window.gradient_norm,
            "bad_steps": progress.bad_steps,
            "samples_per_second": window.samples / window.seconds if window.seconds else 0.0,
            "data_wait": window.data_seconds / window.seconds if window.seconds else 0.0,
            "skipped": progress.skipped,
            "seconds": round(progress.seconds, 2),
            "time": round(time.time(), 2),
        }

    def _write_line(self, number: int, progress: Progress) -> None:
        self.last = self._line(number, progress)
        for name, reason, step in progress.window.skipped:
            append_line(self.folder / SKIPPED, {"file": name, "reason": reason, "step": step})
        append_line(self.folder / METRICS, self.last)
        names = (*SHOWN, *progress.window.watched)
        shown = {name: self.last[name] for name in names if self.last[name] is not None}
        for name, value in shown.items():
            self.board.add_scalar(name, value, number)
        if self.wandb is not None:
            self.wandb.log(shown, step=number)

    def _warn_of_skipped(self, step: Step) -> None:
        for problem in step.skipped:
            key = (problem.name, problem.reason)
            if not self.skipped[key]:
                _log.warning("skipped %s", problem)
            self.skipped[key] += 1

    def _draw_if_due(self, number: int, *, missing_only: bool = False) -> None:
        """A picture at so many places of the run; one that a kill left out is drawn when the run goes on."""
        count, total = self.pictures, self.start.total
        due = number > 0 and count > 0 and (number * count // total > (number - 1) * count // total)
        stem = self.folder / "pictures" / f"step-{number:08d}"
        if missing_only:
            due = self.start.world.tell(lambda: due and not list(stem.parent.glob(f"{stem.name}*")))
        if due and self.gallery is not None:
            paths = self.gallery.draw(stem)
            if paths and self.start.world.first:
                self.board.add_image("reconstructions", _png(paths[0]), number, dataformats="HWC")

    def interrupted(self, saved: int) -> None:
        """Take note of a stop between two steps."""
        self.saved, self.untested = saved, True
        if self.start.world.first:
            note(self.folder, "stopping", self.number, "asked to, by a signal, while being tested")

    def examine_if_missing(self) -> None:
        """What a stop or a kill has left out, and what comes before the first step."""
        self._examine_if_due(self.start.first, missing_only=True)

    def _examine_if_due(self, number: int, *, missing_only: bool = False) -> None:
        """What the run has learnt so far, after every so many epochs and at the end."""
        start, examination = self.start, self.examination
        if examination is None:
            return
        epochs = [at * self.run.batch_size / start.epoch / examination.every for at in (number - 1, number)]
        last = number == start.total
        due = examination.at_start if number == 0 else last or math.floor(epochs[1]) > math.floor(epochs[0])
        if missing_only:
            due = start.world.tell(lambda: due and all(line["step"] != number for line in lines(self.folder / SCORES)))
        if not due:
            return
        began = time.monotonic()
        if last and start.world.first:
            note(self.folder, "testing", number, "what the run has learnt, in the end")
        scores = examination.take(last=last)
        if start.world.first:
            self._write_scores(number, scores, time.monotonic() - began)

    def _write_scores(self, number: int, scores: dict[str, float], seconds: float) -> None:
        epoch = round(number * self.run.batch_size / self.start.epoch, 4)
        append_line(self.folder / SCORES, {"step": number, "epoch": epoch, **scores, "seconds": round(seconds, 2)})
        for name, value in scores.items():
            self.board.add_scalar(name, value, number)
        if self.wandb is not None:
            self.wandb.log(scores, step=number)
        said = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.console.print(f"epoch {epoch:g}: {said}", highlight=False, markup=False, soft_wrap=True)

    def _write_page(self) -> None:
        began = time.time()
        report.write(self.folder)
        self.page_due = time.time() + max(PAGE_SECONDS, 50 * (time.time() - began))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.closing:
            if self.start.world.first:
                self._close(failed=error is not None)

    def _close(self, *, failed: bool) -> None:
        self.display.stop()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))
        with contextlib.suppress(OSError) if failed else contextlib.nullcontext():  # the disk may be what failed
            self._write_page()
        print_ = self.console.print
        if self.skipped:
            files = len({name for name, _ in self.skipped})
            print_(f"[yellow]{files} files could not be used, {sum(self.skipped.values())} samples skipped:")
            for (name, reason), count in self.skipped.most_common():
                print_(f"  {count} x {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
        if self.number < self.start.total or failed or self.untested:
            at = f"stopped after step {self.number} of {self.start.total}"
            print_(f"{at}: the same command goes on from step {self.saved}, the last that was saved")
        elif self.last:
            print_(f"finished: loss {_number(self.last['loss'])} after {self.number} steps")
            note(self.folder, "finished", self.number, f"loss {_number(self.last['loss'])}")
        for name in (LAST, "report.html"):
            print_(f"  {self.folder / name}", highlight=False, markup=False, soft_wrap=True)


def _open_wandb(start: Start) -> Any:
    """The run's page at Weights & Biases, the same one whenever it goes on; None where none is wanted."""
    if start.run.wandb is None:
        return None
    import wandb

    folder = start.run.folder.absolute()
    page = folder / "wandb-id"
    if not page.exists():
        write_whole(page, uuid.uuid4().hex[:16])
    return wandb.init(project=start.run.wandb, name=folder.name, id=page.read_text(), resume="allow", dir=str(folder))


class _Display(contextlib.AbstractContextManager["_Display"]):
    """A progress bar on a terminal; a line every few seconds elsewhere."""

    def __init__(self, start: Start, console: Console) -> None:
        self.start, self.console = start, console
        self.printed = 0.0
        self.spent, self.taken = 0.0, 0
        self.bar = Bar(
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
        if self.taken == 1:
            self.bar.start()
        self.spent, self.taken = self.spent + step.seconds, self.taken + 1
        left = self.spent / self.taken * (self.start.total - step.number)
        status = (
            f"loss {_number(metrics['loss'])}  lr {metrics['learning_rate']:.2e}  "
            f"{metrics['samples_per_second']:.1f} samples/s  data {metrics['data_wait']:.0%}  {_duration(left)} left"
        )
        self.bar.update(self.task, completed=step.number, status=status)
        now = time.time() - self.printed > 5 and step.progress.window.closed
        if not self.console.is_terminal and (now or step.number == self.start.total):
            self.printed = time.time()
            self.console.print(f"step {step.number}/{self.start.total}  {status}", highlight=False, soft_wrap=True)


class _Status(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        return Text(str(task.fields["status"]), no_wrap=True)


def _name(builder: MAE | CMAE) -> str:
    return f"CMAE over {type(builder.mae).__name__}" if isinstance(builder, CMAE) else type(builder).__name__


def _where(start: Start) -> str:
    device = torch.cuda.get_device_name(start.world.device) if start.world.device.type == "cuda" else "CPU"
    return f"{start.world.size} x {device}" if start.world.size > 1 else f"on {device}"


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def _environment(start: Start) -> dict[str, Any]:
    return {
        "code": snapshot.version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": socket.gethostname(),
        "device": _where(start),
        "processes": start.world.size,
        "job": job_id(),
        "command": " ".join(sys.argv),
    }


def _keep(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to a step, and give them."""
    kept = [line for line in lines(path) if line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _png(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@contextlib.contextmanager
def console_log() -> Iterator[Console]:
    """A console for the first process, with the framework's log lines on it, unless the user set up logging."""
    console = Console()
    if logging.getLogger().handlers:
        yield console
        return
    logs = [logging.getLogger(name) for name in ("convmae", "video")]
    handler: logging.Handler = logging.NullHandler()  # what all have to say is said once
    if int(os.environ.get("RANK", 0)) == 0 and not console.is_terminal:
        handler = logging.StreamHandler(sys.stdout)  # whole lines, to be searched
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    elif int(os.environ.get("RANK", 0)) == 0:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=None)
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield console
    finally:
        for log in logs:
            log.removeHandler(handler)
            log.setLevel(logging.NOTSET)
