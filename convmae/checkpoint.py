"""Checkpoints: a file that knows its builder, written whole or not at all, read without running code from it."""

from __future__ import annotations

import argparse
import errno
import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import writing
from .log_lines import seen
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
        ValueError: the model came from no builder, or the state is not tensors and plain data, or takes a name of ours.
        OSError: the disk is full, or the folder cannot be written; the previous file is as it was.
    """
    write(path, pack(model, model.state_dict(), **state))


def pack(model: nn.Module, weights: Mapping[str, Tensor], **state: Any) -> dict[str, Any]:
    """The content of a checkpoint: what `save` writes, with weights given apart from the model.

    Raises ValueError as `save` does.
    """
    builder = getattr(model, "builder", None)
    if builder is None:
        raise ValueError("this model came from no builder, so a checkpoint could not build it again: use .build()")
    content = {"format": FORMAT, "builder": to_plain(builder), "weights": weights}
    if taken := content.keys() & state.keys():
        raise ValueError(f"a checkpoint keeps {', '.join(sorted(taken))} itself: give the state another name")
    return {**content, **state}


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write what `pack` gave, as `save` does: read back before it takes its name, so that it can be read again.

    Raises ValueError and OSError as `save` does.
    """
    try:
        with writing(Path(path)) as file:
            torch.save(dict(content), file)
            file.flush()
            try:
                torch.load(file.name, weights_only=True, mmap=True, map_location="cpu")
            except pickle.UnpicklingError as problem:
                raise ValueError(f"a checkpoint keeps tensors and plain data only: {_first_line(problem)}") from problem
    except (OSError, RuntimeError) as problem:  # torch's writer hides what the disk said
        said = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(said, OSError):
            raise
        raise OSError(said.errno, f"{said.strerror}: this checkpoint cannot be written", str(path)) from None


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: `builder`, `weights`, and what the run kept. Runs no code from the file.

    Raises:
        ValueError: the file is not a checkpoint of this framework, or is damaged.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = read_file(path)
    if not isinstance(content, dict) or "builder" not in content or "weights" not in content:
        raise ValueError(
            f"{path} is not a checkpoint of this framework; for the authors' weights use convmae.official.load"
        )
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content.get('format')}, this version reads {FORMAT}")
    try:
        content["builder"] = from_plain(content["builder"])
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
    if not hasattr(content["builder"], "build"):
        raise ValueError(f"{path} names {type(content['builder']).__name__} as its builder, which builds nothing")
    return content


def read_file(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, without running code from the file.

    Raises ValueError where the file is damaged, by its checksums too, or holds more than tensors and plain data.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it is damaged")
        # The authors' own checkpoints keep their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as problem:  # torch raises half a dozen kinds for a damaged file, EINVAL where its places are wrong
        if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno != errno.EINVAL):
            raise  # the file may be whole
        raise ValueError(f"{path} cannot be read as a checkpoint: {_first_line(problem)}") from problem


def _first_line(problem: Exception) -> str:
    line = (str(problem).splitlines() or [""])[0]
    if len(line) < 8 or "weights_only" in line:  # a lonely number, or advice to run what is in the file
        return "it is damaged, or holds more than tensors and plain data"
    return line


@seen()
def load(path: str | Path, *, size: int | Sequence[int] | None = None, average: bool = False) -> Any:
    """Build the model that a checkpoint holds, with its weights, on the CPU in evaluation mode: outputs are equal.

    Args:
        path: the file.
        size: build for this input size instead, `(H, W)` or `(T, H, W)` pixels; positions are resized.
        average: with the averaged weights that a finetuning run has kept beside the others.

    Raises:
        ValueError: the file is not a checkpoint or is damaged, a class of the user's cannot be imported, the size does
            not suit the model, or there are no averaged weights.
        FileNotFoundError: there is no such file.
    """
    content = read(path)
    if average and "average" not in content:
        raise ValueError(f"{path} has no averaged weights: its run kept none (--average)")
    builder = content["builder"] if size is None else content["builder"].input(size)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's random state stays
        model = builder.build()
    try:
        load_weights(model, content["average" if average else "weights"])
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
    _log.info("%s: all %d tensors match", path, len(content["weights"]))
    return model.eval()


@seen()
def load_trunk(model: nn.Module, path: str | Path) -> None:
    """Start a model's trunk from a checkpoint's: a classifier's from a pretrained one, at any input size.

    Args:
        model: built from a builder with the checkpoint's stages, a masked autoencoder or a classifier; its positions
            are resized from the checkpoint's, with a logged line.
        path: the checkpoint.

    Raises:
        ValueError: the file is not a checkpoint, or its trunk does not fit.
        FileNotFoundError: there is no such file.
    """
    weights = {
        name.removeprefix("trunk."): tensor
        for name, tensor in read(path)["weights"].items()
        if name.startswith("trunk.")
    }
    load_weights(model.get_submodule("trunk"), weights)
    _log.info("%s: all %d tensors of the trunk match", path, len(weights))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a model built for another input size: positions are resized in T, H and W, with a logged line.

    Raises:
        ValueError: names are missing or unexpected, or another tensor than positions has another shape.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError("weights are tensors by name")
    own = model.state_dict()
    fitted: dict[str, Tensor] = {}
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in own]
    for name in own.keys() & weights.keys():
        tensor, wanted = weights[name], own[name].shape
        same_kind = tensor.ndim == len(wanted) and tensor.shape[-1:] == wanted[-1:]
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
