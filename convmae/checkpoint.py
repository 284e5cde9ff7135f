"""Checkpoints: a file that knows its builder, written whole or not at all, read without running code from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .nn.positions import resize
from .plain import from_plain, to_plain

FORMAT = 1
_log = logging.getLogger(__name__)


def save(path: str | Path, model: nn.Module, **state: Any) -> None:
    """Write a model with its builder and whatever else a run keeps, atomically: a reader sees the old file or the new.

    Args:
        path: where to; its folder exists.
        model: from a builder's `.build()`.
        state: tensors and plain data, as the optimiser's state and the progress.

    Raises:
        ValueError: the model came from no builder.
        OSError: the disk is full, or the folder cannot be written; the previous file is as it was.
    """
    builder = getattr(model, "builder", None)
    if builder is None:
        raise ValueError(
            "this model came from no builder, so a checkpoint could not build it again: use .build()"
        )
    content = {"format": FORMAT, "builder": to_plain(builder), "weights": model.state_dict(), **state}
    write_atomically(Path(path), content)


def write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` to a temporary file beside the path, flushed to the disk, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: `builder`, `weights`, and what the run kept. Runs no code from the file.

    Raises:
        ValueError: the file is not a checkpoint of this framework, or is damaged.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises half a dozen kinds for a damaged file
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {first}") from problem
    if not isinstance(content, dict) or "builder" not in content or "weights" not in content:
        raise ValueError(
            f"{path} is not a checkpoint of this framework; for the authors' weights use convmae.official.load"
        )
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}")
    content["builder"] = from_plain(content["builder"])
    return content


def load(path: str | Path) -> Any:
    """Build the model that a checkpoint holds, with its weights, on the CPU in evaluation mode: outputs are equal.

    Raises:
        ValueError: the file is not a checkpoint or is damaged, or a class of the user's cannot be imported.
        FileNotFoundError: there is no such file.
    """
    content = read(path)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's random state stays
        model = content["builder"].build()
    model.load_state_dict(content["weights"])
    return model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a model built for another input size: positions are resized in T, H and W, with a logged line.

    Raises:
        ValueError: names are missing or unexpected, or another tensor than positions has another shape.
    """
    own = model.state_dict()
    fitted: dict[str, Tensor] = {}
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in own]
    for name in own.keys() & weights.keys():
        tensor, wanted = weights[name], own[name].shape
        same_kind = tensor.ndim == len(wanted) and tensor.shape[-1] == wanted[-1]
        if tensor.shape != wanted and name.endswith("positions") and same_kind:
            _log.info("%s resized from %s to %s", name, tuple(tensor.shape[:-1]), tuple(wanted[:-1]))
            tensor = resize(tensor, wanted[:-1])
        if tensor.shape != wanted:
            problems.append(f"{name}: the file has {tuple(tensor.shape)}, the model {tuple(wanted)}")
        fitted[name] = tensor
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in sorted(problems)[:20])
        raise ValueError(f"the weights do not fit the model, {len(problems)} differences:{shown}")
    model.load_state_dict(fitted)
