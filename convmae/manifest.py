"""What a scan found out about the files of a data set: a line of JSON for each, beside the data.

`python -m video.scan ROOT` writes it; `video.videos.Videos` reads it, if it is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import write_whole

NAME = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a file.

    Args:
        file: its path, as it is listed: relative to the root, or as a list has it.
        bytes: its size when it was looked at.
        modified: when it was written to last, in seconds since 1970.
        usable: whether something can be learnt from it.
        reason: why it is not usable; or, where only a part is intact, what is wrong with the rest.
        frames: how many there are, as readers count them.
        fps: frames of a second, on average; 0: not known.
        height, width: of a frame in pixels, upright.
        seconds: from the first frame to the end of the last.
        intact: the longest run of undamaged frames, first and stop; `(0, frames)` where all are.
        reader: the reader that gives all frames as they are; empty: the one that is asked first.
        codec: how the frames are encoded.
        quick: whether only some frames were looked at.
    """

    file: str
    bytes: int
    modified: float
    usable: bool
    reason: str = ""
    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    seconds: float = 0.0
    intact: tuple[int, int] = (0, 0)
    reader: str = ""
    codec: str = ""
    quick: bool = False

    @property
    def partly(self) -> bool:
        """Whether it is usable, but not all of it."""
        return self.usable and bool(self.reason)


def beside(root: Path) -> Path:
    """Where the manifest of a folder, or of a list file, is kept."""
    return root / NAME if root.is_dir() else root.with_name(f"{root.name}.{NAME}")


def load(path: Path) -> dict[str, Entry]:
    """The newest entry of each file, by its name.

    A last line that was cut off by a kill is left out. Raises ValueError for any other line that is not an entry.
    """
    entries: dict[str, Entry] = {}
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(json.loads(line))
        except (ValueError, TypeError, KeyError) as problem:
            if number == len(lines):  # every whole line ends
                break
            raise ValueError(
                f"{path}, line {number}: not an entry of a manifest ({type(problem).__name__}: {problem}). "
                "Remove the line, or the file, and scan again."
            ) from problem
        entries[entry.file] = entry
    return entries


def _entry(found: Any) -> Entry:
    names = {field.name for field in dataclasses.fields(Entry)}
    values = {name: value for name, value in found.items() if name in names}
    if "intact" in values:
        first, stop = values["intact"]
        values["intact"] = (int(first), int(stop))
    return Entry(**values)


def line_of(entry: Entry) -> bytes:
    """An entry as a line of JSON."""
    return json.dumps(dataclasses.asdict(entry)).encode() + b"\n"


def append(descriptor: int, entry: Entry) -> None:
    """Add an entry to the open file, in one write: a kill leaves whole lines, and at most one that is cut off."""
    os.write(descriptor, line_of(entry))


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the manifest by these entries, sorted by file."""
    write_whole(path, b"".join(line_of(entry) for entry in sorted(entries, key=lambda entry: entry.file)))
