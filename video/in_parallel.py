"""Many files, dealt with in other processes: one over which a process hangs or crashes is blamed, the others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class LostError(Exception):
    """A task whose process had to be ended, or ended by itself; the text says how."""


def in_processes(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, seconds: float
) -> Iterator[tuple[Task, Result | Exception]]:
    """Do tasks in other processes, so many at once, and give what became of each, as they finish.

    A process that takes more than so many seconds for a task is ended, and one that crashes is replaced: then a
    `LostError` is given. An error that the work raised is given, not raised. What decoders write to the terminal is not
    shown. Leaving early ends all processes.
    """
    from pebble import ProcessExpired, ProcessPool

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convmae.shards", "video.videos"])  # what takes time to import
    pool = ProcessPool(max_workers=workers, context=context, initializer=_begin)
    remaining, under_way = iter(tasks), dict[Future[Result], Task]()
    try:
        while True:
            for task in islice(remaining, 4 * workers - len(under_way)):
                under_way[pool.schedule(work, (task,), timeout=seconds)] = task
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                task = under_way.pop(future)
                error = future.exception()
                if isinstance(error, TimeoutError):
                    yield task, LostError(f"took more than {seconds:g} s")
                elif isinstance(error, ProcessExpired):
                    code = error.exitcode or 0
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    yield task, LostError(f"ended the process that read it ({how})")
                elif isinstance(error, Exception):
                    yield task, error
                else:
                    yield task, future.result()
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _begin() -> None:
    """Ctrl-C is the parent's; what a damaged file makes a decoder say, its result says better."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Shown:
    """How far it is, on the terminal's error stream: a bar, or where there is no terminal a line every 30 seconds."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn

        self.total = self.done = self.before = self.failed = 0
        self.began = self.said = time.monotonic()
        console = Console(stderr=True)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"))
        self.silent = not console.is_terminal
        self.bar = Progress(*columns, console=console, disable=self.silent)
        self.task = self.bar.add_task("files", total=None, failed=0)

    def __enter__(self) -> Shown:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, total: int, *, before: int = 0) -> None:
        """There are so many files, of which some were done before."""
        self.total, self.done, self.before = total, before, before
        self.began = time.monotonic()
        self.bar.update(self.task, total=total, completed=before)

    def see(self, *, failed: bool) -> None:
        """One more is done."""
        self.done += 1
        self.failed += failed
        self.bar.update(self.task, completed=self.done, failed=self.failed)
        now = time.monotonic()
        if self.silent and now - self.said > 30:
            self.said = now
            rate = (self.done - self.before) / (now - self.began)
            minutes = (self.total - self.done) / rate / 60
            numbers = f"{self.done} of {self.total} files, {self.failed} failed, {rate:.1f}/s, {minutes:.0f} min left"
            print(numbers, file=sys.stderr, flush=True)
