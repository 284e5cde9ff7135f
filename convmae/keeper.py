"""What carries a run over a stop: its state, copied to checkpoints beside the training, and taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .data import Samples
from .distributed import World, state_of, take_up_state
from .learners import Learner
from .plain import from_plain, to_plain
from .progress import Event, Progress, Window
from .run import Run, refusal_beside
from .run_folder import Checkpoints

_log = logging.getLogger(__name__)


class Keeper:
    """Brings the state of a run to checkpoints, beside the training, and back."""

    def __init__(
        self, run: Run, world: World, learner: Learner, optimiser: torch.optim.Optimizer, samples: Samples
    ) -> None:
        self.run, self.world, self.learner, self.optimiser = run, world, learner, optimiser
        self.checkpoints = Checkpoints(run.folder, last=run.keep_last, every=run.keep_every)
        self.data = self.world.tell(lambda: _fingerprint(samples))
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[Event] | None = None
        self.newest = 0
        self.began = time.monotonic()
        self.events: list[Event] = []

    def is_due(self) -> bool:
        """Whether so many minutes have passed since the last checkpoint."""
        return time.monotonic() - self.began >= 60 * self.run.checkpoint_minutes

    def save(self, progress: Progress) -> None:
        """Copy the state, and begin to write it; all processes call it.

        Raises OSError where the checkpoint before could not be written.
        """
        began = time.monotonic()
        self.finish_writing()
        weights, moments = state_of(self.learner.model, self.optimiser)
        beside = self.learner.kept()
        if self.world.first:
            content = checkpoint.pack(
                self.learner.model,
                weights,
                **beside,
                optimiser=moments,
                run=to_plain(self.run),
                progress=dataclasses.asdict(progress),
                data=self.data,
            )
            self.writing = self.writer.submit(self._write, progress.step, content, time.monotonic() - began)
        self.began = time.monotonic()

    def _write(self, step: int, content: dict[str, Any], waited: float) -> Event:
        began = time.monotonic()
        self.checkpoints.save(step, content)
        self.newest = step
        seconds = time.monotonic() - began
        return Event("saved", f"step {step}; training waited {waited:.2f} s, writing took {seconds:.2f} s")

    def finish_writing(self) -> None:
        """Wait for the checkpoint being written; raises OSError where it cannot be."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            self.events.append(writing.result())

    def saved(self) -> int:
        """The step of the newest checkpoint; raises OSError where one could not be written."""
        if self.writing is not None and self.writing.done():
            self.finish_writing()
        return self.newest

    def told(self) -> list[Event]:
        """What was saved since this was last asked."""
        events, self.events = self.events, []
        return events

    def take_up(self) -> Progress | None:
        """Go on from the newest checkpoint that can be read; all processes call it. None where there is none.

        Raises ValueError where the checkpoint is another run's, or of other data.
        """
        self.finish_writing()
        kept: dict[str, Any] = {}

        def find() -> Any:
            found = self.checkpoints.newest()
            if found is not None:
                path, content = found
                self._refuse_another(path, content)
                kept.update(content)
            return kept.get("progress")

        progress = self.world.tell(find)
        if progress is None:
            return None
        take_up_state(self.learner.model, self.optimiser, kept.get("weights", {}), kept.get("optimiser", {}))
        self.learner.take_up(kept)
        self.newest = progress["step"]
        return Progress(**{**progress, "window": Window(**progress["window"])})

    def _refuse_another(self, path: Path, content: dict[str, Any]) -> None:
        if told := refusal_beside(self.run, content["run"]):
            raise ValueError(told)
        if content["data"] != self.data:
            (count, _), (now, _) = content["data"], self.data
            raise ValueError(
                f"the data are not those that {path} was trained on: {count} samples then, {now} now"
                + (", of other names" if count == now else "")
                + ". The order of samples follows from them: bring back the data, or give another --folder."
            )
        before = from_plain(content["run"])
        if before.epochs != self.run.epochs:
            _log.warning(
                "%s was planned for %g epochs, now %g: the learning rate follows the new plan",
                path,
                before.epochs,
                self.run.epochs,
            )

    def close(self) -> None:
        """Let what is being written be written."""
        self.writer.shutdown()
        if self.writing is not None and (problem := self.writing.exception()):
            _log.error("the last checkpoint could not be written: %s", problem)


def _fingerprint(samples: Samples) -> tuple[int, str]:
    """How many samples there are, and a digest of their names, wherever they lie."""
    names = [samples.name(index) for index in range(len(samples))]
    start = len(os.path.commonprefix(names)) if len(names) > 1 else 0  # noqa: RUF071 characters will do
    digest = hashlib.sha256("\0".join(name[start:] for name in names).encode(errors="surrogateescape"))
    return len(names), digest.hexdigest()
