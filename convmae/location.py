"""Where a source of samples is: pointing one elsewhere, as `--data` does."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

S = TypeVar("S")


def has_root(source: object) -> bool:
    """Whether a source can be pointed elsewhere: whether it, or the source that it is made of, has a field `root`."""
    return "root" in _fields(source) or ("source" in _fields(source) and has_root(_inner(source)))


def located(source: S, where: str | Path | None) -> S:
    """The source at a place, or where None is given at its own, as an absolute path.

    Args:
        source: with a field `root`, or made of a `source` that has it.
        where: a folder or file; or a URL, or a pattern of names, where the source takes those.

    Raises:
        ValueError: the source has no root, the place is not there, or is a URL and the source reads from a disk.
    """
    any_: Any = source
    if "root" not in _fields(source) and has_root(source):
        return _around(source, located(_inner(source), where))
    if not has_root(source):
        there = f"it has {', '.join(_fields(source))}" if _fields(source) else "it has no fields"
        raise ValueError(
            f"the recipe's data, {type(source).__name__}, have no field `root` to replace ({there}). Leave it out, or "
            "change the recipe."
        )
    if where is None:
        own = any_.root
        return source if own is None or isinstance(own, str) else _replaced(source, root=_absolute(own))
    if isinstance(where, str) and ("://" in where or "{" in where):
        if not _takes(source, "root", str):
            raise ValueError(
                f"the recipe's data, {type(source).__name__}, are read from a disk: for shards, take a recipe whose "
                "data are VideoShards or ImageShards"
            )
        return _replaced(source, root=where)
    root = _absolute(where)
    if not root.exists():
        raise ValueError(f"there is no {root}")
    return _replaced(whole(source) if root.is_file() else source, root=root)


SEEN = frozenset({"sampling", "crop", "flip", "augment", "repeats", "reader", "views", "manifest"})
"""Fields of sources that say how samples are seen, and not which."""


def same(one: object, other: object) -> bool:
    """Whether two sources hold the same samples, however they are seen: all of one list, or of one part of a place."""
    return bool(_which(one) == _which(other))


def _which(source: Any) -> object:
    root = getattr(source, "root", None)
    if root is not None and "://" not in str(root) and Path(root).is_file():
        return Path(root)
    fields = {name: getattr(source, name) for name in _fields(source) if name not in SEEN}
    return (type(source), fields) if fields else source


def whole(source: S) -> S:
    """The source without the part of its root that it takes, where it can do without."""
    if "split" not in _fields(source) and "source" in _fields(source):
        return _around(source, whole(_inner(source)))
    if getattr(source, "split", None) is None or not _takes(source, "split", NoneType):
        return source
    return _replaced(source, split=None)


def _fields(source: object) -> list[str]:
    return [field.name for field in dataclasses.fields(source)] if dataclasses.is_dataclass(source) else []


def _inner(source: Any) -> Any:
    return source.source


def _around(source: S, inner: Any) -> S:
    any_: Any = source
    changed: S = dataclasses.replace(any_, source=inner)
    return changed


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _takes(source: object, field: str, kind: type) -> bool:
    return kind in typing.get_args(typing.get_type_hints(type(source)).get(field))


def _replaced(source: S, **changes: Any) -> S:
    any_: Any = source
    changed: S = dataclasses.replace(any_, **changes)
    return changed
