"""The sides of the comparison. Each is a module called `side(x, mask) -> loss`, on the same inputs and masks.

`x (B, C, *size)` is ImageNet-normalised, the mask boolean `(B, *grid)`, True = hidden. A side of transformers is
made from the numbers of our builder of the same form, so that the two cannot differ in size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

from dense_masked import DenseMasked
from torch import Tensor, nn

from convmae import MAE, ConvMAE, ConvStage, masking
from convmae.builders import AttentionStage, Stage
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from video import VideoConvMAE

Family = Literal["video", "image"]
TEMPORAL_KERNELS = (1, 3, 5)
TRANSFORMERS = importlib.util.find_spec("transformers") is not None


class Pretraining(nn.Module):
    """A model of ours, or its dense-masked form."""

    def __init__(self, model: MaskedAutoencoder | DenseMasked) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The scalar loss."""
        loss: Tensor = self.model(x, mask)["loss"]
        return loss


class TransformersVideoMAE(nn.Module):
    """`VideoMAEForPreTraining`, which takes clips with time before channels, and the mask flat."""

    def __init__(self, plain: MAE) -> None:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        super().__init__()
        frames, tubelet = plain.size[0], plain.stride[0]
        self.model = VideoMAEForPreTraining(VideoMAEConfig(num_frames=frames, tubelet_size=tubelet, **numbers(plain)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The scalar loss."""
        loss: Tensor = self.model(x.transpose(1, 2), bool_masked_pos=mask.flatten(1)).loss
        return loss


class TransformersViTMAE(nn.Module):
    """`ViTMAEForPreTraining`, which keeps the tokens of the smallest noise: the mask itself is the noise."""

    def __init__(self, plain: MAE) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        assert isinstance(plain.masking, masking.BlockMasking)
        ratio = plain.masking.ratio
        self.model = ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=ratio, norm_pix_loss=True, **numbers(plain)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The scalar loss."""
        loss: Tensor = self.model(x, noise=mask.flatten(1).to(x.dtype)).loss
        return loss


def numbers(plain: MAE) -> dict[str, Any]:
    """The numbers of a plain ViT's builder, by the names that transformers gives them."""
    (stage,) = plain.trunk
    assert isinstance(stage, AttentionStage)
    return {
        "image_size": plain.size[-1],
        "patch_size": plain.stride[-1],
        "hidden_size": stage.dim,
        "num_hidden_layers": stage.depth,
        "num_attention_heads": stage.heads,
        "intermediate_size": int(stage.dim * stage.mlp_ratio),
        "decoder_hidden_size": plain.decoder.dim,
        "decoder_num_hidden_layers": plain.decoder.depth,
        "decoder_num_attention_heads": plain.decoder.heads,
        "decoder_intermediate_size": int(plain.decoder.dim * plain.decoder.mlp_ratio),
        "attn_implementation": "sdpa",
    }


@dataclass(frozen=True, kw_only=True)
class Side:
    """One row of the tables.

    Args:
        name: what `--sides` calls it.
        title: what the tables call it.
        family: whether it takes clips or images.
        source: the builder of the model, or of the form that transformers' model has; it says size and masking.
        make: the module, from the source.
        per_clip: samples that count as one clip: images have one for every two frames, so as many tokens.
        needs_transformers: whether `make` imports transformers.
    """

    name: str
    title: str
    family: Family
    source: MAE
    make: Callable[[MAE], nn.Module]
    per_clip: int = 1
    needs_transformers: bool = False

    def build(self) -> nn.Module:
        """The module, with random weights; built once, and sides of one source share the weights."""
        return _module(self.make, self.source)


@cache
def _module(make: Callable[[MAE], nn.Module], source: MAE) -> nn.Module:
    return make(source)


@cache
def _model(builder: MAE) -> MaskedAutoencoder:
    return builder.build()


def sparse(builder: MAE) -> nn.Module:
    """The model as it is."""
    return Pretraining(_model(builder))


def dense(builder: MAE) -> nn.Module:
    """The model in the published form."""
    return Pretraining(DenseMasked(_model(builder)))


def with_temporal_kernel(builder: VideoConvMAE, kernel: int) -> VideoConvMAE:
    """The same builder with depthwise kernels of this temporal size."""
    stages: list[Stage] = [
        replace(stage, kernel=(kernel, *stage.kernel[1:])) if isinstance(stage, ConvStage) else stage
        for stage in builder.trunk
    ]
    return builder.stages(*stages)


@dataclass(frozen=True, kw_only=True)
class Models:
    """The builders that are compared: ours on clips and images, and the plain ViT's of the same input and decoder."""

    clips: VideoConvMAE
    images: ConvMAE
    plain_clips: MAE
    plain_images: MAE
    size: str = "B"


def base() -> Models:
    """What the papers compare: Base, clips of 16 x 224 x 224 under tubes at 0.9, images of 224 x 224 at 0.75."""
    clips, images = VideoConvMAE.base(), ConvMAE.base()
    return Models(clips=clips, images=images, plain_clips=_videomae(clips, MAE.base()), plain_images=MAE.base())


def tiny() -> Models:
    """A few seconds' worth, to see that everything runs; its times mean nothing."""
    convolutions = [
        ConvStage(dim=dim, depth=1, stride=(stride, stride), kernel=(5, 5)) for dim, stride in ((16, 4), (24, 2))
    ]
    attention = AttentionStage(dim=48, depth=1, stride=(2, 2), heads=2)
    images = ConvMAE.base().input(64).stages(*convolutions, attention).decode(dim=32, depth=1, heads=2, mlp_ratio=4)
    plain = (
        MAE.base().input(64).stages(replace(attention, stride=(16, 16), hybrid=False)).decode(dim=32, depth=1, heads=2)
    )
    clips = VideoConvMAE.inflate(images, frames=4).predict(VideoConvMAE.base().target)
    return Models(clips=clips, images=images, plain_clips=_videomae(clips, plain), plain_images=plain, size="tiny")


def _videomae(clips: VideoConvMAE, vit: MAE) -> MAE:
    """A plain ViT with the input, masking, decoder and target of a VideoConvMAE: VideoMAE's form."""
    return replace(
        vit.input(clips.size).patch(clips.stride).with_class_token(False),
        masking=clips.masking,
        decoder=clips.decoder,
        target=clips.target,
    )


def sides(models: Models) -> list[Side]:
    """All sides, in the order in which they are run and printed."""
    return [*_on_clips(models), *_on_images(models)]


def _on_clips(models: Models) -> Iterator[Side]:
    kernels = {kernel: with_temporal_kernel(models.clips, kernel) for kernel in TEMPORAL_KERNELS}
    for kernel, clips in kernels.items():
        title = f"VideoConvMAE-{models.size}, kernel {kernel}"
        yield Side(name=f"videoconvmae-k{kernel}", title=title, family="video", source=clips, make=sparse)
    for kernel, clips in kernels.items():
        title = f"  dense-masked, kernel {kernel}"
        yield Side(name=f"videoconvmae-dense-k{kernel}", title=title, family="video", source=clips, make=dense)
    yield Side(
        name="videomae",
        title=f"VideoMAE-{models.size} (transformers)",
        family="video",
        source=models.plain_clips,
        make=TransformersVideoMAE,
        needs_transformers=True,
    )


def _on_images(models: Models) -> Iterator[Side]:
    image = partial(Side, family="image", per_clip=models.clips.size[0] // 2)
    yield image(name="convmae", title=f"ConvMAE-{models.size}", source=models.images, make=sparse)
    yield image(name="convmae-dense", title="  dense-masked", source=models.images, make=dense)
    yield image(name="mae", title=f"MAE-{models.size}", source=models.plain_images, make=sparse)
    yield image(
        name="vitmae",
        title=f"MAE-{models.size} (transformers)",
        source=models.plain_images,
        make=TransformersViTMAE,
        needs_transformers=True,
    )
