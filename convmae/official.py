"""The authors' ConvMAE checkpoints, first and second release, by their names: pretraining models and classifiers."""

from __future__ import annotations

import collections
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .builders import AttentionStage, Classifier, ConvMAE, ConvStage
from .checkpoint import load_weights, read_file
from .grids import Grid
from .log_lines import seen
from .nn.classifier import Classifier as ClassifierModule
from .nn.masked_autoencoder import MaskedAutoencoder

_log = logging.getLogger(__name__)

KNOWN_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}
"""Heads of the last stage by its width, in the published sizes."""

_PREFIXES = ("module.", "_orig_mod.")


@seen()
def load(
    source: str | Path | Mapping[str, Tensor],
    *,
    heads: int | None = None,
    decoder_heads: int = 16,
    pooling: str | None = None,
    size: int | Sequence[int] | None = None,
) -> MaskedAutoencoder | ClassifierModule:
    """The model of an authors' checkpoint, with its weights; every size is inferred from shapes.

    A file with a classification head gives a classifier, any other a masked autoencoder. Without the multi-scale
    convolutions in the file (the first release left them out) the model is built without fusion.

    The second release (ConvMAE v2) carries a class token, `cls_token`, and the model gets one. Whether its position
    tables have a row for that token is not published, so both forms are read, told apart by the number of rows; the
    row is the first one, as in MAE's tables. Our class token has no position; the models are the same functions all
    the same, see `without_encoder_row` and `without_decoder_row`.

    Args:
        source: a file, or a state dict; `model`, `state_dict` or `module` inside it are found, and the prefixes
            `module.` and `_orig_mod.` dropped.
        heads: attention heads of the last stage, which no shape tells; known for widths 384, 768, 1024, 1280.
        decoder_heads: attention heads of the decoder.
        size: build for this input size `(H, W)` instead of the file's; positions are resized.
        pooling: of a classifier, "mean" (`fc_norm` in the file) or "token" (`norm`); needed only where both are there.

    Raises:
        ValueError: the names are not ConvMAE's, a tensor is missing or does not fit, or the heads cannot be told.
        FileNotFoundError: there is no such file.
    """
    state = state_of(read(source))
    if "patch_embed1.proj.weight" not in state:
        raise ValueError(
            "not a ConvMAE checkpoint: it has no patch_embed1.proj.weight; it begins with " + ", ".join(list(state)[:5])
        )
    try:
        backbone = _infer(state, heads=heads, decoder_heads=decoder_heads)
        grid = backbone.grid
        if backbone.class_token:
            state = without_decoder_row(without_encoder_row(state, math.prod(grid)), math.prod(grid))
    except KeyError as missing:
        raise ValueError(f"a poor match: the file lacks {missing.args[0]}") from missing
    if size is not None:
        backbone = backbone.input(size)
    builder: ConvMAE | Classifier = backbone
    if "head.weight" in state:
        pooling = pooling or ("mean" if "fc_norm.weight" in state else "token")
        builder = backbone.classifier(len(state["head.weight"]), pooling=pooling)  # type: ignore[arg-type]
        state = {name: tensor for name, tensor in state.items() if name.split(".")[0] != _other_norm(pooling)}
    with torch.random.fork_rng(devices=[]):
        model = builder.build()
    # the first release left mask tokens out
    fill(model, state, _names(len(backbone.trunk)), grid=grid, optional={"decoder.mask_token"})
    return model.eval()


def _other_norm(pooling: str) -> str:
    return "norm" if pooling == "mean" else "fc_norm"


def read(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Any]:
    """What a file holds, which must be a mapping, or the mapping given.

    Raises:
        ValueError: the file cannot be read, or holds something else.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Mapping):
        return source
    if not Path(source).is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    content = read_file(Path(source))
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a state dict")
    return content


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by name: `model`, `state_dict` or `module` inside it, without wrappers' prefixes."""
    for key in ("model", "state_dict", "module"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        if isinstance(tensor, Tensor):
            state[name] = tensor
    return state


def _infer(state: Mapping[str, Tensor], *, heads: int | None, decoder_heads: int) -> ConvMAE:
    """The builder whose shapes these are."""
    count = _count(state, r"patch_embed(\d+)\.proj\.weight")
    trunk: list[ConvStage | AttentionStage] = []
    for number in range(1, count + 1):
        embedding = state[f"patch_embed{number}.proj.weight"]
        dim, stride = len(embedding), tuple(embedding.shape[2:])
        depth = _count(state, rf"blocks{number}\.(\d+)\.norm1\.weight")
        mlp_ratio = len(state[f"blocks{number}.0.mlp.fc1.weight"]) / dim
        depthwise = state.get(f"blocks{number}.0.attn.weight")
        if depthwise is not None:
            kernel = tuple(depthwise.shape[2:])
            trunk.append(ConvStage(dim=dim, depth=depth, stride=stride, kernel=kernel, mlp_ratio=mlp_ratio))
            continue
        own_heads = heads or KNOWN_HEADS.get(dim)
        if own_heads is None:
            raise ValueError(f"no shape tells the heads of a stage {dim} wide: give heads=...")
        trunk.append(AttentionStage(dim=dim, depth=depth, stride=stride, heads=own_heads, mlp_ratio=mlp_ratio))
    builder = ConvMAE().stages(*trunk).with_class_token("cls_token" in state)
    side = side_of(state["pos_embed"].shape[1], class_token=builder.class_token)
    builder = builder.input(tuple(side * stride for stride in builder.stride)).fuse(
        "stage1_output_decode.weight" in state
    )
    if "decoder_embed.weight" in state:
        dim = len(state["decoder_embed.weight"])
        builder = builder.decode(
            dim=dim,
            depth=_count(state, r"decoder_blocks\.(\d+)\.norm1\.weight"),
            heads=decoder_heads,
            mlp_ratio=len(state["decoder_blocks.0.mlp.fc1.weight"]) / dim,
        )
    return builder


def side_of(rows: int, *, class_token: bool) -> int:
    """The side of the square grid of a position table of so many rows, one of which may be the class token's.

    Raises ValueError where there is no such grid.
    """
    for length in (rows, rows - 1) if class_token else (rows,):
        side = math.isqrt(length)
        if side * side == length:
            return side
    with_row = ", with or without a row for the class token" if class_token else ""
    raise ValueError(f"pos_embed has {rows} positions, not a square grid{with_row}")


def shaped(state: Mapping[str, Tensor], name: str, shape: Sequence[int], like: str) -> Tensor:
    """The tensor of this name in float64, where it has this shape; `like` names what asks for it.

    Raises ValueError where it has another shape, and KeyError where it is not there.
    """
    tensor = state[name]
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, needed is {tuple(shape)}, to fit {like}")
    return tensor.double()


def without_encoder_row(state: Mapping[str, Tensor], length: int, prefix: str = "") -> dict[str, Tensor]:
    """An encoder's position table of `length` rows alone: the class token's row is added to that token.

    The names `pos_embed` and `cls_token` have the prefix. Raises ValueError and KeyError as `shaped` does.
    """
    token, positions = f"{prefix}cls_token", f"{prefix}pos_embed"
    table = state[positions]
    if table.shape[1] != length + 1:
        return dict(state)
    row = table[:, :1].double()  # a sum of halves is not rounded to a half
    return {**state, positions: table[:, 1:], token: shaped(state, token, row.shape, positions) + row}


def without_decoder_row(state: Mapping[str, Tensor], length: int, prefix: str = "") -> dict[str, Tensor]:
    """A decoder's position table of `length` rows alone, where it has one; the same function.

    The class token's row, where it is not zero, is added to the bias of the embedding, and so given to the class token
    and to all shown ones. It is taken from all positions, which gives the shown ones back what they had, and added to
    the mask token for the hidden ones.

    The names `decoder_pos_embed`, `decoder_embed.bias` and `mask_token` have the prefix. Raises ValueError and KeyError
    as `shaped` does.
    """
    positions, bias, token = (f"{prefix}{name}" for name in ("decoder_pos_embed", "decoder_embed.bias", "mask_token"))
    table = state.get(positions)
    if table is None or table.shape[1] != length + 1:
        return dict(state)
    row, rest = table[:, :1].double(), table[:, 1:]
    if not row.any():
        return {**state, positions: rest}
    return {
        **state,
        positions: rest.double() - row,
        bias: shaped(state, bias, row.shape[2:], positions) + row.flatten(),
        token: shaped(state, token, row.shape, positions) + row,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    count = sum(re.fullmatch(pattern, name) is not None for name in state)
    if not count:
        raise ValueError(f"not a ConvMAE checkpoint: it has no tensor named like {pattern}")
    return count


Names = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""The authors' names to ours, as substitutions tried in order."""


def _names(stages: int) -> Names:
    def stage(match: re.Match[str]) -> str:
        return f"trunk.stages.{int(match[1]) - 1}."

    return [
        (rf"^patch_embed{stages + 1}\.", f"trunk.stages.{stages - 1}.linear."),
        (r"^patch_embed(\d+)\.(?=proj)", stage),
        (r"^patch_embed(\d+)\.(?=norm)", stage),
        (r"^pos_embed$", f"trunk.stages.{stages - 1}.positions"),
        (r"^cls_token$", f"trunk.stages.{stages - 1}.class_token"),
        (r"^blocks(\d+)\.", lambda match: f"{stage(match)}blocks."),
        (r"^stage(\d+)_output_decode\.", lambda match: f"fusion.{int(match[1]) - 1}."),
        (r"^fc_norm\.", "norm."),
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_embed\.", "decoder.embedding."),
        (r"^decoder_pos_embed$", "decoder.positions"),
        (r"^decoder_blocks\.", "decoder.blocks."),
        (r"^decoder_norm\.", "decoder.norm."),
        (r"^decoder_pred\.", "decoder.head."),
        (r"(?<=\d\.)proj\.(?=(weight|bias)$)", "embedding."),
        (r"\.conv1\.", ".into."),
        (r"\.conv2\.", ".out."),
        (r"\.attn\.qkv\.", ".attention.qkv."),
        (r"\.attn\.proj\.", ".attention.out."),
        (r"\.attn\.", ".depthwise."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
    ]


def fill(
    model: MaskedAutoencoder | ClassifierModule,
    state: Mapping[str, Tensor],
    names: Names,
    *,
    grid: Grid,
    optional: Collection[str] = (),
) -> None:
    """Load the authors' weights into a model, and log what was used, missing and unexpected.

    A decoder may be missing as a whole, and whatever is optional, by our names; they stay as initialised. Positions in
    the file are for this grid, and resized for the model's.

    Raises:
        ValueError: anything else is missing, or does not fit.
    """
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for official, tensor in state.items():
        name = official
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        if name not in own:
            unexpected.append(official)
            continue
        renamed[name] = _reshape(name, tensor, own[name].shape, grid)
    missing = [name for name in own if name not in renamed]
    used = collections.Counter(name.split(".")[0] for name in state if name not in unexpected)
    groups = ", ".join(f"{name} ({count})" for name, count in used.items())
    _log.info("used %d tensors of %d in the file: %s", len(renamed), len(state), groups)
    _log.info("missing, left as initialised: %s", ", ".join(missing) or "none")
    _log.info("unexpected, not used: %s", ", ".join(unexpected) or "none")
    without_decoder = all(not name.startswith("decoder.") for name in renamed)
    needed = [
        name for name in missing if name not in optional and not (without_decoder and name.startswith("decoder."))
    ]
    if needed:
        raise ValueError(
            f"a poor match: the file lacks {', '.join(needed)}; it has {', '.join(unexpected) or 'no others'}"
        )
    load_weights(model, {**{name: own[name] for name in missing}, **renamed})


def _reshape(name: str, tensor: Tensor, shape: torch.Size, grid: Grid) -> Tensor:
    """Positions from a list `(1, L, D)` to the grid, and 1x1 convolutions to matrices; anything else as it is."""
    if name.endswith("positions") and tensor.ndim == 3 and tensor.shape[1] == math.prod(grid):
        return tensor.reshape(*grid, -1)
    pointwise = tensor.shape == (*shape, *[1] * (tensor.ndim - len(shape)))
    return tensor.reshape(shape) if pointwise else tensor
