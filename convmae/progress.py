"""How far a run is, and what each step tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .data import Samples, UnusableFileError, repeats
from .distributed import World
from .learners import Learner
from .run import Run


@dataclass
class Window:
    """What happened since the last line of metrics, this step included.

    A checkpoint keeps it, so that a run which goes on writes the very lines it would have written.

    Args:
        since: its first step.
        loss: summed over the samples that were learnt from.
        samples: their number.
        gradient_norm: the largest, before clipping.
        seconds: of the steps.
        data_seconds: of them, waiting for data.
        skipped: name, reason and step of samples that could not be loaded.
        watched: by name what else the learner tells, summed over the samples that were learnt from.
        closed: whether it ends here, and the next step begins another.
    """

    since: int = 1
    loss: float = 0.0
    samples: int = 0
    gradient_norm: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0
    skipped: list[tuple[str, str, int]] = field(default_factory=list)
    watched: dict[str, float] = field(default_factory=dict)
    closed: bool = False


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps beside weights and optimiser.

    No state of a random generator is among it: what is drawn follows from the seed and the place in the run.

    Args:
        step: steps done.
        detours: times that the run went back; each is another order of the data.
        bad_steps: steps left out, as their loss or gradient was not finite.
        skipped: samples that could not be loaded.
        unusable: samples in a row that could not be loaded.
        seconds: that steps took.
        window: since the last line of metrics.
    """

    step: int = 0
    detours: int = 0
    bad_steps: int = 0
    skipped: int = 0
    unusable: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)


class Event(NamedTuple):
    """Something worth telling: `saved`, `stopping`, `bad_step`, `rolled_back`; and in words."""

    kind: str
    text: str


@dataclass(frozen=True)
class Start:
    """A run that is about to begin or to go on."""

    run: Run
    world: World
    learner: Learner
    samples: Samples
    first: int
    total: int
    progress: Progress
    beat: Callable[[], None]
    """See `Session.breathe`."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained, by itself."""
        return self.learner.model

    @property
    def sharded(self) -> bool:
        """Whether a forward pass needs all processes, as each has a part of the model."""
        return self.run.parallel == "fsdp" and self.world.size > 1

    @property
    def epoch(self) -> int:
        """What an epoch gives: one for each sample, or several where samples give several."""
        return len(self.samples) * repeats(self.samples)


@dataclass(frozen=True)
class Step:
    """One finished optimiser step, over all processes.

    Args:
        number: steps done, 1 after the first.
        loss: mean over the step's usable samples; not finite in a bad step.
        learning_rate: that this step used.
        gradient_norm: before clipping.
        samples: that could be used; the step changes nothing where there were none.
        seconds: that the step took.
        data_seconds: of them, waiting for data.
        skipped: samples that could not be loaded, of all processes.
        start: the run, the model (unwrapped), the world.
        progress: of the whole run; it goes on with the run.
        saved: steps in the newest checkpoint.
        stopping: whether this is the last step before the run stops early, asked by a signal.
        back_to: the step that the run goes back to after this one, the last of too many bad ones.
        events: what else happened.
        watched: by name what else the learner tells, means over the step's usable samples.
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
    progress: Progress
    saved: int
    stopping: bool = False
    back_to: int | None = None
    events: tuple[Event, ...] = ()
    watched: Mapping[str, float] = field(default_factory=dict)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.number * self.start.run.batch_size / self.start.epoch
