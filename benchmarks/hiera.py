"""Hiera in its pretraining form, for images and clips: timm's encoder, with a masked autoencoder around it of our own.

Hiera (Ryali et al., 2023; arXiv 2306.00989) hides whole mask units, squares of tokens that its pooling brings down to
one token. The blocks, the pooling, the patch embedding and the positions are timm's, with the published numbers. Ours
are: what picks the shown units, the multi-scale fusion, the decoder and the loss. They follow the paper where it says
how, and are as cheap as they can be made where it does not, for this is a peer whose time is compared with ours.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae import MAE
from convmae.builders import AttentionStage
from convmae.grids import patches, product, quotient

EPS = 1e-6  # of LayerNorm, as in timm's encoder


def stages(source: MAE) -> list[AttentionStage]:
    """The stages of a builder that describes a Hiera: attention alone, the first at the stride of the patches."""
    found = [stage for stage in source.trunk if isinstance(stage, AttentionStage)]
    assert len(found) == len(source.trunk)
    return found


def unit(source: MAE) -> tuple[int, ...]:
    """Tokens of the first stage in a mask unit, along each axis."""
    return quotient(source.stride, source.trunk[0].stride)


def encoder_numbers(source: MAE) -> dict[str, Any]:
    """A builder's numbers by the names that timm gives them. The patches' kernel is 2·stride - 1, as published."""
    first, second, *rest = found = stages(source)
    assert all(later.stride == second.stride for later in rest), "timm pools by one stride"
    assert all(stage.dim == first.dim * 2**number for number, stage in enumerate(found)), "timm doubles the width"
    assert all(stage.heads == first.heads * 2**number for number, stage in enumerate(found)), "timm doubles the heads"
    return {
        "img_size": source.size,
        "in_chans": source.channels,
        "embed_dim": first.dim,
        "num_heads": first.heads,
        "stages": tuple(stage.depth for stage in source.trunk),
        "mlp_ratio": first.mlp_ratio,
        "q_pool": 1 + len(rest),
        "q_stride": second.stride,
        "mask_unit_size": unit(source),
        "patch_stride": first.stride,
        "patch_kernel": tuple(2 * side - 1 for side in first.stride),
        "patch_padding": tuple(side - 1 for side in first.stride),
        "sep_pos_embed": len(source.size) == 3,
        "num_classes": 0,
    }


class Fusion(nn.Module):
    """Every stage's tokens of a mask unit to the one token of the last, added up, then LayerNorm.

    The paper's strided convolutions cover a whole unit at each stage, so they are matrix products here; their rows
    are in the order in which timm keeps the tokens of a unit.
    """

    def __init__(self, dims: list[int], cells: list[int]) -> None:
        super().__init__()
        *earlier, last = dims
        self.projections = nn.ModuleList(
            [nn.Linear(dim * count, last) for dim, count in zip(earlier, cells, strict=False)]
        )
        self.norm = nn.LayerNorm(last, eps=EPS)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps `(B, tokens of a unit, K, C)` of every stage, `(B, 1, K, D)` of the last `-> (B, K, D)`."""
        *earlier, last = maps
        latent = last.squeeze(1)
        for projection, finer in zip(self.projections, earlier, strict=True):
            latent = latent + projection(finer.transpose(1, 2).flatten(2))
        out: Tensor = self.norm(latent)
        return out


class Decoder(nn.Module):
    """Mask tokens in the hidden units, learned positions, transformer blocks over all units, and a prediction.

    The prediction is made for hidden units only, which alone enter the loss.
    """

    def __init__(self, width: int, dim: int, *, depth: int, heads: int, mlp_ratio: float, units: int, values: int):
        from timm.models.vision_transformer import Block

        super().__init__()
        self.embedding = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, units, dim))
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, values)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, latent: Tensor, shown: Tensor, hidden: Tensor) -> Tensor:
        """`latent (B, K, D)` of the units `shown (B, K)` `-> (B, H, values)` for the units `hidden (B, H)`."""
        tokens = self.embedding(latent)
        batch, width = len(tokens), tokens.shape[-1]
        blank = self.mask_token.to(tokens.dtype).expand(batch, self.positions.shape[1], -1)
        tokens = blank.scatter(1, shown.unsqueeze(-1).expand(-1, -1, width), tokens) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        tokens = tokens.gather(1, hidden.unsqueeze(-1).expand(-1, -1, width))
        out: Tensor = self.head(self.norm(tokens))
        return out


class HieraMAE(nn.Module):
    """A masked autoencoder over timm's Hiera, of the numbers of a builder whose stages are all of attention.

    The target is the builder's, of the pixels of a hidden unit. Of a clip it is those of the first frame of each
    patch: one time slice, as in MAE on video (Feichtenhofer et al., 2022; arXiv 2205.09113). That Hiera is trained so
    too is our assumption, in favour of its time. The patch embedding sees the whole input with hidden units zeroed,
    as published; from there on only shown units exist. Shapes depend on the masking's ratio alone, so nothing waits
    for a GPU.

    Raises:
        ValueError: a mask unit is not pooled to one token.
    """

    def __init__(self, source: MAE) -> None:
        from timm.models.hiera import Hiera

        super().__init__()
        pooled = product(*(stage.stride for stage in source.trunk[1:]))
        if pooled != unit(source):
            raise ValueError(f"a mask unit of {unit(source)} tokens must be pooled to one, not by {pooled}")
        self.target, self.units, self.stride = source.target, source.grid, source.stride
        self.shown = int((~source.masking(1, source.grid)).sum())
        self.encoder = Hiera(**encoder_numbers(source))
        del self.encoder.head
        self.cells = [math.prod(unit(source))]
        for stage in stages(source)[1:]:
            self.cells.append(self.cells[-1] // math.prod(stage.stride))
        self.ends = [total - 1 for total in accumulate(stage.depth for stage in source.trunk)]
        dims = [stage.dim for stage in source.trunk]
        self.fusion = Fusion(dims, self.cells)
        self.slice = (*(1 for _ in source.size[:-2]), *source.stride[-2:])  # pixels of a unit that are predicted
        self.decoder = Decoder(
            dims[-1],
            source.decoder.dim,
            depth=source.decoder.depth,
            heads=source.decoder.heads,
            mlp_ratio=source.decoder.mlp_ratio,
            units=math.prod(source.grid),
            values=source.target.values(math.prod(self.slice), source.channels),
        )

    def encode(self, x: Tensor, mask: Tensor, shown: Tensor) -> Tensor:
        """`x (B, C, *size)`, mask `(B, *units)`, shown `(B, K)` `-> (B, K, D)`, a token for every shown unit."""
        x = self.encoder.patch_embed(x, mask=~mask.unsqueeze(1))
        x = self.encoder.unroll(self.encoder._pos_embed(x))
        # after unrolling, the tokens of a unit lie one unit's count apart: (B, cells, units, C)
        x = x.view(len(x), self.cells[0], -1, x.shape[-1])
        x = x.gather(2, shown[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])).flatten(1, 2)
        maps: list[Tensor] = []
        for number, block in enumerate(self.encoder.blocks):
            x = block(x)
            if number in self.ends:
                cells = self.cells[len(maps)]
                maps.append(x.view(len(x), cells, -1, x.shape[-1]))
        latent: Tensor = self.fusion(maps)
        return latent

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x (B, C, *size)`, mask `(B, *units)`, True = hidden, as many in each as the builder's masking hides.

        Returns:
            The mean squared error over hidden units: scalar, float32.
        """
        order = mask.flatten(1).int().argsort(dim=1, stable=True)
        shown, hidden = order[:, : self.shown], order[:, self.shown :]
        prediction = self.decoder(self.encode(x, mask, shown), shown, hidden)
        frames = x[:, :, :: self.stride[0]] if x.ndim == 5 else x
        pixels = patches(frames.float(), self.slice)
        pixels = pixels.gather(1, hidden[:, :, None, None].expand(-1, -1, *pixels.shape[2:]))
        return F.mse_loss(prediction.float(), self.target(pixels))
