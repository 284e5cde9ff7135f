"""Lists of videos in text files, as Kinetics and most other sets come, and their exchange with pytorchvideo."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convmae.data import UNLABELLED
from convmae.listing import Listing

VIDEO_SUFFIXES = frozenset(
    [".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"]
)
"""Endings of files that are taken for videos, in any case."""

SHOWN = 5  # lines that an error names
MOST_CLASSES = 1_000_000  # a larger label is a time or an identifier

Row = tuple[str, str | None]


def read_list(path: Path) -> Listing:
    """Read a list of videos, one a line; nothing of what it names is opened.

    A line is `path label`, split at a space or tab, or `path,label`; or `path frames label`, as lists of folders of
    frames have it, and `path 0 -1`, without a class; or a path alone, without a class. Which of these is found out from
    the whole file. A path may hold what separates as well: the label is what comes last. A label is a number, or a
    class's name; then classes are numbered in sorted order. Empty lines and those that begin with # are passed over,
    and so is a first line `path,label`.

    Paths stay as they are; relative ones are meant relative to the folder of the list.

    Raises ValueError for a file that is not text, holds no line, names a file twice, or has lines that do not fit the
    others, the first of which are named.
    """
    lines = _lines(path)
    if _HEADER.fullmatch(lines[0][1]):
        if lines[0][1].count(",") > 1 and not re.search("frames|count", lines[0][1]):
            raise ValueError(f"{path} has the columns {lines[0][1]}: keep path,label alone")
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{path} lists no video")
    separate, kind = _layout([line for _, line in lines])
    rows = [(number, line, separate(line)) for number, line in lines]
    if wrong := [(number, line) for number, line, row in rows if not _fits(*row)]:
        raise ValueError(complaint(path, wrong, f"expected {kind}"))
    names = [name for _, _, (name, _) in rows]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        again = [(number, line) for number, line, (name, _) in rows if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise ValueError(complaint(path, again, "each video may be listed once, but these were listed before"))
    return _labelled(path, rows, kind)


def complaint(path: Path, wrong: Sequence[tuple[int, str]], expected: str) -> str:
    """An error text about the lines of a file that are wrong, with the first of them."""
    lines = "".join(f"\n  line {number}: {line[:200]!r}" for number, line in wrong[:SHOWN])
    more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f"{path}: {expected}:{lines}{more}"


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that say something, numbered from 1."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{path} is not a list of videos: it is not text (byte {problem.start}). A list has a line "
            "`path label` or `path,label` for each video"
        ) from problem
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem
    if "\0" in text:
        raise ValueError(f"{path} is not a list of videos: it holds zero bytes")
    found = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    found = [(number, line) for number, line in found if line and (line[0] != "#" or _ENDING.search(line))]
    if not found:
        raise ValueError(f"{path} lists no video: it is empty")
    return found


def _layout(lines: Sequence[str]) -> tuple[Callable[[str], Row], str]:
    """How to take a line apart, and what it should look like: as it does for more than half of them."""
    for sure in (True, False):
        for mark, kind in _KINDS[: None if sure else 2]:  # a space before what may be no label means nothing
            rows = [_split(line, mark) for line in lines if mark in line]
            bare = [(_without_count(name, mark), label) for name, label in rows]
            if 2 * sum(_fits(*row) and (not sure or _is_sure(*row)) for row in bare) > len(lines):
                if 2 * sum(short != name for (short, _), (name, _) in zip(bare, rows, strict=True)) > len(lines):
                    return partial(_split_off_count, mark=mark), kind.replace("path", "path frames", 1)
                return partial(_split, mark=mark), kind
    return (lambda line: (line, None)), "a path alone (names of classes with spaces go after a comma or a tab)"


_KINDS = ((",", "`path,label`"), ("\t", "`path`, a tab, `label`"), (" ", "`path label`"))
_HEADER = re.compile(r"\w*(path|video|file|clip|name)\w*([\s,]+\w+)*[\s,]+\w*(label|class|target)\w*", re.IGNORECASE)
_ENDING = re.compile(rf"({'|'.join(map(re.escape, sorted(VIDEO_SUFFIXES)))})(?=[\s,;|]|$)", re.IGNORECASE)
_NUMBER = re.compile("-?[0-9]+")


def _fits(name: str, label: str | None) -> bool:
    """Whether it may be a path, in which nothing comes after a file's ending, and a label, which is no file."""
    file = os.path.basename(name)
    whole = bool(name) and (os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES or not _ENDING.search(file))
    return whole and (label is None or (bool(label) and "/" not in label and not _ENDING.search(label)))


def _is_sure(name: str, label: str | None) -> bool:
    """Whether it can be nothing but a path and a label: it is a number, or comes after a file's ending."""
    return bool(_NUMBER.fullmatch(label or "")) or os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _split(line: str, mark: str) -> Row:
    if mark == "," and '"' in line:
        fields = next(csv.reader([line], skipinitialspace=True))
        return ",".join(fields[:-1]), fields[-1].strip()
    name, _, label = line.rpartition(mark)
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] == '"' else name, label.strip()


def _split_off_count(line: str, mark: str) -> Row:
    name, label = _split(line, mark)
    short = _without_count(name, mark)
    return ("" if short == name else short), label


def _without_count(name: str, mark: str) -> str:
    """The path without the number of frames that comes between it and the label, if one does."""
    before, _, last = name.rpartition(mark)
    return before.strip() if before and last.strip().isdecimal() else name


def _labelled(path: Path, rows: Sequence[tuple[int, str, Row]], kind: str) -> Listing:
    names, labels = [name for _, _, (name, _) in rows], [label for _, _, (_, label) in rows]
    if labels[0] is None:
        return Listing.of(names, [UNLABELLED] * len(names))
    numbers = [bool(_NUMBER.fullmatch(label or "")) for label in labels]
    if all(numbers):
        values = [int(label or 0) for label in labels]
        if wrong := [(row[0], row[1]) for row, value in zip(rows, values, strict=True) if value < UNLABELLED]:
            raise ValueError(complaint(path, wrong, "labels are numbers from 0, or -1 for none"))
        if wrong := [(row[0], row[1]) for row, value in zip(rows, values, strict=True) if value >= MOST_CLASSES]:
            raise ValueError(complaint(path, wrong, f"labels are numbers of classes, below {MOST_CLASSES}"))
        return Listing.of(names, values, map(str, range(max(values) + 1)))
    if any(numbers):
        few = sum(numbers) * 2 < len(numbers)
        wrong = [(row[0], row[1]) for row, number in zip(rows, numbers, strict=True) if number == few]
        raise ValueError(complaint(path, wrong, f"expected {kind}, all labels numbers or all names, unlike here"))
    classes = sorted({str(label) for label in labels})
    place = {name: number for number, name in enumerate(classes)}
    return Listing.of(names, [place[str(label)] for label in labels], classes)


def labeled_paths(listing: Listing, base: Path) -> Any:
    """The videos as `pytorchvideo.data.labeled_video_paths.LabeledVideoPaths`, for pipelines of pytorchvideo."""
    from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

    pairs = [(name, int(label)) for name, label in zip(listing.files, listing.labels, strict=True)]
    return LabeledVideoPaths(pairs, path_prefix=str(base))


def from_labeled_paths(paths: Any) -> Listing:
    """The videos of a `LabeledVideoPaths`, such as its `from_path` reads; unlabelled where a label is none."""
    pairs = [paths[index] for index in range(len(paths))]
    labels = [UNLABELLED if about.get("label") is None else int(about["label"]) for _, about in pairs]
    return Listing.of([path for path, _ in pairs], labels, map(str, range(max(labels, default=-1) + 1)))
