"""How a side is measured: time of forward and backward, peak memory, multiply-accumulates."""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sides import Side
from torch import Tensor, nn

from convmae import MAE


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a step is run.

    Args:
        device: "cpu" or "cuda".
        dtype: what the forward is autocast to; float32 is none.
        compiled: whether the side is compiled.
        threads: of the CPU.
    """

    device: str
    dtype: torch.dtype
    compiled: bool
    threads: int

    def prepare(self, side: Side) -> nn.Module:
        """The side's module, on the device and compiled if so asked."""
        module = side.build().to(self.device)
        if self.compiled:
            module.compile()
        return module

    def run(self, module: nn.Module, x: Tensor, mask: Tensor) -> None:
        """One forward and backward; the gradients stay in the parameters."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = module(x, mask)
        loss.backward()

    def seconds(self, module: nn.Module, x: Tensor, mask: Tensor) -> float:
        """The time of one forward and backward, with gradients cleared before and after it."""
        module.zero_grad(set_to_none=True)
        if self.device == "cuda":
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            begin.record()
            self.run(module, x, mask)
            end.record()
            torch.cuda.synchronize()
            elapsed: float = begin.elapsed_time(end) / 1000
        else:
            start = time.perf_counter()
            self.run(module, x, mask)
            elapsed = time.perf_counter() - start
        module.zero_grad(set_to_none=True)
        return elapsed


def batch(source: MAE, size: int, device: str) -> tuple[Tensor, Tensor]:
    """A seeded batch: x `(B, C, *size)` and mask `(B, *grid)`, for every side of the same input the same."""
    generator = torch.Generator().manual_seed(0)
    mask = source.masking(size, source.grid, generator)
    return torch.randn(size, source.channels, *source.size, generator=generator).to(device), mask.to(device)


def rounds(
    modules: Sequence[nn.Module], inputs: Sequence[tuple[Tensor, Tensor]], step: Step, *, count: int
) -> Iterator[list[float]]:
    """The seconds of every module, round after round: A B C, A B C, so that a machine's drift hits all alike.

    Two rounds before the first are not given out: they compile, choose algorithms and fill memory pools.
    """
    for number in range(-2, count):
        seconds = [step.seconds(module, *data) for module, data in zip(modules, inputs, strict=True)]
        if number >= 0:
            yield seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def peak_memory(side: Side, size: int, step: Step) -> int:
    """Bytes that one forward and backward takes at its peak beyond the built model and its input.

    So: activations, gradients and workspaces. On the GPU by the allocator's count, of the second step. On the CPU by
    the resident memory of a fresh process for every side, of its first step: later ones reuse what the C library
    keeps of the earlier.
    """
    if step.device == "cuda":
        return _peak_on_gpu(side, size, step)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "convmae", "video"])  # imported once, before any thread or tensor
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_on_cpu, side, size, step).result()


def _peak_on_gpu(side: Side, size: int, step: Step) -> int:
    module, data = step.prepare(side), batch(side.source, size, step.device)
    step.seconds(module, *data)  # the first step may hold workspaces for choosing algorithms
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step.seconds(module, *data)
    return torch.cuda.max_memory_allocated() - held


def _peak_on_cpu(side: Side, size: int, step: Step) -> int:
    torch.set_num_threads(step.threads)
    module, data = step.prepare(side), batch(side.source, size, step.device)
    if step.compiled:
        step.seconds(module, *data)  # the compiler's own memory is not the step's
    held = _reset_peak()
    step.seconds(module, *data)
    return _peak() - held


def _reset_peak() -> int:
    """Bytes resident now; where the system can, the peak is counted from here."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not status.exists():
        return _peak()
    clear.write_text("5")  # Linux: the peak starts again from what is resident now
    return _status("VmRSS")


def _peak() -> int:
    """The most bytes that were resident.

    Linux's ru_maxrss is at least that of the process that started this one, so its VmHWM is read instead.
    """
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Multiply-accumulates of one sample's forward, all of it and without the decoder; and parameters."""

    forward: int
    encoder: int
    parameters: int


def count_work(side: Side, device: str) -> Work:
    """fvcore's count, with handles for attention and the tile convolution; norms and elementwise work count nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")  # fvcore scripts a function at import
        from fvcore.nn import FlopCountAnalysis

    module = side.build().to(device)
    analysis = FlopCountAnalysis(module, batch(side.source, 1, device))
    analysis.tracer_warnings("none").unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    analysis.set_op_handle("prim::PythonOp._TileConvolution", _tile_convolution)
    analysis.set_op_handle("aten::layer_norm", _nothing)
    with torch.no_grad():
        counts = analysis.by_module()
    unknown = [name for name in analysis.unsupported_ops() if not name.startswith("aten::")]
    assert not unknown, f"operators of our own need a handle: {unknown}"
    decoders = [name for name in counts if name.endswith((".decoder", ".encoder_to_decoder"))]
    return Work(
        forward=int(counts[""]),
        encoder=int(counts[""] - sum(counts[name] for name in decoders)),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )


def _shape(value: Any) -> list[int]:
    """The shape of a traced tensor."""
    shape: list[int] = value.type().sizes()
    return shape


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """`q (..., N, D), k (..., M, D), v (..., M, E)`: N·M·D for the scores, N·M·E for the sum."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _tile_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """`x (B, V, *tile, C), weight (C, 1, *kernel)`: one for every cell, channel and tap, hidden neighbours included."""
    x, weight = (_shape(tensor) for tensor in inputs[:2])
    return math.prod(x) * math.prod(weight[2:])


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0
