"""The training loop: a run is a frozen description, `steps(run)` carries it out, `fit(run)` keeps a journal as well.

The loop asks little of a model: masks to draw, and `model(x, mask=mask)` giving a dict with a scalar `loss`. A run
lives in its folder, and running it again goes on from the last checkpoint there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import checkpoint
from .builders import MAE
from .data import Batch, Source, Stream, UnusableFileError, generator
from .distributed import World, join, synchronised
from .nn.masked_autoencoder import MaskedAutoencoder
from .optimisation import adamw, learning_rate
from .plain import from_plain, to_plain
from .targets import normalize

_log = logging.getLogger(__name__)

LAST = "last.pt"
FREE = ("folder", "workers", "micro_batch", "device", "checkpoint_minutes", "log_every", "pictures", "epochs")
"""The fields of a run that may differ when it goes on: they say where, how long and how watched, not what is learnt."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """A pretraining run: everything that decides its result, and where it is kept.

    Args:
        model: the builder of the masked autoencoder.
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
        precision: "auto" is bfloat16 autocast on GPUs that have it, float32 elsewhere.
        micro_batch: most samples a process takes at once, the rest is accumulated; None: its whole share.
        workers: loader processes of each training process.
        device: "auto", "cpu", "cuda"; auto takes a GPU where there is one.
        checkpoint_minutes: time between checkpoints.
        log_every: steps between lines of metrics.
        pictures: how many times during the run reconstructions are drawn.

    Raises:
        ValueError: a number is out of its range.
    """

    model: MAE
    data: Source
    epochs: float
    batch_size: int
    folder: Path
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_gradient: float = 0.0
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch: int | None = None
    workers: int = 8
    device: str = "auto"
    checkpoint_minutes: float = 10
    log_every: int = 10
    pictures: int = 10

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {what}; got {getattr(self, name)!r}"
            for name, what, holds in (
                ("epochs", "positive", self.epochs > 0),
                ("batch_size", "1 or more", self.batch_size >= 1),
                ("base_lr", "positive", self.base_lr > 0),
                ("min_lr", "0 or more", self.min_lr >= 0),
                (
                    "warmup_epochs",
                    f"0 or more, and less than epochs, {self.epochs:g} (change both together)",
                    0 <= self.warmup_epochs < self.epochs,
                ),
                ("weight_decay", "0 or more", self.weight_decay >= 0),
                ("clip_gradient", "0 or more", self.clip_gradient >= 0),
                ("seed", "0 or more", self.seed >= 0),
                ("precision", "auto, float32 or bfloat16", self.precision in ("auto", "float32", "bfloat16")),
                ("micro_batch", "1 or more, or None", self.micro_batch is None or self.micro_batch >= 1),
                ("workers", "0 or more", self.workers >= 0),
                ("checkpoint_minutes", "0 or more", self.checkpoint_minutes >= 0),
                ("log_every", "1 or more", self.log_every >= 1),
                ("pictures", "0 or more", self.pictures >= 0),
            )
            if not holds
        ]
        if problems:
            raise ValueError("this run cannot be:" + "".join(f"\n  - {problem}" for problem in problems))

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: base_lr scaled from 256 samples to the batch size."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class Start:
    """What a run is about to do; `steps` yields nothing before it is known, and every step carries it."""

    run: Pretrain
    world: World
    model: MaskedAutoencoder
    stream: Stream
    first: int
    total: int


@dataclass(frozen=True)
class Step:
    """One finished optimiser step, over all processes.

    Args:
        number: steps done, 1 after the first.
        loss: mean over the step's usable samples.
        learning_rate: that this step used.
        gradient_norm: before clipping.
        samples: that could be used; the step changes nothing where there were none.
        seconds: that the step took.
        data_seconds: of them, waiting for data.
        skipped: samples that could not be loaded, of all processes.
        start: the run, the model (unwrapped), the world.
        saved: steps in the last checkpoint of this session of the run.
        stopping: whether this is the last step before the run stops early, asked by a signal.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    samples: int
    seconds: float
    data_seconds: float
    skipped: list[UnusableFileError]
    start: Start
    saved: int
    stopping: bool = False

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.number * self.start.run.batch_size / len(self.start.stream.samples)


def steps(run: Pretrain) -> Iterator[Step]:
    """Train, from the folder's checkpoint if there is one; yields after every optimiser step.

    A hook is the body of your `for`. Checkpoints are written every `checkpoint_minutes`, at the end, and when Ctrl-C
    or SIGTERM asks the run to stop, which it does after the step at hand; leaving the loop by `break` saves nothing.
    A finished run yields nothing.

    Raises:
        ValueError: the model cannot be built, the data are not there, the folder holds another run's checkpoint, or a
            checkpoint could not keep the run.
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is from before.
        OSError: a checkpoint cannot be written; the one before is as it was.
    """
    _check_can_be_kept(run)
    with join(run.device) as world, _stop_requests() as stop:
        torch.manual_seed(run.seed)
        model = run.model.build()
        samples = run.data.open(run.model.size)
        stream = Stream(
            samples,
            run.model.size,
            run.seed,
            run.batch_size,
            rank=world.rank,
            world=world.size,
            micro_batch=run.micro_batch,
            draw_mask=_DrawMask(model),
        )
        total = stream.steps_in(run.epochs)
        run.folder.mkdir(parents=True, exist_ok=True)
        model.to(world.device)
        optimiser = adamw(model, weight_decay=run.weight_decay, betas=run.betas)
        first = _resume(run, model, optimiser)
        start = Start(run, world, model, stream, first, total)
        yield from _train(start, optimiser, stop)


def _check_can_be_kept(run: Pretrain) -> None:
    """Refuse now what the first checkpoint would refuse."""
    try:
        plain = to_plain(run)
        if from_plain(plain) != run:
            raise ValueError("it does not come back equal")
    except (TypeError, ValueError) as problem:
        raise ValueError(f"a checkpoint could not keep this run: {problem}") from problem


class _DrawMask:
    """One mask from a generator; a class, so that it pickles into loader workers without the model."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        self.masking, self.grid = model.masking, model.trunk.grid

    def __call__(self, generator: torch.Generator) -> Tensor:
        return self.masking(1, self.grid, generator)


def _train(start: Start, optimiser: torch.optim.Optimizer, stop: threading.Event) -> Iterator[Step]:
    run, world = start.run, start.world
    network = world.share(start.model)
    arriving = start.stream.batches(
        start.first, start.total, workers=run.workers, pin_memory=world.device.type == "cuda"
    )
    saved, saved_at = start.first, time.monotonic()
    unusable = 0
    for number in range(start.first, start.total):
        began = time.monotonic()
        batches = next(arriving)
        waited = time.monotonic() - began
        rate = _learning_rate(start, number)
        loss, norm, samples = _optimise(start, network, optimiser, batches, number, rate)
        skipped = [problem for batch in batches for problem in batch.skipped]
        skipped = world.gather(skipped) if samples < run.batch_size else []
        unusable = 0 if samples else unusable + run.batch_size
        if unusable >= len(start.stream.samples):
            raise ValueError(f"no sample could be loaded in a whole epoch; the last: {skipped[-1]}")
        due = world.first and time.monotonic() - saved_at > 60 * run.checkpoint_minutes
        # one clock, the first process's, decides for all; any process may be the one that is asked to stop
        requests = world.sum(torch.tensor([float(stop.is_set()), float(due)], device=world.device))
        stopping, due = (requests > 0).tolist()
        if due or stopping or number + 1 == start.total:
            if world.first:
                _save(start, optimiser, number + 1)
            world.wait()
            saved, saved_at = number + 1, time.monotonic()
        yield Step(
            number=number + 1,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            samples=samples,
            seconds=time.monotonic() - began,
            data_seconds=waited,
            skipped=skipped,
            start=start,
            saved=saved,
            stopping=stopping and number + 1 < start.total,
        )
        if stopping:
            return


def _learning_rate(start: Start, number: int) -> float:
    run = start.run
    warmup = run.warmup_epochs / run.epochs
    return learning_rate(number / start.total, peak=run.peak_lr, floor=run.min_lr, warmup=warmup)


def _optimise(
    start: Start,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: list[Batch],
    number: int,
    rate: float,
) -> tuple[float, float, int]:
    """One optimiser step over the micro-batches: mean loss, gradient norm, usable samples, of all processes.

    Every micro-batch's loss counts by its samples; the sum is divided by the samples of all processes together, so
    that uneven shares and skipped files leave the mean a mean.
    """
    run, world = start.run, start.world
    network.train()  # whatever a hook did in between
    torch.manual_seed(generator(run.seed, 5, number, world.rank).initial_seed())  # drop path, and what else is drawn
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for at, batch in enumerate(batches):
        count = len(batch.pixels)
        x, mask = _to_device(batch, start)
        with synchronised(network, at == len(batches) - 1), _autocast(run, world):
            loss = network(x, mask=mask)["loss"] * count
            loss.backward()
        sums += torch.stack([loss.detach().double(), loss.new_tensor(count, dtype=torch.float64)])
    total, samples = world.sum(sums).tolist()
    norm, loss = 0.0, total / samples if samples else math.nan
    if samples:
        for parameter in start.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(world.size / samples)
        norm = float(nn.utils.clip_grad_norm_(start.model.parameters(), run.clip_gradient or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {number + 1}: loss {loss}, gradient norm {norm}, learning rate {rate:.3g}; "
                f"{run.folder / LAST} is from before. Lower --base-lr, or set --clip-gradient"
            )
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss, norm, int(samples)


def _to_device(batch: Batch, start: Start) -> tuple[Tensor, Tensor | None]:
    """Normalised pixels on the device; the mask stays on the CPU, where shown tokens are worked out.

    A process with no usable sample still takes part in the exchange of gradients: it computes a black one that
    counts for nothing.
    """
    pixels, mask = batch.pixels, batch.mask
    if not len(pixels):
        pixels, mask = pixels.new_zeros(1, *pixels.shape[1:]), start.model.draw_masks(1)
    return normalize(pixels.to(start.world.device, non_blocking=True)), mask


def _autocast(run: Pretrain, world: World) -> Any:
    has_bfloat16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = run.precision == "bfloat16" or (run.precision == "auto" and has_bfloat16)
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=enabled)


def _save(start: Start, optimiser: torch.optim.Optimizer, number: int) -> None:
    checkpoint.save(
        start.run.folder / LAST,
        start.model,
        optimiser=optimiser.state_dict(),
        step=number,
        run=to_plain(start.run),
    )


def _resume(run: Pretrain, model: MaskedAutoencoder, optimiser: torch.optim.Optimizer) -> int:
    """Take up the folder's checkpoint, if there is one: the steps that are done."""
    path = run.folder / LAST
    if not path.exists():
        return 0
    content = checkpoint.read(path)
    before = from_plain(content["run"])
    changed = [
        f"{field.name}: {getattr(before, field.name)!r}, now {getattr(run, field.name)!r}"
        for field in dataclasses.fields(run)
        if field.name not in FREE and getattr(before, field.name) != getattr(run, field.name)
    ]
    if changed:
        raise ValueError(
            f"{run.folder} holds another run's checkpoint, so this one cannot go on from it:"
            + "".join(f"\n  - {change}" for change in changed)
            + "\nGive this run another folder with --folder, or the settings it began with."
        )
    if before.epochs != run.epochs:
        _log.warning(
            "%s was planned for %g epochs, now %g: the learning rate follows the new plan",
            path,
            before.epochs,
            run.epochs,
        )
    model.load_state_dict(content["weights"])
    optimiser.load_state_dict(content["optimiser"])
    return int(content["step"])


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        _log.warning("asked to stop: finishing the step and saving; once more stops at once")
        event.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(run: Pretrain) -> bool:
    """Carry out a run here and now, with progress on the console and its journal in the run's folder.

    The folder then holds `last.pt`, `metrics.jsonl`, `skipped.jsonl`, `tensorboard/`, `pictures/`, and `report.html`,
    one page with all of it. Returns whether the run is finished: False where it was asked to stop before. Raises what
    `steps` raises.
    """
    from .journal import Journal

    stopped = False
    with Journal(run) as journal:
        for step in steps(run):
            stopped = step.stopping
            journal.record(step)
    return not stopped
