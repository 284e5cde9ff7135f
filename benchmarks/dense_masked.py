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
from convmae.nn.trunk import AttentionStage

CONVOLUTION = {2: F.conv2d, 3: F.conv3d}  # by number of axes


def convolve(
    x: Tensor, layer: PatchConvolution | Pointwise | TileConvolution, stride: Sequence[int] = ()
) -> Tensor:
    """`(B, C, *cells) -> (B, D, *cells / stride)`, depthwise where the weight has one input channel."""
    axes = x.ndim - 2
    weight = layer.weight if layer.weight.ndim > 2 else layer.weight.reshape(*layer.weight.shape, *[1] * axes)
    depthwise = isinstance(layer, TileConvolution)
    return CONVOLUTION[axes](
        x,
        weight,
        layer.bias,
        stride=tuple(stride) or 1,
        padding=tuple(side // 2 for side in weight.shape[2:]) if depthwise else 0,
        groups=len(weight) if depthwise else 1,
    )


def over_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for channels-last cells, on `(B, C, *cells)`; the result keeps the layout that the layer gave it."""
    out: Tensor = layer(x.movedim(1, -1))
    return out.movedim(-1, 1)


def run_block(block: ConvolutionBlock, x: Tensor, visible: Tensor) -> Tensor:
    """`x (B, C, *cells)`, visible `(B, 1, *cells)`, 1 = shown `-> (B, C, *cells)`."""
    mixed = convolve(over_channels(block.norm1, x), block.into)
    x = x + convolve(convolve(visible * mixed, block.depthwise), block.out)
    hidden = F.gelu(convolve(over_channels(block.norm2, x), block.mlp[0]))
    return x + convolve(hidden, block.mlp[2])


def shown_tokens(x: Tensor, shown: Shown) -> Tensor:
    """`(B, C, *grid) -> (B, V, C)`."""
    assert shown.index is not None
    tokens = x.flatten(2).transpose(1, 2)
    return tokens.gather(1, shown.index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class DenseMasked(nn.Module):
    """A model of ours run in the published form: the same parameters, and the same latent and loss to rounding.

    For trunks of convolution stages with one attention stage at the end, without class token.
    """

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def encode(self, x: Tensor, mask: Tensor, shown: Shown) -> Tensor:
        """`x (B, C, *size)`, mask `(B, *grid)` `-> (B, V, D)`, the latent of the shown tokens."""
        trunk, fused = self.model.trunk, []
        for number, stage in enumerate(trunk.stages):
            x = convolve(x, stage.embedding, stage.embedding.stride)
            x = over_channels(stage.norm, x)
            if isinstance(stage, AttentionStage):
                break
            x = F.gelu(x).contiguous()
            visible = (~mask).unsqueeze(1).to(x.dtype)
            for axis, side in enumerate(quotient(x.shape[2:], trunk.grid)):
                visible = visible.repeat_interleave(side, dim=2 + axis)
            for block in stage.blocks:
                x = run_block(block, x, visible)
            if len(self.model.fusion):
                fusion = self.model.fusion[number]
                fused.append(shown_tokens(convolve(x, fusion, fusion.stride), shown))
        return self.attend(x, shown, fused)

    def attend(self, x: Tensor, shown: Shown, fused: list[Tensor]) -> Tensor:
        """The attention stage after its normalised embedding `(B, D, *grid)`, fusion and norm: `(B, V, D)`."""
        stage = self.model.trunk.stages[-1]
        assert isinstance(stage, AttentionStage) and stage.class_token is None
        positioned = stage.linear(stage.activation(x).movedim(1, -1)) + stage.positions
        tokens = shown_tokens(positioned.movedim(-1, 1), shown)
        for block in stage.blocks:
            tokens = block(tokens)
        out: Tensor = self.model.norm(sum(fused, tokens))
        return out

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`x (B, C, *size)`, mask `(B, *grid)`, True = hidden; as `MaskedAutoencoder.forward`."""
        shown = self.model.trunk.shown(mask, device=x.device)
        mask = mask.to(x.device, non_blocking=True)
        prediction = self.model.decoder(self.encode(x, mask, shown), shown)
        return {"loss": self.model.loss(x, prediction, mask), "prediction": prediction, "mask": mask}


@torch.no_grad()
def disagreement(model: MaskedAutoencoder, x: Tensor, mask: Tensor) -> tuple[float, float]:
    """How far the two forms are apart, relative: the latent's largest difference over its largest value; the loss's."""
    dense, shown = DenseMasked(model), model.trunk.shown(mask, device=x.device)
    ours, theirs = model.encode(x, shown)[0], dense.encode(x, mask.to(x.device), shown)
    losses = model(x, mask=mask)["loss"].item(), dense(x, mask)["loss"].item()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item(), abs(losses[0] / losses[1] - 1)
