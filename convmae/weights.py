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
