"""The contrastive masked autoencoder: reconstruction, and agreement with a momentum encoder that sees everything."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..grids import Shown
from .layers import DropPath
from .masked_autoencoder import Decoder, MaskedAutoencoder, fused
from .trunk import Trunk

HEAD_EPS = 1e-6  # of the heads' BatchNorm in CMAE's code


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the batches of all processes together, on any device; in a world of one as torch's.

    As torch's SyncBatchNorm, which knows GPUs alone; and rows may count for nothing.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`x (B, D) -> (B, D)`, worked out in float32 or better; valid boolean `(B)`, the rows that count; None: all.

        All processes call it in training, with any number of rows.
        """
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.training:
            mean, variance = self.running_mean, self.running_var
            assert mean is not None
            assert variance is not None
            return self._scaled(precise - mean, variance.to(precise.dtype)).to(x.dtype)
        whole = valid is None and _processes() == 1 and len(x) > 1
        if whole and self.weight.dtype == precise.dtype:
            return super().forward(precise).to(x.dtype)
        weight = precise.new_ones(len(x), 1) if valid is None else valid.to(precise.dtype)[:, None]
        sums = summed(torch.cat([weight.sum(0), (weight * precise).sum(0)]))
        rows, count = sums[0], sums[0].clamp(min=1)
        mean = sums[1:] / count
        centred = precise - mean
        variance = summed((weight * centred.square()).sum(0)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1), rows.detach() > 0)
        return self._scaled(centred, variance).to(x.dtype)

    def _scaled(self, centred: Tensor, variance: Tensor) -> Tensor:
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, any_row: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(any_row)
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(now.to(running.dtype), self.momentum * any_row.to(running.dtype))


class Head(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear without bias: CMAE's projector and predictor."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), BatchNorm(hidden, eps=HEAD_EPS), nn.ReLU(), nn.Linear(hidden, dim, bias=False)
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`x (B, D) -> (B, dim)`; valid: see `BatchNorm`."""
        into, norm, activation, out = self
        x = out(activation(norm(into(x), valid)))
        return x


class TargetEncoder(nn.Module):
    """The trunk, its multi-scale fusion and the projector as they were on average: sees everything, learns nothing.

    It begins as a copy, drops no paths, and has no norm after the trunk (CMAE's code).
    """

    def __init__(self, trunk: Trunk, fusion: nn.ModuleList, projector: Head) -> None:
        super().__init__()
        self.trunk, self.fusion, self.projector = copy.deepcopy((trunk, fusion, projector))
        for module in self.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        self.requires_grad_(False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Keys `(B, dim)`, of the mean over all tokens but the class token.

        `x (B, C, *size)` normalised; valid: see `BatchNorm`.
        """
        maps, _ = self.trunk(x)
        keys: Tensor = self.projector(fused(maps, self.fusion).flatten(1, -2).mean(1), valid)
        return keys


class ContrastiveMaskedAutoencoder(MaskedAutoencoder):
    """CMAE (Huang et al., 2022; arXiv 2207.13532) over any masked autoencoder: its parts keep their names.

    The online encoder sees what is shown; beside the pixel decoder, a feature decoder fills in features. Their mean
    over all tokens, through projector and predictor, is to tell the target encoder's mean of the same sample, seen
    whole and in another view, from those of all other samples, of all processes. `update_target` is to follow every
    optimiser step.

    Args:
        plain: the masked autoencoder, whose parts are taken over.
        feature_decoder: gives values as wide as the trunk.
        projector, predictor: heads of the features; the target's projector begins as a copy.
        momentum, momentum_end: of the target, at the start and the end.
        temperature: of the contrastive loss.
        reconstruction_weight, contrast_weight: of the losses.
    """

    def __init__(
        self,
        plain: MaskedAutoencoder,
        *,
        feature_decoder: Decoder,
        projector: Head,
        predictor: Head,
        momentum: float,
        momentum_end: float,
        temperature: float,
        reconstruction_weight: float,
        contrast_weight: float,
    ) -> None:
        super().__init__(
            plain.trunk,
            plain.decoder,
            masking=plain.masking,
            target=plain.target,
            fusion=False,
            part=plain.part,
        )
        self.fusion, self.norm = plain.fusion, plain.norm
        self.feature_decoder = feature_decoder
        self.projector, self.predictor = projector, predictor
        self.momentum_start, self.momentum_end = momentum, momentum_end
        self.temperature = temperature
        self.weights = (reconstruction_weight, contrast_weight)
        self.target_encoder = TargetEncoder(plain.trunk, plain.fusion, projector)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Shown | None = None,
        second: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Hide, encode, decode twice, compare with the pixels and with the target.

        In training all processes call it, with equally many samples each, for they give each other their keys; in
        evaluation each is by itself.

        Args:
            x: the online view `(B, C, *size)`, ImageNet-normalised floats, or uint8 pixels.
            mask: as `MaskedAutoencoder.forward` takes it, one for each sample.
            second: the target's view, as x; None: the same.
            valid: boolean `(B)`, the samples that count; None: all.

        Returns:
            `loss`: scalar, float32, the weighted sum of the next two; `reconstruction`: as a plain masked autoencoder's
            loss, of the online view; `contrast`: see `contrastive_loss`; `agreement`: mean cosine of a sample's
            prediction and its key, 1 at best; `spread`: of the keys of all processes, 1 where they point anywhere, 0
            where all have collapsed to one; `prediction`, `mask`: as a plain one's.

        Raises:
            ValueError: as the plain one's; where the views differ in shape, there is not one mask for each sample, or
                `valid` is no truth value of each.
        """
        x, shown = self.hide(x, mask)
        second = x if second is None else self.trunk.normalized(second)
        if second.shape != x.shape:
            raise ValueError(f"the views are {tuple(x.shape)} and {tuple(second.shape)}: they must have one shape")
        if shown.index is not None and len(shown.index) != len(x):
            raise ValueError(f"the mask is for {len(shown.index)} rows, there are {len(x)} samples: give one for each")
        if valid is not None and (valid.shape != x.shape[:1] or valid.dtype != torch.bool):
            raise ValueError(f"valid is boolean ({len(x)},), got {valid.dtype} {tuple(valid.shape)}")
        latent, class_token = self.encode(x, shown)
        prediction = self.decoder(latent, shown, class_token)
        reconstruction = self.loss(x, prediction, shown, valid)
        features = self.feature_decoder(latent, Shown(shown.grid, shown.index), class_token)
        queries = self.predictor(self.projector(features.mean(1), valid), valid)
        with torch.no_grad():
            keys = self.target_encoder(second, valid)
        told = contrastive_loss(queries, keys, self.temperature, valid, alone=not self.training)
        weigh_pixels, weigh_contrast = self.weights
        return {
            "loss": weigh_pixels * reconstruction + weigh_contrast * told["contrast"],
            "reconstruction": reconstruction.detach(),
            **{name: value.detach() for name, value in told.items()},
            "prediction": prediction,
            "mask": shown.hidden,
        }

    def momentum(self, progress: float) -> float:
        """That of an update at a progress in [0, 1): from start to end by half a cosine (CMAE's code; BYOL)."""
        return self.momentum_end - (self.momentum_end - self.momentum_start) * (math.cos(math.pi * progress) + 1) / 2

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target towards the online encoder: `t <- momentum * t + (1 - momentum) * o`, all its parameters.

        To be called after every optimiser step. The norms' buffers are not averaged. Of a sharded model (FSDP2) every
        process moves its own part: reshard it before. Raises ValueError for a momentum that is not from 0 to 1.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is from 0 to 1; got {momentum!r}")
        averaged, online = zip(*self.followed(), strict=True)
        torch._foreach_lerp_(list(averaged), list(online), 1 - momentum)

    def followed(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter of the target, and that of the online encoder which it follows."""
        online = dict(self.named_parameters())
        for name, parameter in self.target_encoder.named_parameters():
            yield parameter, online[name]


def contrastive_loss(
    queries: Tensor, keys: Tensor, temperature: float, valid: Tensor | None = None, *, alone: bool = False
) -> dict[str, Tensor]:
    """InfoNCE of queries against the keys of all processes, and what tells a collapse; in float32 or better.

    Vectors are scaled to unit length; the loss is `2 * temperature` times the mean cross entropy of `q · k /
    temperature`, where a sample's own key is right (CMAE, section 3.3; the factor is its code's). Keys get no gradient.

    Args:
        queries: of this process's samples, `(B, D)`.
        keys: of the same samples, `(B, D)`; all processes have equally many.
        temperature: positive.
        valid: boolean `(B)`, the samples that count, as queries and as keys; None: all.
        alone: compare with this process's keys only.

    Returns:
        `contrast`, the loss; `agreement`, the mean cosine of queries and their keys; `spread`, the keys' deviation
        along an axis, mean over axes, times sqrt(D): scalars. The first two are of this process's samples.
    """
    precision = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = (F.normalize(each.to(precision), dim=1) for each in (queries, keys.detach()))
    counted = torch.ones(len(keys), dtype=torch.bool, device=keys.device) if valid is None else valid
    everyones, theirs = (keys, counted) if alone else (gathered(keys), gathered(counted))
    with torch.autocast(queries.device.type, enabled=False):
        logits = (queries @ everyones.T / temperature).masked_fill(~theirs, -math.inf)
    rank = 0 if alone or _processes() == 1 else dist.get_rank()
    own = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    # of a row that does not count all logits are 0, so that no NaN comes of it
    logits = torch.where(counted[:, None], logits, 0.0)
    share = counted.to(precision) / counted.sum().clamp(min=1)
    error = F.cross_entropy(logits, own, reduction="none")
    weight = theirs.to(precision)[:, None]
    total = weight.sum().clamp(min=1)
    centred = everyones - (weight * everyones).sum(0) / total
    deviation = ((weight * centred.square()).sum(0) / total).sqrt()
    return {
        "contrast": 2 * temperature * (share * error).sum(),
        "agreement": (share * (queries * keys).sum(1)).sum(),
        "spread": deviation.mean() * math.sqrt(keys.shape[1]),
    }


# ---- among processes; nothing of it is there in a world of one -------------------------------------------------------


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes by rank, equally many of each, `(processes * B, ...)`; without gradient."""
    if _processes() == 1:
        return x.detach()
    # by a sum, which every backend and the compiler know, of any kind of number but truth values
    own = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
    rows = own.new_zeros(_processes(), *own.shape)
    rows[dist.get_rank()] = own
    dist.all_reduce(rows)
    return rows.flatten(0, 1).to(x.dtype)


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, with the gradient of all their losses."""
    if _processes() == 1:
        return x
    found: Tensor = _Sum.apply(x)
    return found


class _Sum(torch.autograd.Function):
    """As each process has a loss of its own, gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient
