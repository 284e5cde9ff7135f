"""The builder of VideoConvMAE: ConvMAE's, on three axes, with the video presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from convmae.builders import MAE, AttentionStage, ConvMAE, Decoder, Stage, hybrid
from convmae.grids import Grid
from convmae.masking import Masking, tube
from convmae.targets import Target, normalized_pixels

V = TypeVar("V", bound="VideoConvMAE")

TEMPORAL_KERNEL = 3
"""The temporal size of the depthwise kernels: not published, so chosen here.

Kernels of 3 see the neighbouring time steps, which kernels of 1 do not, at next to no cost: on two CPU cores a step
of Base took 1.18, 1.20 and 1.24 times VideoMAE-B's for kernels of 1, 3 and 5 (`python benchmarks/pretrain_step.py`).
Which one is most accurate was not measured.
"""


def _inflate(stages: tuple[Stage, ...], *, tubelet: int, kernel: int) -> tuple[Stage, ...]:
    """Two-axis stages to three: the first stride takes `tubelet` frames, the others one; kernels take `kernel`."""
    inflated: list[Stage] = []
    for number, stage in enumerate(stages):
        stride = (tubelet if number == 0 else 1, *stage.stride)
        if isinstance(stage, AttentionStage):
            inflated.append(replace(stage, stride=stride))
        else:
            inflated.append(replace(stage, stride=stride, kernel=(kernel, *stage.kernel)))
    return tuple(inflated)


def _video(
    dims: tuple[int, int, int], depth: int, heads: int, mlp_ratios: tuple[float, float, float]
) -> tuple[Stage, ...]:
    return _inflate(hybrid(dims, depth, heads, mlp_ratios), tubelet=2, kernel=TEMPORAL_KERNEL)


@dataclass(frozen=True, kw_only=True, repr=False)
class VideoConvMAE(ConvMAE):
    """ConvMAE on clips `(B, 3, T, H, W)` (VideoConvMAE: results in arXiv 2205.03892's project, code never released).

    Published: Base has the size of ViT-B, 86 M parameters. Not published, and so an option here: the strides
    (2, 4, 4), (1, 2, 2), (1, 2, 2), which give those 86 M; the depthwise kernels (k, 5, 5); the rounding of the tube
    mask at 90 % (VideoMAE's: 176 of 196 hidden at each time step); the decoder and the target, which are VideoMAE's.
    Multi-scale fusion is on: the paper's table has rows with and without it.
    """

    size: Grid = (16, 224, 224)
    trunk: tuple[Stage, ...] = field(default_factory=lambda: _video((256, 384, 768), 11, 12, (4, 4, 4)))
    masking: Masking = tube(0.9)
    decoder: Decoder = Decoder(dim=384, depth=4, heads=6)
    target: Target = normalized_pixels(per_channel=True)

    @classmethod
    def small(cls: type[V]) -> V:
        """ConvMAE-S inflated; the decoder of VideoMAE-S: 192 wide, 4 deep, 3 heads. Not published."""
        return cls(trunk=_video((128, 256, 384), 11, 6, (4, 4, 4)), decoder=Decoder(dim=192, depth=4, heads=3))

    @classmethod
    def base(cls: type[V]) -> V:
        """ConvMAE-B inflated; the decoder of VideoMAE-B: 384 wide, 4 deep, 6 heads. K400 top-1 80.1 to 82.7."""
        return cls()

    @classmethod
    def large(cls: type[V]) -> V:
        """ConvMAE-L inflated; the decoder of VideoMAE-L: 512 wide, 12 deep, 8 heads. Not published."""
        return cls(trunk=_video((384, 768, 1024), 23, 16, (8, 8, 4)), decoder=Decoder(dim=512, depth=12, heads=8))

    @classmethod
    def huge(cls: type[V]) -> V:
        """ConvMAE-H inflated; the decoder of VideoMAE-H: 640 wide, 12 deep, 8 heads. Not published."""
        return cls(trunk=_video((768, 1024, 1280), 31, 16, (8, 8, 4)), decoder=Decoder(dim=640, depth=12, heads=8))

    @classmethod
    def inflate(cls: type[V], image: MAE, *, frames: int, tubelet: int = 2, kernel: int = TEMPORAL_KERNEL) -> V:
        """An image builder on clips: its stages, decoder, target, fusion, drop path and class token, on three axes.

        Args:
            image: a builder on two axes.
            frames: T, the frames of a clip.
            tubelet: frames that one token covers: the temporal stride of the first stage.
            kernel: temporal size of the depthwise kernels, odd.

        The masking becomes this class's default, tubes at 90 %, for an image's ratio does not suit clips; change it
        with `.mask(...)`.

        Raises:
            ValueError: the builder is not on two axes, or a number is not positive.
        """
        if len(image.size) != 2:
            raise ValueError(f"inflate takes an image builder, of size (H, W); this one has size {image.size}")
        sized = cls().input((frames, *image.size))
        return replace(
            sized,
            trunk=_inflate(image.trunk, tubelet=tubelet, kernel=kernel),
            decoder=image.decoder,
            target=image.target,
            fusion=image.fusion,
            drop_path_rate=image.drop_path_rate,
            class_token=image.class_token,
        )
