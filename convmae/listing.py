"""What a data set consists of: files, their classes, and the classes' names, in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from convmae.data import UNLABELLED


@dataclass(frozen=True, eq=False, repr=False)
class Names(Sequence[str]):
    """Many names in two arrays, not in an object each.

    A loader process shares the memory of the process that it was forked from until one of them writes there, and
    Python writes to an object when it looks at it: in a list, a million names would soon be copied to every process.

    Args:
        text: the names, one after the other, as the file system encodes them.
        ends: where each of them ends, int64.
    """

    text: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The names of an iterable."""
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return Names.of(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[place - 1] if place else 0 : self.ends[place]])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names):
            return NotImplemented
        return self.text == other.text and np.array_equal(self.ends, other.ends)

    def __hash__(self) -> int:
        return hash((self.text, len(self)))

    def __repr__(self) -> str:
        shown = ", ".join(repr(self[index]) for index in range(min(len(self), 3)))
        return f"Names({shown}{', ...' if len(self) > 3 else ''}; {len(self)})"


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of a data set: their paths, the class of each, int32 `(N)`, and the classes' names."""

    files: Names
    labels: NDArray[np.int32]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[str], labels: Iterable[int], classes: Iterable[str] = ()) -> Listing:
        """Files in this order; a label is an index into the classes, or `UNLABELLED`."""
        return cls(Names.of(files), np.fromiter(labels, np.int32), tuple(classes))

    def take(self, indices: Sequence[int]) -> Listing:
        """Some of the files, by index; all of the classes."""
        return Listing(Names.of(self.files[index] for index in indices), self.labels[list(indices)], self.classes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Listing):
            return NotImplemented
        same = self.files == other.files and self.classes == other.classes
        return same and np.array_equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((self.files, self.classes))


def listing(root: Path, suffixes: Set[str], *, frames: Set[str] = frozenset()) -> Listing:
    """List the files below `root` whose suffix, in any case, is one of `suffixes`; nothing is opened.

    A file's class is the subfolder of `root` that it is in, at whatever depth; subfolders are numbered in
    sorted order, those without such files left out. Files directly in `root` are `UNLABELLED`. Links are
    followed, hidden names are skipped. A link that leads nowhere is listed, so that loading reports it.

    With `frames`, a folder that holds no other folder and none of these files, but two or more whose suffix is one of
    `frames`, is listed itself: a video in pictures.

    Raises ValueError where `root` is not a folder or holds no such file.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is not a folder")
    try:
        files = tuple(_walk(str(root), "", suffixes, frames, ()))
    except OSError as problem:
        raise ValueError(f"root={str(root)!r} cannot be listed: {problem}") from problem
    if not files:
        or_frames = ", and no folder of frames" if frames else ""
        raise ValueError(f"root={str(root)!r} holds no file ending in {' '.join(sorted(suffixes))}{or_frames}")
    folders = [file.partition(os.sep)[0] if os.sep in file else None for file in files]
    classes = sorted({folder for folder in folders if folder is not None})
    number = {name: label for label, name in enumerate(classes)}
    return Listing.of(files, (UNLABELLED if folder is None else number[folder] for folder in folders), classes)


def _walk(
    folder: str, inside: str, suffixes: Set[str], frames: Set[str], above: tuple[tuple[int, int], ...]
) -> Iterator[str]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder that we are in
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    endings = [None if entry.is_dir() else os.path.splitext(entry.name)[1].lower() for entry in found]
    if inside and None not in endings and not suffixes & set(endings):
        if sum(ending in frames for ending in endings) > 1:
            yield inside.removesuffix(os.sep)
        return
    for entry, ending in zip(found, endings, strict=True):
        if ending is None:
            yield from _walk(entry.path, f"{inside}{entry.name}{os.sep}", suffixes, frames, (*above, here))
        elif ending in suffixes:
            yield inside + entry.name
