"""The backbone: a trunk's maps, stage by stage, for whatever detects, segments or looks up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ..grids import Grid, Shown, product
from .layers import ATTENTION_EPS
from .positions import resize
from .trunk import AttentionStage, Trunk


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """What the maps are, asked as timm's `features_only` models are asked.

    Args:
        widths: channels of each map.
        strides: pixels of a cell of each map, along each axis.
    """

    widths: tuple[int, ...]
    strides: tuple[Grid, ...]

    def channels(self) -> list[int]:
        """Channels of each map."""
        return list(self.widths)

    def reduction(self) -> list[int]:
        """Pixels of a cell of each map along height and width; `Backbone.strides` has every axis.

        Raises ValueError where height and width differ: there is no such number then.
        """
        if any(stride[-2] != stride[-1] for stride in self.strides):
            raise ValueError(f"the strides {list(self.strides)} differ in height and width: use .strides")
        return [stride[-1] for stride in self.strides]


class Backbone(nn.Module):
    """Maps of a trunk's stages, channels first: `(B, C, *size) -> [(B, C', *grid), ...]`.

    It has the parameters that its maps need and no others: stages after the last one that is given are left out. A
    class token, where the trunk has one, takes part in the attention and is not given: it is no part of a map.

    The last stage's map is the residual stream, without a norm. Pretraining normalises it, but where it fuses, the sum
    with the finer maps (ConvMAE, section 3.3), so that its norm does not suit this map: with `norm` there is a new one.

    Args:
        trunk: shared, not copied.
        stages: those whose maps are given, ascending from 0; None: all of them.
        norm: a LayerNorm over the channels of the last stage's map.
        any_size: take inputs of any size that is a multiple of the stride: positions are resized for each, as
            `positions.resize` does, where it is not the trunk's own.

    Raises:
        ValueError: there is no such stage, or a norm but not the last stage's map.
    """

    builder: Any = None
    """The builder that made it, if one did: what a checkpoint keeps to build it again."""

    def __init__(
        self, trunk: Trunk, *, stages: Sequence[int] | None = None, norm: bool = False, any_size: bool = False
    ) -> None:
        super().__init__()
        count = len(trunk.stages)
        self.stages = tuple(range(count)) if stages is None else tuple(stages)
        if problems := problems_of(self.stages, count, norm=norm):
            raise ValueError("; ".join(problems))
        used = self.stages[-1] + 1
        # modules are shared: a shorter trunk is a list of the same stages
        self.trunk = trunk if used == count else Trunk(list(trunk.stages)[:used], size=trunk.size)  # type: ignore[arg-type]
        self.any_size = any_size
        self.channels = [trunk.dims[stage] for stage in self.stages]
        self.strides = [product(*trunk.strides[: stage + 1]) for stage in self.stages]
        self.feature_info = FeatureInfo(widths=tuple(self.channels), strides=tuple(self.strides))
        self.norm = nn.LayerNorm(trunk.dims[-1], eps=ATTENTION_EPS) if norm else nn.Identity()

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps of the stages asked for, finest first.

        Args:
            x: `(B, C, *size)`, ImageNet-normalised floats, or uint8 pixels, which are normalised here.

        Returns:
            `(B, C', *grid)` for each stage; views of what the trunk computed, whose channels are last in memory
            (torch's `channels_last`), so nothing is copied.

        Raises:
            ValueError: x is not of the size that the trunk was built for, or with `any_size` not of a multiple of the
                stride.
        """
        x = self.trunk.normalized(x)
        maps = self._stage_by_stage(x) if self.any_size else self.trunk(x).maps
        maps = [*maps[:-1], self.norm(maps[-1])]
        return [maps[stage].squeeze(1).movedim(-1, 1) for stage in self.stages]

    def forward(self, x: Tensor) -> list[Tensor]:
        """`x (B, C, *size) -> [(B, C', *grid), ...]`; see `features`."""
        return self.features(x)

    def _stage_by_stage(self, x: Tensor) -> list[Tensor]:
        """The maps as the trunk has them, `(B, 1, *cells, C)`, with positions resized to the input's grid."""
        size, stride = tuple(x.shape[2:]), self.trunk.stride
        if len(size) != len(stride) or any(side < s or side % s for side, s in zip(size, stride, strict=True)):
            raise ValueError(
                f"inputs (B, C, {', '.join(map(str, size))}) are not a multiple of {stride}: pad or resize"
            )
        shown = Shown(tuple(side // s for side, s in zip(size, stride, strict=True)))
        x = shown.take(x.movedim(1, -1))
        maps: list[Tensor] = []
        for stage in self.trunk.stages:
            if isinstance(stage, AttentionStage):
                cells = [side // s for side, s in zip(x.shape[2:-1], stage.embedding.stride, strict=True)]
                x, _ = functional_call(stage, {"positions": resize(stage.positions, cells)}, (x, shown))
            else:
                x = stage(x, shown)
            maps.append(x)
        return maps


def problems_of(stages: Sequence[int], count: int, *, norm: bool) -> list[str]:
    """What is wrong with asking a trunk of so many stages for the maps of these."""
    problems = []
    if not stages or sorted(set(stages)) != list(stages) or not 0 <= stages[0] <= stages[-1] < count:
        problems.append(f"stages={tuple(stages)}: give some of {tuple(range(count))}, ascending, or None for all")
    elif norm and stages[-1] != count - 1:
        problems.append(f"norm=True is for the last stage's map: add {count - 1} to stages={tuple(stages)}")
    return problems
