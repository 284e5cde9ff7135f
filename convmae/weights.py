"""One way in for weights: a run's folder, our own files, other people's; recognised by what they hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from . import checkpoint, foreign, official, official_cmae
from .log_lines import seen
from .nn.classifier import Pooling
from .nn.contrast import ContrastiveMaskedAutoencoder
from .official_cmae import Channels as Channels
from .run_folder import LAST, kept_in

_log = logging.getLogger(__name__)

Encoder = Literal["online", "target"]
"""Which encoder of a contrastive masked autoencoder is meant."""

SAFETENSORS = "model.safetensors"
"""What `hub.save_pretrained` calls its file of weights."""

READABLE = (
    "a run's folder or checkpoint, what convmae.hub wrote, the authors' ConvMAE and CMAE checkpoints, "
    "and plain ViTs by the names of MAE, VideoMAE, transformers or timm"
)


@seen()
def load(
    source: str | Path | Mapping[str, Tensor],
    *,
    size: int | Sequence[int] | None = None,
    average: bool = False,
    encoder: Encoder = "online",
    channels: Channels = "rgb",
    heads: int | None = None,
    decoder_heads: int | None = None,
    pooling: Pooling | None = None,
) -> Any:
    """The model that a run's folder, a file or a state dict holds, on the CPU in evaluation mode, with its builder.

    Recognised by what they hold are `READABLE`; log lines, on stderr where nobody has set up logging, say what it was
    taken for and what of it matched.

    Args:
        source: a run's folder, a folder that `hub.save_pretrained` wrote, a file of torch's or safetensors, or a state
            dict of the authors' ConvMAE or CMAE or of a plain ViT.
        size: build for this input size instead; positions are resized.
        average: take the averaged weights that a finetuning run has kept.
        encoder: of a contrastive masked autoencoder (CMAE) "target" puts the target's trunk, and its fusion, in the
            place of the online ones.
        channels: of the images that the authors' CMAE saw: the released weights saw "bgr", see `official_cmae.load`.
        heads, decoder_heads, pooling: of other people's weights, where they do not tell: see `official.load`,
            `official_cmae.load` and `foreign.load`.

    Raises:
        ValueError: it is none of these, is damaged, does not match, or has no averaged weights, or no such encoder.
        FileNotFoundError: there is no such file, or the folder has no checkpoint.
    """
    if encoder not in ("online", "target"):
        raise ValueError(f'encoder is "online" or "target"; got {encoder!r}')
    found = _opened(source)
    if average and not found.own:
        raise ValueError(f"{found.name} has no averaged weights: only the checkpoints of finetuning runs keep them")
    model = _model(found, average, _Hints(size, heads, decoder_heads, pooling, channels))
    if encoder == "target":
        if not isinstance(model, ContrastiveMaskedAutoencoder):
            raise ValueError(f"{source} holds a {type(model).__name__}, which has no target encoder: CMAE has")
        model.trunk.load_state_dict(model.target_encoder.trunk.state_dict())
        model.fusion.load_state_dict(model.target_encoder.fusion.state_dict())
    return model


class _Hints(NamedTuple):
    """What `load` was told of other people's weights, and the size."""

    size: int | Sequence[int] | None
    heads: int | None
    decoder_heads: int | None
    pooling: Pooling | None
    channels: Channels


class _Opened(NamedTuple):
    """What was found: where, whether it is a checkpoint of our own, and otherwise what the file holds."""

    name: str
    own: bool = False
    exported: bool = False
    content: Any = None


def _opened(source: str | Path | Mapping[str, Tensor]) -> _Opened:
    if isinstance(source, Mapping):
        return _Opened("the state dict", content=source)
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in (LAST, SAFETENSORS) if (path / name).exists()), path / LAST)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        about, state = _safetensors(path)
        return _Opened(str(path), exported="convmae.builder" in about, content=state)
    if kept_in(path, "builder") is not None:
        return _Opened(str(path), own=True)
    content = checkpoint.read_file(path)
    if isinstance(content, Mapping) and "builder" in content:  # of another version: it says so
        return _Opened(str(path), own=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no weights. What can be read: {READABLE}")
    return _Opened(str(path), content=content)


def _model(found: _Opened, average: bool, hints: _Hints) -> Any:
    if found.own:
        return checkpoint.load(found.name, size=hints.size, average=average)
    if found.exported:
        from .hub import from_pretrained

        return from_pretrained(found.name, size=hints.size)
    return _others(found.content, found.name, hints)


def _others(content: Mapping[str, Any], name: str, hints: _Hints) -> Any:
    """The model of somebody else's state dict."""
    size, heads, decoder_heads, pooling, channels = hints
    state = official.state_of(content)
    try:
        if "patch_embed1.proj.weight" in state:
            model: Any = official.load(
                state, heads=heads, decoder_heads=decoder_heads or 16, pooling=pooling, size=size
            )
            kind = "the authors' ConvMAE"
        elif official_cmae.recognised(state):
            model = official_cmae.load(
                state, heads=heads, decoder_heads=decoder_heads or 16, size=size, channels=channels
            )
            kind = f"the authors' CMAE, of {channels.upper()} images"
        elif foreign.recognised(state):
            model = foreign.load(state, size=size, heads=heads, decoder_heads=decoder_heads, pooling=pooling)
            kind = "a plain ViT"
        else:
            first = ", ".join(list(state)[:5]) or "none"
            raise ValueError(f"nothing known. Its tensors begin with {first}. What can be read: {READABLE}")
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from problem
    _log.info("%s: taken for %s, %d tensors, as %r", name, kind, len(state), model.builder)
    return model


def _safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file says of itself, and its tensors."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as missing:
        raise ValueError(f"{path}: pip install safetensors to read it") from missing
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise ValueError(f"{path} cannot be read as safetensors: {problem}") from problem


class Wanted(Protocol):
    """The options of a command by which it takes a model."""

    @property
    def model(self) -> Path:
        """A run's folder, or a file that `load` reads."""
        ...

    @property
    def size(self) -> int | None:
        """Height and width of the input; None: the model's."""
        ...

    @property
    def encoder(self) -> Encoder:
        """Of a CMAE."""
        ...

    @property
    def channels(self) -> Channels:
        """Of the authors' CMAE."""
        ...


def load_taking(axes: int, options: Wanted, *, other: str) -> Any:
    """As `load`, for a command that is for inputs of so many axes, at another height and width if given.

    Raises ValueError where there is none, or where its inputs have other axes: they are the `other` command's.
    """
    found = partial(load, options.model, encoder=options.encoder, channels=options.channels)
    try:
        model = found()
        size = model.get_submodule("trunk").size
        if len(size) != axes:
            raise ValueError(f"the model of {options.model} takes inputs of {size}: use `python -m {other}`")
        wanted = size if options.size is None else (*size[:-2], options.size, options.size)
        return model if wanted == size else found(size=wanted)
    except FileNotFoundError as missing:
        raise ValueError(f"{missing}: give a run's folder, or a checkpoint") from missing
