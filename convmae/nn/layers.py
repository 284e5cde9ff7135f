"""The layers of a stage. Channels are last everywhere, so that a layer asks nothing about axes before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..grids import cut
from .tile_convolution import tile_convolution

# einops finds its backend when it is first used: within torch.compile that would make the second step compile anew
rearrange(torch.empty(0), "n -> n")

CONVOLUTION_EPS = 1e-5  # LayerNorm of embeddings and convolution blocks in the authors' code
ATTENTION_EPS = 1e-6  # and everywhere else


def _reset_as_convolution(weight: Tensor, bias: Tensor) -> None:
    """torch's default for convolutions: uniform within 1 / sqrt(fan in), weights and biases alike."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


class Pointwise(nn.Linear):
    """A 1x1 convolution on channels-last cells. Apart from Linear, for the papers initialise the two differently."""


class PatchConvolution(nn.Module):
    """A convolution whose kernel is its stride: `(R, V, *(t·stride), C) -> (R, V, *t, D)`."""

    def __init__(self, channels: int, dim: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.weight = nn.Parameter(torch.empty(dim, channels, *stride))
        self.bias = nn.Parameter(torch.empty(dim))
        _reset_as_convolution(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x (R, V, *(t·stride), C) -> (R, V, *t, D)`."""
        axes = len(self.stride)
        cells = cut(x, self.stride, first=2).flatten(2 + axes)
        return F.linear(cells, self.weight.movedim(1, -1).flatten(1), self.bias)

    def extra_repr(self) -> str:
        """Widths and stride, as a convolution prints them."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, stride={self.stride}"


class TileConvolution(nn.Module):
    """The depthwise convolution of a stage, over the shown tiles."""

    def __init__(self, dim: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.kernel = tuple(kernel)
        self.weight = nn.Parameter(torch.empty(dim, 1, *kernel))
        self.bias = nn.Parameter(torch.empty(dim))
        _reset_as_convolution(self.weight, self.bias)

    def forward(self, x: Tensor, around: Tensor | None) -> Tensor:
        """`x (R, V, *tile, C) -> (R, V, *tile, C)`; hidden cells count as zeros. around: see `tile_convolution`."""
        return tile_convolution(x, self.weight, self.bias, around)

    def extra_repr(self) -> str:
        """Width and kernel."""
        return f"{self.weight.shape[0]}, kernel={self.kernel}"


class DropPath(nn.Module):
    """Drops a residual branch for whole samples, and scales the others up (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, ...) -> (B, ...)`; the identity in evaluation or at rate 0."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3g}"


class MLP(nn.Sequential):
    """Two linear layers with a GELU between; pointwise convolutions in a convolution block."""

    def __init__(self, dim: int, hidden: int, linear: type[nn.Linear]) -> None:
        super().__init__(linear(dim, hidden), nn.GELU(), linear(hidden, dim))


class ConvolutionBlock(nn.Module):
    """`x + conv1x1(depthwise(mask · conv1x1(LN(x))))`, then `x + MLP(LN(x))` (ConvMAE, section 3.1 and 3.2)."""

    def __init__(self, dim: int, kernel: Sequence[int], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=CONVOLUTION_EPS)
        self.into = Pointwise(dim, dim)
        self.depthwise = TileConvolution(dim, kernel)
        self.out = Pointwise(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=CONVOLUTION_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), Pointwise)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, around: Tensor | None) -> Tensor:
        """`x (R, V, *tile, C) -> (R, V, *tile, C)`; around: see `tile_convolution`."""
        x = x + self.drop_path(self.out(self.depthwise(self.into(self.norm1(x)), around)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, N, D) -> (B, N, D)`."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> b three h n d", three=3, h=self.heads).unbind(1)
        x = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x


class AttentionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ATTENTION_EPS)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=ATTENTION_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), nn.Linear)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, N, D) -> (B, N, D)`."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a model: the pieces that are sharded, recomputed and compiled as one."""
    return [module for module in model.modules() if isinstance(module, (ConvolutionBlock, AttentionBlock))]


def recompute(model: nn.Module, stages: Sequence[int] = ()) -> None:
    """Keep only the blocks' inputs for the backward pass, and compute them again there (activation checkpointing).

    With `stages`, counted from 0, in these of the model's trunk alone; raises ValueError where it has no such stage.
    """
    parts = [model]
    if stages:
        found = list(model.get_submodule("trunk.stages").children())
        if max(stages) >= len(found):
            raise ValueError(f"recompute_stages {tuple(stages)}: the trunk has stages 0 to {len(found) - 1}")
        parts = [found[stage] for stage in stages]
    for block in chain.from_iterable(map(blocks, parts)):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
