"""The sides of the comparison. Each is a module called `side(x, mask) -> loss`, on the same inputs and masks.

`x (B, C, *size)` is ImageNet-normalised, the mask boolean `(B, *grid)`, True = hidden; finetuning sees the whole input
and leaves the mask alone. A side of transformers is made from the numbers of our builder of the same form, so that the
two cannot differ in size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import hiera
import torch
import torch.nn.functional as F
from dense_masked import DenseMasked, convolve, disagreement, embed, over_channels, run_block
from torch import Tensor, nn

from convmae import CMAE, MAE, ConvMAE, ConvStage, masking
from convmae.builders import AttentionStage, Decoder, Stage
from convmae.nn.classifier import Classifier
from convmae.nn.contrast import ContrastiveMaskedAutoencoder
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.nn.trunk import AttentionStage as AttentionStageModule
from convmae.nn.trunk import ConvolutionStage
from video import VideoConvMAE

Family = Literal["video", "image"]
TEMPORAL_KERNELS = (1, 3, 5)
CLASSES = 1000  # ImageNet's; clips get as many, for a head costs nothing beside its trunk


def installed(library: str | None) -> bool:
    """Whether a library that a side needs is there; None is."""
    return library is None or importlib.util.find_spec(library) is not None


class Pretraining(nn.Module):
    """A model of ours, or its dense-masked form.

    The mask is taken on the CPU, as a loader draws it: what it shows is worked out there, before the model, so that
    nothing waits for a GPU and torch.compile sees the model alone. A contrastive model gets the same pixels as both of
    its views, which costs what two views do.
    """

    def __init__(self, model: MaskedAutoencoder | DenseMasked) -> None:
        super().__init__()
        self.model = model

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the model, not what comes before it."""
        self.model.compile(*args, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The scalar loss."""
        trunk = self.model.trunk if isinstance(self.model, MaskedAutoencoder) else self.model.model.trunk
        loss: Tensor = self.model(x, trunk.shown(mask, device=x.device))["loss"]
        return loss

    def follow(self) -> None:
        """Let the target of a contrastive model follow, as after every step of an optimiser; others have none."""
        if isinstance(self.model, ContrastiveMaskedAutoencoder):
            self.model.update_target(self.model.momentum(0.0))

    def disagreement(self, x: Tensor, mask: Tensor) -> tuple[float, float] | None:
        """How far the dense-masked form is from the model, see `dense_masked.disagreement`; None for the model."""
        return disagreement(self.model, x, mask) if isinstance(self.model, DenseMasked) else None


class DenseClassifier(nn.Module):
    """A finetuning network of ours run in the published form: plain convolutions, on the same parameters.

    For trunks of convolution stages with one attention stage at the end, without class token, pooled by the mean.

    Args:
        model: the network.
        layout: of the maps in memory; channels come first in the authors' code.
    """

    def __init__(self, model: Classifier, layout: torch.memory_format) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    def pool(self, x: Tensor) -> Tensor:
        """`x (B, C, *size) -> (B, D)`, as `Classifier.pool`."""
        *convolutions, attention = self.model.trunk.stages
        x = x.contiguous(memory_format=self.layout)
        for stage in convolutions:
            assert isinstance(stage, ConvolutionStage)
            embedded = over_channels(stage.norm, convolve(x, stage.embedding))
            x = F.gelu(embedded).contiguous(memory_format=self.layout)
            for block in stage.blocks:
                x = run_block(block, x)
        assert isinstance(attention, AttentionStageModule)
        tokens = embed(attention, x).flatten(1, -2)
        for block in attention.blocks:
            tokens = block(tokens)
        pooled: Tensor = self.model.norm(tokens.mean(1))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, *size) -> (B, classes)`, logits."""
        out: Tensor = self.model.head(self.model.dropout(self.pool(x)))
        return out


class Finetuning(nn.Module):
    """A classifier of ours, or its published form, with cross entropy; drop path and dropout are off."""

    def __init__(self, model: Classifier | DenseClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The scalar loss of the whole input; labels are counted up, which costs what others do."""
        logits = self.model(x)
        return F.cross_entropy(logits.float(), torch.arange(len(x), device=x.device) % CLASSES)

    @torch.no_grad()
    def disagreement(self, x: Tensor, mask: Tensor) -> tuple[float, float] | None:
        """How far the published form is from the model: of what the head sees, and of the loss; None for the model."""
        if not isinstance(self.model, DenseClassifier):
            return None
        ours, theirs = self.model.model.pool(x), self.model.pool(x)
        losses = Finetuning(self.model.model)(x, mask).item(), self(x, mask).item()
        return ((ours - theirs).abs().max() / theirs.abs().max()).item(), abs(losses[0] / losses[1] - 1)


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


class TransformersHiera(nn.Module):
    """`HieraForPreTraining`: hidden units are dropped after the patch embedding, as the mask's noise says.

    Its attention is written out, and it picks shown units by boolean masks, which wait for a GPU: a peer to compare
    multiply-accumulates with, more than time.
    """

    def __init__(self, source: MAE) -> None:
        from transformers import HieraConfig, HieraForPreTraining

        super().__init__()
        assert isinstance(source.masking, masking.BlockMasking)
        first, second, *_ = stages = hiera.stages(source)
        config = HieraConfig(
            embed_dim=first.dim,
            image_size=list(source.size),
            patch_size=[2 * side - 1 for side in first.stride],
            patch_stride=list(first.stride),
            patch_padding=[side - 1 for side in first.stride],
            mlp_ratio=first.mlp_ratio,
            depths=[stage.depth for stage in stages],
            num_heads=[stage.heads for stage in stages],
            num_query_pool=len(stages) - 1,
            query_stride=list(second.stride),
            masked_unit_size=list(hiera.unit(source)),
            mask_ratio=source.masking.ratio,
            decoder_hidden_size=source.decoder.dim,
            decoder_depth=source.decoder.depth,
            decoder_num_heads=source.decoder.heads,
        )
        self.model = HieraForPreTraining(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The scalar loss."""
        loss: Tensor = self.model(x, noise=mask.flatten(1).to(x.dtype)).loss
        return loss


@dataclass(frozen=True, kw_only=True)
class Side:
    """One row of the tables.

    Args:
        name: what `--sides` calls it.
        title: what the tables call it.
        family: whether it takes clips or images.
        source: the builder of the model, or of the form that a peer's model has; it says size and masking.
        make: the module, from the source.
        peer: the side over whose time and peak memory its own are given.
        by_name: whether it is measured only where `--sides` names it.
        per_clip: samples that count as one clip: images have one for every two frames, so as many tokens.
        needs: the library that `make` imports, if it needs one that is optional.
        mask_on_device: whether the module takes its mask where the pixels are, or on the CPU.
    """

    name: str
    title: str
    family: Family
    source: MAE
    make: Callable[[MAE], nn.Module]
    peer: str
    by_name: bool = False
    per_clip: int = 1
    needs: str | None = None
    mask_on_device: bool = True

    def build(self) -> nn.Module:
        """The module, with random weights; built once, and sides of one source share the weights."""
        return _module(self.make, self.source)

    def draw_masks(self, size: int, generator: torch.Generator) -> Tensor:
        """Masks for so many samples on the CPU, as the source's model draws them."""
        return masking.draw(self.source.masking, self.source.part, size, self.source.grid, generator)


@cache
def _module(make: Callable[[MAE], nn.Module], source: MAE) -> nn.Module:
    return make(source)


@cache
def _model(builder: MAE) -> MaskedAutoencoder:
    return builder.build()


@cache
def _classifier(builder: MAE) -> Classifier:
    return builder.classifier(CLASSES).build()


def sparse(builder: MAE) -> nn.Module:
    """The model as it is."""
    return Pretraining(_model(builder))


def dense(builder: MAE) -> nn.Module:
    """The model in the published form."""
    return Pretraining(DenseMasked(_model(builder)))


def contrastive(builder: MAE) -> nn.Module:
    """The model with a momentum target and contrast beside it."""
    return Pretraining(CMAE(mae=builder).build())


def finetuned(builder: MAE) -> nn.Module:
    """The finetuning network as it is."""
    return Finetuning(_classifier(builder))


def finetuned_dense(builder: MAE) -> nn.Module:
    """The finetuning network in the published form."""
    return Finetuning(DenseClassifier(_classifier(builder), torch.contiguous_format))


def finetuned_dense_last(builder: MAE) -> nn.Module:
    """The finetuning network in the published form, channels last in memory; of images."""
    return Finetuning(DenseClassifier(_classifier(builder), torch.channels_last))


def with_temporal_kernel(builder: VideoConvMAE, kernel: int) -> VideoConvMAE:
    """The same builder with depthwise kernels of this temporal size."""
    stages: list[Stage] = [
        replace(stage, kernel=(kernel, *stage.kernel[1:])) if isinstance(stage, ConvStage) else stage
        for stage in builder.trunk
    ]
    return builder.stages(*stages)


@dataclass(frozen=True, kw_only=True)
class Models:
    """The builders that are compared: ours on clips and images, and peers' of the same input.

    The plain ViTs have the decoders of ours; a Hiera is a trunk of attention stages with its own masking and decoder.
    """

    clips: VideoConvMAE
    images: ConvMAE
    plain_clips: MAE
    plain_images: MAE
    hiera_clips: MAE
    hiera_images: MAE
    size: str = "B"


def base() -> Models:
    """What the papers compare: Base, clips of 16 x 224 x 224 under tubes at 0.9, images of 224 x 224 at 0.75.

    Hiera-B hides 0.9 of a clip's mask units and 0.6 of an image's, and its decoder is MAE's: as we take it, not checked
    against its paper.
    """
    clips, images = VideoConvMAE.base(), ConvMAE.base()
    hiera_b = partial(_hiera, dim=96, depths=(2, 3, 16, 3), decoder=Decoder(dim=512, depth=8, heads=16))
    return Models(
        clips=clips,
        images=images,
        plain_clips=_videomae(clips, MAE.base()),
        plain_images=MAE.base(),
        hiera_clips=hiera_b(clips.size, ratio=0.9),
        hiera_images=hiera_b(images.size, ratio=0.6),
    )


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
    tiny_hiera = partial(_hiera, dim=16, depths=(1, 1, 1, 1), decoder=plain.decoder)
    return Models(
        clips=clips,
        images=images,
        plain_clips=_videomae(clips, plain),
        plain_images=plain,
        hiera_clips=tiny_hiera(clips.size, ratio=0.8),
        hiera_images=tiny_hiera(images.size, ratio=0.6),
        size="tiny",
    )


def _videomae(clips: VideoConvMAE, vit: MAE) -> MAE:
    """A plain ViT with the input, masking, decoder and target of a VideoConvMAE: VideoMAE's form."""
    return replace(
        vit.input(clips.size).patch(clips.stride).with_class_token(False),
        masking=clips.masking,
        decoder=clips.decoder,
        target=clips.target,
    )


def _hiera(size: tuple[int, ...], *, ratio: float, dim: int, depths: tuple[int, ...], decoder: Decoder) -> MAE:
    """A Hiera: patches of 4 x 4, of two frames in a clip; then each stage pools 2 x 2 and doubles width and heads."""
    frames = size[:-2]
    strides = [(*(2 for _ in frames), 4, 4)] + [(*(1 for _ in frames), 2, 2)] * (len(depths) - 1)
    stages = [
        AttentionStage(dim=dim * 2**number, depth=depth, stride=stride, heads=2**number, hybrid=False)
        for number, (depth, stride) in enumerate(zip(depths, strides, strict=True))
    ]
    return replace(MAE.base().input(size).stages(*stages).mask(masking.random(ratio)), decoder=decoder)


def sides(models: Models) -> list[Side]:
    """All sides, in the order in which they are run and printed."""
    return [*_on_clips(models), *_on_images(models)]


def _on_clips(models: Models) -> Iterator[Side]:
    clip = partial(Side, family="video", peer="videomae")
    ours = partial(clip, mask_on_device=False)
    kernels = {kernel: with_temporal_kernel(models.clips, kernel) for kernel in TEMPORAL_KERNELS}
    for kernel, clips in kernels.items():
        title = f"VideoConvMAE-{models.size}, kernel {kernel}"
        yield ours(name=f"videoconvmae-k{kernel}", title=title, source=clips, make=sparse)
    yield ours(
        name="videoconvmae-half",
        title=f"VideoConvMAE-{models.size}, half decoded",
        source=models.clips.reconstruct_part(masking.running_cells(0.5)),
        make=sparse,
    )
    for kernel, clips in kernels.items():
        title = f"  dense-masked, kernel {kernel}"
        yield ours(name=f"videoconvmae-dense-k{kernel}", title=title, source=clips, make=dense)
    yield ours(name="plain", title=f"VideoMAE-{models.size} (our MAE)", source=models.plain_clips, make=sparse)
    yield clip(
        name="videomae",
        title=f"VideoMAE-{models.size} (transformers)",
        source=models.plain_clips,
        make=TransformersVideoMAE,
        needs="transformers",
    )
    yield clip(
        name="hiera-video",
        title=f"Hiera-{models.size}, clips (timm)",
        source=models.hiera_clips,
        make=hiera.HieraMAE,
        needs="timm",
    )
    asked = partial(ours, source=kernels[3], by_name=True)
    yield asked(
        name="videoconvmae-tube75",
        title=f"VideoConvMAE-{models.size}, tubes at 0.75",
        source=kernels[3].mask(masking.tube(0.75)),
        make=sparse,
    )
    yield asked(
        name="videoconvmae-cmae",
        title=f"CMAE over VideoConvMAE-{models.size}",
        make=contrastive,
        peer="videoconvmae-k3",
    )
    finetuning = partial(asked, peer="videoconvmae-finetune")
    title = f"VideoConvMAE-{models.size}, finetuning"
    yield finetuning(name="videoconvmae-finetune", title=title, make=finetuned)
    yield finetuning(name="videoconvmae-finetune-dense", title="  published form", make=finetuned_dense)


def _on_images(models: Models) -> Iterator[Side]:
    image = partial(Side, family="image", peer="mae", per_clip=models.clips.size[0] // 2)
    ours = partial(image, mask_on_device=False)
    yield ours(name="convmae", title=f"ConvMAE-{models.size}", source=models.images, make=sparse)
    yield ours(
        name="fastconvmae",
        title=f"ConvMAE-{models.size}, 4 masks an image",
        source=models.images.mask(masking.complementary(4)),
        make=sparse,
    )
    yield ours(name="convmae-dense", title="  dense-masked", source=models.images, make=dense)
    yield ours(name="mae", title=f"MAE-{models.size}", source=models.plain_images, make=sparse)
    yield image(
        name="vitmae",
        title=f"MAE-{models.size} (transformers)",
        source=models.plain_images,
        make=TransformersViTMAE,
        needs="transformers",
    )
    yield image(
        name="hiera",
        title=f"Hiera-{models.size} (timm)",
        source=models.hiera_images,
        make=hiera.HieraMAE,
        needs="timm",
    )
    yield image(
        name="hiera-transformers",
        title=f"Hiera-{models.size} (transformers)",
        source=models.hiera_images,
        make=TransformersHiera,
        needs="transformers",
    )
    asked = partial(ours, source=models.images, by_name=True)
    title = f"CMAE over ConvMAE-{models.size}"
    yield asked(name="convmae-cmae", title=title, make=contrastive, peer="convmae")
    yield asked(
        name="mae-cmae",
        title=f"CMAE over MAE-{models.size}",
        source=models.plain_images,
        make=contrastive,
        peer="mae",
    )
    finetuning = partial(asked, peer="convmae-finetune")
    yield finetuning(name="convmae-finetune", title=f"ConvMAE-{models.size}, finetuning", make=finetuned)
    yield finetuning(name="convmae-finetune-dense", title="  published form", make=finetuned_dense)
    yield finetuning(name="convmae-finetune-dense-last", title="  channels last", make=finetuned_dense_last)
