"""Video recipes: functions that return a frozen run. A run of your own is `dataclasses.replace` of one of these."""

from __future__ import annotations

from pathlib import Path

from convmae import AttentionStage, ConvMAE, ConvStage, masking, targets
from convmae.training import Pretrain

from .builders import VideoConvMAE
from .clips import Dense
from .videos import Videos


def kinetics_pretrain() -> Pretrain:
    """VideoConvMAE-B on Kinetics-400.

    VideoConvMAE's own recipe is not published; these are VideoMAE's numbers (arXiv 2203.12602, appendix, and its
    scripts), which it follows: 16 frames at stride 4, multi-scale crops to 224 without flips, tubes at 90 %, AdamW
    (0.9, 0.95), weight decay 0.05, base learning rate 1.5e-4 for 256 clips, floor 1e-5, 40 epochs of warm-up, batch
    2048 (64 GPUs of 32). 800 epochs; 200 and 1600 are published too: `replace(kinetics_pretrain(), epochs=200)`.

    Published for VideoConvMAE-B, finetuned: 80.1 (200 epochs), 81.7 (800), 82.7 (800, multi-scale decoder) % top-1.
    VideoMAE-B's 800 epochs took 27 hours on 64 V100. No accuracy was measured with this code yet.
    """
    return Pretrain(
        model=VideoConvMAE.base(),
        data=Videos(sampling=Dense(stride=4)),
        epochs=800,
        batch_size=2048,
        min_lr=1e-5,
        warmup_epochs=40,
        folder=Path("runs/kinetics_pretrain"),
    )


def demo() -> Pretrain:
    """A small VideoConvMAE on the built-in demo clips, or on your folder: about four minutes on two CPU cores.

    For a first look; no published counterpart. Clips of 8 frames at 64 pixels, tokens of 2 x 8 x 8, 75 % in tubes.
    """
    image = (
        ConvMAE()
        .input(64)
        .stages(
            ConvStage(dim=48, depth=1, stride=(4, 4), kernel=(5, 5)),
            ConvStage(dim=96, depth=1, stride=(2, 2), kernel=(5, 5)),
            AttentionStage(dim=192, depth=3, stride=(1, 1), heads=6),
        )
        .decode(dim=96, depth=2, heads=3)
        .predict(targets.pixels())
    )
    return Pretrain(
        model=VideoConvMAE.inflate(image, frames=8).mask(masking.tube(0.75)),
        data=Videos(sampling=Dense(stride=2)),
        epochs=25,
        batch_size=8,
        base_lr=3.2e-2,
        warmup_epochs=2,
        clip_gradient=1.0,
        workers=1,
        folder=Path("runs/demo"),
    )
