"""Log lines that are seen where nobody has set up logging: in a notebook, in a user's script, in a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGS = tuple(logging.getLogger(name) for name in ("convmae", "video"))
"""What all of the framework logs to."""


@contextmanager
def seen() -> Iterator[None]:
    """Show the framework's log lines on stderr meanwhile, unless something has them already, as a run does."""
    if any(log.hasHandlers() for log in LOGS):
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    levels = [log.level for log in LOGS]
    for log in LOGS:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in zip(LOGS, levels, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)
