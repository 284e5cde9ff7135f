"""A run as a frozen description: everything that decides its result, and where it is kept."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .builders import MAE
from .cmae import CMAE
from .data import Samples, Source, StartMethod, views
from .distributed import World
from .learners import Contrast, Examination, Learner, Reconstruction
from .optimisation import learning_rate
from .plain import from_plain, to_plain
from .probe import Probe, Probing
from .run_folder import in_use, kept_in

FREE = (
    "epochs",
    "folder",
    "workers",
    "worker_start",
    "sample_seconds",
    "micro_batch",
    "device",
    "parallel",
    "recompute",
    "recompute_stages",
    "compile",
    "deterministic",
    "checkpoint_minutes",
    "checkpoint_steps",
    "keep_last",
    "keep_every",
    "bad_steps",
    "rollbacks",
    "hang_minutes",
    "log_every",
    "pictures",
    "probe",
    "test",
    "test_every",
    "wandb",
)
"""The fields of a run that may differ when it goes on: they say where, how long and how watched, not what is learnt."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a launcher carries out: a training run, or a test. Where it is done, and how samples are loaded.

    Args:
        folder: where all that comes of it goes.
        seed: of all that is drawn.
        precision: "auto" is bfloat16 autocast on GPUs that have it, float32 elsewhere.
        workers: loader processes of each process.
        worker_start: how they are started; None: as Python does on this system.
        sample_seconds: a loader process that takes longer for a sample is replaced, and the sample skipped.
        device: "auto", "cpu", "cuda"; auto takes a GPU where there is one.
        hang_minutes: a process that makes no step for so long, what you do in between included, ends, and with it all.

    Raises:
        ValueError: a number is out of its range.
    """

    folder: Path
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = 8
    worker_start: StartMethod | None = None
    sample_seconds: float = 120
    device: str = "auto"
    hang_minutes: float = 20

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {what}; got {getattr(self, name)!r}" for name, what, holds in self.demands() if not holds
        ]
        if problems:
            raise ValueError(f"this {self.kind} cannot be:" + "".join(f"\n  - {problem}" for problem in problems))

    @property
    def kind(self) -> str:
        """In one word."""
        return "run"

    def demands(self) -> list[tuple[str, str, bool]]:
        """What the fields must be: name, words, and whether it holds."""
        return [
            ("seed", "0 or more", self.seed >= 0),
            ("precision", "auto, float32 or bfloat16", self.precision in ("auto", "float32", "bfloat16")),
            ("workers", "0 or more", self.workers >= 0),
            ("sample_seconds", "positive", self.sample_seconds > 0),
            ("hang_minutes", "positive", self.hang_minutes > 0),
        ]

    def check(self) -> None:
        """Refuse now what would fail later; raises ValueError."""
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as problem:
            raise ValueError(f"--device {self.device}: it is auto, cpu, cuda or another of torch's") from problem

    def refusal(self) -> str | None:
        """Why this cannot be done in its folder; None: it can."""
        return in_use(self.folder)

    def ready(self) -> None:
        """Make what several processes would each begin to make: the demo set, where it is the data.

        Raises ValueError where it cannot be written.
        """


@dataclass(frozen=True, kw_only=True)
class Run(Task):
    """What every training run has: all that decides its result, and where it is kept.

    `Pretrain` is one, `convmae.finetune.Finetune` another. The fields of `Task` are among them.

    Args:
        model: the builder of what is trained.
        data: the source of samples, loaded at the model's input size.
        epochs: passes over the data.
        batch_size: samples of one optimiser step, over all processes and accumulated micro-batches.
        folder: where checkpoint, metrics and pictures go; a run goes on from its folder.
        base_lr: peak learning rate for 256 samples; the real one is base_lr * batch_size / 256.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up.
        betas: of AdamW.
        weight_decay: of AdamW; not on norms, biases, positions and tokens.
        clip_gradient: largest norm of the gradient; 0 does not clip.
        seed: of initial weights, order, augmentation and masks.
        micro_batch: most samples a process takes at once, the rest is accumulated; None: its whole share.
        parallel: ddp copies the model to every process; fsdp (FSDP2) shares it out, for models too large for one GPU.
        recompute: keep less for the backward pass and compute it again: less memory, more time.
        recompute_stages: the same in these stages of the trunk alone, counted from 0; (): as `recompute` says.
        compile: torch.compile for forward and backward, under fsdp for their blocks: minutes before the first step.
        deterministic: no kernels that add up in changing order, for the same bits every time on a GPU too.
        checkpoint_minutes: time between checkpoints; 0: after every step.
        checkpoint_steps: steps between checkpoints, beside the time; None: by time alone.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: steps; a checkpoint is written at every multiple and kept for good. None: none.
        bad_steps: steps in a row without a finite loss and gradient, each left out, until the run goes back to the
            last checkpoint and takes the data in another order.
        rollbacks: how often it goes back before it stops with an error.
        log_every: steps between lines of metrics.
        wandb: the Weights & Biases project that metrics go to as well; needs `pip install wandb`. None: none.

    Raises:
        ValueError: a number is out of its range.
    """

    model: MAE | CMAE
    data: Source
    epochs: float
    batch_size: int
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_gradient: float = 0.0
    micro_batch: int | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    recompute: bool = False
    recompute_stages: tuple[int, ...] = ()
    compile: bool = False
    deterministic: bool = False
    checkpoint_minutes: float = 10
    checkpoint_steps: int | None = None
    keep_last: int = 3
    keep_every: int | None = None
    bad_steps: int = 10
    rollbacks: int = 2
    log_every: int = 10
    wandb: str | None = None

    def demands(self) -> list[tuple[str, str, bool]]:
        """What the fields must be."""
        return [
            *super().demands(),
            ("epochs", "positive", self.epochs > 0),
            ("batch_size", "1 or more", self.batch_size >= 1),
            ("base_lr", "positive", self.base_lr > 0),
            ("min_lr", "0 or more", self.min_lr >= 0),
            (
                "warmup_epochs",
                f"0 or more, and less than epochs, {self.epochs:g} (change both together)",
                0 <= self.warmup_epochs < self.epochs,
            ),
            ("betas", "two numbers from 0 to below 1", all(0 <= beta < 1 for beta in self.betas)),
            ("weight_decay", "0 or more", self.weight_decay >= 0),
            ("clip_gradient", "0 or more", self.clip_gradient >= 0),
            ("micro_batch", "1 or more, or None", self.micro_batch is None or self.micro_batch >= 1),
            ("parallel", "ddp or fsdp", self.parallel in ("ddp", "fsdp")),
            (
                "recompute_stages",
                "stages of the trunk, counted from 0, each once; or (), as with recompute, which takes all of them",
                len(set(self.recompute_stages)) == len(self.recompute_stages)
                and min(self.recompute_stages, default=0) >= 0
                and not (self.recompute and self.recompute_stages),
            ),
            ("checkpoint_minutes", "0 or more", self.checkpoint_minutes >= 0),
            ("checkpoint_steps", "1 or more, or None", self.checkpoint_steps is None or self.checkpoint_steps >= 1),
            ("keep_last", "1 or more", self.keep_last >= 1),
            ("keep_every", "1 or more, or None", self.keep_every is None or self.keep_every >= 1),
            ("bad_steps", "1 or more", self.bad_steps >= 1),
            ("rollbacks", "0 or more", self.rollbacks >= 0),
            ("log_every", "1 or more", self.log_every >= 1),
        ]

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: base_lr scaled from 256 samples to the batch size."""
        return self.base_lr * self.batch_size / 256

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0, of so many."""
        return learning_rate(
            step / total, peak=self.peak_lr, floor=self.min_lr, warmup=self.warmup_epochs / self.epochs
        )

    def check(self) -> None:
        """Refuse now what the model's building, the first checkpoint or the journal would refuse."""
        super().check()
        self.model.check()
        if self.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"--wandb {self.wandb}: wandb is not installed; pip install wandb")
        try:
            plain = to_plain(self)
            if from_plain(plain) != self:
                raise ValueError("it does not come back equal")
        except (TypeError, ValueError) as problem:
            raise ValueError(f"a checkpoint could not keep this run: {problem}") from problem

    def refusal(self) -> str | None:
        """Why this cannot go on in its folder: another process trains there, or it holds another run. None: it can."""
        if occupant := in_use(self.folder):
            return occupant
        kept = kept_in(self.folder, "run")
        return None if kept is None else refusal_beside(self, kept)

    def ready(self) -> None:
        """Make the demo set, if it is the data."""
        if getattr(self.data, "root", "") is None:
            self.data.open(self.model.size)

    def learner(self, samples: Samples) -> Learner:
        """What is trained, on the CPU, initialised from torch's global random state or from where the run starts.

        Raises ValueError where it cannot be built, or does not suit the samples.
        """
        raise NotImplementedError

    def examination(self, learner: Learner, world: World, beat: Callable[[], None]) -> Examination | None:
        """What tells from time to time how much was learnt; None: nothing does.

        `beat` is to be called after every batch, equally often by all processes: for whatever makes no step for long is
        taken to hang, and by it all hear that one was asked to stop.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """A pretraining run: a masked autoencoder learns to fill in what is hidden.

    Args:
        model: the builder of the masked autoencoder, contrastive (CMAE) or not.
        pictures: how many times during the run reconstructions are drawn.
        probe: what the frozen features are probed on meanwhile; None: they are not.

    And all fields of `Run`.
    """

    pictures: int = 10
    probe: Probe | None = None

    def demands(self) -> list[tuple[str, str, bool]]:
        """What the fields must be."""
        count = len(self.model.mae.trunk if isinstance(self.model, CMAE) else self.model.trunk)
        return [
            *super().demands(),
            ("recompute_stages", f"some of {tuple(range(count))}", set(self.recompute_stages) <= set(range(count))),
            ("pictures", "0 or more", self.pictures >= 0),
        ]

    def learner(self, samples: Samples) -> Learner:
        """The masked autoencoder, as its builder initialises it.

        Raises ValueError where a contrastive one is given single views, or another two.
        """
        if isinstance(self.model, CMAE):
            if views(samples) != 2:
                raise ValueError(
                    f"CMAE compares two views of each sample, {type(self.data).__name__} gives one: "
                    "data=TwoViews(source=...), of convmae.two_views"
                )
            return Contrast(self.model.build())
        if views(samples) == 2:
            raise ValueError(
                f"{type(self.data).__name__} gives two views of each sample, {type(self.model).__name__} takes one: "
                "data=data.source, or model=CMAE(mae=...)"
            )
        return Reconstruction(self.model.build())

    def examination(self, learner: Learner, world: World, beat: Callable[[], None]) -> Examination | None:
        """The probe, if there is one; raises ValueError where its sources hold nothing."""
        if self.probe is None:
            return None
        return Probing(
            self.probe,
            learner.model,
            size=self.model.size,
            world=world,
            workers=self.workers,
            autocast=autocast(self, world.device),
            seconds=self.sample_seconds,
            method=self.worker_start,
            beat=beat,
        )


def autocast(task: Task, device: torch.device) -> Any:
    """The precision of a forward pass on a device."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = task.precision == "bfloat16" or (task.precision == "auto" and has_bfloat16)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def refusal_beside(run: Run, kept: Any) -> str | None:
    """Why this run cannot go on from the checkpoint of another, in its plain form; None: it can."""
    try:
        before = from_plain(kept)
    except ValueError as problem:
        return f"{run.folder} holds a run that cannot be read: {problem}"
    if type(before) is not type(run):
        return (
            f"{run.folder} holds a {type(before).__name__}, this run is a {type(run).__name__}: give it another folder "
            "with --folder"
        )
    # contrast is with the samples of a micro-batch, of all processes
    free = [name for name in FREE if name != "micro_batch" or not isinstance(run.model, CMAE)]
    changed = [
        f"{one.name}: {getattr(before, one.name)!r}, now {getattr(run, one.name)!r}"
        for one in dataclasses.fields(run)
        if one.name not in free and _placeless(getattr(before, one.name)) != _placeless(getattr(run, one.name))
    ]
    if not changed:
        return None
    return (
        f"{run.folder} holds another run's checkpoint, so this one cannot go on from it:"
        + "".join(f"\n  - {change}" for change in changed)
        + "\nGive this run another folder with --folder, or the settings it began with."
    )


def _placeless(value: Any) -> Any:
    """A value in its plain form, a source without its root: data may move."""
    plain = inner = to_plain(value)
    while isinstance(inner, dict) and "fields" in inner:
        inner["fields"].pop("root", None)
        inner = inner["fields"].get("source")
    return plain
