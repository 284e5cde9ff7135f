"""What a run trains, and how a batch becomes a loss: all that the training loop does not know itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import masking
from .augmentation import Erasing, Mixing, soft_targets
from .average import Average
from .data import Batch, generator
from .distributed import hold_own_parts
from .nn.classifier import Classifier
from .nn.contrast import ContrastiveMaskedAutoencoder
from .nn.masked_autoencoder import MaskedAutoencoder
from .optimisation import parameter_groups
from .targets import normalize


class Learner(Protocol):
    """A model under training; `network` in a call is what shares it among processes."""

    @property
    def model(self) -> nn.Module:
        """What is trained, with the builder that made it."""
        ...

    def begin(self, most: int) -> None:
        """Called once the model is on its device and shared among the processes, before anything is taken up.

        `most` is the number of samples of the largest micro-batch, the same for all processes.
        """
        ...

    @property
    def draw_mask(self) -> Callable[[torch.Generator], Tensor] | None:
        """Draws a sample's mask where it is loaded; it pickles, for loader processes get a copy. None: no mask."""
        ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What is trained, for the optimiser; each group has a `scale` of its learning rate beside `weight_decay`."""
        ...

    def inputs(self, batch: Batch, device: torch.device, random: torch.Generator) -> Any:
        """What `loss` needs of a batch, on the device; without waiting for it.

        All randomness of the batch comes from the generator, which is the CPU's.
        """
        ...

    def losses(self, network: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """`loss`, the mean over the batch's samples, and whatever else is to be watched, by name: scalars."""
        ...

    def nothing(self, count: int = 1) -> Batch:
        """Black samples that count for nothing, so that all processes take part in the exchange of gradients."""
        ...

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step that changed the model; the part of the run done before it, in [0, 1)."""
        ...

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside the model's weights, whole and on the CPU; all processes call it."""
        ...

    def take_up(self, kept: dict[str, Any]) -> None:
        """Go on from a checkpoint that has what `kept` gave; all processes call it, and the first one has it."""
        ...


class Examination(Protocol):
    """Tells from time to time what a run has learnt."""

    @property
    def every(self) -> float:
        """Epochs between two; there is one at the end as well."""
        ...

    @property
    def at_start(self) -> bool:
        """Whether there is one before the first step."""
        ...

    def take(self, *, last: bool) -> dict[str, float]:
        """Figures by name; `last` at the end of the run. All processes call it, and leave the model as it was."""
        ...


class Reconstruction:
    """Masked pretraining: the model is a masked autoencoder, whose masks are drawn where samples are loaded."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        self.model = model
        self.draw_mask = _DrawMask(model)

    def begin(self, most: int) -> None:
        """Nothing."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All, at one learning rate."""
        return parameter_groups(self.model, weight_decay)

    def inputs(self, batch: Batch, device: torch.device, random: torch.Generator) -> Any:
        """Pixels, uint8 until they are there, and what the mask shows, worked out here: a GPU is not waited for."""
        shown = self.model.trunk.shown(batch.mask, device=device)
        return batch.pixels.to(device, non_blocking=True), shown

    def losses(self, network: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """The model's own."""
        x, shown = inputs
        return {"loss": network(x, mask=shown)["loss"]}

    def nothing(self, count: int = 1) -> Batch:
        """Black samples under any mask."""
        masks = self.model.draw_masks(count, generator(0))
        return black(count, self.model.trunk.size)._replace(mask=masks)

    def after_step(self, progress: float) -> None:
        """Nothing."""

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """Nothing."""
        return {}

    def take_up(self, kept: dict[str, Any]) -> None:
        """Nothing."""


WATCHED = ("loss", "reconstruction", "contrast", "agreement", "spread")
"""What is told of a contrastive masked autoencoder; see its `forward`."""


class Contrast(Reconstruction):
    """Masked pretraining against a momentum target: of each sample there are two views.

    As processes give each other their keys, each brings equally many rows to a step: where its share is smaller, or
    some samples could not be loaded, black ones that count for nothing fill up.
    """

    model: ContrastiveMaskedAutoencoder

    def __init__(self, model: ContrastiveMaskedAutoencoder) -> None:
        super().__init__(model)
        self.rows = 0

    def begin(self, most: int) -> None:
        """Fill up to so many rows. Raises ValueError where a sample would be compared with itself alone."""
        if most * (dist.get_world_size() if dist.is_initialized() else 1) < 2:
            raise ValueError(
                "CMAE compares a sample with others, but takes one at a time: raise --batch-size or --micro-batch"
            )
        self.rows = most

    def inputs(self, batch: Batch, device: torch.device, random: torch.Generator) -> Any:
        """Both views, what the mask shows, and which rows count.

        Raises ValueError where the samples promised a second view, and gave none.
        """
        missing = self.rows - len(batch.pixels)
        if missing > 0:
            batch = _together(batch, self.nothing(missing))
        if batch.second is None or len(batch.second) != len(batch.pixels):
            raise ValueError("samples with `views = 2` must give Sample(pixels, label, second): see convmae.two_views")
        x, shown = super().inputs(batch, device, random)
        return x, shown, batch.second.to(device, non_blocking=True), (batch.indices >= 0).to(device, non_blocking=True)

    def losses(self, network: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """The model's own, both of them, and what tells of a collapse."""
        x, shown, second, valid = inputs
        out = network(x, mask=shown, second=second, valid=valid)
        return {name: out[name] for name in WATCHED}

    def nothing(self, count: int = 1) -> Batch:
        """Black samples under any mask, in two views."""
        batch = super().nothing(count)
        return batch._replace(second=batch.pixels)

    def after_step(self, progress: float) -> None:
        """Let the target follow."""
        hold_own_parts(self.model)
        self.model.update_target(self.model.momentum(progress))


class Classification:
    """Finetuning: the model is a classifier, taught by soft labels (cross entropy in float32 or better).

    Samples of a batch may be erased in part, and then mixed with each other, both on the device.

    Args:
        model: the classifier.
        layer_decay: of learning rates, see `optimisation.parameter_groups`.
        mixing: mixup, cutmix and smoothing of labels; None: labels as they are.
        erasing: None: nothing is erased.
        average: decay of the average of weights that is kept beside them; None: none is.
    """

    draw_mask = None

    def __init__(
        self,
        model: Classifier,
        *,
        layer_decay: float = 1.0,
        mixing: Mixing | None = None,
        erasing: Erasing | None = None,
        average: float | None = None,
    ) -> None:
        self.model, self.classes = model, model.head.out_features
        self.layer_decay, self.mixing, self.erasing = layer_decay, mixing, erasing
        self.decay = average
        self.average: Average | None = None

    def begin(self, most: int) -> None:
        """Average the weights from here on; they are where they are trained."""
        if self.decay is not None:
            self.average = Average(self.model, self.decay)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """By layers, the last ones at the full learning rate."""
        return parameter_groups(self.model, weight_decay, layer_decay=self.layer_decay)

    def inputs(self, batch: Batch, device: torch.device, random: torch.Generator) -> Any:
        """Pixels ImageNet-normalised `(n, 3, *size)` and soft labels `(n, classes)`.

        Raises ValueError for a label that is no class.
        """
        wrong = batch.labels[(batch.labels < 0) | (batch.labels >= self.classes)]
        if len(wrong):
            what = "some samples have no label" if int(wrong.min()) < 0 else f"a sample has label {int(wrong.max())}"
            raise ValueError(f"{what}, the classifier has classes 0 to {self.classes - 1}: see --classes and --data")
        x = normalize(batch.pixels.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        if self.erasing is not None:
            x = self.erasing(x, random)
        if self.mixing is not None:
            return self.mixing(x, labels, self.classes, random)
        return x, soft_targets(labels, self.classes, smoothing=0.0)

    def losses(self, network: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """The cross entropy of logits and soft labels, mean over samples."""
        x, targets = inputs
        logits = network(x)
        return {"loss": F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)}

    def nothing(self, count: int = 1) -> Batch:
        """Black samples of the first class."""
        return black(count, self.model.trunk.size)

    def after_step(self, progress: float) -> None:
        """Take the new weights into the average."""
        if self.average is not None:
            self.average.update()

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """The averaged weights, as `average`."""
        return {} if self.average is None else {"average": self.average.kept()}

    def take_up(self, kept: dict[str, Any]) -> None:
        """The average goes on."""
        if self.average is not None:
            self.average.take_up(kept.get("average", {}))


def _together(batch: Batch, more: Batch) -> Batch:
    """The rows of both batches, which have masks and second views."""

    def joined(*parts: Tensor | None) -> Tensor:
        return torch.cat([part for part in parts if part is not None])

    return Batch(
        pixels=joined(batch.pixels, more.pixels),
        labels=joined(batch.labels, more.labels),
        mask=joined(batch.mask, more.mask),
        skipped=batch.skipped,
        indices=joined(batch.indices, more.indices),
        second=joined(batch.second, more.second),
    )


def black(count: int, size: tuple[int, ...]) -> Batch:
    """So many black samples of `size` pixels, of class 0, without masks; none of the data's, so of index -1."""
    none = torch.zeros(count, dtype=torch.long)
    return Batch(torch.zeros(count, 3, *size, dtype=torch.uint8), none, None, [], none - 1)


class _DrawMask:
    """A sample's mask from a generator; a class, so that it pickles into loader workers without the model."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        self.masking, self.part, self.grid = model.masking, model.part, model.trunk.grid

    def __call__(self, generator: torch.Generator) -> Tensor:
        return masking.draw(self.masking, self.part, 1, self.grid, generator)
