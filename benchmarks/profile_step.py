"""Where the time of a training step goes: its kernels, by name and by kind, and how long the GPU has nothing to do.

    python benchmarks/profile_step.py --sides videoconvmae-k3 videomae
    python benchmarks/profile_step.py --sides convmae --compile --trace traces
    python benchmarks/profile_step.py --quick                        tiny models, on the CPU too

A step is forward, backward and fused AdamW of a side of `pretrain_step.py`. torch.profiler records some steps; a kernel
belongs to the operator that launched it, and its kind is that of the outermost known operator around it, else what its
name says. On the CPU the rows are operators, by the time they spend themselves.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measure import Step, inputs
from pretrain_step import aligned
from rich.table import Table
from scaling import OUT_OF_MEMORY, console_pair, first_line, headline
from sides import Side, base, sides, tiny
from torch.profiler import ProfilerActivity, profile

from convmae.micro_batch import ran_out

AROUND = (
    ("optimiser", re.compile(r"Optimizer\.(step|zero_grad)|_fused_adamw")),
    ("tile convolution", re.compile(r"tile_?convolution", re.IGNORECASE)),
    ("attention", re.compile(r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention", re.IGNORECASE)),
)
"""Kinds by an operator around the kernel."""

REST = "elementwise, reduction"

BY_NAME = (
    (REST, re.compile(r"^triton_(poi|red|per|for)_")),  # the compiler's, named by all that it fused
    ("optimiser", re.compile(r"adam", re.IGNORECASE)),
    ("tile convolution", re.compile(r"tile_?conv|depthwise|conv_dw|conv2d_c1_k1|dgrad2d|wgrad2d", re.IGNORECASE)),
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)),
    ("matmul", re.compile(r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|triton_tem|addmm|\b(aten::)?b?mm\b", re.I)),
    ("convolution", re.compile(r"conv", re.IGNORECASE)),
    (
        "copies",
        re.compile(r"mem(cpy|set)|copy|Cat[A-Z]|\b(aten::)?cat\b|gather|scatter|index|transpose|nchw|nhwc|fill", re.I),
    ),
)
"""Kinds by the kernel's own name, where no operator tells; the first that is found. All else is elementwise work."""

LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "user_annotation")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the time of a training step goes: its kernels, by name and by kind, and how long the GPU idles."""

    sides: tuple[str, ...] = ("videoconvmae-k3", "videomae")
    """Sides of pretrain_step.py, by name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Autocast of the forward; float32 is none. Default float32 on the CPU, bfloat16 on the GPU."""
    batch_size: int | None = None
    """Clips of a step; a step on images has one for every two frames. Default 1 on the CPU, 32 on the GPU."""
    compile: bool = False
    """Compile every side with torch.compile."""
    steps: int = 3
    """Recorded steps, after three that are not."""
    top: int = 15
    """Rows of the table of kernels."""
    quick: bool = False
    """Tiny models, to see that it runs: the figures mean nothing."""
    json: Path | None = None
    """Write the figures to this file."""
    trace: Path | None = None
    """Keep the profiler's traces in this folder, for a browser."""

    def step(self) -> Step:
        """How a step is run."""
        return Step.on(self.device, self.dtype, compiled=self.compile)

    def selected(self) -> list[Side]:
        """The sides asked for, in that order; raises ValueError for a name that is unknown."""
        known = {side.name: side for side in sides(tiny() if self.quick else base())}
        if unknown := [name for name in self.sides if name not in known]:
            raise ValueError(f"--sides {' '.join(unknown)}: no such side; there are {', '.join(known)}")
        return [known[name] for name in self.sides]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel's share in a step: its name, kind, calls of a step, and microseconds of a step."""

    name: str
    kind: str
    calls: float
    microseconds: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A side's step.

    Args:
        side: its name.
        title: its title in tables.
        samples: of the step.
        microseconds: from the first kernel's start to the last one's end, over all recorded steps, for one.
        idle: the share of it in which no kernel runs; None on the CPU.
        kernels: by falling time.
        failure: why there are no figures, where there are none.
    """

    side: str
    title: str
    samples: int
    microseconds: float = 0.0
    idle: float | None = None
    kernels: tuple[Kernel, ...] = ()
    failure: str | None = None

    def kinds(self) -> dict[str, tuple[float, float]]:
        """Calls and microseconds of each kind, by falling time."""
        sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for kernel in self.kernels:
            calls, time = sums[kernel.kind]
            sums[kernel.kind] = calls + kernel.calls, time + kernel.microseconds
        return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def kind_of(name: str, around: Sequence[str]) -> str:
    """The kind of a kernel that was launched within these operators, outermost first."""
    for operator in around:
        for kind, pattern in AROUND:
            if pattern.search(operator):
                return kind
    return next((kind for kind, pattern in BY_NAME if pattern.search(name)), REST)


def short(name: str) -> str:
    """A kernel's name without types of templates and arguments: at most 60 letters."""
    name = re.sub(r"^void\s+", "", name)
    inner = re.search(r"\w*(?:[Ff]unctor|Ops|CUDAKernelImpl|_kernel_cuda)\w*", name.partition("<")[2])
    plain = re.sub(r"\(anonymous namespace\)::", "", name)
    plain = plain.partition("<")[0].partition("(")[0].removeprefix("at::native::")
    if inner is not None and inner[0] not in plain:
        plain = f"{plain}<{inner[0]}>"
    return plain if len(plain) <= 60 else plain[:40] + "…" + plain[-19:]


def nested(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Each event of one thread with those around it, outermost first."""
    stack: list[Mapping[str, Any]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0))):
        while stack and stack[-1]["ts"] + stack[-1].get("dur", 0) <= event["ts"]:
            stack.pop()
        yield event, list(stack)
        stack.append(event)


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The time covered by intervals `(start, end)`, overlaps once."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def by_thread(events: Iterable[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    """Events with a duration, thread by thread."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    return threads.values()


def on_gpu(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    """The kernels of a trace: name, kind, start, end, in microseconds."""
    around: dict[Any, list[str]] = {}
    for thread in by_thread(event for event in events if event.get("cat") in (*LAUNCHES, *ON_HOST)):
        for event, outer in nested(thread):
            if event["cat"] in LAUNCHES:
                around[event["args"].get("correlation")] = [each["name"] for each in outer]
    for event in events:
        if event.get("cat") in ON_DEVICE:
            operators = around.get(event["args"].get("correlation"), [])
            start = event["ts"]
            yield event["name"], kind_of(event["name"], operators), start, start + event.get("dur", 0)


def on_cpu(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """The operators of a trace: name, kind, and the microseconds they spend themselves."""
    for thread in by_thread(event for event in events if event.get("cat") in ON_HOST):
        inner: dict[int, float] = defaultdict(float)
        found = []
        for event, outer in nested(thread):
            if outer:
                inner[id(outer[-1])] += event.get("dur", 0)
            found.append((event, [each["name"] for each in outer]))
        for event, operators in found:
            if event["cat"] == "cpu_op" and not event["name"].startswith("ProfilerStep"):
                name = event["name"]
                yield name, kind_of(name, [*operators, name]), event.get("dur", 0) - inner[id(event)]


def summarise(side: Side, samples: int, events: Sequence[Mapping[str, Any]], *, steps: int, device: str) -> Profile:
    """A profile from the events of a trace over so many steps."""
    rows: list[tuple[str, str, float]]
    span, idle = 0.0, None
    if device == "cuda":
        kernels = list(on_gpu(events))
        if not kernels:
            raise ValueError("the profiler recorded no kernel")
        span = max(end for *_, end in kernels) - min(start for *_, start, _ in kernels)
        idle = 1 - busy((start, end) for *_, start, end in kernels) / span
        rows = [(name, kind, end - start) for name, kind, start, end in kernels]
    else:
        rows = list(on_cpu(events))
        span = sum(time for *_, time in rows)
    sums: dict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, kind, time in rows:
        calls, total = sums[short(name), kind]
        sums[short(name), kind] = calls + 1, total + time
    found = [
        Kernel(name=name, kind=kind, calls=calls / steps, microseconds=total / steps)
        for (name, kind), (calls, total) in sums.items()
    ]
    return Profile(
        side=side.name,
        title=side.title.strip(),
        samples=samples,
        microseconds=span / steps,
        idle=idle,
        kernels=tuple(sorted(found, key=lambda kernel: -kernel.microseconds)),
    )


def record(side: Side, samples: int, step: Step, *, steps: int, trace: Path) -> Profile:
    """Take a side's steps under the profiler; the trace is left in the file."""
    module = step.prepare(side)
    x, mask = inputs(side, samples, step.device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def once() -> None:
        step.run(module, x, mask, optimiser)
        optimiser.zero_grad(set_to_none=True)

    def finish() -> None:
        if step.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):  # they compile, choose algorithms and make the optimiser's state
        once()
    finish()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if step.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            once()
        finish()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    return summarise(side, samples, events, steps=steps, device=step.device)


def kernels_table(found: Profile, top: int) -> Table:
    """The kernels that take most time."""
    out = aligned(
        f"{found.title}: {found.samples} samples, {found.microseconds / 1000:.2f} ms a step",
        *("kernel", "kind", "calls a step", "microseconds a step", "share"),
    )
    for kernel in found.kernels[:top]:
        share = f"{kernel.microseconds / found.microseconds:.1%}"
        out.add_row(kernel.name, kernel.kind, f"{kernel.calls:g}", f"{kernel.microseconds:.0f}", share)
    rest = found.kernels[top:]
    if rest:
        time = sum(kernel.microseconds for kernel in rest)
        calls = sum(kernel.calls for kernel in rest)
        out.add_row(f"{len(rest)} others", "", f"{calls:g}", f"{time:.0f}", f"{time / found.microseconds:.1%}")
    return out


def kinds_table(profiles: Sequence[Profile]) -> Table:
    """The kinds of all sides, side by side: microseconds of a sample, and the share of the step."""
    out = aligned("By kind: microseconds a sample, and share of the step", "kind", *(each.title for each in profiles))
    for kind in dict.fromkeys(kind for each in profiles for kind in each.kinds()):
        times = [(each.kinds().get(kind, (0, 0.0))[1], each) for each in profiles]
        out.add_row(kind, *(f"{time / each.samples:.1f}  {time / each.microseconds:6.1%}" for time, each in times))
    idle = [(each.idle, each) for each in profiles]
    out.add_row(
        "no kernel runs",
        *(
            "-" if share is None else f"{share * each.microseconds / each.samples:.1f}  {share:6.1%}"
            for share, each in idle
        ),
    )
    out.add_row("all", *(f"{each.microseconds / each.samples:.1f}  {1:6.1%}" for each in profiles))
    return out


def main(options: Options) -> list[Profile]:
    """Profile the sides asked for, and print it.

    Raises:
        ValueError: `--sides` has an unknown name.
    """
    console, progress = console_pair()
    step = options.step()
    chosen = options.selected()
    dtype = str(step.dtype).removeprefix("torch.")
    console.print(*headline(step.device, dtype, "compiled" if step.compiled else "not compiled"), sep="\n")
    clips = options.batch_size or (1 if step.device == "cpu" else 32)
    profiles = []
    with tempfile.TemporaryDirectory() as place:
        folder = options.trace or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        for side in chosen:
            samples = clips * side.per_clip
            trace = folder / f"{side.name}.json"
            try:
                found = record(side, samples, step, steps=options.steps, trace=trace)
            except Exception as error:  # a line of its own: the others go on
                failure = OUT_OF_MEMORY if ran_out(error) else first_line(error)
                found = Profile(side=side.name, title=side.title.strip(), samples=samples, failure=failure)
            profiles.append(found)
            gc.collect()
            if step.device == "cuda":
                torch.cuda.empty_cache()
            progress.print(f"{side.name}: {found.failure or f'{found.microseconds / 1000:.2f} ms a step'}")
    for found in profiles:
        console.print(f"{found.title}: {found.failure}" if found.failure else kernels_table(found, options.top))
    if good := [each for each in profiles if not each.failure]:
        console.print(kinds_table(good))
    if options.json is not None:
        listed = [{**asdict(each), "kinds": each.kinds()} for each in profiles]
        options.json.write_text(json.dumps(listed, indent=1) + "\n")
    return profiles


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as problem:
        sys.exit(str(problem))
