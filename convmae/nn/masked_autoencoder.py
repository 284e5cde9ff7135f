"""The masked autoencoder: a trunk that sees what is shown, and a decoder that predicts what is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..grids import Grid, Shown, assemble, patches
from ..masking import Masking, Part, draw
from ..targets import Target
from .layers import ATTENTION_EPS, AttentionBlock, PatchConvolution
from .positions import sincos
from .squared_error import squared_error
from .trunk import Features, Trunk


class Decoder(nn.Module):
    """Mask tokens in the hidden places, positions, transformer blocks, LayerNorm, Linear (MAE, section 3)."""

    def __init__(self, width: int, dim: int, *, depth: int, heads: int, mlp_ratio: float, grid: Grid, values: int):
        super().__init__()
        self.embedding = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(sincos(grid, dim), requires_grad=False)  # (*grid, D)
        self.blocks = nn.ModuleList([AttentionBlock(dim, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=ATTENTION_EPS)
        self.head = nn.Linear(dim, values)

    def forward(self, latent: Tensor, shown: Shown, class_token: Tensor | None = None) -> Tensor:
        """`latent (R, V, D)`, class_token `(R, 1, D)` or None `-> (R, N, values)`.

        A prediction for each of `shown.decoded`, which alone get mask tokens then, or for every token of the grid.
        """
        positions = self.positions.flatten(0, -2)
        tokens = self.embedding(latent)
        blank = self.mask_token.to(tokens.dtype)
        if shown.decoded is not None:
            assert shown.index is not None
            blanks = blank.expand(len(tokens), shown.decoded.shape[1], -1)
            tokens = torch.cat([tokens, blanks], dim=1) + positions[torch.cat([shown.index, shown.decoded], dim=1)]
        elif shown.index is not None:
            places = shown.index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = blank.expand(len(tokens), len(positions), -1).scatter(1, places, tokens) + positions
        else:
            tokens = tokens + positions
        if class_token is not None:
            tokens = torch.cat([self.embedding(class_token), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        predicted = len(positions) if shown.decoded is None else shown.decoded.shape[1]
        out: Tensor = self.head(self.norm(tokens[:, -predicted:]))
        return out


def fused(maps: Sequence[Tensor], fusion: nn.ModuleList) -> Tensor:
    """The last stage's map `(R, V, *tile, D)`, and the earlier ones' brought to its width and grid, one each."""
    latent = maps[-1]
    for convolution, finer in zip(fusion, maps, strict=False):
        latent = latent + convolution(finer)
    return latent


class MaskedAutoencoder(nn.Module):
    """Trunk, multi-scale fusion, decoder and loss.

    With fusion, every earlier stage's map is brought to the last stage's width and grid by a convolution whose
    kernel is its stride, and added to the last stage's output before the norm (ConvMAE, section 3.3).
    """

    builder: Any = None
    """The builder that made it, if one did: what a checkpoint keeps to build it again."""

    def __init__(
        self,
        trunk: Trunk,
        decoder: Decoder,
        *,
        masking: Masking,
        target: Target,
        fusion: bool,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.decoder = decoder
        self.masking = masking
        self.part = part
        self.target = target
        earlier: Sequence[int] = range(len(trunk.dims) - 1) if fusion else ()
        self.fusion = nn.ModuleList(
            [PatchConvolution(trunk.dims[stage], trunk.dims[-1], trunk.tile(stage)) for stage in earlier]
        )
        self.norm = nn.LayerNorm(trunk.dims[-1], eps=ATTENTION_EPS)

    def draw_masks(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Masks as this model's masking draws them, `(R, *grid)` on the CPU: boolean, True = hidden.

        R is the batch, times the masking's groups. Where the decoder predicts a part, uint8 as `grids.show` takes it.
        """
        return draw(self.masking, self.part, batch, self.trunk.grid, generator)

    def encode(self, x: Tensor, shown: Shown) -> tuple[Tensor, Tensor | None]:
        """Pixels `(B, C, *size)` to the latent `(R, V, D)` of shown tokens, and the class token `(R, 1, D)` or None."""
        maps, class_token = self.trunk(x, shown)
        latent = fused(maps, self.fusion)
        return self.norm(latent.flatten(1, -2)), None if class_token is None else self.norm(class_token)

    def forward(self, x: Tensor, mask: Tensor | Shown | None = None) -> dict[str, Tensor]:
        """Hide, encode, decode, compare.

        Args:
            x: `(B, C, *size)`, ImageNet-normalised floats, or uint8 pixels, which are normalised here.
            mask: boolean `(R, *grid)`, True = hidden, or uint8 as `grids.show` takes it; R is B, or a multiple of it:
                then every sample is seen under several masks. Or `Trunk.shown(mask)`, worked out before: then nothing
                here waits for a GPU, and torch.compile sees one graph. Drawn by the model's masking when not given.

        Returns:
            `loss`: scalar, float32: squared error, mean over a patch's values, mean over the hidden patches that are
            predicted; `prediction`: `(R, L, values)`, or `(R, N, values)` where the mask says which N to predict;
            `mask`: boolean `(R, *grid)`, on the device of x.

        Raises:
            ValueError: x or the mask has another shape than the model's, or the mask's counts differ by sample.
        """
        x, shown = self.hide(x, mask)
        latent, class_token = self.encode(x, shown)
        prediction = self.decoder(latent, shown, class_token)
        return {"loss": self.loss(x, prediction, shown), "prediction": prediction, "mask": shown.hidden}

    def features(self, x: Tensor) -> Features:
        """The trunk's features of the whole input, as a probe asks for them: `x (B, C, *size)`, normalised."""
        found: Features = self.trunk(x)
        return found

    def hide(self, x: Tensor, mask: Tensor | Shown | None) -> tuple[Tensor, Shown]:
        """The input normalised, and what is shown of it; takes and raises what `forward` does."""
        x = self.trunk.normalized(x)
        if mask is None:
            mask = self.draw_masks(len(x))
        if isinstance(mask, Tensor) and (len(mask) % len(x) if len(x) else len(mask)):
            raise ValueError(f"mask is for {len(mask)} samples, the input has {len(x)}")
        shown = self.trunk.shown(mask, device=x.device) if isinstance(mask, Tensor) else mask.to(x.device)
        if not 0 < shown.count < self.trunk.length:
            raise ValueError(
                f"the mask shows {shown.count} of {self.trunk.length} tokens: some must be shown, some hidden"
            )
        return x, shown

    def loss(self, x: Tensor, prediction: Tensor, shown: Shown, valid: Tensor | None = None) -> Tensor:
        """The mean over hidden patches of the mean squared error in a patch, in float32 or better: scalar.

        `x (B, C, *size)`, prediction `(R, L, values)`, or `(R, N, values)` of `shown.decoded`; valid boolean `(R)`, the
        rows that count, None: all.
        """
        precision = torch.promote_types(x.dtype, torch.float32)
        target = self.target(patches(x.to(precision), self.trunk.stride))
        if len(prediction) != len(target):
            target = target.repeat_interleave(len(prediction) // len(target), dim=0)
        if shown.decoded is not None:
            target = target.gather(1, shown.decoded.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        assert target.shape == prediction.shape, (target.shape, prediction.shape)
        error = squared_error(prediction, target)
        if shown.decoded is not None and valid is None:
            return error.mean()
        counted = shown.hidden.flatten(1) if shown.decoded is None else torch.ones_like(error, dtype=torch.bool)
        if valid is not None:
            counted = counted & valid[:, None]
        return torch.where(counted, error, 0).sum() / (counted.sum() if valid is None else counted.sum().clamp(min=1))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Pixels `(R, C, *size)`: the input where shown, the prediction where hidden, ImageNet-normalised.

        `x (B, C, *size)` normalised or uint8, prediction `(R, L, values)`, mask boolean `(R, *grid)`.

        A normalised target is undone with the mean and variance of the input's own patches.

        Raises:
            ValueError: the model's target has no `invert`.
        """
        if not hasattr(self.target, "invert"):
            raise ValueError(f"{self.target!r} has no invert(values, patches): its predictions are not pixels")
        x = self.trunk.normalized(x)
        x = x.repeat_interleave(len(mask) // max(1, len(x)), dim=0)
        precision = torch.promote_types(x.dtype, torch.float32)
        original = patches(x.to(precision), self.trunk.stride)
        predicted = self.target.invert(prediction.to(precision), original)
        mixed = torch.where(mask.flatten(1)[:, :, None, None], predicted, original)
        return assemble(mixed, self.trunk.grid, self.trunk.stride)
