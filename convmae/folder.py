"""A folder as a data set: the part of it that is taken, with classes numbered alike, and what manifests know of it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from . import manifest
from .data import UNLABELLED
from .listing import Listing, listing
from .manifest import Entry

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "validate", "validation", "test")
"""Folders that hold parts of one data set, by their usual names."""


class Unusable(NamedTuple):
    """A file that cannot be used: its name, why, and its label, or `UNLABELLED` where it has none or it is unknown."""

    name: str
    reason: str
    label: int


def part(root: Path, split: str | int | None, suffixes: Set[str], *, frames: Set[str] = frozenset()) -> Listing:
    """List a folder, as `convmae.listing.listing` does, or the subfolder `split` of it: paths stay relative to `root`.

    The classes of a split are numbered over all of `SPLITS` that are there: folders right below any of them count, even
    empty ones. So a class has the same number in each.

    Raises ValueError where `root` has no such subfolder, and says which it has; else as `listing` does.
    """
    if split is None or not Path(root).is_dir():
        return listing(root, suffixes, frames=frames)
    there = _folders(Path(root))
    if str(split) not in there:
        raise ValueError(
            f"root={str(root)!r} has no subfolder split={split!r}, but {', '.join(there) or 'none at all'}"
        )
    inside = str(split)
    found = listing(root / inside, suffixes, frames=frames)
    files = [os.path.join(inside, name) for name in found.files]
    if not found.classes:
        return Listing.of(files, found.labels.tolist())
    parts = [name for name in there if name in SPLITS or name == inside]
    classes = sorted({*found.classes, *(name for each in parts for name in _folders(root / each))})
    number = {name: label for label, name in enumerate(classes)}
    labels = [label if label == UNLABELLED else number[found.classes[label]] for label in found.labels.tolist()]
    return Listing.of(files, labels, classes)


def _folders(root: Path) -> list[str]:
    """The subfolders of a folder, by name, without hidden ones."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def entries(root: Path | None, files: Iterable[str], named: Path | None) -> dict[str, Entry]:
    """What manifests know: the one that is named, or those beside the root, if any, and in the folders right below it.

    Raises ValueError where the one that is named is not there, or one is not a manifest.
    """
    if named is not None:
        if not named.is_file():
            raise ValueError(f"manifest={str(named)!r} is not there: `python -m video.scan` writes one")
        return manifest.load(named)
    if root is None:
        return {}
    found: dict[str, Entry] = {}
    below = {name.partition(os.sep)[0] for name in files if os.sep in name} if root.is_dir() else set()
    for inside in sorted(below):
        if (path := root / inside / manifest.NAME).is_file():
            found |= {os.path.join(inside, name): entry for name, entry in manifest.load(path).items()}
    if (path := manifest.beside(root)).is_file():
        found |= manifest.load(path)
    return found


class Known(NamedTuple):
    """The files of a listing that manifests do not call unusable, what is known of each, and those left out."""

    listing: Listing
    entries: list[Entry | None]
    left_out: tuple[Unusable, ...]


def without_unusable(found: Listing, entries: Mapping[str, Entry], base: Path) -> Known:
    """Leave out the files that manifests call unusable, and say how many for which reason.

    Raises ValueError where none is left.
    """
    known = [entries.get(name) for name in found.files] if entries else [None] * len(found.files)
    kept = [index for index, entry in enumerate(known) if entry is None or entry.usable]
    if not kept:
        raise ValueError(f"all {len(known)} files in {base} are unusable, as their manifest has it")
    left_out = tuple(
        Unusable(os.path.join(base, found.files[index]), entry.reason, int(found.labels[index]))
        for index, entry in enumerate(known)
        if entry is not None and not entry.usable
    )
    for reason, count in Counter(one.reason for one in left_out).most_common():
        log.info("left out, as the manifest has it: %d x %s", count, reason)
    unknown = sum(entry is None for entry in known) if entries else 0
    if unknown:
        log.warning("%d files are not in the manifest: `python -m video.scan` looks at them", unknown)
    return Known(found.take(kept) if left_out else found, [known[index] for index in kept], left_out)
