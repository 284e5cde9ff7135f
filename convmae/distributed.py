"""The processes of a run: one a GPU, or one a node on CPUs. One process alone is a world of one."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from .nn.layers import blocks

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

    def share(self, model: nn.Module, *, sharded: bool = False) -> nn.Module:
        """The model with its gradients averaged over all processes.

        Sharded, every process keeps its part of parameters, gradients and optimiser state (FSDP2), block by block: the
        model itself is changed, and each of its forward passes needs all processes.
        """
        if not dist.is_initialized():
            return model
        if not sharded:
            # Kernels of one cell: the strides of an axis of length 1 mean nothing.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # no device_ids: they would move the mask off the CPU
            return DistributedDataParallel(model, gradient_as_bucket_view=True)
        # FSDP2 warns of in-place changes to a view that it gives out; there are none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if hasattr(model, "features"):  # asked for by a probe, past the forward method
            register_fsdp_forward_method(model, "features")
        return model

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

    def tell(self, find: Callable[[], T]) -> T:
        """What the first process finds, as all are told; an error of its is everybody's."""
        if self.size == 1:
            return find()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = find()
            except Exception as error:  # raised below, everywhere
                told[1] = _pickling(error)
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        found: T = told[0]
        return found


def _pickling(error: Exception) -> Exception:
    """The error, or one with its words where it would not reach another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is built again
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def state_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and optimiser state, whole and on the CPU, whoever keeps which part; empty where not the first process.

    All processes must call it. The tensors are copies: training may go on while they are written.
    """
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    own: Any
    moments: Any
    own, moments = states.get_state_dict(model, optimiser, options=whole)
    on_cpu = next(model.parameters()).device.type == "cpu"  # elsewhere the way to the CPU has copied them
    return copy.deepcopy((own, moments)) if on_cpu else (own, moments)


def take_up_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, weights: Mapping[str, Tensor], moments: Mapping[str, Any]
) -> None:
    """The inverse of `state_of`: the first process has the state, all must call it."""
    take_up_weights(model, weights)
    whole = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    states.set_optimizer_state_dict(model, optimiser, dict(moments), options=whole)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """As `state_of`, of the weights alone."""
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    own: Any = states.get_model_state_dict(model, options=whole)
    on_cpu = next(model.parameters()).device.type == "cpu"
    return copy.deepcopy(own) if on_cpu else own


def take_up_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of `weights_of`: the first process has them, all must call it."""
    whole = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    states.set_model_state_dict(model, dict(weights), options=whole)


def hold_own_parts(model: nn.Module) -> None:
    """Of a sharded model leave every process its own parts alone: after a forward pass the root's are whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def join(device: str, *, minutes: float = 20) -> Iterator[World]:
    """Meet the other processes named by RANK and WORLD_SIZE, as torchrun and the launchers set them; alone without.

    Args:
        device: "auto" (this process's GPU where there is one), "cpu", "cuda" or another of torch's.
        minutes: how long to wait for another process before giving up.

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
    if size == 1 and "MASTER_ADDR" not in os.environ:
        yield World(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


@contextmanager
def synchronised(network: nn.Module, last: bool) -> Iterator[None]:
    """The context of one backward: gradients are exchanged in a step's last micro-batch only."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        yield
    elif last or not isinstance(network, DistributedDataParallel):
        yield
    else:
        with network.no_sync():
            yield
