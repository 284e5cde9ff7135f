"""The processes of a run: one a GPU, or one a node on CPUs. One process alone is a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of a run: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over all processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model)  # no device_ids: they would move the mask off the CPU

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, by rank."""
        if self.size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items)
        return [item for own in gathered for item in own]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[World]:
    """Meet the other processes named by RANK and WORLD_SIZE, as torchrun and the launchers set them; alone without.

    Args:
        device: "auto" (this process's GPU where there is one), "cpu", "cuda" or another of torch's.

    Raises:
        ValueError: the device is not to be had here.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here; use --device cpu or auto")
        if place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


def synchronised(model: nn.Module, last: bool) -> Any:
    """The context of one backward: gradients are exchanged in a step's last micro-batch only."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
