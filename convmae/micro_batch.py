"""The largest micro-batch of a run that fits this GPU, found by real optimiser steps on random pixels.

python -m convmae.micro_batch convmae.recipes:imagenet_pretrain
python -m convmae.micro_batch video.recipes:kinetics_pretrain --size large --recompute
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from . import command
from .builders import MAE
from .cmae import CMAE
from .data import generator
from .launch import find_recipe
from .nn.contrast import ContrastiveMaskedAutoencoder
from .nn.layers import recompute
from .nn.masked_autoencoder import MaskedAutoencoder
from .optimisation import adamw, parameter_groups
from .run import Pretrain, autocast
from .training import compile_step

MARGIN = 0.05
"""The share of the free memory that is left: for the buffers of gradient exchange, workspaces and fragmentation."""

EXHAUSTED = ("out of memory", "_STATUS_ALLOC_FAILED")
"""What errors say where memory ran out in a library, and not in torch's own allocator."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A step at so many samples: its bytes at the peak, or None where memory ran out."""

    samples: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest micro-batch that fits.

    Args:
        micro_batch: in samples.
        peak_bytes: what its step takes at the peak: weights, AdamW's moments, gradients, activations, workspaces.
        limit_bytes: what a step was allowed to take.
        trials: all steps that were tried, in order.
    """

    micro_batch: int
    peak_bytes: int
    limit_bytes: int
    trials: tuple[Trial, ...]


class Rehearsal:
    """Optimiser steps of a run as its loop takes them, on random pixels; nothing is learnt, the learning rate is 0.

    Args:
        run: precision, recompute and compile are taken from it as well as the model.
        device: where the steps are taken.
        model: of the run, and there; built where not given.
    """

    def __init__(self, run: Pretrain, device: torch.device, *, model: MaskedAutoencoder | None = None) -> None:
        self.run, self.device = run, device
        self.model = (run.model.build().to(device) if model is None else model).train()
        if run.recompute or run.recompute_stages:
            recompute(self.model, run.recompute_stages)
        if run.compile:
            compile_step(self.model, self.model)
        self.autocast = autocast(run, device)
        self.optimiser = adamw(parameter_groups(self.model, run.weight_decay), betas=run.betas)

    def step(self, samples: int) -> None:
        """An optimiser step over two micro-batches of so many samples.

        Two, for the second one's activations are there beside the gradients of the first: as in a run that accumulates,
        and in one that shares gradients with other processes and so keeps their buffers.
        """
        self.take(self.inputs(samples))

    def inputs(self, samples: int) -> dict[str, Any]:
        """What the model takes, for so many samples."""
        pixels = torch.randint(256, (samples, 3, *self.run.model.size), dtype=torch.uint8, device=self.device)
        mask = self.model.draw_masks(samples, generator(self.run.seed))
        inputs: dict[str, Any] = {"x": pixels, "mask": self.model.trunk.shown(mask, device=self.device)}
        if isinstance(self.model, ContrastiveMaskedAutoencoder):
            inputs["second"] = pixels.flip(0)
            inputs["valid"] = torch.ones(samples, dtype=torch.bool, device=self.device)
        return inputs

    def take(self, inputs: dict[str, Any]) -> None:
        """Such a step on these inputs, for either micro-batch."""
        for _ in range(2):
            with self.autocast:
                loss = self.model(**inputs)["loss"]
            (loss * len(inputs["x"])).backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        scale = 1 / nn.utils.get_total_norm(gradients).clamp(min=1)
        torch._foreach_mul_(gradients, scale)
        self.optimiser.step()

    def peak(self, samples: int) -> int | None:
        """Bytes at the peak of a step on the GPU, by the allocator's count, or None where memory runs out."""
        if self.run.compile:
            torch.compiler.reset()  # each size as if it were the only one: a second would compile for any size
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self.step(samples)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return None
        finally:
            self.clear()

    def clear(self) -> None:
        """Free what a step leaves: gradients, and the memory that the allocator keeps."""
        self.optimiser.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            release()


def release() -> None:
    """Give the memory of tensors that nobody holds back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in EXHAUSTED)
    )


def usable(device: torch.device, margin: float = MARGIN) -> int:
    """Bytes of the GPU that this process may take: those free or its own, less the margin."""
    release()
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_reserved(device)) * (1 - margin))


@contextmanager
def confined(device: torch.device, limit: int) -> Iterator[None]:
    """Let this process take no more than so many bytes of the GPU, fragmentation included."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def predicted(trials: Sequence[Trial], limit: int) -> int | None:
    """The most samples within the limit by a straight line through the two largest trials that did not run out.

    None where there are fewer than two, or more samples do not take more.
    """
    points = sorted({one.samples: one.peak_bytes for one in trials if one.peak_bytes is not None}.items())
    if len(points) < 2:
        return None
    (few, less), (many, more) = points[-2:]
    slope = (more - less) / (many - few)
    return None if slope <= 0 else max(0, int(few + (limit - less) / slope))


def search(
    peak: Callable[[int], int | None],
    *,
    limit: int,
    at_most: int,
    first: int = 1,
    tried: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Try micro-batches until the largest that fits is known to one part in 32: all that were tried, in order.

    Doubling, then bisection, and every other time what a straight line through the trials before foretells: as peaks
    are nearly linear in the samples, few trials are needed.

    Args:
        peak: bytes at the peak of a step of so many samples, or None where memory ran out.
        limit: bytes that fit.
        at_most: samples; no more are tried.
        first: samples of the first trial.
        tried: called after every trial.
    """
    trials: list[Trial] = []
    low, high, samples = 0, at_most + 1, min(first, at_most)
    while True:
        trial = Trial(samples=samples, peak_bytes=peak(samples))
        trials.append(trial)
        tried(trial)
        if trial.peak_bytes is not None and trial.peak_bytes <= limit:
            low = samples
        else:
            high = samples
        least = max(1, low // 32)
        if high - low <= least:
            return trials
        foretold = predicted(trials, limit) if len(trials) % 2 == 0 else None
        samples = foretold if foretold is not None else min(2 * low, at_most) if high > at_most else (low + high) // 2
        samples = min(max(samples, low + least), at_most if high > at_most else high - 1)


def largest(
    run: Pretrain, *, margin: float = MARGIN, first: int = 8, tried: Callable[[Trial], None] = lambda trial: None
) -> Found:
    """The largest micro-batch of a run that this GPU takes: forward, backward, gradients kept, and the AdamW step.

    The steps are real ones, in the run's precision, and with its recompute and compile; other processes on the GPU are
    counted as they are now. A run shared out by fsdp takes less than is found here, where one process keeps all.

    Args:
        run: of its batch size at most are tried.
        margin: the share of the free memory to leave.
        first: samples of the first trial.
        tried: called after every trial.

    Raises:
        ValueError: there is no GPU, the margin is not in [0, 1), the model cannot be built, or not one sample fits.
    """
    if not torch.cuda.is_available() or run.device == "cpu":
        raise ValueError("the largest micro-batch is found by steps on a GPU, and torch finds none here")
    if not 0 <= margin < 1:
        raise ValueError(f"margin is in [0, 1); got {margin!r}")
    device = torch.device("cuda" if run.device == "auto" else run.device)
    if device.index is None:  # the memory of a device is limited by its number
        device = torch.device("cuda", torch.cuda.current_device())
    limit = usable(device, margin)
    rehearsal: Rehearsal | None = None
    trials: list[Trial] = []
    with confined(device, limit):
        try:
            rehearsal = Rehearsal(run, device)
            trials = search(rehearsal.peak, limit=limit, at_most=run.batch_size, first=first, tried=tried)
        except RuntimeError as error:  # of the weights and moments
            if not ran_out(error):
                raise
        finally:
            rehearsal = None
            release()
    fitting = [
        (one.samples, one.peak_bytes) for one in trials if one.peak_bytes is not None and one.peak_bytes <= limit
    ]
    if not fitting:
        already = ["recompute"] if not run.recompute else []
        ways = " or ".join([*already, "a smaller model or input"])
        raise ValueError(f"not one sample fits {limit / 2**30:.1f} GiB; {ways} takes less, and fsdp on several GPUs")
    samples, taken = max(fitting)
    return Found(micro_batch=samples, peak_bytes=taken, limit_bytes=limit, trials=tuple(trials))


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The largest micro-batch of a recipe that this GPU takes, found by real optimiser steps.

    Args:
        recipe: module:function that returns the run.
        size: another size of the recipe's model: the trunk and decoder of that preset.
        input: another input size in pixels: one number for height and width, or all axes.
        recompute: recompute in the backward pass.
        recompute_stages: in these stages of the trunk alone, counted from 0.
        compile: torch.compile; every trial compiles, which takes a minute or more each.
        precision: of the forward; None: the recipe's.
        at_most: samples; no more are tried. None: the recipe's batch size.
        margin: the share of the free memory to leave.
    """

    recipe: str
    size: Literal["small", "base", "large", "huge"] | None = None
    input: tuple[int, ...] = ()
    recompute: bool = False
    recompute_stages: tuple[int, ...] = ()
    compile: bool = False
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    at_most: int | None = None
    margin: float = MARGIN

    def changed(self, run: Pretrain) -> Pretrain:
        """The run with these options; raises ValueError for those that it cannot have."""
        model = run.model
        if self.size is not None:
            model = sized(model, self.size)
        if self.input:
            model = model.input(self.input[0] if len(self.input) == 1 else self.input)
        run = replace(run, model=model, compile=self.compile or run.compile)
        if self.recompute or self.recompute_stages:
            run = replace(run, recompute=self.recompute, recompute_stages=self.recompute_stages)
        if self.precision is not None:
            run = replace(run, precision=self.precision)
        return run if self.at_most is None else replace(run, batch_size=self.at_most)


def sized(model: MAE | CMAE, size: Literal["small", "base", "large", "huge"]) -> MAE | CMAE:
    """A builder with the trunk and decoder of its class's preset of this size; all else stays."""
    plain = model.mae if isinstance(model, CMAE) else model
    preset = getattr(type(plain), size)()
    plain = replace(plain, trunk=preset.trunk, decoder=preset.decoder)
    return replace(model, mae=plain) if isinstance(model, CMAE) else plain


def _say(trial: Trial) -> None:
    taken = "out of memory" if trial.peak_bytes is None else f"{trial.peak_bytes / 2**30:.2f} GiB"
    print(f"{trial.samples:>6} samples: {taken}", flush=True)


def _find(options: _Options) -> int:
    given = find_recipe(options.recipe)[0]
    if not isinstance(given, Pretrain):
        raise ValueError(f"--recipe {options.recipe} is a {type(given).__name__}: give one that pretrains")
    run = options.changed(given)
    run.model.check()
    found = largest(run, margin=options.margin, tried=_say)
    limit = f"{found.limit_bytes / 2**30:.2f} GiB on {torch.cuda.get_device_name()}"
    print(f"largest micro-batch: {found.micro_batch} samples, {found.peak_bytes / 2**30:.2f} of {limit}")
    if found.micro_batch == run.batch_size:
        print("no more were tried: it is the batch size" if options.at_most is None else "no more were to be tried")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Find it for the recipe that the command line names, and print it; the exit code, 2 where it cannot be done."""
    return command.run(_Options, "convmae.micro_batch", _find, arguments)


if __name__ == "__main__":
    sys.exit(main())
