"""The training loop: a run is a frozen description, `steps(run)` carries it out, `fit(run)` keeps a journal as well.

The loop asks little of what it trains: how a batch becomes a loss (`convmae.learners`). A run lives in its folder, and
running it again goes on from the newest checkpoint there: on the same number of processes with the same bits as if it
had never stopped: on the CPU, and on GPUs as far as `deterministic` goes.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .data import Batch, Samples, Stream, UnusableFileError, generator, repeats
from .distributed import World, join, synchronised
from .keeper import Keeper
from .learners import Learner
from .nn.layers import blocks, recompute
from .optimisation import adamw
from .progress import Event, Progress, Start, Step, Window
from .run import Pretrain, Run, autocast
from .run_folder import Checkpoints, InUseError, failures, forget_failures, note, occupied, record_failure
from .watchdog import Watchdog

_log = logging.getLogger(__name__)

__all__ = ["Event", "Pretrain", "Progress", "Session", "Start", "Step", "Window", "fit", "opened", "steps"]


def steps(run: Run) -> Iterator[Step]:
    """Train, from the folder's newest checkpoint if there is one; yields after every optimiser step.

    A hook is the body of your `for`. Checkpoints are written beside the training, when `checkpoint_minutes` have passed
    or `checkpoint_steps` are done, at the end, and when Ctrl-C, SIGTERM or SIGUSR2 asks the run to stop, which it does
    after the step at hand. Leaving the loop by `break` saves nothing. A finished run yields nothing.

    Raises:
        ValueError: the model cannot be built, the data are not there or have changed, the folder is in use or holds
            another run's checkpoint, or a checkpoint could not keep the run.
        FloatingPointError: loss or gradient were not finite in too many steps; the checkpoints are from before.
        OSError: a checkpoint cannot be written; the ones before are as they were.
    """
    with opened(run) as session:
        yield from session


@contextmanager
def opened(run: Run) -> Iterator[Session]:
    """A run about to begin or to go on, whose steps are then taken by iterating; raises what `steps` does."""
    run.check()
    session: Session | None = None

    def last_words(error: Exception | str) -> None:
        record_failure(run.folder, error, step=None if session is None else session.progress.step)

    with ExitStack() as stack:
        stack.enter_context(_deterministic(run.deterministic))
        stop = stack.enter_context(_stop_requests())
        watchdog = stack.enter_context(Watchdog(run.hang_minutes, last_words))
        try:
            world = stack.enter_context(join(run.device, minutes=run.hang_minutes))
            samples = world.tell(lambda: run.data.open(run.model.size))
            torch.manual_seed(run.seed)
            learner = run.learner(samples)
            world.tell(lambda: stack.enter_context(_in_folder(run)))
            watchdog.beat()
            session = stack.enter_context(Session(run, world, learner, samples, stop, watchdog))
            yield session
        except InUseError:
            raise  # the folder is another's
        except Exception as error:
            last_words(error)
            raise


@contextmanager
def _in_folder(run: Run) -> Iterator[None]:
    """The run's folder, made where it is not there, locked and swept; the first process holds it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with occupied(run.folder):
        Checkpoints(run.folder, last=run.keep_last, every=run.keep_every).sweep()
        for words in failures(run.folder):
            note(run.folder, "failed", words["step"], f"process {words['rank']} on {words['host']}: {words['error']}")
        forget_failures(run.folder)
        yield


class Session:
    """A run under way: what it holds; iterating over it takes the steps that are left."""

    def __init__(
        self,
        run: Run,
        world: World,
        learner: Learner,
        samples: Samples,
        stop: threading.Event,
        watchdog: Watchdog,
    ) -> None:
        self.run, self.world, self.learner, self.stop = run, world, learner, stop
        self.model = model = learner.model.to(world.device)
        self.watchdog = watchdog
        self.autocast = autocast(run, world.device)
        self.stream = Stream(
            samples,
            run.model.size,
            run.seed,
            run.batch_size,
            rank=world.rank,
            world=world.size,
            micro_batch=run.micro_batch,
            draw_mask=learner.draw_mask,
        )
        if run.recompute or run.recompute_stages:
            recompute(model, run.recompute_stages)
        self.network = world.share(model, sharded=run.parallel == "fsdp")
        if run.compile:
            compile_step(self.network, model)
        learner.begin(self.stream.most)
        groups = learner.parameter_groups(run.weight_decay)
        self.scales = [group.pop("scale") for group in groups]
        self.optimiser = adamw(groups, betas=run.betas)
        self.keeper = Keeper(run, world, learner, self.optimiser, samples)
        kept = self.keeper.take_up()
        self.progress = kept or Progress()
        if kept is None:
            self.keeper.save(self.progress)  # to go back to; and a disk that cannot be written is known now
            self.keeper.finish_writing()
        self.bad_in_a_row = 0
        total = self.stream.steps_in(run.epochs)
        self.start = Start(run, world, learner, samples, self.progress.step, total, self.progress, self.breathe)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keeper.close()

    def __iter__(self) -> Iterator[Step]:
        if self.progress.step >= self.start.total:
            return
        self._rehearse()
        while True:
            for step in self._along(replace(self.stream, detour=self.progress.detours)):
                yield step
                if step.stopping or (step.number == self.start.total and step.back_to is None):
                    return

    def breathe(self) -> None:
        """To be called in whatever takes long between steps, equally often by all processes.

        Raises StopRequested, in all of them, where one was asked to stop.
        """
        self.watchdog.beat()
        asked = torch.tensor(float(self.stop.is_set()), device=self.world.device)
        if self.world.sum(asked).item():
            raise StopRequested

    def save(self) -> int:
        """Write a checkpoint now, unless this step has one; all processes call it. The step of the newest one."""
        self.keeper.finish_writing()
        if self.world.tell(lambda: self.keeper.newest) != self.progress.step and not self.bad_in_a_row:
            self.keeper.save(self.progress)
            self.keeper.finish_writing()
        return self.keeper.newest

    def _rehearse(self) -> None:
        """A backward pass for nothing, where DDP shares the gradients.

        DDP arranges its buckets by how gradients arrived in the first pass: without this one, a run that goes on would
        add up its first step in another order than one that was not interrupted, and so end with other bits.
        """
        if isinstance(self.network, DistributedDataParallel):
            nothing = self.learner.nothing(len(self.stream.share(0)[0]) * repeats(self.stream.samples) or 1)
            inputs = self.learner.inputs(nothing, self.world.device, generator(0))
            self.model.train()
            buffers = _Buffers(self.model)
            with self.autocast:
                loss = self.learner.losses(self.network, inputs)["loss"]
            torch.autograd.backward(loss)
            self.optimiser.zero_grad(set_to_none=True)
            buffers.bring_back()

    def _along(self, stream: Stream) -> Iterator[Step]:
        """Steps along one order of the data: to the end, to a request to stop, or to where the run goes back."""
        on_gpu = self.world.device.type == "cuda"
        run = self.run
        batches = stream.batches(
            self.progress.step,
            self.start.total,
            workers=run.workers,
            pin_memory=on_gpu,
            seconds=run.sample_seconds,
            method=run.worker_start,
        )
        with closing(batches) as arriving:
            while True:
                self.watchdog.beat()
                began = time.monotonic()
                loaded = next(arriving)
                step = self._step(stream, loaded, began, waited=time.monotonic() - began)
                self.watchdog.beat()
                yield step
                if step.back_to is not None:
                    return

    def _step(self, stream: Stream, batches: list[Batch], began: float, *, waited: float) -> Step:
        run, world, number = self.run, self.world, self.progress.step
        events = []
        rate = run.rate(number, self.start.total)
        done = self._optimise(batches, number, rate)
        skipped = [problem for batch in batches for problem in batch.skipped]
        skipped = world.gather(skipped) if done.samples < run.batch_size else []
        seconds = time.monotonic() - began
        self._count(done, skipped, seconds, waited)
        back_to = None
        if done.bad:
            text = self._what_is_bad(stream, done, number, rate)
            events.append(Event("bad_step", text))
            _log.warning("left out: %s", text)
            if self.bad_in_a_row >= run.bad_steps:
                back_to = self._go_back(text)
                text = f"to step {back_to}, with the data in another order"
                events.append(Event("rolled_back", text))
                _log.warning("%d steps in a row were not finite: back %s", run.bad_steps, text)
        ended = self.progress.step == self.start.total
        stopping = done.stopping and not ended and back_to is None
        if stopping:
            events.append(Event("stopping", "asked to, by a signal"))
        good = not self.bad_in_a_row and back_to is None
        if ended or (good and (stopping or done.due or self._is_due(self.progress.step))):
            self.keeper.save(self.progress)
        if ended or stopping:
            self.keeper.finish_writing()
        return Step(
            number=number + 1,
            loss=done.loss,
            learning_rate=rate,
            gradient_norm=done.norm,
            samples=done.samples,
            seconds=seconds,
            data_seconds=waited,
            skipped=skipped,
            start=self.start,
            progress=self.progress,
            saved=self.keeper.saved(),
            stopping=stopping,
            back_to=back_to,
            events=(*events, *self.keeper.told()),
            watched=done.watched,
        )

    def _is_due(self, step: int) -> bool:
        """Whether a checkpoint is, by its step."""
        return any(every and step % every == 0 for every in (self.run.checkpoint_steps, self.run.keep_every))

    def _optimise(self, batches: list[Batch], number: int, rate: float) -> _Done:
        """One optimiser step over the micro-batches.

        Every micro-batch's loss counts by its samples; the sum is divided by the samples of all processes together, so
        that uneven shares and skipped files leave the mean a mean. A step that is not finite changes nothing.
        """
        run, world = self.run, self.world
        self.model.train()  # whatever a hook did in between
        buffers = _Buffers(self.model)
        torch.manual_seed(generator(run.seed, 5, number, world.rank).initial_seed())  # drop path, what else is drawn
        sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        losses = []
        watched: dict[str, Tensor] = {}
        for at, batch in enumerate(batches):
            count = len(batch.pixels)
            random = generator(run.seed, 6, number, world.rank, at)
            inputs = self.learner.inputs(batch if count else self.learner.nothing(), world.device, random)
            with synchronised(self.network, at == len(batches) - 1):
                with self.autocast:
                    told = self.learner.losses(self.network, inputs)
                loss = told.pop("loss")
                torch.autograd.backward(loss * count)
            losses.append(loss.detach())
            sums[0] += losses[-1].double() * count
            sums[1] += count
            for name, value in told.items():
                watched[name] = watched.get(name, 0) + value.detach().double() * count
        # one clock, the first process's, decides for all; any process may be the one that is asked to stop
        sums[2], sums[3] = float(self.stop.is_set()), float(world.first and self.keeper.is_due())
        sums = world.sum(torch.cat([sums, *(value.reshape(1) for value in watched.values())]))
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        scale = (world.size / sums[1].clamp(min=1)).float()
        norm = nn.utils.get_total_norm(gradients)
        norm = scale * (norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if run.clip_gradient:
            scale = scale * (run.clip_gradient / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, scale)
        norm, total, samples, stopping, due, *others = torch.cat([norm.double().reshape(1), sums]).tolist()
        means = {name: other / samples for name, other in zip(watched, others, strict=True)} if samples else {}
        done = _Done(total / samples if samples else math.nan, norm, int(samples), stopping > 0, due > 0, losses, means)
        if samples and not done.bad:
            for group, part in zip(self.optimiser.param_groups, self.scales, strict=True):
                group["lr"] = rate * part
            self.optimiser.step()
            self.learner.after_step(number / self.start.total)
        else:
            buffers.bring_back()
        self.optimiser.zero_grad(set_to_none=True)
        return done

    def _count(self, done: _Done, skipped: list[UnusableFileError], seconds: float, waited: float) -> None:
        run, progress = self.run, self.progress
        progress.step += 1
        progress.bad_steps += done.bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if done.bad else 0
        progress.skipped += len(skipped)
        progress.seconds += seconds
        progress.unusable = 0 if done.samples else progress.unusable + run.batch_size
        if progress.unusable >= self.start.epoch:
            raise ValueError(f"no sample could be loaded in a whole epoch; the last: {skipped[-1]}")
        if progress.window.closed:
            progress.window = Window(since=progress.step)
        window = progress.window
        if done.samples and not done.bad:
            window.loss += done.loss * done.samples
            window.samples += done.samples
            window.gradient_norm = max(window.gradient_norm, done.norm)
            for name, mean in done.watched.items():
                window.watched[name] = window.watched.get(name, 0.0) + mean * done.samples
        window.seconds += seconds
        window.data_seconds += waited
        window.skipped += [(problem.name, problem.reason, progress.step) for problem in skipped]
        window.closed = progress.step % run.log_every == 0 or progress.step in (1, self.start.total)

    def _what_is_bad(self, stream: Stream, done: _Done, number: int, rate: float) -> str:
        """Step, numbers and samples of a bad step; called by all processes."""
        shares = stream.share(number)
        bad = [share for share, loss in zip(shares, done.losses, strict=True) if not math.isfinite(loss)]
        found = self.world.gather([stream.named(share) for share in bad])
        if not found:  # finite losses with a gradient that is not: any of them
            found = self.world.gather([stream.named(share) for share in shares])
        names = [name for share in found for name in share]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        figures = f"loss {done.loss:.6g}, gradient norm {done.norm:.6g}, learning rate {rate:.3g}"
        return f"step {number + 1}: {figures}, among samples {shown}"

    def _go_back(self, text: str) -> int:
        """To the last checkpoint, which is from before the bad steps, to take another way from there: its step."""
        run, before = self.run, self.progress
        if before.detours >= run.rollbacks:
            again = f", also after going back (--rollbacks {run.rollbacks})" if before.detours else ""
            clip = "" if run.clip_gradient else " or with --clip-gradient"
            if self.world.first:
                note(run.folder, "bad_step", before.step, text)
            raise FloatingPointError(
                f"{self.bad_in_a_row} steps in a row were not finite{again}. The last: {text}. The checkpoints in "
                f"{run.folder} are from before. Look at these samples; or begin in another --folder with a lower "
                f"--base-lr{clip}."
            )
        kept = self.keeper.take_up()
        assert kept is not None
        self.progress = replace(kept, detours=before.detours + 1, bad_steps=before.bad_steps, seconds=before.seconds)
        self.bad_in_a_row = 0
        self.keeper.save(self.progress)  # that it went back is kept, too
        return kept.step


class _Buffers:
    """What a forward pass changes in a model, as running statistics: to be brought back where it is not to count."""

    def __init__(self, model: nn.Module) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def bring_back(self) -> None:
        """To what it was."""
        for buffer, before in self.before:
            buffer.copy_(before)


class StopRequested(Exception):
    """A process was asked to stop while it did something between two steps."""


class _Done(NamedTuple):
    """What a step came to, over all processes; `losses` are this process's, by micro-batch."""

    loss: float
    norm: float
    samples: int
    stopping: bool
    due: bool
    losses: list[Tensor]
    watched: dict[str, float]

    @property
    def bad(self) -> bool:
        """Whether it must not be learnt from."""
        return self.samples > 0 and not (math.isfinite(self.loss) and math.isfinite(self.norm))


def compile_step(network: nn.Module, model: nn.Module) -> None:
    """torch.compile for a network that shares out a model, or is it: whole, or block by block where it is sharded.

    Under DDP the compiler cuts the backward pass where gradients can be sent off.
    """
    for module in blocks(model) if isinstance(network, FSDPModule) else [network]:
        module.compile(dynamic=False)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Kernels that add up in one order only, where they are wanted."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C, SIGTERM or SIGUSR2; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: object) -> None:
        if event.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        event.set()
        once_more = "; once more stops at once" if number == signal.SIGINT else ""
        _log.warning("asked to stop by %s: finishing the step and saving%s", signal.Signals(number).name, once_more)

    asked_by = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.signal(number, request) for number in asked_by}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(run: Run) -> bool:
    """Carry out a run here and now, with progress on the console and its journal in the run's folder.

    The folder then holds checkpoints and `last.pt`, `metrics.jsonl`, `skipped.jsonl`, `events.jsonl`, `tensorboard/`,
    `pictures/`, and `report.html`, one page with all of it. Returns whether the run is finished: False where it was
    asked to stop before. Raises what `steps` raises, and leaves a word of it in `failures/`.
    """
    from .journal import Journal, console_log

    stopped = False
    with console_log() as console, opened(run) as session, Journal(session.start, console) as journal:
        try:
            journal.examine_if_missing()
            for step in session:
                journal.record(step)
                stopped = step.stopping
        except StopRequested:
            journal.interrupted(session.save())
            stopped = True
    return not stopped
