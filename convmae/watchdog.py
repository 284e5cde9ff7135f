"""Ends a process that hangs: an idle cluster says nothing, and costs as much as a busy one."""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

STDERR = 2


class Watchdog:
    """Ends this process with exit code 1 when no `beat` came for so long, after printing where every thread is.

    Args:
        minutes: the longest time between two beats.
        last_words: called with what happened before the process ends.
    """

    def __init__(self, minutes: float, last_words: Callable[[str], None]) -> None:
        self.seconds, self.last_words = 60 * minutes, last_words
        self.due, self.armed = time.monotonic() + self.seconds, -math.inf
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._wait, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()  # it must not be what holds on to the model while the interpreter shuts down
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """All is well."""
        now = time.monotonic()
        self.due = now + self.seconds
        if now > self.armed + self.seconds / 10:
            # The thread below needs the interpreter; this one does not, should what hangs hold on to it.
            faulthandler.dump_traceback_later(1.2 * self.seconds + 30, exit=True, file=STDERR)
            self.armed = now

    def _wait(self) -> None:
        while not self.ended.wait(max(0, self.due - time.monotonic())):
            if time.monotonic() < self.due:
                continue
            words = f"no step in {self.seconds / 60:g} minutes: this process hangs, or waits for one that does"
            os.write(STDERR, f"\n{words}; it ends. Its threads:\n".encode())
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            self.last_words(words)
            os._exit(1)
