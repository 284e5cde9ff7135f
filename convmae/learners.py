"""What a run trains, and how a batch becomes a loss: all that the training loop does not know itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masking
from .augmentation import Erasing, Mixing, soft_targets
from .average import Average
from .data import Batch, generator
from .nn.classifier import Classifier
from .nn.masked_autoencoder import MaskedAutoencoder
from .optimisation import parameter_groups
from .targets import normalize


class Learner(Protocol):
    """A model under training; `network` in a call is what shares it among processes."""

    @property
    def model(self) -> nn.Module:
        """What is trained, with the builder that made it."""
        ...

    def begin(self) -> None:
        """Called once the model is on its device and shared among the processes, before anything is taken up."""
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

    def loss(self, network: nn.Module, inputs: Any) -> Tensor:
        """The mean loss over the batch's samples: scalar."""
        ...

    def nothing(self, count: int = 1) -> Batch:
        """Black samples that count for nothing, so that all processes take part in the exchange of gradients."""
        ...

    def after_step(self) -> None:
        """Called after every optimiser step that changed the model."""
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

    def begin(self) -> None:
        """Nothing."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All, at one learning rate."""
        return parameter_groups(self.model, weight_decay)

    def inputs(self, batch: Batch, device: torch.device, random: torch.Generator) -> Any:
        """Pixels, uint8 until they are there, and what the mask shows, worked out here: a GPU is not waited for."""
        shown = self.model.trunk.shown(batch.mask, device=device)
        return batch.pixels.to(device, non_blocking=True), shown

    def loss(self, network: nn.Module, inputs: Any) -> Tensor:
        """The model's own."""
        x, shown = inputs
        loss: Tensor = network(x, mask=shown)["loss"]
        return loss

    def nothing(self, count: int = 1) -> Batch:
        """Black samples under any mask."""
        masks = self.model.draw_masks(count, generator(0))
        return black(count, self.model.trunk.size)._replace(mask=masks)

    def after_step(self) -> None:
        """Nothing."""

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """Nothing."""
        return {}

    def take_up(self, kept: dict[str, Any]) -> None:
        """Nothing."""


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

    def begin(self) -> None:
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

    def loss(self, network: nn.Module, inputs: Any) -> Tensor:
        """The cross entropy of logits and soft labels, mean over samples."""
        x, targets = inputs
        logits = network(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def nothing(self, count: int = 1) -> Batch:
        """Black samples of the first class."""
        return black(count, self.model.trunk.size)

    def after_step(self) -> None:
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


def black(count: int, size: tuple[int, ...]) -> Batch:
    """So many black samples of `size` pixels, of class 0, without masks."""
    none = torch.zeros(count, dtype=torch.long)
    return Batch(torch.zeros(count, 3, *size, dtype=torch.uint8), none, None, [], none)


class _DrawMask:
    """A sample's mask from a generator; a class, so that it pickles into loader workers without the model."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        self.masking, self.part, self.grid = model.masking, model.part, model.trunk.grid

    def __call__(self, generator: torch.Generator) -> Tensor:
        return masking.draw(self.masking, self.part, 1, self.grid, generator)
