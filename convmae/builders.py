"""The builders: frozen, keyword-only dataclasses whose verbs return a new builder, until `.build()` gives a module.

A builder is a value: it compares, hashes, pickles, and its `repr` is the chain of verbs that makes it again. A verb
refuses what is wrong by itself; what is wrong between the parts is found at `.build()`, all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .grids import Grid, product
from .masking import Masking, Part
from .masking import random as random_masking
from .nn import initialisation
from .nn.backbone import Backbone as BackboneModule
from .nn.backbone import problems_of
from .nn.classifier import Classifier as ClassifierModule
from .nn.classifier import Pooling
from .nn.masked_autoencoder import Decoder as DecoderModule
from .nn.masked_autoencoder import MaskedAutoencoder
from .nn.trunk import AttentionStage as AttentionStageModule
from .nn.trunk import ConvolutionStage, Trunk
from .targets import Target, normalized_pixels

B = TypeVar("B", bound="MAE")


def require(holds: bool, what: str, given: object) -> None:
    """Raise a ValueError that says what must hold, and what was given, unless it does."""
    if not holds:
        raise ValueError(f"{what}; got {given!r}")


def require_counts(owner: object, *names: str) -> None:
    """Raise a ValueError for the first of these attributes that is no positive int."""
    for name in names:
        value = getattr(owner, name)
        require(isinstance(value, int) and value >= 1, f"{type(owner).__name__}: {name} is a positive int", value)


def _sides(owner: str, name: str, sides: Sequence[int], *, least: int = 1) -> Grid:
    grid = tuple(sides)
    require(
        len(grid) >= 2 and all(isinstance(side, int) and side >= least for side in grid),
        f"{owner}: {name} has a positive int for each axis, (H, W) or (T, H, W)",
        sides,
    )
    return grid


@dataclass(frozen=True, kw_only=True)
class ConvStage:
    """A stage of convolution blocks.

    Args:
        dim: width.
        depth: number of blocks.
        stride: of the embedding that begins the stage, along each axis: cells of the stage before (or pixels).
        kernel: of the depthwise convolutions, odd.
        mlp_ratio: hidden width of the MLPs over `dim`.

    Raises:
        ValueError: a number is not positive, a kernel is even, or stride and kernel differ in axes.
    """

    dim: int
    depth: int
    stride: Grid
    kernel: Grid
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        require_counts(self, "dim", "depth")
        require(self.mlp_ratio > 0, "ConvStage: mlp_ratio is positive", self.mlp_ratio)
        object.__setattr__(self, "stride", _sides("ConvStage", "stride", self.stride))
        object.__setattr__(self, "kernel", _sides("ConvStage", "kernel", self.kernel))
        require(all(side % 2 for side in self.kernel), "ConvStage: kernel sides are odd", self.kernel)
        require(
            len(self.stride) == len(self.kernel),
            "ConvStage: stride and kernel have the same number of axes",
            (self.stride, self.kernel),
        )


@dataclass(frozen=True, kw_only=True)
class AttentionStage:
    """A stage of transformer blocks.

    Args:
        dim: width.
        depth: number of blocks.
        stride: of the embedding that begins the stage, along each axis.
        heads: attention heads; they divide `dim`.
        mlp_ratio: hidden width of the MLPs over `dim`.
        hybrid: True: the embedding is a strided convolution, LayerNorm, GELU and a Linear (ConvMAE); False: a strided
            convolution alone (ViT).

    Raises:
        ValueError: a number is not positive.
    """

    dim: int
    depth: int
    stride: Grid
    heads: int
    mlp_ratio: float = 4.0
    hybrid: bool = True

    def __post_init__(self) -> None:
        require_counts(self, "dim", "depth", "heads")
        require(self.mlp_ratio > 0, "AttentionStage: mlp_ratio is positive", self.mlp_ratio)
        object.__setattr__(self, "stride", _sides("AttentionStage", "stride", self.stride))


Stage = ConvStage | AttentionStage


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The decoder's numbers; see `MAE.decode`."""

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        require_counts(self, "dim", "depth", "heads")
        require(self.mlp_ratio > 0, "Decoder: mlp_ratio is positive", self.mlp_ratio)


def _vit(dim: int, depth: int, heads: int, patch: Grid) -> tuple[Stage, ...]:
    return (AttentionStage(dim=dim, depth=depth, heads=heads, stride=patch, hybrid=False),)


@dataclass(frozen=True, kw_only=True, repr=False)
class MAE:
    """A masked autoencoder over a plain ViT (He et al., 2022; arXiv 2111.06377).

    Sizes: `MAE.small()`, `.base()`, `.large()`, `.huge()`. With a size of three axes it takes clips:
    `MAE.base().input((16, 224, 224)).patch((2, 16, 16)).mask(masking.tube(0.9)).with_class_token(False)` has
    VideoMAE's encoder and masking; its decoder and target are `.decode(...)` and `.predict(...)` away.
    """

    size: Grid = (224, 224)
    trunk: tuple[Stage, ...] = field(default_factory=lambda: _vit(768, 12, 12, (16, 16)))
    masking: Masking = random_masking(0.75)
    decoder: Decoder = Decoder(dim=512, depth=8, heads=16)
    target: Target = normalized_pixels()
    fusion: bool = False
    drop_path_rate: float = 0.0
    class_token: bool = True
    part: Part | None = None

    channels: ClassVar[int] = 3

    @classmethod
    def small(cls: type[B]) -> B:
        """ViT-S/16: 384 wide, 12 blocks, 6 heads; the decoder is the paper's. MAE published no Small."""
        return cls(trunk=_vit(384, 12, 6, (16, 16)))

    @classmethod
    def base(cls: type[B]) -> B:
        """ViT-B/16: 768 wide, 12 blocks, 12 heads (MAE, table 3)."""
        return cls(trunk=_vit(768, 12, 12, (16, 16)))

    @classmethod
    def large(cls: type[B]) -> B:
        """ViT-L/16: 1024 wide, 24 blocks, 16 heads (MAE, table 3)."""
        return cls(trunk=_vit(1024, 24, 16, (16, 16)))

    @classmethod
    def huge(cls: type[B]) -> B:
        """ViT-H/14: 1280 wide, 32 blocks, 16 heads, patches of 14 (MAE, table 3)."""
        return cls(trunk=_vit(1280, 32, 16, (14, 14)))

    def input(self: B, size: int | Sequence[int]) -> B:
        """Take inputs of this size in pixels: `(H, W)` or `(T, H, W)`; an int is both H and W, and keeps T."""
        sides = (*self.size[:-2], size, size) if isinstance(size, int) else tuple(size)
        return replace(self, size=_sides(".input(...)", "size", sides))

    def stages(self: B, *stages: Stage) -> B:
        """Make the trunk of these stages, `ConvStage(...)` and `AttentionStage(...)`, first to last."""
        require(
            bool(stages) and all(isinstance(stage, ConvStage | AttentionStage) for stage in stages),
            ".stages(...) takes one stage or more, ConvStage(...) and AttentionStage(...), each an argument of its own",
            stages,
        )
        return replace(self, trunk=stages)

    def patch(self: B, patch: int | Sequence[int]) -> B:
        """Cut the input into patches of these sides: the stride of a trunk's only stage, a plain ViT's."""
        require(
            len(self.trunk) == 1,
            ".patch(...) is for a trunk of one stage; set strides in .stages(...)",
            self.trunk,
        )
        sides = (*self.trunk[0].stride[:-2], patch, patch) if isinstance(patch, int) else tuple(patch)
        return replace(self, trunk=(replace(self.trunk[0], stride=sides),))

    def mask(self: B, masking: Masking) -> B:
        """Hide tokens this way; see `convmae.masking`."""
        require(callable(masking), ".mask(...) takes a masking, as masking.random(0.75)", masking)
        return replace(self, masking=masking)

    def decode(self: B, *, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> B:
        """Decode with transformer blocks of this width, number and heads."""
        return replace(self, decoder=Decoder(dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio))

    def reconstruct_part(self: B, part: Part | None) -> B:
        """Decode a part of the hidden tokens in pretraining, as `masking.running_cells(0.5)`; None: all of them.

        The decoder then sees the shown tokens and those it predicts alone (VideoMAE V2; arXiv 2303.16727).
        """
        require(
            part is None or callable(part),
            ".reconstruct_part(...) takes which hidden tokens to predict, as masking.running_cells(0.5), or None",
            part,
        )
        return replace(self, part=part)

    def predict(self: B, target: Target) -> B:
        """Predict this target; see `convmae.targets`."""
        require(
            callable(target) and hasattr(target, "values"),
            ".predict(...) takes a target, as targets.normalized_pixels()",
            target,
        )
        return replace(self, target=target)

    def fuse(self: B, fusion: bool = True) -> B:
        """Add the earlier stages' maps to the encoder's output in pretraining, or not (ConvMAE, section 3.3)."""
        return replace(self, fusion=fusion)

    def drop_path(self: B, rate: float) -> B:
        """Drop residual branches at a rate that rises linearly over all blocks of all stages to this one."""
        require(0 <= rate < 1, ".drop_path(rate) is in [0, 1)", rate)
        return replace(self, drop_path_rate=rate)

    def with_class_token(self: B, class_token: bool = True) -> B:
        """Put a class token before the last stage's tokens, or not."""
        return replace(self, class_token=class_token)

    def classifier(self, classes: int, *, pooling: Pooling = "mean", dropout: float = 0.0) -> Classifier:
        """The finetuning network over the same trunk, for so many classes."""
        return Classifier(backbone=self, classes=classes, pooling=pooling, dropout=dropout)

    def backbone(self, *, stages: Sequence[int] | None = None, norm: bool = False, any_size: bool = False) -> Backbone:
        """The maps of the same trunk's stages, for detection and the like; see `Backbone`."""
        chosen = None if stages is None else tuple(stages)
        return Backbone(backbone=self, stages=chosen, norm=norm, any_size=any_size)

    @property
    def stride(self) -> Grid:
        """Pixels of a token along each axis: the product of the stages' strides."""
        return product(*(stage.stride for stage in self.trunk))

    @property
    def grid(self) -> Grid:
        """Tokens along each axis."""
        return tuple(pixels // stride for pixels, stride in zip(self.size, self.stride, strict=True))

    def build(self) -> MaskedAutoencoder:
        """The module, initialised as the paper's code initialises it, from torch's global random state.

        Raises:
            ValueError: parts do not fit each other; the message lists all that do not, and the calls to change.
        """
        self.check()
        decoder = DecoderModule(
            self.trunk[-1].dim,
            self.decoder.dim,
            depth=self.decoder.depth,
            heads=self.decoder.heads,
            mlp_ratio=self.decoder.mlp_ratio,
            grid=self.grid,
            values=self.target.values(math.prod(self.stride), self.channels),
        )
        model = MaskedAutoencoder(
            self.build_trunk(),
            decoder,
            masking=self.masking,
            target=self.target,
            fusion=self.fusion,
            part=self.part,
        )
        initialisation.for_pretraining(model)
        model.builder = self
        return model

    def check(self) -> None:
        """Raise the ValueError that `build` would, without building."""
        self._refuse(self.problems())

    def problems(self) -> list[str]:
        """What does not fit, each with the call to change; none: it can be built."""
        return [
            *self._trunk_problems(),
            *self._decoder_problems(),
            *self._masking_problems(),
            *self._target_problems(),
        ]

    def build_trunk(self) -> Trunk:
        """The trunk alone, with torch's default initialisation. Raises ValueError as `build` does."""
        self._refuse(self._trunk_problems())
        depths = [stage.depth for stage in self.trunk]
        rates = iter(torch.linspace(0, self.drop_path_rate, sum(depths), device="cpu").tolist())
        modules: list[ConvolutionStage | AttentionStageModule] = []
        channels, cells = self.channels, self.size
        for number, stage in enumerate(self.trunk):
            cells = tuple(side // stride for side, stride in zip(cells, stage.stride, strict=True))
            drop_path = [next(rates) for _ in range(stage.depth)]
            if isinstance(stage, ConvStage):
                modules.append(
                    ConvolutionStage(
                        channels,
                        stage.dim,
                        stride=stage.stride,
                        kernel=stage.kernel,
                        mlp_ratio=stage.mlp_ratio,
                        drop_path=drop_path,
                    )
                )
            else:
                modules.append(
                    AttentionStageModule(
                        channels,
                        stage.dim,
                        stride=stage.stride,
                        heads=stage.heads,
                        mlp_ratio=stage.mlp_ratio,
                        drop_path=drop_path,
                        cells=cells,
                        hybrid=stage.hybrid,
                        class_token=self.class_token and number == len(self.trunk) - 1,
                    )
                )
            channels = stage.dim
        return Trunk(modules, size=self.size)

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise ValueError(f"{type(self).__name__} cannot be built:{lines}")

    def _trunk_problems(self) -> list[str]:
        axes = len(self.size)
        problems = [
            f".input(size={self.size}) has {axes} axes, stage {number} of .stages(...) has a stride of "
            f"{len(stage.stride)}: {stage.stride}"
            for number, stage in enumerate(self.trunk, 1)
            if len(stage.stride) != axes
        ]
        if not problems and not self._fits():
            problems = [
                f".input(size={self.size}) is not a multiple of {self.stride}, "
                "the product of the strides in .stages(...)"
            ]
        for number, stage in enumerate(self.trunk, 1):
            if isinstance(stage, AttentionStage):
                problems += attention_problems(f".stages(...): stage {number}", stage.dim, stage.heads, axes)
        if self.class_token and not isinstance(self.trunk[-1], AttentionStage):
            problems.append(".with_class_token(True) needs an AttentionStage as the last of .stages(...)")
        return problems

    def _decoder_problems(self) -> list[str]:
        dim, heads = self.decoder.dim, self.decoder.heads
        return attention_problems(f".decode(dim={dim}, heads={heads})", dim, heads, len(self.size))

    def _masking_problems(self) -> list[str]:
        """Try the masking on the grid, if there is a grid."""
        if not self._fits():
            return []
        verb = f".mask({self.masking!r})"
        try:
            mask = self.masking(2, self.grid, torch.Generator().manual_seed(0))
        except (TypeError, ValueError) as problem:
            return [f"{verb}: {problem}"]
        shape = (2 * getattr(self.masking, "groups", 1), *self.grid)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            batch = "batch" if shape[0] == 2 else f"{shape[0] // 2} * batch"
            return [
                f"{verb} must give boolean masks ({batch}, {', '.join(map(str, self.grid))}); it gave {_kind(mask)}"
            ]
        hidden, tokens = mask.flatten(1).sum(1).tolist(), mask[0].numel()
        if hidden[0] != hidden[1] or not 0 < hidden[0] < tokens:
            return [
                f"{verb} must hide some tokens but not all, equally many in every sample; of {tokens} it hid {hidden}"
            ]
        return [] if self.part is None else self._part_problems(mask)

    def _part_problems(self, mask: Tensor) -> list[str]:
        """Try the part on a mask."""
        assert self.part is not None
        verb = f".reconstruct_part({self.part!r})"
        try:
            part = self.part(mask, torch.Generator().manual_seed(0))
        except (TypeError, ValueError) as problem:
            return [f"{verb}: {problem}"]
        if not isinstance(part, Tensor) or part.dtype != torch.uint8 or part.shape != mask.shape:
            return [f"{verb} must give uint8 masks {tuple(mask.shape)}; it gave {_kind(part)}"]
        predicted = (part == 1).flatten(1).sum(1).tolist()
        if not part.gt(0).equal(mask) or predicted[0] < 1 or len(set(predicted)) > 1:
            return [f"{verb} must leave what is hidden hidden, and predict equally many in every sample: {predicted}"]
        return []

    def _target_problems(self) -> list[str]:
        """Try the target on a few patches."""
        verb, pixels = f".predict({self.target!r})", math.prod(self.stride)
        values = self.target.values(pixels, self.channels)
        if not isinstance(values, int) or values < 1:
            return [f"{verb}: values(pixels, channels) must be a positive int; it gave {values!r}"]
        try:
            target = self.target(torch.zeros(2, 3, pixels, self.channels, device="cpu"))
        except (TypeError, ValueError, RuntimeError) as problem:
            return [f"{verb}: {problem}"]
        if not isinstance(target, Tensor) or tuple(target.shape) != (2, 3, values):
            return [
                f"{verb} must give (B, L, {values}) for patches (B, L, P, C); for B = 2, L = 3 it gave {_kind(target)}"
            ]
        return []

    def _fits(self) -> bool:
        return all(len(stage.stride) == len(self.size) for stage in self.trunk) and not any(
            pixels % side for pixels, side in zip(self.size, self.stride, strict=True)
        )

    _VERBS: ClassVar[dict[str, Callable[[Any], str]]] = {
        "size": lambda size: f".input({size})",
        "trunk": lambda stages: f".stages({', '.join(map(repr, stages))})",
        "masking": lambda masking: f".mask({masking!r})",
        "decoder": lambda decoder: f".decode{repr(decoder).removeprefix('Decoder')}",
        "target": lambda target: f".predict({target!r})",
        "fusion": lambda fusion: f".fuse({fusion})",
        "drop_path_rate": lambda rate: f".drop_path({rate})",
        "class_token": lambda class_token: f".with_class_token({class_token})",
        "part": lambda part: f".reconstruct_part({part!r})",
    }

    def __repr__(self) -> str:
        return f"{type(self).__name__}()" + "".join(self.verbs())

    def verbs(self, *, defaults: bool = False) -> Iterator[str]:
        """The calls that make this builder from an empty one, as code; those that change nothing only on demand."""
        empty = type(self)()
        for name, verb in self._VERBS.items():
            if defaults or getattr(self, name) != getattr(empty, name):
                yield verb(getattr(self, name))


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def attention_problems(where: str, dim: int, heads: int, axes: int) -> list[str]:
    """What is wrong with the numbers of transformer blocks that stand `where`."""
    problems = []
    if dim % heads:
        problems.append(f"{where}: dim {dim} is not divisible by heads {heads}")
    if dim % 2 or dim < 2 * axes:
        problems.append(f"{where}: dim {dim} must be even and at least {2 * axes}, for positions on {axes} axes")
    return problems


def hybrid(
    dims: tuple[int, int, int], depth: int, heads: int, mlp_ratios: tuple[float, float, float]
) -> tuple[Stage, ...]:
    """ConvMAE's three stages on images: strides 4, 2, 2, kernels 5 x 5, two convolution blocks a stage."""
    first, second, third = dims
    return (
        ConvStage(dim=first, depth=2, stride=(4, 4), kernel=(5, 5), mlp_ratio=mlp_ratios[0]),
        ConvStage(dim=second, depth=2, stride=(2, 2), kernel=(5, 5), mlp_ratio=mlp_ratios[1]),
        AttentionStage(dim=third, depth=depth, stride=(2, 2), heads=heads, mlp_ratio=mlp_ratios[2]),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvMAE(MAE):
    """ConvMAE, also MCMAE (Gao et al., 2022; arXiv 2205.03892): masked convolution stages, then a transformer.

    Sizes: `ConvMAE.small()`, `.base()`, `.large()`, `.huge()`; with multi-scale fusion, without class token. The
    decoder is 512 wide, 8 deep, 16 heads; its MLP ratio is the first stage's.
    """

    trunk: tuple[Stage, ...] = field(default_factory=lambda: hybrid((256, 384, 768), 11, 12, (4, 4, 4)))
    fusion: bool = True
    class_token: bool = False

    @classmethod
    def small(cls: type[B]) -> B:
        """128, 256, 384 wide; 2, 2, 11 blocks; 6 heads (some of the authors' code has 12); 21.9 M in the encoder."""
        return cls(trunk=hybrid((128, 256, 384), 11, 6, (4, 4, 4)))

    @classmethod
    def base(cls: type[B]) -> B:
        """256, 384, 768 wide; 2, 2, 11 blocks; 12 heads; 84.5 M in the encoder without fusion (paper, table 1)."""
        return cls(trunk=hybrid((256, 384, 768), 11, 12, (4, 4, 4)))

    @classmethod
    def large(cls: type[B]) -> B:
        """384, 768, 1024 wide; 2, 2, 23 blocks; 16 heads; MLP ratios 8, 8, 4 as in the released checkpoint: 322 M."""
        return cls(
            trunk=hybrid((384, 768, 1024), 23, 16, (8, 8, 4)),
            decoder=Decoder(dim=512, depth=8, heads=16, mlp_ratio=8),
        )

    @classmethod
    def huge(cls: type[B]) -> B:
        """768, 1024, 1280 wide; 2, 2, 31 blocks; 16 heads; MLP ratios 8, 8, 4 as in the released checkpoint: 679 M."""
        return cls(
            trunk=hybrid((768, 1024, 1280), 31, 16, (8, 8, 4)),
            decoder=Decoder(dim=512, depth=8, heads=16, mlp_ratio=8),
        )


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The finetuning network over a masked autoencoder's trunk; made by `MAE.classifier(...)`.

    Args:
        backbone: the builder whose trunk it is; its masking, decoder, target and fusion play no part.
        classes: number of classes.
        pooling: "mean" over tokens, or "token": the class token, or where there is none the first token.
        dropout: before the head.
        head_std: spread of the head's initial weights (2e-5 in ConvMAE's code).
        names: of the classes, in order; none where they are not known.

    Raises:
        ValueError: a number is out of its range, the pooling is unknown, or there are not as many names as classes.
    """

    backbone: MAE
    classes: int
    pooling: Pooling = "mean"
    dropout: float = 0.0
    head_std: float = 2e-5
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_counts(self, "classes")
        require(self.pooling in ("mean", "token"), 'Classifier: pooling is "mean" or "token"', self.pooling)
        require(0 <= self.dropout < 1, "Classifier: dropout is in [0, 1)", self.dropout)
        require(self.head_std >= 0, "Classifier: head_std is 0 or more", self.head_std)
        fitting = len(self.names) in (0, self.classes)
        require(fitting, f"Classifier: there are as many names as classes={self.classes}, or none", len(self.names))

    @property
    def size(self) -> Grid:
        """Input size in pixels."""
        return self.backbone.size

    def input(self, size: int | Sequence[int]) -> Classifier:
        """Take inputs of this size in pixels; see `MAE.input`."""
        return replace(self, backbone=self.backbone.input(size))

    def build(self) -> ClassifierModule:
        """The module, initialised for finetuning (ConvMAE's code). Raises ValueError as the backbone's `build`."""
        model = ClassifierModule(self.backbone.build_trunk(), self.classes, pooling=self.pooling, dropout=self.dropout)
        initialisation.for_finetuning(model, head_std=self.head_std)
        model.builder = self
        return model


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The maps of a masked autoencoder's trunk, stage by stage; made by `MAE.backbone(...)`.

    Args:
        backbone: the builder whose trunk it is; its masking, decoder, target and fusion play no part.
        stages: those whose maps are given, ascending from 0; None: all. Stages after the last of them are not built.
        norm: a LayerNorm over the channels of the last stage's map; a new one, for that of pretraining is fed with the
            fused sum.
        any_size: take inputs of any size that is a multiple of the stride, not of `size` alone.

    Raises:
        ValueError: there is no such stage, or a norm but not the last stage's map.
    """

    backbone: MAE
    stages: tuple[int, ...] | None = None
    norm: bool = False
    any_size: bool = False

    def __post_init__(self) -> None:
        count = len(self.backbone.trunk)
        if problems := problems_of(range(count) if self.stages is None else self.stages, count, norm=self.norm):
            raise ValueError(f"Backbone: {'; '.join(problems)}")

    @property
    def size(self) -> Grid:
        """Input size in pixels."""
        return self.backbone.size

    def input(self, size: int | Sequence[int]) -> Backbone:
        """Take inputs of this size in pixels; see `MAE.input`."""
        return replace(self, backbone=self.backbone.input(size))

    def build(self) -> BackboneModule:
        """The module, its trunk initialised as a classifier's. Raises ValueError as the trunk's `build`."""
        trunk = self.backbone.classifier(1).build().trunk
        model = BackboneModule(trunk, stages=self.stages, norm=self.norm, any_size=self.any_size)
        model.builder = self
        return model


def owner_of(builder: Any) -> MAE | None:
    """The builder of the masked autoencoder whose trunk a builder's model has; None: it has none."""
    if not isinstance(builder, MAE):
        builder = getattr(builder, "mae", None) or getattr(builder, "backbone", None)
    return builder if isinstance(builder, MAE) else None


def backbone_of(model: nn.Module, *, stages: Sequence[int] | None = None, any_size: bool = False) -> BackboneModule:
    """The backbone of a model that has a trunk, as a masked autoencoder or a classifier: shared, nothing is copied.

    Weights, modes and devices are the trunk's, so that what is done to one model is done to the other. Positions are
    trained where the model trains them. Stages and sizes are those of `Backbone`; there is no norm, as a model's own
    is not for this map (a masked autoencoder's is fed with the fused sum, a classifier's with the pooled tokens).

    Raises:
        ValueError: the model has no trunk, or there is no such stage.
    """
    trunk, builder = getattr(model, "trunk", None), getattr(model, "builder", None)
    if not isinstance(trunk, Trunk):
        raise ValueError(f"a {type(model).__name__} has no .trunk: give a masked autoencoder or a classifier")
    found = BackboneModule(trunk, stages=stages, any_size=any_size)
    found.training = trunk.training
    if owner := owner_of(builder):
        found.builder = Backbone(backbone=owner, stages=found.stages, any_size=any_size)
    return found
