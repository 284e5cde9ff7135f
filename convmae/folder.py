"""A folder as a data set: the part of it that is taken, with classes numbered alike in all parts."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

from .data import UNLABELLED
from .listing import Listing, listing

SPLITS = ("train", "val", "validate", "validation", "test")
"""Folders that hold parts of one data set, by their usual names."""


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
