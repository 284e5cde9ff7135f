"""The authors' CMAE checkpoints, by their names: the whole model, or its online encoder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from .builders import MAE, AttentionStage, Decoder
from .cmae import CMAE
from .grids import Grid
from .log_lines import seen
from .masking import Masking, block, random
from .nn.contrast import ContrastiveMaskedAutoencoder
from .nn.masked_autoencoder import MaskedAutoencoder
from .official import (
    KNOWN_HEADS,
    Names,
    fill,
    read,
    shaped,
    side_of,
    state_of,
    without_decoder_row,
    without_encoder_row,
)
from .targets import IMAGENET_MEAN, IMAGENET_STD

Channels = Literal["rgb", "bgr"]
"""The order of the channels that a model was trained on."""

MASK_RATIO = 0.65
"""Of the authors' code, in blocks of 2 x 2 tokens; the paper says 0.75."""

_EMBEDDING = "patch_embed.projection.weight"
_ATTENTION = "layers.0.attn.qkv.weight"
_ENCODER = "backbone."
_CONTRAST = ("target_backbone.", "feature_decoder.", "projector.", "target_projector.", "head.predictor.")

_NAMES: Names = (
    (r"^backbone\.ln1\.", "norm."),
    (r"^backbone\.", "trunk.stages.0."),
    (r"^target_backbone\.", "target_encoder.trunk.stages.0."),
    (r"^target_projector\.", "target_encoder.projector."),
    (r"^pixel_decoder\.", "decoder."),
    (r"^head\.predictor\.", "predictor."),
    (r"(?<=stages\.0\.)patch_embed\.projection\.", "embedding."),
    (r"(?<=stages\.0\.)pos_embed$", "positions"),
    (r"(?<=stages\.0\.)cls_token$", "class_token"),
    (r"(?<=stages\.0\.)layers\.", "blocks."),
    (r"^((?:feature_)?decoder)\.ln1\.", r"\1.norm."),
    (r"(?<=decoder\.)decoder_embed\.", "embedding."),
    (r"(?<=decoder\.)decoder_pos_embed$", "positions"),
    (r"(?<=decoder\.)decoder_blocks\.", "blocks."),
    (r"(?<=decoder\.)decoder_pred\.", "head."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.0."),
    (r"\.ffn\.layers\.1\.", ".mlp.2."),
    (r"(?<=or\.)fc0\.", "0."),
    (r"(?<=or\.)bn0\.", "1."),
    (r"(?<=or\.)fc1\.", "3."),
)


def recognised(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of the authors' CMAE, or of its encoder, with or without `backbone.` before them."""
    return any(prefix + _EMBEDDING in state and prefix + _ATTENTION in state for prefix in (_ENCODER, ""))


@seen()
def load(
    source: str | Path | Mapping[str, Tensor],
    *,
    heads: int | None = None,
    decoder_heads: int = 16,
    size: int | Sequence[int] | None = None,
    channels: Channels = "rgb",
) -> ContrastiveMaskedAutoencoder | MaskedAutoencoder:
    """The model of an authors' checkpoint, with its weights, in evaluation mode; every size is inferred from shapes.

    A file with both decoders, the heads and the target gives a contrastive masked autoencoder; one with the online
    encoder alone a plain one, whose decoder is as initialised unless the file has it. Masks are the authors' code's,
    blocks of 2 x 2 tokens, 65 % of them hidden (single tokens, where blocks do not fit the grid). Momentum,
    temperature and the losses' weights are in no file: they are the builder's defaults, which are the code's.

    The authors' position tables have a row for the class token, ours have none; the model is the same function, see
    `official.without_encoder_row` and `official.without_decoder_row`. Whether the target sees a class token is a switch
    of the authors' code which no file tells: here it does.

    The released weights saw BGR images, normalised with the statistics of RGB. With `channels="bgr"` that is folded
    into the patch embeddings, exactly: the model takes RGB images, normalised as ever, and its encoders give what the
    authors' give for theirs. Of the pixel decoder only the channels are put in order. What it predicts are pixels
    normalised by their patch, over three channels scaled in another way, which no linear map undoes: its loss is near
    the authors', not theirs.

    Args:
        source: a file, or a state dict; `model`, `state_dict` or `module` inside it are found, and the prefixes
            `module.` and `_orig_mod.` dropped. An encoder's names may begin with `backbone.` or do without.
        heads: attention heads of the encoder, which no shape tells; known for widths 384, 768, 1024, 1280.
        decoder_heads: attention heads of both decoders.
        size: build for this input size `(H, W)` instead of the file's; positions are resized.
        channels: the order that the authors' model was trained on.

    Raises:
        ValueError: the names are not CMAE's, a tensor is missing or does not fit, the heads cannot be told, or there is
            no such order of channels.
        FileNotFoundError: there is no such file.
    """
    if channels not in ("rgb", "bgr"):
        raise ValueError(f'channels is "rgb" or "bgr", the order the model was trained on; got {channels!r}')
    state = state_of(read(source))
    if not recognised(state):
        raise ValueError(
            f"not a CMAE checkpoint: it has no {_ENCODER}{_EMBEDDING} and {_ENCODER}{_ATTENTION}, with or without "
            f"{_ENCODER} before them; it begins with {', '.join(list(state)[:5]) or 'none'}"
        )
    if _EMBEDDING in state:
        state = {_ENCODER + name: tensor for name, tensor in state.items()}
    try:
        mae = _plain(state, heads=heads, decoder_heads=decoder_heads)
        grid = mae.grid
        state = _without_rows(_as_rgb(state) if channels == "bgr" else state, mae)
        mae = mae if size is None else mae.input(size)
        mae = mae.mask(_masking(mae.grid))
        builder = _contrastive(state, mae, decoder_heads) if any(name.startswith(_CONTRAST) for name in state) else mae
    except KeyError as missing:
        raise ValueError(
            f"a poor match: the file lacks {missing.args[0]}; to load the encoder alone leave out all but {_ENCODER}*"
        ) from missing
    with torch.random.fork_rng(devices=[]):
        model = builder.build()
    fill(model, state, _NAMES, grid=grid)
    return model.eval()


def _masking(grid: Grid) -> Masking:
    return random(MASK_RATIO) if any(side % 2 for side in grid) else block(MASK_RATIO, 2)


def _plain(state: Mapping[str, Tensor], *, heads: int | None, decoder_heads: int) -> MAE:
    """The builder of the masked autoencoder whose shapes these are; KeyError for a tensor that is not there."""
    embedding = state[_ENCODER + _EMBEDDING]
    if embedding.ndim != 4 or embedding.shape[1] != MAE.channels:
        raise ValueError(f"{_ENCODER}{_EMBEDDING} is {tuple(embedding.shape)}, needed is (width, 3, patch, patch)")
    dim, stride = len(embedding), tuple(embedding.shape[2:])
    own_heads = heads or KNOWN_HEADS.get(dim)
    if own_heads is None:
        raise ValueError(f"no shape tells the heads of an encoder {dim} wide: give heads=...")
    class_token = f"{_ENCODER}cls_token" in state
    stage = AttentionStage(
        dim=dim,
        depth=_depth(state, f"{_ENCODER}layers."),
        stride=stride,
        heads=own_heads,
        mlp_ratio=len(state[f"{_ENCODER}layers.0.ffn.layers.0.0.weight"]) / dim,
        hybrid=False,
    )
    side = side_of(state[f"{_ENCODER}pos_embed"].shape[1], class_token=class_token)
    mae = MAE().stages(stage).input(tuple(side * each for each in stride)).with_class_token(class_token)
    if any(name.startswith("pixel_decoder.") for name in state):
        mae = replace(mae, decoder=_decoder(state, "pixel_decoder", decoder_heads))
    return mae


def _contrastive(state: Mapping[str, Tensor], mae: MAE, decoder_heads: int) -> CMAE:
    """The builder of the whole over that of the plain one; KeyError for a tensor that is not there."""
    return CMAE(
        mae=mae,
        features=_decoder(state, "feature_decoder", decoder_heads),
        hidden=len(state["projector.fc0.weight"]),
        dim=len(state["projector.fc1.weight"]),
    )


def _decoder(state: Mapping[str, Tensor], name: str, heads: int) -> Decoder:
    dim = len(state[f"{name}.decoder_embed.weight"])
    return Decoder(
        dim=dim,
        depth=_depth(state, f"{name}.decoder_blocks."),
        heads=heads,
        mlp_ratio=len(state[f"{name}.decoder_blocks.0.ffn.layers.0.0.weight"]) / dim,
    )


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)})


def _without_rows(state: dict[str, Tensor], mae: MAE) -> dict[str, Tensor]:
    """Position tables without the rows of class tokens."""
    if not mae.class_token:
        return state
    length = math.prod(mae.grid)
    for encoder in (_ENCODER, "target_backbone."):
        if f"{encoder}cls_token" in state:
            state = without_encoder_row(state, length, encoder)
    for decoder in ("pixel_decoder.", "feature_decoder."):
        state = without_decoder_row(state, length, decoder)
    return state


def _as_rgb(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoders that saw BGR under the statistics of RGB, made to take RGB; and the pixel decoder's channels turned."""
    mean, std = torch.tensor(IMAGENET_MEAN, dtype=torch.float64), torch.tensor(IMAGENET_STD, dtype=torch.float64)
    # the value theirs saw in channel c is scale * ours in the channel opposite + shift
    scale, shift = std.flip(0) / std, (mean.flip(0) - mean) / std
    state = dict(state)
    shape = state[_ENCODER + _EMBEDDING].shape
    for name in (_ENCODER + _EMBEDDING, "target_backbone." + _EMBEDDING):
        if name in state:
            bias = name.removesuffix("weight") + "bias"
            weight = shaped(state, name, shape, _ENCODER + _EMBEDDING)
            state[name] = (weight * scale.view(-1, 1, 1)).flip(1)
            state[bias] = shaped(state, bias, shape[:1], name) + weight.sum((2, 3)) @ shift
    for name in ("pixel_decoder.decoder_pred.weight", "pixel_decoder.decoder_pred.bias"):
        if name in state:
            values = shaped(state, name, (math.prod(shape[1:]), *state[name].shape[1:]), _ENCODER + _EMBEDDING)
            turned = rearrange(values, "(pixels channels) ... -> pixels channels ...", channels=MAE.channels).flip(1)
            state[name] = turned.flatten(0, 1)
    return state
