"""The dense-masked reference: the published form of ConvMAE's encoder, on the weights of a built model.

Every cell of the map is computed, shown or hidden; the mask multiplies the input of the depthwise convolutions, and
only shown tokens enter the attention stage. Written with plain NC[T]HW convolutions, for any number of axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.grids import Shown, quotient
from convmae.nn.layers import ConvolutionBlock, PatchConvolution, Pointwise, TileConvolution
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.trunk import AttentionStage, ConvolutionStage

CONVOLUTION = {2: F.conv2d, 3: F.conv3d}  # by number of axes


def convolve(x: Tensor, layer: nn.Module) -> Tensor:
    """A layer of ours as a plain convolution: `(B, C, *cells) -> (B, D, *cells / stride)`."""
    assert isinstance(layer, PatchConvolution | Pointwise | TileConvolution)
    axes = x.ndim - 2
    weight = layer.weight if layer.weight.ndim > 2 else layer.weight.reshape(*layer.weight.shape, *[1] * axes)
    depthwise = isinstance(layer, TileConvolution)
    return CONVOLUTION[axes](
        x,
        weight,
        layer.bias,
        stride=layer.stride if isinstance(layer, PatchConvolution) else 1,
        padding=tuple(side // 2 for side in weight.shape[2:]) if depthwise else 0,
        groups=len(weight) if depthwise else 1,
    )


def over_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for channels-last cells, on `(B, C, *cells)`; the result keeps the layout that the layer gave it."""
    out: Tensor = layer(x.movedim(1, -1))
    return out.movedim(-1, 1)


def run_block(block: nn.Module, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """`x (B, C, *cells)`, visible `(B, 1, *cells)`, 1 = shown, None: all `-> (B, C, *cells)`."""
    assert isinstance(block, ConvolutionBlock)
    mixed = convolve(over_channels(block.norm1, x), block.into)
    x = x + convolve(convolve(mixed if visible is None else visible * mixed, block.depthwise), block.out)
    hidden = F.gelu(convolve(over_channels(block.norm2, x), block.mlp[0]))
    return x + convolve(hidden, block.mlp[2])


def embed(stage: nn.Module, x: Tensor) -> Tensor:
    """An attention stage's tokens before its blocks, with positions: `(B, C, *cells) -> (B, *grid, D)`."""
    assert isinstance(stage, AttentionStage)
    assert stage.class_token is None
    embedded = over_channels(stage.norm, convolve(x, stage.embedding))
    out: Tensor = stage.linear(stage.activation(embedded).movedim(1, -1)) + stage.positions
    return out


def shown_tokens(x: Tensor, shown: Shown) -> Tensor:
    """`(B, C, *grid) -> (B, V, C)`."""
    assert shown.index is not None
    tokens = x.flatten(2).transpose(1, 2)
    return tokens.gather(1, shown.index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def enlarge(mask: Tensor, cells: Sequence[int]) -> Tensor:
    """The mask of the tokens on a finer map: `(B, *grid) -> (B, *cells)`."""
    for axis, side in enumerate(quotient(cells, mask.shape[1:]), 1):
        mask = mask.repeat_interleave(side, dim=axis)
    return mask


class DenseMasked(nn.Module):
    """A model of ours run in the published form: the same parameters, and the same latent and loss to rounding.

    For trunks of convolution stages with one attention stage at the end, without class token.
    """

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def encode(self, x: Tensor, shown: Shown) -> Tensor:
        """`x (B, C, *size) -> (B, V, D)`, the latent of the shown tokens."""
        *convolutions, attention = self.model.trunk.stages
        fused = []
        for number, stage in enumerate(convolutions):
            assert isinstance(stage, ConvolutionStage)
            x = F.gelu(over_channels(stage.norm, convolve(x, stage.embedding))).contiguous()
            visible = enlarge(~shown.hidden, x.shape[2:]).unsqueeze(1).to(x.dtype)
            for block in stage.blocks:
                x = run_block(block, x, visible)
            if len(self.model.fusion):
                fused.append(shown_tokens(convolve(x, self.model.fusion[number]), shown))
        latent: Tensor = self.model.norm(sum(fused, self.attend(attention, x, shown)))
        return latent

    def attend(self, stage: nn.Module, x: Tensor, shown: Shown) -> Tensor:
        """The attention stage: embedded densely, then of the shown tokens only; `(B, C, *cells) -> (B, V, D)`."""
        assert isinstance(stage, AttentionStage)
        tokens = shown_tokens(embed(stage, x).movedim(-1, 1), shown)
        for block in stage.blocks:
            tokens = block(tokens)
        return tokens

    def forward(self, x: Tensor, mask: Tensor | Shown) -> dict[str, Tensor]:
        """`x (B, C, *size)`, mask `(B, *grid)`, True = hidden, or what it shows; as `MaskedAutoencoder.forward`."""
        shown = self.model.trunk.shown(mask, device=x.device) if isinstance(mask, Tensor) else mask.to(x.device)
        prediction = self.model.decoder(self.encode(x, shown), shown)
        return {"loss": self.model.loss(x, prediction, shown), "prediction": prediction, "mask": shown.hidden}


@torch.no_grad()
def disagreement(dense: DenseMasked, x: Tensor, mask: Tensor) -> tuple[float, float]:
    """How far the two forms are apart: the latent's largest difference over its largest value; the loss's, relative."""
    model, shown = dense.model, dense.model.trunk.shown(mask, device=x.device)
    ours, theirs = model.encode(x, shown)[0], dense.encode(x, shown)
    losses = model(x, mask=mask)["loss"].item(), dense(x, mask)["loss"].item()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item(), abs(losses[0] / losses[1] - 1)
