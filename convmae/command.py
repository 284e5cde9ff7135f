"""Command lines of modules, such as `python -m convmae.shards`: a dataclass of options, and what is done with them."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

Options = TypeVar("Options")

_METAVARS: dict[Any, str] = {int | None: "INT", float | None: "FLOAT", str | None: "STR", Path | None: "PATH"}


def run(kind: type[Options], module: str, do: Callable[[Options], int], arguments: Sequence[str] | None = None) -> int:
    """Read the options of `python -m MODULE` and do with them; the exit code, 2 where a ValueError says what is wrong.

    Options without a default are given by place. tyro prints help and mistakes, and ends the program.
    """
    import tyro

    hints, fields = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING
        value = None if required else field.default
        metavar = field.name.upper() if required else None
        annotation: Any = Annotated[hints[field.name], flag(hints[field.name], value, metavar=metavar)]
        fields.append((field.name, annotation, dataclasses.field() if required else dataclasses.field(default=value)))
    program = f"python -m {module}"
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass(kind.__name__, fields, namespace={"__doc__": kind.__doc__}),
        args=arguments,
        prog=program,
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )
    try:
        return do(kind(**vars(parsed)))
    except ValueError as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return 2


def flag(hint: Any, value: object, *, metavar: str | None = None, about: str | None = None) -> Any:
    """How tyro shows an option: no None as its default, nor as what may be given."""
    import tyro

    if metavar is None and value is None:
        metavar = _METAVARS.get(hint)
    shown = "" if value is None or value is False or value == () else None
    return tyro.conf.arg(metavar=metavar, help=about, help_behavior_hint=shown)
