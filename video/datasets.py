"""The data sets of the field, as their own downloads lie on disk."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convmae.augmentation import Flip
from convmae.data import UNLABELLED
from convmae.folder import SPLITS, part
from convmae.images import IMAGE_SUFFIXES
from convmae.listing import Listing
from video.clips import Sampling, Segments
from video.lists import VIDEO_SUFFIXES, complaint, read_list
from video.videos import Videos

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kinetics(Videos):
    """Kinetics-400, 600 or 700: a split's folder of classes, or the official csv with the files that it names.

    Args:
        split: the subfolder of `root` with its videos, and the csv's rows; None: all of them. The videos of "train",
            or of a csv's split, may lie in `root` itself.
        annotations: the csv of `label,youtube_id,time_start,time_end,split`; None: subfolders are the classes. A video
            is `ID_000010_000020.mp4` or `ID.mp4`, of any suffix, in a folder of its class or not. No download of
            Kinetics is complete: training leaves out those that are not there, a test counts them as unusable.
    """

    split: str | None = "train"
    annotations: Path | None = None

    def listing(self) -> Listing:
        """The videos and their classes, or those of a list; raises ValueError for none, or a csv that is wrong."""
        if self.root is not None and self.root.is_file():
            if _text(self.root).startswith("label,youtube_id,"):
                raise ValueError(f"{self.root} names no files: it is for annotations=..., with their folder as root")
            return read_list(self.root)
        base = _folder(self)
        inside = self.split if self.split and (base / self.split).is_dir() else None
        if not (inside or self.annotations):
            others = [name for name in SPLITS if (base / name).is_dir()]
            whole = self.split in (None, base.name) or (self.split == "train" and base.name not in SPLITS)
            if others or not whole:
                instead = ", ".join(others) or "no parts at all: split=None takes all of it"
                raise ValueError(f"{base} holds no split={self.split!r}, but {instead}")
        found = part(base, inside, VIDEO_SUFFIXES, frames=IMAGE_SUFFIXES)
        if self.annotations is None:
            return found
        rows, classes = _kinetics_rows(self.annotations, self.split)
        place = {name: number for number, name in enumerate(classes)}
        there = {Path(name).stem: name for name in found.files}
        pairs = [(there.get(cut) or there.get(whole), cut, place[label]) for label, cut, whole in rows]
        count = sum(name is not None for name, _, _ in pairs)
        if not count:
            raise ValueError(f"of {len(rows)} videos of {self.annotations} none is below {base / (inside or '')}")
        if count < len(rows):
            log.warning("%d of %d videos of %s are not there", len(rows) - count, len(rows), self.annotations)
        counted = self.views is not None  # by a test, as unusable
        lost = os.path.join(inside or "", "{}.mp4")
        named = [(name or lost.format(cut), label) for name, cut, label in pairs if name or counted]
        return Listing.of([name for name, _ in named], [label for _, label in named], classes)


def _as_found(folder: Path, names: Sequence[str]) -> list[str]:
    """The names with the ending that the first of them has on the disk: prepared videos end in mp4."""
    first = folder / names[0]
    endings = [ending for ending in sorted(VIDEO_SUFFIXES) if first.with_suffix(ending).is_file()]
    if first.exists() or not endings:
        return list(names)
    return [str(Path(name).with_suffix(endings[0])) for name in names]


def _kinetics_rows(path: Path, split: str | None) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Of each row, of a split or of all: its class, the name of the file cut by the official tool, that of the whole.

    And the classes of all splits in the csv, sorted: so they have the same numbers in each.
    """
    wanted = ("label", "youtube_id", "time_start", "time_end")
    reader = csv.DictReader(io.StringIO(_text(path)))
    if lacking := [name for name in wanted if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path} has no column {', '.join(lacking)}: it is not a csv of Kinetics with labels")
    rows, wrong, classes, splits = [], [], set(), set()
    for number, row in enumerate(reader, start=2):
        start, end = row["time_start"] or "", row["time_end"] or ""
        if not row["youtube_id"] or not row["label"] or not (start.isdecimal() and end.isdecimal()):
            wrong.append((number, ",".join(str(value) for value in row.values())))
            continue
        classes.add(row["label"])
        splits.add(row.get("split") or str(split))
        if split is None or row.get("split") in (None, "", split):
            rows.append((row["label"], f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}", row["youtube_id"]))
    if wrong:
        raise ValueError(complaint(path, wrong, f"expected {','.join(wanted)}, times as whole seconds"))
    if not rows:
        raise ValueError(f"{path} has no row of split {split!r}, but of {', '.join(sorted(splits)) or 'none'}")
    return rows, sorted(classes)


@dataclass(frozen=True, kw_only=True)
class SomethingSomething(Videos):
    """Something-Something V2: `ID.webm`, or folders of frames, in `20bn-something-something-v2/`, `videos/` or `root`.

    Annotations are the json files of its download, `something-something-v2-train.json` or `labels/train.json` and so
    on. Clips are one frame of each of so many segments, as usual for it, and never flipped.

    Raises:
        ValueError: `flip`: left and right tell its classes apart.
    """

    split: Literal["train", "validation", "test"] = "train"
    sampling: Sampling = Segments()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip or any(isinstance(augment, Flip) for augment in self.augment):
            raise ValueError("SomethingSomething(flip=True): left and right tell its classes apart")

    def listing(self) -> Listing:
        """The videos of the split and their classes, of which the test split has none; or those of a list."""
        if self.root is not None and self.root.is_file():
            return read_list(self.root)
        base = _folder(self)
        rows = self._json(self.split)
        places = self._json("labels") if self.split != "test" else {}
        if not isinstance(rows, list) or not isinstance(places, dict):
            raise ValueError(f"the annotations in {self.base} are not those of Something-Something V2")
        if sorted(map(str, places.values())) != sorted(map(str, range(len(places)))):
            raise ValueError(f"{self._annotation('labels')}: expected a number for each template, from 0 on, each once")
        if not rows:
            raise ValueError(f"{self._annotation(self.split)} lists no video")
        classes = [name for name, _ in sorted(places.items(), key=lambda pair: int(pair[1]))]
        labels, wrong = [], []
        for number, row in enumerate(rows, start=1):
            template = re.sub(r"[\[\]]", "", str(row.get("template", ""))) if isinstance(row, dict) else ""
            if not isinstance(row, dict) or "id" not in row or (places and template not in places):
                wrong.append((number, json.dumps(row)))
            labels.append(int(places.get(template, UNLABELLED)))
        if wrong:
            expected = "expected entries with an id, and a template that is among the labels; counted from the first"
            raise ValueError(complaint(self._annotation(self.split), wrong, expected))
        inside = _first(base, ("20bn-something-something-v2", "videos", ""))
        suffix = "" if (inside / str(rows[0]["id"])).is_dir() else ".webm"
        names = _as_found(inside, [f"{row['id']}{suffix}" for row in rows])
        return Listing.of([str((inside / name).relative_to(base)) for name in names], labels, classes)

    def _annotation(self, what: str) -> Path:
        names = (f"something-something-v2-{what}.json", f"labels/{what}.json", f"{what}.json")
        return _first(self.base, (*names, *(f"annotations/{name}" for name in names)))

    def _json(self, what: str) -> Any:
        path = self._annotation(what)
        try:
            return json.loads(_text(path))
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path} cannot be read: {problem}") from problem


@dataclass(frozen=True, kw_only=True)
class UCF101(Videos):
    """UCF101: `CLASS/v_CLASS_g01_c01.avi`, in `UCF-101/` or in `root` itself, and one of its three splits.

    Its lists, `classInd.txt`, `trainlist01.txt`, `testlist01.txt` and so on, lie in `root` or `ucfTrainTestlist/`.
    """

    split: Literal[1, 2, 3] = 1
    train: bool = True

    def listing(self) -> Listing:
        """The videos of the split and their classes; or those of a list."""
        if self.root is not None and self.root.is_file():
            return read_list(self.root)
        base = _folder(self)
        lists = _first(base, ("ucfTrainTestlist", "annotations", ""))
        path = lists / f"{'train' if self.train else 'test'}list{self.split:02}.txt"
        classes = [fields[1] for _, fields in _fields(lists / "classInd.txt", 2)]
        rows = [(number, fields[0]) for number, fields in _fields(path, 1)]
        wrong = [(number, name) for number, name in rows if name.partition("/")[0] not in classes]
        if wrong:
            raise ValueError(complaint(path, wrong, "expected CLASS/FILE, of a class of classInd.txt"))
        inside = _first(base, ("UCF-101", "UCF101", "videos", ""))
        files = [str((inside / name).relative_to(base)) for name in _as_found(inside, [name for _, name in rows])]
        return Listing.of(files, [classes.index(name.partition("/")[0]) for _, name in rows], classes)


@dataclass(frozen=True, kw_only=True)
class HMDB51(Videos):
    """HMDB51: `CLASS/FILE.avi`, in `videos/`, `hmdb51_org/` or in `root` itself, and one of its three splits.

    Its lists, `CLASS_test_split1.txt` and so on, of `FILE.avi 1` (to train), `2` (to test) or `0` (neither), lie in
    `root` or `testTrainMulti_7030_splits/`.
    """

    split: Literal[1, 2, 3] = 1
    train: bool = True

    def listing(self) -> Listing:
        """The videos of the split and their classes; or those of a list."""
        if self.root is not None and self.root.is_file():
            return read_list(self.root)
        base, ending = _folder(self), f"_test_split{self.split}.txt"
        folder = _first(base, ("testTrainMulti_7030_splits", "splits", "annotations", ""))
        lists = sorted(folder.glob(f"*{ending}"))
        if not lists:
            raise ValueError(f"{folder} holds no list CLASS{ending}")
        inside = _first(base, ("videos", "hmdb51_org", ""))
        files, labels, classes = [], [], [path.name.removesuffix(ending) for path in lists]
        for label, path in enumerate(lists):
            rows = list(_fields(path, 2))
            if wrong := [(number, " ".join(fields)) for number, fields in rows if fields[1] not in ("0", "1", "2")]:
                raise ValueError(complaint(path, wrong, "expected FILE.avi and 0, 1 or 2"))
            names = [fields[0] for _, fields in rows if fields[1] == ("1" if self.train else "2")]
            files += [f"{classes[label]}/{name}" for name in names]
            labels += [label] * len(names)
        if not files:
            raise ValueError(f"the lists in {folder} name no video of this part of split {self.split}")
        names = [str((inside / name).relative_to(base)) for name in _as_found(inside, files)]
        return Listing.of(names, labels, classes)


def _folder(source: Videos) -> Path:
    """Where a data set lies; raises ValueError where it is not a folder."""
    if source.root is None or not source.root.is_dir():
        raise ValueError(f"{type(source).__name__}(root={str(source.root)!r}): root is not a folder with the data set")
    return source.root


def _text(path: Path) -> str:
    """A text file, without a byte order mark; raises ValueError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem


def _first(base: Path, names: Iterable[str]) -> Path:
    """The first of these that is there; raises ValueError where none is."""
    names = list(names)
    found = next((base / name for name in names if (base / name).exists()), None)
    if found is None:
        raise ValueError(f"{base} holds none of {', '.join(name.lstrip('/') for name in names)}")
    return found


def _fields(path: Path, least: int) -> Sequence[tuple[int, list[str]]]:
    """The words of each line, with its number; raises ValueError for lines of less, and for an empty file."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}")
    lines = [(number, line.strip()) for number, line in enumerate(_text(path).split("\n"), start=1)]
    rows = [(number, line.split()) for number, line in lines if line]
    if wrong := [(number, " ".join(words)) for number, words in rows if len(words) < least]:
        raise ValueError(complaint(path, wrong, f"expected {least} words in a line"))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
