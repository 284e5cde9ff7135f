"""Image weights to video: a ConvMAE or MAE, or a classifier on its trunk, becomes the same model on clips.

    python -m video.inflation runs/images clips.pt --frames 16
    python launchers/slurm_finetune.py --recipe video.recipes:kinetics_finetune --checkpoint clips.pt

On a still clip, whose frames are all one image, the inflated model does what the image model does on the image;
`inflate` says where that is exact, and where it is not.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from convmae import CMAE, checkpoint, command, weights
from convmae.builders import MAE, Backbone, Classifier
from convmae.nn.positions import sincos
from video.builders import TEMPORAL_KERNEL, VideoConvMAE

Rule = Literal["centre", "mean"]
_log = logging.getLogger(__name__)


def inflate(
    image_model: nn.Module,
    *,
    frames: int,
    tubelet: int = 2,
    kernel: int = TEMPORAL_KERNEL,
    rule: Rule = "centre",
    temporal_positions: bool = False,
) -> Any:
    """The video model of an image model: built by `VideoConvMAE.inflate`, with the image's weights along time.

    The embedding of tubelets and the depthwise kernels are put along time by the rule: "centre" (ViViT's central frame,
    arXiv 2103.15691, section 3.4) or "mean" (I3D, arXiv 1705.07750, section 2.1). Positions are the image's at every
    time step. The head of a decoder predicts the image's values for each frame of a tubelet. All else is copied.

    On a still clip, up to rounding:

    - Without a class token, "centre" is exact, as attention over T copies of each token is attention over one: all
      maps, a classifier's logits, and predictions under masks that hide the same tokens at every time step.
    - "mean" is exact in the embedding, and so everywhere in a plain ViT or with a kernel of 1; but not in depthwise
      convolutions near the clip's first and last frames, beyond which there are zeros and not copies of the image.
    - A class token is one beside T copies of the others, and has a smaller share of the attention than on the image:
      the stage that has it, the last one, is not exact.
    - The loss is not exact for a normalised target: the unbiased variance of more pixels is another one.

    On any clip, "centre" at first sees one frame of each tubelet, and no other time step before the attention.

    Equal positions at all time steps tell no times apart. A classifier trains its positions; a masked autoencoder does
    not, and its predictions for a place that is hidden at every time step are equal for ever. To train one on clips,
    ask for `temporal_positions`.

    Args:
        image_model: from an image builder's `.build()`: a masked autoencoder, a classifier or a backbone.
        frames: T, the frames of a clip, a multiple of the tubelet.
        tubelet: frames that one token covers.
        kernel: temporal size of the depthwise kernels, odd.
        rule: "centre": the image's weights in the middle frame (of an even number, the first after the middle), zeros
            in the others; "mean": the image's weights, divided by the number of frames, in each.
        temporal_positions: add to all positions a sine-cosine table of the time step, whose mean over time is 0. Then
            nothing above is exact but the stages before attention.

    Returns:
        A model on clips `(B, 3, frames, H, W)`, in evaluation mode, on the device and in the precision of the image
        model, with which it shares no memory. It has the masking of `VideoConvMAE`. Where the target has neither as
        many values as on images nor `tubelet` times as many, the decoder's head is a fresh one, with a logged line.

    Raises:
        ValueError: the model came from no image builder, the rule is unknown, or a number is not positive or does not
            fit.
    """
    if rule not in get_args(Rule):
        raise ValueError(f'rule is "centre" or "mean"; got {rule!r}')
    builder = _inflated(getattr(image_model, "builder", None), frames=frames, tubelet=tubelet, kernel=kernel)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's random state stays
        model = builder.build().to(next(image_model.parameters()))
    inflated = model.state_dict()
    for name, weight in image_model.state_dict().items():
        fresh = inflated[name]
        if name.endswith("positions"):
            inflated[name] = _positions(weight, len(fresh), temporal=temporal_positions)
        elif name.startswith("decoder.head."):
            inflated[name] = _head(name, weight, fresh, tubelet)
        elif fresh.ndim > weight.ndim:
            inflated[name] = _along_time(weight, fresh.shape[2], rule)
        else:
            inflated[name] = weight
    model.load_state_dict(inflated)
    return model.eval()


def _inflated(builder: Any, **numbers: int) -> VideoConvMAE | CMAE | Classifier | Backbone:
    """The builder on clips. Raises ValueError where there is none on images."""
    if isinstance(builder, MAE):
        return VideoConvMAE.inflate(builder, **numbers)
    if isinstance(builder, CMAE):
        return replace(builder, mae=VideoConvMAE.inflate(builder.mae, **numbers))
    if isinstance(builder, Classifier | Backbone):
        return replace(builder, backbone=VideoConvMAE.inflate(builder.backbone, **numbers))
    kind = "no builder" if builder is None else type(builder).__name__
    raise ValueError(f"inflate takes a model that an image builder built, as ConvMAE.base().build(); this one: {kind}")


def _along_time(weight: Tensor, frames: int, rule: Rule) -> Tensor:
    """A convolution's weight `(D, C, kh, kw) -> (D, C, frames, kh, kw)`; summed over frames it is the image's."""
    if rule == "mean":
        return repeat(weight / frames, "d c h w -> d c t h w", t=frames)
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


def _positions(table: Tensor, times: int, *, temporal: bool) -> Tensor:
    """A table `(H, W, D) -> (times, H, W, D)`, the same at every time, or plus one of the times."""
    tables = repeat(table, "h w d -> t h w d", t=times)
    if not temporal:
        return tables
    of_times = sincos((times,), table.shape[-1]).to(table)
    return tables + rearrange(of_times - of_times.mean(0), "t d -> t 1 1 d")


def _head(name: str, weight: Tensor, fresh: Tensor, tubelet: int) -> Tensor:
    """The decoder head's weight or bias `(values, ...) -> (values of a tubelet, ...)`.

    Values of a patch lie by pixel, and pixels by frame (`convmae.targets`), so those of a tubelet are the image's,
    frame after frame. A target that has as many values for a tubelet sums it up, as it does a patch.
    """
    if len(fresh) not in (len(weight), tubelet * len(weight)):
        _log.info("%s is fresh: %d values a patch of images, %d a tubelet", name, len(weight), len(fresh))
        return fresh
    return repeat(weight, "v ... -> (t v) ...", t=len(fresh) // len(weight))


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Make a checkpoint of a video model from image weights: what the launchers' --checkpoint takes.

    Args:
        source: a run's folder, or a file that convmae.weights.load reads, the authors' too.
        out: the checkpoint to write.
        frames: of a clip.
        tubelet: frames that one token covers.
        kernel: temporal size of the depthwise kernels.
        rule: where the weights go along time: all in the centre, or their mean in each frame.
        temporal_positions: tell times by fixed positions: to go on with masked pretraining, which trains none.
        average: the averaged weights that a finetuning run kept.
        encoder: of a CMAE: online or target.
        channels: of the authors' CMAE: rgb, or bgr, which the released weights saw.
    """

    source: Path
    out: Path
    frames: int = 16
    tubelet: int = 2
    kernel: int = TEMPORAL_KERNEL
    rule: Rule = "centre"
    temporal_positions: bool = False
    average: bool = False
    encoder: weights.Encoder = "online"
    channels: weights.Channels = "rgb"


def _write(options: _Options) -> int:
    if options.out.is_dir():
        raise ValueError(f"{options.out} is a folder: name the file to write, as {options.out / 'clips.pt'}")
    try:
        image_model = weights.load(
            options.source, average=options.average, encoder=options.encoder, channels=options.channels
        )
    except FileNotFoundError as missing:
        raise ValueError(f"{missing}: give a run's folder, or a checkpoint") from missing
    model = inflate(
        image_model,
        frames=options.frames,
        tubelet=options.tubelet,
        kernel=options.kernel,
        rule=options.rule,
        temporal_positions=options.temporal_positions,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(options.out, model)
    print(f"{options.out}: clips (B, 3, {', '.join(map(str, model.trunk.size))}), {type(model).__name__}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the command line says; the exit code, 2 where it cannot be done."""
    return command.run(_Options, "video.inflation", _write, arguments)


if __name__ == "__main__":
    sys.exit(main())
