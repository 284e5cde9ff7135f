"""The trunk: stages of convolution blocks, then stages of attention blocks, over shown tiles or over whole maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..grids import Grid, Shown, product, show
from ..targets import normalize
from .layers import CONVOLUTION_EPS, AttentionBlock, ConvolutionBlock, PatchConvolution
from .positions import sincos
from .tile_convolution import reach


class Features(NamedTuple):
    """What a trunk gives: each stage's map `(R, V, *tile, C)`, and the class token `(R, 1, D)` if there is one."""

    maps: list[Tensor]
    class_token: Tensor | None

    @property
    def tokens(self) -> Tensor:
        """The last stage's tokens `(B, N, D)`, row-major, without the class token."""
        return self.maps[-1].flatten(1, -2)


class ConvolutionStage(nn.Module):
    """Strided convolution, LayerNorm, GELU, then convolution blocks."""

    def __init__(
        self,
        channels: int,
        dim: int,
        *,
        stride: Sequence[int],
        kernel: Sequence[int],
        mlp_ratio: float,
        drop_path: Sequence[float],
    ) -> None:
        super().__init__()
        self.kernel = tuple(kernel)
        self.embedding = PatchConvolution(channels, dim, stride)
        self.norm = nn.LayerNorm(dim, eps=CONVOLUTION_EPS)
        self.activation = nn.GELU()
        self.blocks = nn.ModuleList([ConvolutionBlock(dim, kernel, mlp_ratio, rate) for rate in drop_path])

    def forward(self, x: Tensor, shown: Shown) -> Tensor:
        """`x (R, V, *(tile·stride), C) -> (R, V, *tile, D)`."""
        x = self.activation(self.norm(self.embedding(x)))
        around = shown.around(reach(tuple(x.shape[2:-1]), self.kernel))
        for block in self.blocks:
            x = block(x, around)
        return x


class AttentionStage(nn.Module):
    """An embedding, sine-cosine positions, then transformer blocks over all shown cells together.

    The hybrid embedding is a strided convolution, LayerNorm, GELU and a Linear (ConvMAE); the plain one is a strided
    convolution alone (ViT).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        *,
        stride: Sequence[int],
        heads: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        cells: Grid,
        hybrid: bool,
        class_token: bool,
    ) -> None:
        super().__init__()
        self.embedding = PatchConvolution(channels, dim, stride)
        self.norm = nn.LayerNorm(dim, eps=CONVOLUTION_EPS) if hybrid else nn.Identity()
        self.activation = nn.GELU() if hybrid else nn.Identity()
        self.linear = nn.Linear(dim, dim) if hybrid else nn.Identity()
        self.positions = nn.Parameter(sincos(cells, dim), requires_grad=False)  # (*cells, D)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.blocks = nn.ModuleList([AttentionBlock(dim, heads, mlp_ratio, rate) for rate in drop_path])

    def forward(self, x: Tensor, shown: Shown) -> tuple[Tensor, Tensor | None]:
        """`x (R, V, *(tile·stride), C) -> (R, V, *tile, D)` and the class token `(R, 1, D)` or None."""
        x = self.linear(self.activation(self.norm(self.embedding(x))))
        x = x + shown.take(self.positions.unsqueeze(0))
        tokens = x.flatten(1, -2)
        if self.class_token is not None:
            # not len(tokens), which an exported batch size would be fixed by
            tokens = torch.cat([self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        if self.class_token is None:
            return tokens.view(x.shape), None
        return tokens[:, 1:].reshape(x.shape), tokens[:, :1]


class Trunk(nn.Module):
    """The stages in order; the encoder of pretraining and the backbone of finetuning are this same module."""

    def __init__(self, stages: Sequence[ConvolutionStage | AttentionStage], *, size: Grid) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.size = size
        self.strides = [stage.embedding.stride for stage in stages]
        self.stride = product(*self.strides)
        self.grid = tuple(pixels // stride for pixels, stride in zip(size, self.stride, strict=True))
        self.dims = [stage.embedding.weight.shape[0] for stage in stages]

    def normalized(self, x: Tensor) -> Tensor:
        """Pixels uint8 `(B, 3, *size)`, ImageNet-normalised in the precision of the weights; floats as they are."""
        return normalize(x, next(self.parameters()).dtype) if x.dtype == torch.uint8 else x

    @property
    def length(self) -> int:
        """L, all tokens of the grid."""
        return math.prod(self.grid)

    def tile(self, stage: int) -> Grid:
        """The cells of a stage that one token of the last stage covers, along each axis."""
        return product((1,) * len(self.grid), *self.strides[stage + 1 :])

    def shown(self, mask: Tensor | None, *, device: torch.device) -> Shown:
        """The shown tokens under a mask `(R, *grid)`; a mask on the CPU is worked out there, without a device wait."""
        return Shown(self.grid) if mask is None else show(mask, self.grid).to(device)

    def forward(self, x: Tensor, shown: Shown | None = None) -> Features:
        """Pixels to features.

        Args:
            x: `(B, C, *size)`, ImageNet-normalised.
            shown: from `Trunk.shown(mask)`; None shows everything.

        Raises:
            ValueError: x is not of the size the trunk was built for.
        """
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"the model was built for inputs (B, C, {', '.join(map(str, self.size))}), got {tuple(x.shape)}; "
                f"build it with .input({tuple(x.shape[2:])}), or resize the input"
            )
        shown = shown or Shown(self.grid)
        x = shown.take(x.movedim(1, -1))
        maps: list[Tensor] = []
        class_token = None
        for stage in self.stages:
            if isinstance(stage, AttentionStage):
                x, class_token = stage(x, shown)
            else:
                x = stage(x, shown)
            maps.append(x)
        return Features(maps, class_token)
