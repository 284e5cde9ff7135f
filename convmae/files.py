"""Files that are whole or not there at all, and lines of JSON that may still be growing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def cache() -> Path:
    """The folder for what can be made or fetched again: `$CONVMAE_CACHE`, or else `~/.cache/convmae`."""
    return Path(os.environ.get("CONVMAE_CACHE") or Path.home() / ".cache" / "convmae")


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces the one at the path once all is written and flushed to the disk.

    A reader sees the old file or the new one. Where writing fails, the old one stays and nothing else is left; a killed
    process leaves its temporary file, `.NAME.PID.tmp`, to `sweep`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write the data, text as UTF-8, making folders where needed; gives the path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder; nobody may be writing there."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON, in one write, flushed to the disk."""
    with path.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file. A line cut off by a kill is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found
