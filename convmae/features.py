"""Features of files: a vector of every image of a folder, and its maps where they are asked for, in arrays on the disk.

    python -m convmae.features runs/a photos features
    python -m convmae.features runs/a/last.pt photos features --maps --format safetensors

`python -m video.features` does the same for videos. What the folder then holds:

    part-000000.npz    `vector` float32 (n, D), the mean of the last stage's tokens, not normalised; `label` int64 (n),
                       the number of the file's subfolder, or -1; with --maps `stage0`, `stage1`, ... float16
                       (n, C, *grid). Or part-000000.safetensors, with the same names. One for every so many files.
    index.jsonl        a line for each file, in the order of the parts' rows: file, part and row; there when all is done
    failed.jsonl       a line for each file that could not be loaded: file and reason. It has no row: nothing stands in.
    settings.json      what it was made from

To read them back:

    parts = [np.load(path) for path in sorted(Path("features").glob("part-*.npz"))]
    names = [json.loads(line)["file"] for line in open("features/index.jsonl")]
    vectors = dict(zip(names, np.concatenate([part["vector"] for part in parts]), strict=True))

A part is written whole, with the names of its files in it. So what was interrupted, by Ctrl-C, SIGTERM or a kill, goes
on at the part it was at; parts that are there are not looked at again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import command, weights
from .builders import backbone_of
from .data import Batch, Source, Stream, UnusableFileError, repeats
from .files import sweep, write_whole, writing
from .images import ImageFolder
from .nn.backbone import Backbone

Format = Literal["npz", "safetensors"]
Precision = Literal["float32", "bfloat16"]
Arrays = dict[str, NDArray[Any]]

INDEX, FAILED, SETTINGS = "index.jsonl", "failed.jsonl", "settings.json"
SHOWN = 20  # files that could not be loaded, of which each is named


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a folder of features holds.

    Args:
        files: that have features.
        before: those of them, and of the failed, that were done by an earlier command.
        failed: those that could not be loaded.
    """

    files: int
    before: int
    failed: tuple[UnusableFileError, ...]


def extract(
    model: nn.Module,
    source: Source,
    out: Path,
    *,
    base: Path | None = None,
    format: Format = "npz",
    maps: bool = False,
    part: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    seconds: float = 300,
    device: str = "auto",
    precision: Precision = "float32",
) -> Written:
    """Write the features of every sample of a source; a folder that was begun like this is gone on with.

    Args:
        model: with a trunk, as a masked autoencoder, a classifier or a backbone; it is moved to the device.
        source: of samples in which nothing is drawn: `.as_test()` of most. Where each gives several clips, so many
            vectors and maps are written for a file, in an axis after the first.
        out: a new folder, or one that an earlier command began.
        base: files below it are named relative to it.
        format: of the parts.
        maps: write the maps of every stage, too.
        part: samples of a part, a multiple of the batch size; None: 1024, or with maps 64.
        batch_size: samples that are computed at once.
        workers: loader processes; None: as many as CPUs that this process may use.
        seconds: after which a sample is given up.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or another of torch's.
        precision: of the computation.

    Raises:
        ValueError: the model has no trunk, the source holds nothing usable, a number is not positive, the folder is
            another's or was begun otherwise, another process writes there, or the disk is full.
    """
    backbone = backbone_of(model).eval()
    part = part or (64 if maps else 1024)
    _check(part=part, batch_size=batch_size, seconds=seconds, workers=1 if workers is None else workers + 1)
    if part % batch_size:
        raise ValueError(f"part={part} is not a multiple of batch_size={batch_size}: change one of them")
    samples = source.open(backbone.trunk.size)
    stream = Stream(samples, backbone.trunk.size, 0, batch_size * repeats(samples), once=True)
    names = _relative([samples.name(index) for index in range(len(samples))], base)
    parts = _Parts(out, format, part, names)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    network = _Network(backbone.to(place), repeats(samples), maps, place, precision)
    settings = {
        "model": repr(backbone.builder),
        "weights": _digest(backbone),
        "data": repr(source),
        "files": hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest(),
        "format": format,
        "maps": maps,
        "part": part,
        "precision": precision,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            _settle(out, settings)
            sweep(out)
            before = sum(len(parts.numbers(number)) for number in range(parts.count) if parts.there(number))
            _compute(stream, network, parts, _cpus() if workers is None else workers, seconds)
            return parts.finish(before)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{out} cannot be written: {problem}") from problem
        raise ValueError(f"{out}: the disk is full; make room, and the same command goes on") from problem


def _check(**numbers: float) -> None:
    if wrong := [f"{name}={number:g}" for name, number in numbers.items() if not number > 0]:
        raise ValueError(f"{', '.join(wrong)}: must be positive")


def _relative(names: Sequence[str], base: Path | None) -> list[str]:
    prefix = "" if base is None else os.path.join(base, "")
    return [name.removeprefix(prefix) for name in names]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _digest(model: nn.Module) -> str:
    """What tells one model's weights from another's."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


# ---- what is computed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Network:
    """The backbone, and what is kept of what it gives."""

    backbone: Backbone
    clips: int
    maps: bool
    device: torch.device
    precision: Precision

    @torch.inference_mode()
    def features(self, batch: Batch) -> Arrays:
        """The arrays of a batch, a row for each of its samples; none for those that could not be loaded."""
        if not len(batch.pixels):
            return self.empty()
        lower = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            maps = self.backbone(batch.pixels.to(self.device, non_blocking=True))
        found: dict[str, Tensor] = {"vector": maps[-1].float().flatten(2).mean(2)}
        if self.maps:
            found |= {f"stage{stage}": each.half() for stage, each in zip(self.backbone.stages, maps, strict=True)}
        arrays = {name: self._by_sample(tensor).cpu().numpy() for name, tensor in found.items()}
        return {**arrays, "label": batch.labels[:: self.clips].numpy()}

    def empty(self) -> Arrays:
        """The arrays of no sample."""
        several = (self.clips,) if self.clips > 1 else ()
        arrays: Arrays = {"vector": np.empty((0, *several, self.backbone.channels[-1]), np.float32)}
        if self.maps:
            for stage, width, stride in zip(
                self.backbone.stages, self.backbone.channels, self.backbone.strides, strict=True
            ):
                cells = [side // by for side, by in zip(self.backbone.trunk.size, stride, strict=True)]
                arrays[f"stage{stage}"] = np.empty((0, *several, width, *cells), np.float16)
        return {**arrays, "label": np.empty(0, np.int64)}

    def _by_sample(self, x: Tensor) -> Tensor:
        return x if self.clips == 1 else torch.unflatten(x, 0, (-1, self.clips))


def _compute(stream: Stream, network: _Network, parts: _Parts, workers: int, seconds: float) -> None:
    """Compute and write the parts that are not there."""
    steps = parts.size // stream.drawn
    with _bar(len(parts.names)) as advance:
        for number in range(parts.count):
            if parts.there(number):
                advance(len(parts.numbers(number)), 0)
        for first, stop in parts.missing():
            end = min(stop * steps, stream.steps_in(1))
            loaded = stream.batches(
                first * steps, end, workers=workers, seconds=seconds, pin_memory=network.device.type == "cuda"
            )
            rows, indices, skipped = [network.empty()], list[int](), list[UnusableFileError]()
            with closing(loaded):
                for step, [batch] in enumerate(loaded, first * steps):
                    rows.append(network.features(batch))
                    indices += batch.indices[:: network.clips].tolist()
                    skipped += batch.skipped
                    advance(len(rows[-1]["label"]), len(batch.skipped))
                    if (step + 1) % steps == 0 or step + 1 == end:
                        arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
                        parts.write(step // steps, arrays, indices, skipped)
                        rows, indices, skipped = [network.empty()], [], []


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """Shows on the terminal's error stream how far it is, or where there is no terminal, says it every 30 seconds.

    Gives what is called with how many more are done, and how many more failed.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"))
    counts, said = [0, 0], time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("files", total=total, failed=0)

        def advance(done: int, failed: int) -> None:
            nonlocal said
            counts[0] += done + failed
            counts[1] += failed
            bar.update(task, completed=counts[0], failed=counts[1])
            if not console.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"{counts[0]} of {total} files, {counts[1]} failed", file=sys.stderr, flush=True)

        yield advance


# ---- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The parts of a folder: number n holds the samples from `n * size` on.

    Args:
        folder: where they are.
        format: of their files.
        size: samples of a part, the last may have less.
        names: of all samples.
    """

    folder: Path
    format: Format
    size: int
    names: Sequence[str]

    @property
    def count(self) -> int:
        """How many there will be."""
        return math.ceil(len(self.names) / self.size)

    def path(self, number: int) -> Path:
        """Where a part is written."""
        return self.folder / f"part-{number:06}.{self.format}"

    def there(self, number: int) -> bool:
        """Whether a part is written."""
        return self.path(number).exists()

    def numbers(self, number: int) -> range:
        """The samples of a part."""
        return range(number * self.size, min((number + 1) * self.size, len(self.names)))

    def missing(self) -> Iterator[tuple[int, int]]:
        """The first and the stop of every stretch of parts that are not written."""
        for there, stretch in groupby(range(self.count), self.there):
            if not there:
                found = list(stretch)
                yield found[0], found[-1] + 1

    def write(self, number: int, arrays: Arrays, indices: Sequence[int], skipped: Sequence[UnusableFileError]) -> None:
        """Write a part, whole or not at all: the rows of these samples, and what became of the others."""
        left = sorted(set(self.numbers(number)) - set(indices))
        assert len(left) == len(skipped), (left, skipped)
        about = {
            "files": json.dumps([self.names[index] for index in indices]),
            "failed": json.dumps(
                [[self.names[index], str(error.reason)] for index, error in zip(left, skipped, strict=True)]
            ),
        }
        with writing(self.path(number)) as file:
            if self.format == "safetensors":
                file.write(_safetensors().numpy.save(arrays, metadata=about))
            else:
                texts: dict[str, Any] = {name: np.array(text) for name, text in about.items()}
                np.savez(file, **{**texts, **arrays})

    def about(self, number: int) -> tuple[list[str], list[tuple[str, str]]]:
        """The files that have a row in a part, in order, and those that failed, with reasons."""
        if self.format == "safetensors":
            with _safetensors().safe_open(self.path(number), "numpy") as file:
                about = file.metadata()
        else:
            with np.load(self.path(number)) as file:
                about = {name: file[name].item() for name in ("files", "failed")}
        return json.loads(about["files"]), [(name, reason) for name, reason in json.loads(about["failed"])]

    def finish(self, before: int) -> Written:
        """Write the index and the list of what failed, when all parts are there."""
        index, failed = [], []
        for number in range(self.count):
            files, errors = self.about(number)
            part = self.path(number).name
            index += [{"file": file, "part": part, "row": row} for row, file in enumerate(files)]
            failed += [UnusableFileError(file, reason) for file, reason in errors]
        _write_lines(self.folder / FAILED, [{"file": error.name, "reason": error.reason} for error in failed])
        _write_lines(self.folder / INDEX, index)
        return Written(files=len(index), before=before, failed=tuple(failed))


def _write_lines(path: Path, found: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(line) + "\n" for line in found))


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as missing:
        raise ValueError("safetensors is not installed: `pip install safetensors`, or give --format npz") from missing
    return safetensors


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raises ValueError where another process writes features there."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process writes to {out}: wait for it, or end it") from None
    finally:
        os.close(folder)


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Begin with these settings, or go on with them; raises ValueError where others were begun with."""
    path = out / SETTINGS
    if not path.exists():
        if others := [other.name for other in out.iterdir() if not other.name.endswith(".tmp")]:
            raise ValueError(f"{out} holds {min(others)!r} and was not begun by this command: choose a new folder")
        write_whole(path, json.dumps(settings, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    if begun != settings:
        names = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        changed = ", ".join(f"{name} was {begun.get(name)!r}, now {settings.get(name)!r}" for name in names)
        raise ValueError(f"{out} was begun with other settings ({changed}): choose a new folder, or those settings")


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the features of every file of a folder: a vector each, and on demand the maps of every stage.

    Interrupted, the same command goes on.

    Args:
        model: a run's folder, or a checkpoint.
        data: a folder of files; their subfolders, if any, are the classes.
        out: a new folder.
        format: of what is written: npz or safetensors.
        maps: write the maps of every stage, too, in float16.
        size: of the input: height and width in pixels. (default: the model's)
        encoder: of a CMAE: online or target.
        channels: of the authors' CMAE: rgb, or bgr, which the released weights saw.
        part: files whose features are written together, a multiple of the batch. (default: 1024, with maps 64)
        batch_size: files that are computed at once.
        workers: loader processes. (default: as many as CPUs)
        seconds: after which a file is given up.
        device: auto takes a GPU where there is one; cpu, cuda.
        precision: of the computation: float32 or bfloat16.
    """

    model: Path
    data: Path
    out: Path
    format: Format = "npz"
    maps: bool = False
    size: int | None = None
    encoder: weights.Encoder = "online"
    channels: weights.Channels = "rgb"
    part: int | None = None
    batch_size: int = 32
    workers: int | None = None
    seconds: float = 300
    device: str = "auto"
    precision: Precision = "float32"


def carry_out(options: Options, model: nn.Module, source: Source) -> int:
    """Write features as the options say, and say what was done; the exit code, 1 where there are none, 130 if stopped.

    Raises ValueError as `extract` does.
    """
    data = options.data.absolute()
    kept = ("format", "maps", "part", "batch_size", "workers", "seconds", "device", "precision")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in kept}
    try:
        done = extract(model, source, options.out, base=data if data.is_dir() else data.parent, **chosen)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{options.out}: features of {done.files} files; {done.before} files were done before")
    if done.failed:
        print(f"{len(done.failed)} could not be loaded; all are in {options.out / FAILED}")
        for error in done.failed[:SHOWN]:
            print(f"  {error}")
    return 0 if done.files else 1


def _extract(options: Options) -> int:
    model = weights.load_taking(2, options, other="video.features")
    return carry_out(options, model, ImageFolder(root=options.data.absolute()).as_test())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write features of images; the exit code, 1 where there are none, 2 where it cannot be done, 130 if stopped."""
    return command.run(Options, "convmae.features", _extract, arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
