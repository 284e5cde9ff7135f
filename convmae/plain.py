"""Frozen dataclasses as plain data, and back: what a checkpoint keeps of a builder.

A dataclass becomes `{"class": "module:name", "fields": {...}}`; numbers, strings, tuples and None stay. Coming back
imports the class by name and accepts only frozen dataclasses: no code comes from the file.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any


def to_plain(value: object) -> Any:
    """A value of frozen dataclasses, tuples, paths and scalars as plain data.

    Raises:
        TypeError: a value of another kind, or of a class that cannot be imported by name.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        if not _is_frozen(type(value)):
            raise TypeError(f"{name} must be @dataclass(frozen=True) to be kept: it would not be built again")
        if "<locals>" in name:
            raise TypeError(f"{name} is defined inside a function: a checkpoint could not find it; move it to a module")
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": name, "fields": fields}
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, Path):
        return {"path": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot keep {value!r} as plain data: use frozen dataclasses of numbers, strings and tuples")


def from_plain(data: Any) -> Any:
    """The inverse of `to_plain`.

    Raises:
        ValueError: a class cannot be imported, is no frozen dataclass, or no longer takes the fields given.
    """
    if isinstance(data, tuple):
        return tuple(from_plain(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "path" in data:
        return Path(data["path"])
    if not (isinstance(data.get("class"), str) and isinstance(data.get("fields"), dict)):
        raise ValueError(f"no plain form of a dataclass: {data!r}")
    name = data["class"]
    kind = _import(name)
    if not _is_frozen(kind):
        raise ValueError(f"{name} is not a frozen dataclass, so it is not built from a file")
    try:
        return kind(**{field: from_plain(value) for field, value in data["fields"].items()})
    except TypeError as mismatch:
        raise ValueError(f"{name} has changed since this was written: {mismatch}") from mismatch


def _is_frozen(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as missing:
        raise ValueError(
            f"{name} cannot be imported ({missing}); it was at hand when this was written: "
            "put the folder it lives in on PYTHONPATH"
        ) from missing
    return found
