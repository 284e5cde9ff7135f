"""The finetuning run: from a pretrained trunk, or from scratch, to a classifier with a test result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import weights
from .augmentation import Erasing, Mixing
from .builders import MAE, Classifier, owner_of
from .checkpoint import load_weights
from .data import Samples, Source
from .distributed import World
from .evaluation import as_tested, check, evaluate, glanced, write
from .learners import Classification, Examination, Learner
from .nn.classifier import Pooling
from .plain import from_plain
from .run import Run, autocast
from .run_folder import kept_in

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finetune(Run):
    """A finetuning run: a classifier learns labels, from a checkpoint or from scratch.

    The defaults are what ConvMAE's and VideoMAE's finetuning have in common; see the recipes.

    Args:
        model: the builder whose trunk is trained. With a checkpoint the trunk is the checkpoint's, and this builder
            gives the input size alone.
        checkpoint: where to start from: a run's folder, or a file that `convmae.weights.load` reads; None: from
            scratch. The trunk is taken, positions resized; not the decoder, nor a head.
        encoder: of a contrastive checkpoint (CMAE), whose trunk: the online one's, or the target's.
        channels: of the authors' CMAE weights, what they saw: rgb, or bgr, as the released ones.
        test: the samples that show how well it does; None: it is not tested.
        test_every: epochs between two tests on one view of each sample; all views of `test` are looked at in the end.
        classes: how many; None: as many as the data have.
        pooling: "mean" over tokens, or "token": the class token, or where there is none the first one.
        dropout: before the head.
        drop_path: the last block's rate of dropped residual branches; it rises linearly from 0.
        head_std: spread of the head's initial weights.
        layer_decay: factor between the learning rates of a layer and the next; see `optimisation.layer_of`.
        mixing: mixup, cutmix, smoothing of labels; None: none of them.
        erasing: of boxes; None: none are.
        average: decay of a moving average of the weights, which is tested beside them; None: none is kept.
    """

    checkpoint: Path | None = None
    encoder: weights.Encoder = "online"
    channels: weights.Channels = "rgb"
    test: Source | None = None
    test_every: float = 1
    classes: int | None = None
    pooling: Pooling = "mean"
    dropout: float = 0.0
    drop_path: float = 0.1
    head_std: float = 2e-5
    layer_decay: float = 0.75
    mixing: Mixing | None = Mixing()
    erasing: Erasing | None = Erasing()
    average: float | None = None
    base_lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    betas: tuple[float, float] = (0.9, 0.999)

    def demands(self) -> list[tuple[str, str, bool]]:
        """What the fields must be."""
        return [
            *super().demands(),
            ("encoder", "online or target", self.encoder in ("online", "target")),
            ("channels", "rgb or bgr", self.channels in ("rgb", "bgr")),
            ("test_every", "positive", self.test_every > 0),
            ("classes", "1 or more, or None", self.classes is None or self.classes >= 1),
            ("pooling", "mean or token", self.pooling in ("mean", "token")),
            ("dropout", "from 0 to below 1", 0 <= self.dropout < 1),
            ("drop_path", "from 0 to below 1", 0 <= self.drop_path < 1),
            ("head_std", "0 or more", self.head_std >= 0),
            ("layer_decay", "above 0 and at most 1", 0 < self.layer_decay <= 1),
            ("average", "from 0 to below 1, or None", self.average is None or 0 <= self.average < 1),
        ]

    def learner(self, samples: Samples) -> Learner:
        """The classifier, on the trunk of the checkpoint or of `model`; a run that goes on builds what it has kept.

        Raises ValueError where the data have no classes, or other ones than the run; where the checkpoint cannot be
        read or has a trunk for other axes; or where the model cannot be built.
        """
        kept = self._kept_builder()
        pretrained = None
        if kept is None and self.checkpoint is not None:
            pretrained = self._pretrained(self.checkpoint)
        if kept is None:
            backbone = self._backbone(self.model if pretrained is None else pretrained.builder)
            kept = self._classifier(backbone.drop_path(self.drop_path), class_names(samples))
        model = kept.build()
        if pretrained is not None:
            taken = pretrained.trunk.state_dict()
            load_weights(model.trunk, taken)
            left = sum(not name.startswith("trunk.") for name in pretrained.state_dict())
            _log.info("the trunk's %d tensors are taken, the head is fresh, %d others are left", len(taken), left)
        return Classification(
            model,
            layer_decay=self.layer_decay,
            mixing=self.mixing,
            erasing=self.erasing,
            average=self.average,
        )

    def _pretrained(self, checkpoint: Path) -> Any:
        try:
            return weights.load(checkpoint, encoder=self.encoder, channels=self.channels)
        except FileNotFoundError as missing:
            raise ValueError(f"--checkpoint {checkpoint}: {missing}") from missing

    def _kept_builder(self) -> Classifier | None:
        """The builder of the run's own checkpoint: the one that it began with need not be there any more."""
        kept = kept_in(self.folder, "builder")
        found = None if kept is None else from_plain(kept)
        return found if isinstance(found, Classifier) else None  # another kind of run is refused later

    def _backbone(self, builder: Any) -> MAE:
        """The builder of a checkpoint's trunk, for this run's input size."""
        backbone = owner_of(builder)
        if backbone is None:
            raise ValueError(f"--checkpoint {self.checkpoint} was made by {type(builder).__name__}, which has no trunk")
        if len(backbone.size) != len(self.model.size):
            raise ValueError(
                f"--checkpoint {self.checkpoint} has a model of {backbone.size} pixels, this run one of "
                f"{self.model.size}: take a recipe for those axes, or inflate images' weights (video.inflation)"
            )
        return backbone.input(self.model.size)

    def _classifier(self, backbone: MAE, names: tuple[str, ...]) -> Classifier:
        if not (names or self.classes):
            raise ValueError(
                f"{self.data!r} has no classes: give folders named by class, a list with labels, or how many with "
                "--classes"
            )
        if self.classes is not None and len(names) > self.classes:
            raise ValueError(f"--classes {self.classes}: the data have {len(names)}")
        classes = self.classes or len(names)
        return Classifier(
            backbone=backbone,
            classes=classes,
            pooling=self.pooling,
            dropout=self.dropout,
            head_std=self.head_std,
            names=names if len(names) == classes else (),
        )

    def examination(self, learner: Learner, world: World, beat: Callable[[], None]) -> Examination | None:
        """The tests, where there is something to test on.

        Raises ValueError where its samples cannot be listed, or have other classes.
        """
        if self.test is None:
            return None
        assert isinstance(learner, Classification)
        return _Test(self, self.test, learner, world, beat)


class _Test:
    """Tests of a run under way on one view of each sample, and on all of them in the end."""

    at_start = False

    def __init__(
        self, run: Finetune, test: Source, learner: Classification, world: World, beat: Callable[[], None]
    ) -> None:
        self.run, self.learner, self.world, self.beat = run, learner, world, beat
        self.every = run.test_every
        sources = (glanced(test), as_tested(test))
        self.quick, self.whole = (world.tell(partial(one.open, run.model.size)) for one in sources)
        for samples in (self.quick, self.whole):
            check(samples, learner.classes, learner.model.builder.names)

    def take(self, *, last: bool) -> dict[str, float]:
        """Figures of the weights, and as `average_...` of their average; files go to `test/` in the end."""
        found = self._scores("", "test" if last else None)
        if self.learner.average is not None:
            with self.learner.average.in_place():
                found |= self._scores("average_", "test_average" if last else None)
        return found

    def _scores(self, prefix: str, folder: str | None) -> dict[str, float]:
        run, world = self.run, self.world
        scores = evaluate(
            self.learner.model,
            self.quick if folder is None else self.whole,
            size=run.model.size,
            classes=self.learner.classes,
            names=self.learner.model.builder.names,
            world=world,
            batch_size=run.micro_batch or -(-run.batch_size // world.size),
            workers=run.workers,
            autocast=autocast(run, world.device),
            seconds=run.sample_seconds,
            method=run.worker_start,
            sharded=run.parallel == "fsdp",
            beat=self.beat,
        )
        if folder is not None and world.first:
            write(scores, run.folder / folder)
        told = ("top1", "top5", "mean_class", "loss", "unusable")
        return {prefix + name: value for name in told if (value := scores.figures()[name]) is not None}


def class_names(samples: Samples) -> tuple[str, ...]:
    """The names of the samples' classes, in the order of their numbers; none where these are not known."""
    for owner in (samples, getattr(samples, "listing", None), getattr(samples, "members", None)):
        if names := getattr(owner, "classes", ()):
            return tuple(names)
    return ()
