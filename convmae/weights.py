"""One way in for weights: a run's folder, our own files, other people's; recognised by what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checkpoint, official
from .run_folder import LAST


def load(source: str | Path, *, size: int | Sequence[int] | None = None, average: bool = False) -> Any:
    """The model that a run's folder or a file holds, on the CPU in evaluation mode, with its builder.

    Args:
        source: a run's folder, our checkpoint, or the authors' ConvMAE checkpoint.
        size: build for this input size instead; positions are resized.
        average: take the averaged weights that a finetuning run has kept.

    Raises:
        ValueError: the file is none of these, is damaged, or has no averaged weights.
        FileNotFoundError: there is no such file, or the folder has no checkpoint.
    """
    path = Path(source)
    if path.is_dir():
        path = path / LAST
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint.read(path)
    except ValueError as problem:
        if "not a checkpoint of this framework" not in str(problem):
            raise
        return official.load(path, size=size)
    return checkpoint.load(path, size=size, average=average)


def load_taking(axes: int, source: Path, side: int | None = None, *, other: str) -> Any:
    """As `load`, for a command that is for inputs of so many axes, at another height and width if given.

    Raises ValueError where there is none, or where its inputs have other axes: they are the `other` command's.
    """
    try:
        model = load(source)
        size = model.get_submodule("trunk").size
        if len(size) != axes:
            raise ValueError(f"the model of {source} takes inputs of {size}: use `python -m {other}`")
        wanted = size if side is None else (*size[:-2], side, side)
        return model if wanted == size else load(source, size=wanted)
    except FileNotFoundError as missing:
        raise ValueError(f"{missing}: give a run's folder, or a checkpoint") from missing
