"""Classifiers for programs without this framework: ONNX, and torch's exported programs.

    python -m convmae.export runs/finetuned classifier.onnx
    python -m convmae.export runs/finetuned classifier.pt2 --raw-pixels

Both take `pixels (B, 3, *size)` and give `logits (B, classes)`, for any batch size or a fixed one. The pixels are
floats, normalised as ImageNet's; or, with raw pixels, uint8 RGB, and the normalisation is in the file.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from . import command, weights
from .files import write_whole
from .nn.classifier import Classifier

PACKAGES = ("onnx", "onnxscript")
LIMIT = 2**31 - 2**20
"""Bytes of weights that an ONNX file can hold, less than 2 GiB with all the rest: larger ones lie beside it."""


def to_exported_program(model: nn.Module, *, raw_pixels: bool = False, batch: int | None = None) -> ExportedProgram:
    """A classifier as torch's exported program, in evaluation mode: its graph, and its weights on the CPU.

    Args:
        model: a classifier, on any device; it stays as it is.
        raw_pixels: take uint8 pixels instead of normalised floats.
        batch: the only batch size that the program takes; None: it takes any.

    Raises ValueError for another model, for raw pixels where it is not in float32, and for a batch below 1.
    """
    if not isinstance(model, Classifier):
        raise ValueError(
            f"a {type(model).__name__} is no classifier: finetune it first, or make one of its builder, "
            ".classifier(classes).build(), and load its trunk (checkpoint.load_trunk)"
        )
    if batch is not None and batch < 1:
        raise ValueError(f"a batch has one sample or more; got {batch}")
    dtype = next(model.parameters()).dtype
    if raw_pixels and dtype != torch.float32:
        raise ValueError(f"raw pixels are normalised in float32, and the model is in {dtype}: give model.float()")
    # on a GPU the convolution would be our own operator, which is known to nobody else
    model = copy.deepcopy(model).cpu().eval()
    count = 2 if batch is None else batch  # 0 and 1 would be taken as fixed
    pixels = torch.zeros(count, 3, *model.trunk.size, dtype=torch.uint8 if raw_pixels else dtype)
    return torch.export.export(model, (pixels,), dynamic_shapes=({0: Dim("batch")},) if batch is None else None)


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    raw_pixels: bool = False,
    batch: int | None = None,
    opset: int | None = None,
) -> Path:
    """Write a classifier as ONNX, with its weights; it is there as a whole or not at all.

    Weights of 2 GiB and more, which no ONNX file can hold, are written beside it, as NAME.data: keep the two together.

    Args:
        model: a classifier, in float32; it stays as it is.
        path: where to.
        raw_pixels: take uint8 pixels instead of normalised floats.
        batch: the only batch size that it takes; None: it takes any.
        opset: ONNX's version of operators; None: torch's default.

    Raises ValueError as `to_exported_program`, and where onnx or onnxscript is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'ONNX needs {" and ".join(missing)}: pip install "convmae[export]", or {" ".join(missing)}')
    path = Path(path)
    program = to_exported_program(model, raw_pixels=raw_pixels, batch=batch)
    beside = sum(tensor.nbytes for tensor in program.state_dict.values()) > LIMIT
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of its own insides
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        written: Any = torch.onnx.export(
            program,
            (),
            input_names=["pixels"],
            output_names=["logits"],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        inside = Path(folder) / path.name  # the weights beside it are found by its name
        written.save(str(inside), external_data=beside)
        if beside:
            write_whole(path.with_name(f"{path.name}.data"), inside.with_name(f"{path.name}.data").read_bytes())
        return write_whole(path, inside.read_bytes())


def save_exported_program(
    model: nn.Module, path: str | Path, *, raw_pixels: bool = False, batch: int | None = None
) -> Path:
    """Write a classifier as an exported program, as a whole or not at all, for `torch.export.load(path).module()`.

    Raises ValueError as `to_exported_program`.
    """
    program = to_exported_program(model, raw_pixels=raw_pixels, batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "model.pt2"
        torch.export.save(program, inside)
        return write_whole(Path(path), inside.read_bytes())


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Write a classifier for programs without this framework.

    Args:
        model: a finetuning run's folder, or a file that convmae.weights.load reads.
        out: a file that ends in .onnx, or in .pt2 for torch's exported program.
        size: side of the input in pixels. (default: the model's)
        average: the averaged weights that the run kept.
        raw_pixels: take uint8 RGB pixels, and normalise them in the file.
        batch: the only batch size that the file takes. (default: any)
        opset: ONNX's version of operators. (default: torch's)
    """

    model: Path
    out: Path
    size: int | None = None
    average: bool = False
    raw_pixels: bool = False
    batch: int | None = None
    opset: int | None = None


def _export(options: _Options) -> int:
    if options.out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{options.out} must end in .onnx or .pt2, to say what is to be written")
    try:
        model = weights.load(options.model, average=options.average)
        size = model.get_submodule("trunk").size
        if options.size is not None:
            wanted = (*size[:-2], options.size, options.size)
            model = weights.load(options.model, average=options.average, size=wanted)
    except FileNotFoundError as missing:
        raise ValueError(f"{missing}: give a run's folder, or a checkpoint") from missing
    if options.out.suffix == ".onnx":
        path = to_onnx(model, options.out, raw_pixels=options.raw_pixels, batch=options.batch, opset=options.opset)
    else:
        path = save_exported_program(model, options.out, raw_pixels=options.raw_pixels, batch=options.batch)
    size = ", ".join(map(str, model.trunk.size))
    kind = "uint8 RGB" if options.raw_pixels else "ImageNet-normalised floats"
    batch = options.batch or "B"
    print(f"{path}: pixels ({batch}, 3, {size}), {kind}, to logits ({batch}, {model.head.out_features})")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a classifier; the exit code, 2 where it cannot be done."""
    return command.run(_Options, "convmae.export", _export, arguments)


if __name__ == "__main__":
    sys.exit(main())
