"""The builder of contrastive masked autoencoders: CMAE over any of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .builders import MAE, Backbone, Classifier, Decoder, attention_problems, require, require_counts
from .grids import Grid
from .masking import Masking
from .nn import initialisation
from .nn.classifier import Pooling
from .nn.contrast import ContrastiveMaskedAutoencoder, Head
from .nn.masked_autoencoder import Decoder as DecoderModule


@dataclass(frozen=True, kw_only=True, repr=False)
class CMAE:
    """A contrastive masked autoencoder (Huang et al., 2022; arXiv 2207.13532) over `MAE`, `ConvMAE` or `VideoConvMAE`.

    `CMAE(mae=MAE.base()).mask(masking.block(0.75, 2)).follow(0.996, 1.0)` is the paper's on a plain ViT; over
    `ConvMAE.base()` it has the paper's convolutional encoder, over a builder of three axes it is CMAE-V (arXiv
    2301.06018). A run feeds it with two views: `data=TwoViews(source=...)`, see `convmae.two_views`.

    Where the sources say nothing: heads and the feature decoder are initialised by MAE's rule, as the rest; the target
    of an encoder with multi-scale fusion has it as well; the feature decoder gives as many values as the encoder is
    wide, which for ViT-B/16 is the published 768.

    Args:
        mae: the masked autoencoder.
        features: of the feature decoder.
        hidden, dim: widths of projector and predictor: hidden layer and output.
        momentum, momentum_end: of the target, at the start and the end of a run, by half a cosine between. The paper
            describes a rise; every published configuration of the code stays at 0.996.
        temperature: of the contrastive loss.
        reconstruction_weight, contrast_weight: of the two losses.

    Raises:
        ValueError: a number is out of its range.
    """

    mae: MAE
    features: Decoder = Decoder(dim=512, depth=2, heads=16)
    hidden: int = 1536
    dim: int = 256
    momentum: float = 0.996
    momentum_end: float = 0.996
    temperature: float = 0.07
    reconstruction_weight: float = 1.0
    contrast_weight: float = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.mae, MAE), "CMAE: mae is a builder of a masked autoencoder", self.mae)
        decoder = isinstance(self.features, Decoder)
        require(decoder, "CMAE: features is a Decoder, set by .decode_features(...)", self.features)
        require_counts(self, "hidden", "dim")
        for name in ("momentum", "momentum_end"):
            require(0 <= getattr(self, name) <= 1, f"CMAE: {name} is from 0 to 1", getattr(self, name))
        require(0 < self.temperature < math.inf, "CMAE: temperature is positive", self.temperature)
        for name in ("reconstruction_weight", "contrast_weight"):
            require(0 <= getattr(self, name) < math.inf, f"CMAE: {name} is 0 or more", getattr(self, name))

    def input(self, size: int | Sequence[int]) -> CMAE:
        """Take inputs of this size in pixels; see `MAE.input`."""
        return replace(self, mae=self.mae.input(size))

    def mask(self, masking: Masking) -> CMAE:
        """Hide tokens of the online view this way; see `MAE.mask`."""
        return replace(self, mae=self.mae.mask(masking))

    def decode_features(self, *, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> CMAE:
        """Fill in features with transformer blocks of this width, number and heads."""
        return replace(self, features=Decoder(dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio))

    def project(self, *, hidden: int, dim: int) -> CMAE:
        """Project and predict vectors of `dim` numbers through a hidden layer."""
        return replace(self, hidden=hidden, dim=dim)

    def follow(self, momentum: float, end: float | None = None) -> CMAE:
        """Let the target follow with this momentum: constant, or by half a cosine to another one at the end."""
        return replace(self, momentum=momentum, momentum_end=momentum if end is None else end)

    def contrast(self, *, temperature: float) -> CMAE:
        """Contrast at this temperature."""
        return replace(self, temperature=temperature)

    def weigh(self, *, reconstruction: float = 1.0, contrast: float = 1.0) -> CMAE:
        """Weigh the two losses."""
        return replace(self, reconstruction_weight=reconstruction, contrast_weight=contrast)

    @property
    def size(self) -> Grid:
        """Input size in pixels."""
        return self.mae.size

    def classifier(self, classes: int, *, pooling: Pooling = "mean", dropout: float = 0.0) -> Classifier:
        """The finetuning network over the same trunk, for so many classes."""
        return self.mae.classifier(classes, pooling=pooling, dropout=dropout)

    def backbone(self, *, stages: Sequence[int] | None = None, norm: bool = False, any_size: bool = False) -> Backbone:
        """The maps of the same trunk's stages, for detection and the like; see `Backbone`."""
        return self.mae.backbone(stages=stages, norm=norm, any_size=any_size)

    def check(self) -> None:
        """Raise the ValueError that `build` would, without building."""
        problems = self.mae.problems() + attention_problems(
            f".decode_features(dim={self.features.dim}, heads={self.features.heads})",
            self.features.dim,
            self.features.heads,
            len(self.size),
        )
        if getattr(self.mae.masking, "groups", 1) > 1:
            problems.append(f"mae=...mask({self.mae.masking!r}) shows a sample under several masks: CMAE compares one")
        if problems:
            raise ValueError("CMAE cannot be built:" + "".join(f"\n  - {problem}" for problem in problems))

    def build(self) -> ContrastiveMaskedAutoencoder:
        """The module, initialised from torch's global random state: first what `mae.build()` makes, and as there.

        Raises:
            ValueError: parts do not fit each other; the message lists what does not, and the calls to change.
        """
        self.check()
        plain = self.mae.build()
        width = plain.trunk.dims[-1]
        decoder = DecoderModule(
            width,
            self.features.dim,
            depth=self.features.depth,
            heads=self.features.heads,
            mlp_ratio=self.features.mlp_ratio,
            grid=self.mae.grid,
            values=width,
        )
        heads = [Head(inputs, self.hidden, self.dim) for inputs in (width, self.dim)]
        for part in (decoder, *heads):
            initialisation.for_pretraining(part)
        model = ContrastiveMaskedAutoencoder(
            plain,
            feature_decoder=decoder,
            projector=heads[0],
            predictor=heads[1],
            momentum=self.momentum,
            momentum_end=self.momentum_end,
            temperature=self.temperature,
            reconstruction_weight=self.reconstruction_weight,
            contrast_weight=self.contrast_weight,
        )
        model.builder = self
        return model

    def __repr__(self) -> str:
        return f"CMAE(mae={self.mae!r})" + "".join(self.verbs())

    def verbs(self, *, defaults: bool = False) -> Iterator[str]:
        """The calls that make this builder from one over the same `mae`, as code; see `MAE.verbs`."""
        empty = CMAE(mae=self.mae)
        calls: list[tuple[tuple[str, ...], str]] = [
            (("features",), f".decode_features{repr(self.features).removeprefix('Decoder')}"),
            (("hidden", "dim"), f".project(hidden={self.hidden}, dim={self.dim})"),
            (("momentum", "momentum_end"), f".follow({self.momentum}, {self.momentum_end})"),
            (("temperature",), f".contrast(temperature={self.temperature})"),
            (
                ("reconstruction_weight", "contrast_weight"),
                f".weigh(reconstruction={self.reconstruction_weight}, contrast={self.contrast_weight})",
            ),
        ]
        for names, call in calls:
            if defaults or any(getattr(self, name) != getattr(empty, name) for name in names):
                yield call
