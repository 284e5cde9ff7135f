"""Video recipes: functions that return a frozen run. A run of your own is `dataclasses.replace` of one of these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convmae import CMAE, AttentionStage, ConvMAE, ConvStage, masking, targets
from convmae.augmentation import RandAugment
from convmae.finetune import Finetune
from convmae.images import RandomResizedCrop
from convmae.training import Pretrain
from convmae.two_views import TwoViews

from .builders import VideoConvMAE
from .clips import Dense
from .datasets import UCF101, Kinetics, SomethingSomething
from .videos import Videos

FROM_8_PERCENT = RandomResizedCrop(area=(0.08, 1.0))


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


def kinetics_cmae() -> Pretrain:
    """CMAE-V: VideoConvMAE-B with a momentum target and contrast beside it, on Kinetics-400.

    From the paper (arXiv 2301.06018): CMAE's losses, heads and target; in place of the shift in pixels one in time,
    the target's clip beginning a few frames after the online one; the target's colours changed as CMAE's. There is no
    code, and neither the range of that shift nor the mask ratio is published: here it is 0 to 15 frames of the video,
    and tubes of blocks at 90 %, `VideoConvMAE.base()`'s. All else is `kinetics_pretrain`'s. To shift in pixels as well:
    `replace(run.data, shift=(16, 32, 32))`.

    Published for its convolutional encoder, finetuned: 82.2 % top-1 on Kinetics-400, 71.6 % on Something-Something V2.
    No accuracy was measured with this code yet.
    """
    run = kinetics_pretrain()
    return replace(
        run,
        model=CMAE(mae=VideoConvMAE.base()),
        data=TwoViews(source=run.data, shift=(16, 0, 0)),
        folder=Path("runs/kinetics_cmae"),
    )


def kinetics_finetune() -> Finetune:
    """VideoConvMAE-B on Kinetics-400 after 800 epochs of pretraining; give it `--checkpoint`.

    VideoConvMAE's own recipe is not published; these are VideoMAE-B's numbers (arXiv 2203.12602, appendix, and its
    scripts): 16 frames at stride 4, 100 epochs, 5 of warm-up, batch 512, AdamW (0.9, 0.999), weight decay 0.05, base
    learning rate 1e-3 for 256 clips, floor 1e-6, layer decay 0.75, drop path 0.1, mixup 0.8, cutmix 1, erasing 0.25,
    rand-m7-n4-mstd0.5-inc1, smoothing 0.1, the head's initial weights times 0.001; crops of 8 to 100 % of the area (as
    SlowFast's), flips. Tested on 5 clips in 3 crops. `--data` is Kinetics' folder with `train/` and `val/`.

    Published for VideoConvMAE-B: 81.7 % top-1 from 800 epochs of pretraining. Not measured with this code yet.
    """
    return Finetune(
        model=VideoConvMAE.base(),
        data=Kinetics(split="train", crop=FROM_8_PERCENT, flip=True, augment=(RandAugment(),)),
        test=Kinetics(split="val").as_test(clips=5, crops=3),
        epochs=100,
        batch_size=512,
        base_lr=1e-3,
        folder=Path("runs/kinetics_finetune"),
    )


def kinetics_finetune_long() -> Finetune:
    """VideoConvMAE-B on Kinetics-400 after 1600 epochs of pretraining: `kinetics_finetune`, shorter and gentler.

    VideoMAE-B's numbers (its scripts): 75 epochs, 384 videos a step, two clips of each, base learning rate 5e-4 for 256
    videos. A batch counts clips here, 768, so that the base learning rate for 256 of them is 2.5e-4.

    Published for VideoMAE-B: 81.5 % top-1. Not measured with this code yet.
    """
    return replace(
        kinetics_finetune(),
        data=Kinetics(split="train", crop=FROM_8_PERCENT, flip=True, augment=(RandAugment(),), repeats=2),
        epochs=75,
        batch_size=768,
        base_lr=2.5e-4,
        folder=Path("runs/kinetics_finetune_long"),
    )


def ssv2_pretrain() -> Pretrain:
    """VideoConvMAE-B on Something-Something V2: `kinetics_pretrain` at stride 2.

    VideoMAE's numbers (its scripts): 16 frames at stride 2, 800 epochs; 200 and 2400 are published too.

    Published for VideoConvMAE-B, finetuned: 67.7 (200 epochs), 69.9 (800), 70.7 (800, multi-scale decoder) % top-1. Not
    measured with this code yet.
    """
    return replace(
        kinetics_pretrain(),
        data=SomethingSomething(sampling=Dense(stride=2)),
        folder=Path("runs/ssv2_pretrain"),
    )


def ssv2_finetune() -> Finetune:
    """VideoConvMAE-B on Something-Something V2 after 800 epochs of pretraining; give it `--checkpoint`.

    VideoMAE-B's numbers (its scripts): 50 epochs, batch 512, base learning rate 5e-4 for 256 clips; a frame of each of
    16 segments, no flips; tested on 2 clips in 3 crops. What is not said here is `kinetics_finetune`'s.

    Published for VideoConvMAE-B: 69.9 % top-1 from 800 epochs of pretraining. Not measured with this code yet.
    """
    return replace(
        kinetics_finetune(),
        data=SomethingSomething(split="train", crop=FROM_8_PERCENT, augment=(RandAugment(),)),
        test=SomethingSomething(split="validation").as_test(clips=2, crops=3),
        epochs=50,
        base_lr=5e-4,
        folder=Path("runs/ssv2_finetune"),
    )


def ucf101_pretrain() -> Pretrain:
    """VideoConvMAE-B on the first split of UCF101, without labels, from nothing.

    VideoMAE's numbers (its scripts): 3200 epochs, batch 192, tubes at 75 %, base learning rate 3e-4 for 256 clips;
    stride 4. No result of VideoConvMAE's is published; none was measured with this code yet.
    """
    return replace(
        kinetics_pretrain(),
        model=VideoConvMAE.base().mask(masking.tube(0.75)),
        data=UCF101(),
        epochs=3200,
        batch_size=192,
        base_lr=3e-4,
        folder=Path("runs/ucf101_pretrain"),
    )


def ucf101_finetune() -> Finetune:
    """VideoConvMAE-B on the first split of UCF101; give it `--checkpoint`.

    VideoMAE-B's numbers (its scripts): 100 epochs, 128 videos a step, two clips of each, base learning rate 5e-4 for
    256 videos (2.5e-4 for clips, which a batch counts here), layer decay 0.7, drop path 0.2, dropout 0.5 before the
    head; tested on 5 clips in 3 crops. What is not said here is `kinetics_finetune`'s.

    No result of VideoConvMAE's is published; none was measured with this code yet.
    """
    return replace(
        kinetics_finetune(),
        data=UCF101(crop=FROM_8_PERCENT, flip=True, augment=(RandAugment(),), repeats=2),
        test=UCF101(train=False).as_test(clips=5, crops=3),
        batch_size=256,
        base_lr=2.5e-4,
        layer_decay=0.7,
        drop_path=0.2,
        dropout=0.5,
        folder=Path("runs/ucf101_finetune"),
    )


def demo_finetune() -> Finetune:
    """The small VideoConvMAE of `demo` on the demo clips' motions: minutes on a CPU. For a first look.

    Give it `--checkpoint runs/demo`, or nothing, to train from scratch.
    """
    return Finetune(
        model=demo().model,
        data=Videos(split="train", sampling=Dense(stride=2)),
        test=Videos(split="val", sampling=Dense(stride=2)).as_test(clips=2),
        epochs=15,
        batch_size=8,
        base_lr=3.2e-2,
        warmup_epochs=1,
        mixing=None,
        erasing=None,
        test_every=5,
        clip_gradient=1.0,
        workers=1,
        folder=Path("runs/demo_finetune"),
    )


def demo_cmae() -> Pretrain:
    """`demo` with a momentum target and contrast beside it: minutes on a CPU. For a first look.

    The target's clip begins up to 3 frames later, its window lies up to 7 pixels off.
    """
    run = demo()
    assert isinstance(run.model, VideoConvMAE)
    model = CMAE(mae=run.model).decode_features(dim=96, depth=1, heads=3).project(hidden=256, dim=64).follow(0.99)
    data = TwoViews(source=run.data, shift=(4, 8, 8))
    return replace(run, model=model, data=data, folder=Path("runs/demo_cmae"))


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
