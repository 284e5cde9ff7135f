"""A running average of a model's weights, which often does better in a test than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import hold_own_parts, take_up_weights, weights_of


class Average:
    """An exponential moving average of the trained parameters, `a <- decay * a + (1 - decay) * w` after every step.

    It begins as the weights are. Where the model is sharded (FSDP2), every process averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self._parameters()], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile, and its own, to the bit, afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def kept(self) -> dict[str, Tensor]:
        """The model's weights with those that are averaged, whole and on the CPU; all processes call it."""
        with self.in_place():
            return weights_of(self.model)

    def take_up(self, weights: Mapping[str, Any]) -> None:
        """The inverse of `kept`; the first process has the weights, all call it."""
        own = [parameter.detach().clone() for parameter in self._parameters()]
        take_up_weights(self.model, weights)
        self.values = own
        self._swap()

    def _parameters(self) -> list[nn.Parameter]:
        """The trained ones; of a sharded model, this process's parts."""
        hold_own_parts(self.model)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self._parameters(), self.values, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(own)
