"""Weights for others: a folder with a safetensors file, here or in a repository on the Hugging Face Hub.

    python -m convmae.hub runs/a models/a                      writes the folder
    python -m convmae.hub runs/a models/a --push user/name     and uploads it

model.safetensors   the weights, and in its metadata the builder, so that the file alone gives the model again
config.json         the same for people: what the builder is, what goes in, what made it; nothing reads it
README.md           the model card: what it is, and how to load it
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, weights
from .builders import Backbone, Classifier
from .checkpoint import load_weights
from .command import run
from .files import write_whole
from .log_lines import seen
from .plain import from_plain, to_plain
from .targets import IMAGENET_MEAN, IMAGENET_STD

_log = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = "1"
_OURS = ("convmae", "video")
_HERE = "path/to/this/folder"
_LOST = "it was cut off or changed since it was written: fetch it again"


def save_pretrained(model: nn.Module, folder: str | Path, *, note: str = "") -> Path:
    """Write a model for others: weights, what they are and how to load them; each file whole or not at all.

    Tensors keep their precision, and tensors that share memory are written one by one. Other files in the folder stay.

    Args:
        model: from a builder's `.build()`.
        folder: where to; it is made where needed, and the three files in it are replaced.
        note: Markdown for the model card: data, recipe, figures that were measured, licence. Without one the card says
            that nothing was measured.

    Returns:
        The folder.

    Raises:
        ValueError: the model came from no builder or not from one that others could build again, or safetensors is not
            installed.
        OSError: the folder cannot be written; files in it are as they were, or whole new ones.
    """
    return _save(model, Path(folder), note=note, source=_HERE)


@seen()
def from_pretrained(source: str | Path, *, size: int | Sequence[int] | None = None, revision: str | None = None) -> Any:
    """The model that `save_pretrained` or `push_to_hub` wrote, on the CPU in evaluation mode: bit for bit the same.

    The builder in the file is built by importing its class, one that is installed here, by name: no code comes from the
    file. Parameters have the precision that the file has.

    Args:
        source: a folder, a `.safetensors` file, or else a repository on the hub, `user/name`, kept in its usual cache.
        size: build for this input size instead, `(H, W)` or `(T, H, W)` pixels; positions are resized.
        revision: of a repository: a branch, a tag or a commit.

    Raises:
        ValueError: the file is damaged or not of this framework, a class of the builder's cannot be imported, the size
            does not suit the model, the repository cannot be had, or a library for it is not installed.
        FileNotFoundError: there is no such folder or file.
    """
    path = _find(source, revision)
    builder, tensors = _read(path)
    if size is not None:
        builder = builder.input(size)
    try:
        with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's random state stays
            model = builder.build()
        _take_precision(model, tensors)
        load_weights(model, tensors)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
    _log.info("%s: all %d tensors match", path, len(tensors))
    return model.eval()


def push_to_hub(
    model: nn.Module, repository: str, *, private: bool = False, token: str | None = None, note: str = ""
) -> str:
    """Upload what `save_pretrained` writes to a repository on the hub, which is made where there is none.

    Args:
        model: from a builder's `.build()`.
        repository: `user/name`.
        private: make the repository private; one that is there and public is refused.
        token: with the right to write; None: the one of `hf auth login` or of `$HF_TOKEN`.
        note: see `save_pretrained`.

    Returns:
        The repository's address.

    Raises:
        ValueError: as `save_pretrained`, or the hub refuses or cannot be reached, or huggingface_hub is not installed.
    """
    _check_repository(repository)
    with tempfile.TemporaryDirectory() as folder:
        return _upload(_save(model, Path(folder), note=note, source=repository), repository, private, token)


# ---- the files -------------------------------------------------------------------------------------------------------


def _save(model: nn.Module, folder: Path, *, note: str, source: str) -> Path:
    """As `save_pretrained`; the card says to load from `source`."""
    library = _safetensors()
    builder = getattr(model, "builder", None)
    if builder is None:
        raise ValueError("this model came from no builder, so nobody could build it again: use .build()")
    try:
        plain = to_plain(builder)
    except TypeError as problem:
        raise ValueError(str(problem)) from problem
    modules = sorted(set(_modules(plain)))
    if "__main__" in modules:
        raise ValueError(
            f"{builder!r} has a class from the script that runs, where others could not import it from: "
            "move it to a module of its own"
        )
    tensors = _separate(model.state_dict())
    about = {
        "format": "pt",  # what other libraries ask for: tensors of torch
        "convmae.format": FORMAT,
        "convmae.version": __version__,
        "convmae.builder": json.dumps(plain),
        "convmae.checksum": _checksum(tensors),
    }
    write_whole(folder / WEIGHTS, library.torch.save(tensors, metadata=about))
    config = _config(model, builder, tensors)
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_whole(folder / CARD, _card(builder, config, [name for name in modules if _strange(name)], note, source))
    return folder


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The builder and the weights of a file. Raises ValueError as `from_pretrained` does."""
    library = _safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            about, names = file.metadata() or {}, list(file.keys())
            if "convmae.builder" not in about:
                raise ValueError(
                    f"{path} holds no builder, so it is not of this framework; "
                    f"its tensors begin with {', '.join(sorted(names)[:3]) or 'nothing'}"
                )
            if about.get("convmae.format") != FORMAT:
                raise ValueError(f"{path} has format {about.get('convmae.format')}, this version reads {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in names}
    except library.SafetensorError as problem:
        raise ValueError(f"{path} cannot be read as safetensors: {problem}; {_LOST}") from problem
    if about.get("convmae.checksum") != _checksum(tensors):
        raise ValueError(f"the weights in {path} are damaged: they do not give its checksum; {_LOST}")
    try:
        builder = from_plain(_tuples(json.loads(about["convmae.builder"])))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"the builder in {path} cannot be read: {problem}") from problem
    if not hasattr(builder, "build"):
        raise ValueError(f"{path} names {type(builder).__name__} as its builder, which builds nothing")
    return builder, tensors


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, dense, and each in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, kinds, shapes and bytes; safetensors has none of its own."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _take_precision(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model's tensors the precision of the file's: copying alone would turn half precision to float32."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)


def _tuples(data: Any) -> Any:
    """JSON has lists where a builder's plain form has tuples, and no others."""
    if isinstance(data, list):
        return tuple(_tuples(item) for item in data)
    return {name: _tuples(item) for name, item in data.items()} if isinstance(data, dict) else data


def _modules(plain: Any) -> Iterator[str]:
    """The modules of all classes in a builder's plain form."""
    if isinstance(plain, dict) and "class" in plain:
        yield plain["class"].partition(":")[0]
        for value in plain["fields"].values():
            yield from _modules(value)
    elif isinstance(plain, tuple):
        for value in plain:
            yield from _modules(value)


def _strange(module: str) -> bool:
    return module.split(".")[0] not in _OURS


# ---- for people ------------------------------------------------------------------------------------------------------


def _config(model: nn.Module, builder: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    floats = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    classes = {"classes": builder.classes, "names": builder.names} if isinstance(builder, Classifier) else {}
    return {
        "library": "convmae",
        "version": __version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "builder": repr(_short(builder)),
        "input_size": getattr(builder, "size", None),
        "normalisation": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        **classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": sorted(floats),
    }


def _card(builder: Any, config: Mapping[str, Any], strange: Sequence[str], note: str, source: str) -> str:
    clips, sides = _takes(builder)
    owner = builder.backbone if isinstance(builder, Classifier | Backbone) else builder
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", config["model"]).lower()
    task, gives = "feature-extraction" if clips else "image-feature-extraction", f"what a {kind} gives"
    if isinstance(builder, Classifier):
        task, gives = (
            "video-classification" if clips else "image-classification",
            f"logits of {builder.classes} classes",
        )
    # uint8 pixels become float32
    floats = "uint8 pixels in RGB, or floats" if config["precision"] == ["float32"] else "floats in its own precision,"
    needed = f"\nIts builder needs {', '.join(f'`{name}`' for name in strange)} on `PYTHONPATH`.\n" if strange else ""
    return f"""---
library_name: convmae
pipeline_tag: {task}
tags:
- masked-image-modeling
---

# {type(owner).__name__} {kind}

{config["parameters"]:,} parameters in {", ".join(config["precision"])}, made by

```python
{config["builder"]}
```

## Input and output

{"Clips" if clips else "Images"} `(B, 3, {sides})`: {floats} normalised by ImageNet's mean
{IMAGENET_MEAN} and standard deviation {IMAGENET_STD}. It gives {gives}.

## How to load it

```python
from convmae import hub

model = hub.from_pretrained("{source}")
```
{needed}
## What was measured

{note.strip() or "Nothing that is known here: these weights came without figures."}
"""


def _takes(builder: Any) -> tuple[bool, str]:
    """Whether a builder's models take clips, and the sides of what they take."""
    size = getattr(builder, "size", ())
    return len(size) == 3, ", ".join(map(str, size)) or "*size"


def _short(builder: Any) -> Any:
    """Without the names of a thousand classes."""
    return replace(builder, names=()) if isinstance(builder, Classifier) else builder


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _find(source: str | Path, revision: str | None) -> Path:
    """The file of a folder, a file, or a repository."""
    path = Path(source)
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a repository on the hub; {source} is on this disk")
        file = path if path.is_file() else path / WEIGHTS
        if file.is_file():
            return file
        raise FileNotFoundError(
            f"{path} has no {WEIGHTS}: write one with `python -m convmae.hub {path} FOLDER`, if it is a run's"
        )
    if isinstance(source, Path) or not _is_repository(source):
        raise FileNotFoundError(f"no folder and no file {source}, which is no repository 'user/name' either")
    library = _huggingface_hub()
    with _clearly(library, source, revision):
        return Path(library.hf_hub_download(source, WEIGHTS, revision=revision))


def _upload(folder: Path, repository: str, private: bool, token: str | None) -> str:
    library = _huggingface_hub()
    with _clearly(library, repository):
        hub = library.HfApi(token=token)
        address = hub.create_repo(repository, private=private or None, exist_ok=True)
        # a repository that was there stays as public as it was
        if private and not hub.repo_info(repository).private:
            raise ValueError(f"{repository} is there and public: make it private on the hub, or leave out private")
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message=f"Weights, by convmae {__version__}",
        )
    return str(address)


@contextmanager
def _clearly(library: Any, repository: str, revision: str | None = None) -> Iterator[None]:
    """What the hub says, as a ValueError that says what to do."""
    errors = library.errors
    try:
        yield
    except errors.GatedRepoError as problem:
        raise ValueError(f"{repository} is gated: ask for access on its page, then `hf auth login`") from problem
    except errors.RepositoryNotFoundError as problem:
        raise ValueError(
            f"there is no folder and no file {repository} here, and on the hub no such repository that you may see: "
            "where it is private, `hf auth login` or give a token"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise ValueError(f"{repository} has no revision {revision!r}") from problem
    except errors.LocalEntryNotFoundError as problem:
        raise ValueError(f"the hub cannot be reached, and its cache here has no {repository}") from problem
    except errors.EntryNotFoundError as problem:
        raise ValueError(f"{repository} has no {WEIGHTS}: it is not of this framework") from problem
    # its HTTPError is that of the client it uses, a lost connection too; an upload that fails is a RuntimeError
    except (errors.HTTPError, OSError, RuntimeError) as problem:
        raise ValueError(f"{repository}: the hub says {_first(problem)}") from problem


def _first(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None and not name.startswith(".")


def _check_repository(name: str) -> None:
    if not _is_repository(name):
        raise ValueError(f"a repository on the hub is named 'user/name'; got {name!r}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as missing:
        raise ValueError("safetensors is not installed: `pip install safetensors`") from missing
    return safetensors


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as missing:
        raise ValueError("huggingface_hub is not installed: `pip install huggingface_hub`") from missing
    return huggingface_hub


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Write a run's weights for others, as safetensors with a model card, and upload them if told to.

    Args:
        source: a run's folder, or a checkpoint.
        folder: where to; it is made where needed.
        average: take the averaged weights that a finetuning run has kept.
        note: Markdown for the model card: data, recipe, what was measured.
        push: upload it to this repository on the hub, user/name.
        private: make the repository private.
    """

    source: Path
    folder: Path
    average: bool = False
    note: str = ""
    push: str | None = None
    private: bool = False


def _write(options: _Options) -> int:
    if options.push is None and options.private:
        raise ValueError("--private is for --push user/name")
    if options.push is not None:
        _check_repository(options.push)
    try:
        model = weights.load(options.source, average=options.average)
    except FileNotFoundError as missing:
        raise ValueError(f"{missing}: give a run's folder, or a checkpoint") from missing
    print(_save(model, options.folder, note=options.note, source=options.push or _HERE) / WEIGHTS)
    if options.push is not None:
        print(_upload(options.folder, options.push, options.private, None))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the command line says; the exit code, 2 where it cannot be done."""
    return run(_Options, "convmae.hub", _write, arguments)


if __name__ == "__main__":
    sys.exit(main())
