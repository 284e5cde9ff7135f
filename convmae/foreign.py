"""Plain ViT weights of others: MAE and VideoMAE from their published files, from transformers, and timm's ViTs.

All of them are read by the names of their tensors, brought to one set of names first, MAE's own. What our models cannot
be is refused: a poor match is no match.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import targets
from .builders import MAE, AttentionStage, Classifier
from .checkpoint import load_weights
from .grids import Grid
from .log_lines import seen
from .masking import random, tube
from .nn.classifier import Classifier as ClassifierModule
from .nn.classifier import Pooling
from .nn.masked_autoencoder import MaskedAutoencoder
from .official import without_decoder_row

_log = logging.getLogger(__name__)

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Attention heads by width, in the published sizes."""

IMAGE_DECODER_HEADS = {512: 16}
VIDEO_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
VIDEO_SIZE = (16, 224, 224)
"""Of VideoMAE's models: their files do not say it, for their positions are computed."""

_NAMES = (
    # transformers: an encoder by itself, or inside another model
    (r"^(vit|videomae)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.(decoder_\w+|mask_token)", r"\1"),
    (r"\.attention\.attention\.(query|key|value|q_bias|v_bias)", r".attn.\1"),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    # VideoMAE's own files
    (r"^encoder\.", ""),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^decoder\.blocks\.", "decoder_blocks."),
    (r"^decoder\.norm\.", "decoder_norm."),
    (r"^decoder\.head\.", "decoder_pred."),
)

_OURS = (
    (r"^patch_embed\.proj\.", "trunk.stages.0.embedding."),
    (r"^cls_token$", "trunk.stages.0.class_token"),
    (r"^blocks\.", "trunk.stages.0.blocks."),
    (r"^fc_norm\.", "norm."),
    (r"^decoder_embed\.", "decoder.embedding."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.head."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)


def recognised(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a plain ViT."""
    names = _common(state)
    return "patch_embed.proj.weight" in names and "blocks.0.norm1.weight" in names


@seen()
def load(
    state: Mapping[str, Tensor],
    *,
    size: int | Sequence[int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    pooling: Pooling | None = None,
) -> MaskedAutoencoder | ClassifierModule:
    """The model of a plain ViT's state dict, in evaluation mode; every size that shapes tell is inferred.

    A head gives a classifier, a decoder a masked autoencoder; where there is neither, a masked autoencoder with a fresh
    decoder. VideoMAE's positions, which its files leave out, are computed: a sinusoid over the flattened index.

    Norms have an eps of 1e-6 here, as MAE's and VideoMAE's own. transformers' configurations have 1e-12 in blocks, and
    1e-5 here and there; outputs then differ by 1e-6 to 1e-5 of their size.

    Args:
        state: by the names of MAE's, VideoMAE's, transformers' or timm's.
        size: of the input, `(H, W)` or `(T, H, W)`, or both sides; without it the file's, and for video 16 frames of
            224, which the file does not tell. Positions that the file has are resized.
        heads: known for widths of 192, 384, 768, 1024 and 1280.
        decoder_heads: known for the published widths.
        pooling: of a classifier: "mean" where the file has `fc_norm`, else "token", unless given.

    Raises:
        ValueError: tensors are missing, left over or of other shapes, or what the file means cannot be built.
    """
    names = _common(state)
    if "patch_embed.proj.weight" not in names:
        raise ValueError(f"not a plain ViT: it has no patch embedding; it begins with {', '.join(list(state)[:5])}")
    try:
        backbone = _backbone(names, heads=heads, decoder_heads=decoder_heads)
        sides = (*backbone.size[:-2], size, size) if isinstance(size, int) else size
        own = backbone.size  # that of the positions in the file
        sized = backbone if sides is None else backbone.input(sides)
        builder = _classifier(sized, names, pooling) if "head.weight" in names else sized
    except KeyError as missing:
        raise ValueError(f"a poor match: the file lacks {missing.args[0]}") from missing
    with torch.random.fork_rng(devices=[]):
        model: Any = builder.build()
    weights = _translated(names, model, tuple(side // s for side, s in zip(own, backbone.stride, strict=True)))
    load_weights(model, weights)
    return model.eval()  # type: ignore[no-any-return]


def _common(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By MAE's names, with q, k and v as one."""
    found: dict[str, Tensor] = {}
    for given, tensor in state.items():
        name = given
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    for block in sorted({name[: name.index(".attn.") + 6] for name in found if ".attn." in name}):
        _join(found, block)
    return found


_PARTS = (("query", "q"), ("key", "k"), ("value", "v"))


def _join(found: dict[str, Tensor], block: str) -> None:
    """Make q, k and v of a block one, where they are apart."""

    def taken(names: Sequence[str]) -> Tensor | None:
        return next((found.pop(block + name) for name in names if block + name in found), None)

    weights = [taken([f"{name}.weight" for name in names]) for names in _PARTS]
    biases = [taken([f"{letter}_bias", f"{word}.bias", f"{letter}.bias"]) for word, letter in _PARTS]
    if there := [weight for weight in weights if weight is not None]:
        found[f"{block}qkv.weight"] = torch.cat(there)
    if any(bias is not None for bias in biases):  # VideoMAE's keys have no bias, which is one of 0
        zero = torch.zeros_like(next(bias for bias in biases if bias is not None))
        found[f"{block}qkv.bias"] = torch.cat([zero if bias is None else bias for bias in biases])


def _backbone(names: Mapping[str, Tensor], *, heads: int | None, decoder_heads: int | None) -> MAE:
    """The builder whose shapes these are."""
    embedding = names["patch_embed.proj.weight"]
    dim, stride = len(embedding), tuple(embedding.shape[2:])
    video = len(stride) == 3
    own_heads = heads or HEADS.get(dim)
    if own_heads is None:
        raise ValueError(f"no shape tells the heads of a ViT {dim} wide: give heads=...")
    class_token = "cls_token" in names
    stage = AttentionStage(
        dim=dim,
        depth=_count(names, "blocks"),
        stride=stride,
        heads=own_heads,
        mlp_ratio=len(names["blocks.0.mlp.fc1.weight"]) / dim,
        hybrid=False,
    )
    builder = MAE().input(_size(names, stride, class_token)).stages(stage).with_class_token(class_token)
    if video:
        builder = builder.mask(tube(0.9)).predict(targets.normalized_pixels(per_channel=True))
    else:
        builder = builder.mask(random(0.75))
    if "decoder_embed.weight" not in names:
        return builder
    width = len(names["decoder_embed.weight"])
    known = (VIDEO_DECODER_HEADS if video else IMAGE_DECODER_HEADS).get(width)
    if (decoder_heads := decoder_heads or known) is None:
        raise ValueError(f"no shape tells the heads of a decoder {width} wide: give decoder_heads=...")
    return builder.decode(
        dim=width,
        depth=_count(names, "decoder_blocks"),
        heads=decoder_heads,
        mlp_ratio=len(names["decoder_blocks.0.mlp.fc1.weight"]) / width,
    )


def _size(names: Mapping[str, Tensor], stride: Grid, class_token: bool) -> Grid:
    """The input size that the positions in the file are for."""
    if "pos_embed" not in names:
        if len(stride) == 2:
            raise ValueError("a poor match: the file lacks pos_embed, the positions of its patches")
        return VIDEO_SIZE
    count = names["pos_embed"].shape[-2] - class_token
    side = math.isqrt(count)
    if len(stride) != 2 or side * side != count:
        raise ValueError(f"pos_embed has {count} positions, not those of a square image")
    return tuple(side * each for each in stride)


def _count(names: Mapping[str, Tensor], what: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{what}.")})


def _classifier(backbone: MAE, names: Mapping[str, Tensor], pooling: Pooling | None) -> Classifier:
    pooling = pooling or ("mean" if "fc_norm.weight" in names else "token")
    if pooling == "mean" and "fc_norm.weight" not in names:
        raise ValueError(
            "this classifier has a norm before its mean over tokens (no fc_norm), ours one after it: it cannot be "
            "expressed"
        )
    return backbone.classifier(len(names["head.weight"]), pooling=pooling)


def _translated(names: Mapping[str, Tensor], model: Any, grid: Grid) -> dict[str, Tensor]:
    """By our names, with positions; what the model has and the file need not have is taken from the model."""
    own: dict[str, Tensor] = model.state_dict()
    left = dict(names)
    weights: dict[str, Tensor] = {}
    trunk, dim = model.trunk, model.trunk.dims[-1]
    positions = left.pop("pos_embed", None)
    token = left.get("cls_token")
    if positions is not None:
        positions = positions.reshape(-1, dim)
        if token is not None:  # its own position is added to it once and for all
            left["cls_token"] = token + positions[:1]
            positions = positions[1:]
        weights["trunk.stages.0.positions"] = positions.view(*grid, dim)
    else:
        weights["trunk.stages.0.positions"] = sinusoid(trunk.grid, dim)
    ignored = []
    if isinstance(model, ClassifierModule):
        if model.pooling == "mean":
            ignored = [name for name in left if name.startswith("norm.")]
        ignored += [name for name in left if name.startswith(("decoder", "mask_token"))]
    elif "decoder_embed.weight" in left:
        width = own["decoder.embedding.weight"].shape[0]
        left.setdefault("decoder_embed.bias", torch.zeros(width))
        if token is not None:
            left = without_decoder_row(left, math.prod(grid))
        given = left.pop("decoder_pos_embed", None)
        weights["decoder.positions"] = sinusoid(trunk.grid, width) if given is None else given.view(*grid, width)
    else:
        weights |= {name: tensor for name, tensor in own.items() if name.startswith("decoder.")}
        _log.info("the file has no decoder: it is fresh")
    if not isinstance(model, ClassifierModule) and "norm.weight" not in left:
        if "decoder_embed.weight" in left:
            raise ValueError("this masked autoencoder has no norm after its encoder, ours has: it cannot be expressed")
        weights |= {name: own[name] for name in ("norm.weight", "norm.bias")}
        _log.info("the file has no last norm: it is fresh")
    for name in ignored:
        left.pop(name)
    if ignored:
        _log.info("left out, as the model has no place for it: %s", ", ".join(ignored))
    _log.info("used %d tensors of %d", len(names) - len(ignored), len(names))
    for name, tensor in left.items():
        for pattern, replacement in _OURS:
            name = re.sub(pattern, replacement, name)
        same = name in own and tensor.numel() == own[name].numel()
        weights[name] = tensor.reshape(own[name].shape) if same else tensor
    return weights


def sinusoid(grid: Grid, dim: int) -> Tensor:
    """VideoMAE's positions `(*grid, dim)`: sines and cosines in turn, of the index of a token in row-major order."""
    index = torch.arange(math.prod(grid), dtype=torch.float64)[:, None]
    rates = 10000 ** (-2 * torch.arange((dim + 1) // 2, dtype=torch.float64) / dim)
    table = torch.stack([(index * rates).sin(), (index * rates).cos()], dim=-1).flatten(1)[:, :dim]
    return table.float().view(*grid, dim)
