"""Lists of videos in text files, as Kinetics and most other sets come, and their exchange with pytorchvideo."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convmae.data import UNLABELLED
from convmae.listing import Listing

SHOWN = 5  # lines that an error names

Row = tuple[str, str | None]


def read_list(path: Path) -> Listing:
    """Read a list of videos, one a line; nothing of what it names is opened.

    A line is `path label`, split at a space or tab, or `path,label`; or `path frames label`, as lists of folders of
    frames have it; or a path alone, without a class. What separates is found out from the whole file, and a path may
    hold it as well: the label is what comes last. A label is a number, or a class's name; then classes are numbered in
    sorted order. Empty lines and those that begin with # are passed over, and so is a first line `path,label`.

    Paths stay as they are; relative ones are meant relative to the folder of the list.

    Raises ValueError for a file that is not text, holds no line, names a file twice, or has lines that do not fit the
    others, the first of which are named.
    """
    lines = _lines(path)
    separate, kind = _separator([line for _, line in lines])
    rows = [(number, line, separate(line)) for number, line in lines]
    if rows[0][2][1] in ("label", "class") and rows[0][2][0].split(",")[0] in ("path", "video", "file", "filename"):
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{path} lists no video")
    if wrong := [(number, line) for number, line, (name, label) in rows if not name or label == ""]:
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
    found = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    found = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path} lists no video: it is empty")
    return found


def _separator(lines: Sequence[str]) -> tuple[Callable[[str], Row], str]:
    """How to take a line apart, and what it should look like."""
    for mark, kind in ((",", "`path,label`"), ("\t", "`path`, a tab, `label`"), (" ", "`path label`")):
        with_it = sum(mark in line and _is_label(line.rpartition(mark)[2]) for line in lines)
        if 2 * with_it > len(lines) and (mark != " " or _labels_after_spaces(lines)):
            return (_by_comma if mark == "," else partial(_by_last, mark)), kind
    return (lambda line: (line, None)), "a path"


def _is_label(text: str) -> bool:
    """Whether it may be a label: no path, and no name of a file."""
    return bool(text.strip()) and "/" not in text and Path(text.strip()).suffix.lower() not in _ENDINGS


_ENDINGS = frozenset((".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts"))


def _labels_after_spaces(lines: Sequence[str]) -> bool:
    """Whether most lines end in a number, or hold a file's ending before their last word: paths may hold spaces."""
    parts = [line.rpartition(" ") for line in lines]
    return 2 * sum(word.isdigit() or Path(path).suffix.lower() in _ENDINGS for path, _, word in parts) > len(lines)


def _by_comma(line: str) -> Row:
    if not line.startswith('"'):
        return _by_last(",", line)
    fields = next(csv.reader([line], skipinitialspace=True))
    return (_without_count(",".join(fields[:-1]), ","), fields[-1].strip()) if len(fields) > 1 else (line, "")


def _by_last(mark: str, line: str) -> Row:
    path, found, label = line.rpartition(mark)
    if not found:
        return line, ""
    return _without_count(path.strip(), mark), label.strip()


def _without_count(path: str, mark: str) -> str:
    """The path of a folder of frames without their number, which comes between path and label."""
    before, _, last = path.rpartition(mark)
    return before.strip() if before and last.strip().isdigit() and not Path(before).suffix else path


def _labelled(path: Path, rows: Sequence[tuple[int, str, Row]], kind: str) -> Listing:
    names, labels = [name for _, _, (name, _) in rows], [label for _, _, (_, label) in rows]
    if labels[0] is None:
        return Listing.of(names, [UNLABELLED] * len(names))
    numbers = [label is not None and label.lstrip("-").isdigit() for label in labels]
    if all(numbers):
        values = [int(label or 0) for label in labels]
        if wrong := [(row[0], row[1]) for row, value in zip(rows, values, strict=True) if value < UNLABELLED]:
            raise ValueError(complaint(path, wrong, "labels are numbers from 0, or -1 for none"))
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
