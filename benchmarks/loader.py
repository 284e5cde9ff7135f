"""What loading clips costs: every reader, and the whole loader against bare decoding of the same frames, in one run.

    python benchmarks/loader.py DATA                # a folder or list of videos; two classes of files are best apart
    python benchmarks/loader.py DATA --only memory --memory-clips 2000

Clips of 16 frames at stride 4, cropped to 224 (VideoMAE's multi-scale crop, and a flip). A round decodes and loads the
same clips in turn, each side in one thread, and rates are medians over the rounds, by processor time and by the clock.

| side | what it does |
| --- | --- |
| decord (bare) | `VideoReader(path, num_threads=1)`, `get_batch`: the library alone, at the size of the file |
| decord, pyav, torchcodec | our readers: the right frames, upright, at the size that is needed |
| load | what a run does with a sample: decode with the default reader, crop, flip |
| loader | the same through one loader process |

The demand: clips a core's second of the loader, which are those of its process and of what this one spends on receiving
batches, at least 0.9 of bare decoding's. By the clock they are shown as well: there bare decord gains from frames that
its own thread prepares on a second core. Memory: of the loader's processes over many clips, which must stay flat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from convmae.data import Stream, generator
from video import readers
from video.throughput import Rate, decode, load
from video.videos import Videos, VideoSamples

SIZE = (16, 224, 224)


def bare_decord(samples: VideoSamples, order: list[int], seed: int) -> Rate:
    """decord alone on the same indices; files that it cannot read, or reads wrongly, are not among `order`."""
    from decord import VideoReader

    began, cpu = time.perf_counter(), time.process_time()
    for index in order:
        choose = samples.source.choosing(SIZE[0], generator(seed, index))
        reader = VideoReader(samples.name(index), num_threads=1)
        reader.get_batch(choose(readers.Track(len(reader), 0.0, 0, 0))).asnumpy()
    return Rate(len(order), time.perf_counter() - began, time.process_time() - cpu)


def one_worker(samples: VideoSamples, order: list[int], seed: int) -> Rate:
    """The same samples through a loader process; its start is not counted, its processor time and this one's are."""
    fixed = Fixed(samples, (order[0], *order), seed)
    stream = Stream(fixed, SIZE, seed=seed, batch_size=1)
    began, cpu, clips = 0.0, 0.0, 0
    for step, [batch] in enumerate(stream.batches(0, len(fixed), workers=1)):
        if step == 0:
            began, cpu = time.perf_counter(), processor_seconds()
        else:
            clips += len(batch.pixels)
        if clips == len(order):  # while the loader process, which has no more to do, can still be asked
            rate = Rate(clips, time.perf_counter() - began, processor_seconds() - cpu)
    return rate


def processor_seconds() -> float:
    """What this process and its children that still run have spent on all cores, in steps of 0.01 s."""
    own = os.getpid()
    spent = 0
    for pid in [own, *map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split())]:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        spent += int(user) + int(system)
    return spent / os.sysconf("SC_CLK_TCK")


class Fixed:
    """Samples in a given order, each at its place, and with the clips that the other sides take."""

    def __init__(self, samples: VideoSamples, places: tuple[int, ...], seed: int) -> None:
        self.samples, self.places, self.seed = samples, places, seed

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return self.samples.name(self.places[index])

    def load(self, index: int, random: torch.Generator) -> Any:
        return self.samples.load(self.places[index], generator(self.seed, self.places[index]))

    def order(self, random: torch.Generator) -> torch.Tensor:
        return torch.arange(len(self))


def megabytes(pid: int) -> float:
    """What a process alone holds in memory, and its part of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def memory(samples: VideoSamples, clips: int) -> list[tuple[int, float]]:
    """Clips loaded by two processes, and the megabytes of these and of this process, from time to time."""
    stream = Stream(samples, SIZE, seed=0, batch_size=4)
    curve: list[tuple[int, float]] = []
    own = os.getpid()
    for step, _ in enumerate(stream.batches(0, clips // 4, workers=2)):
        if step % max(1, clips // 80) == 0:
            children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            curve.append((4 * step, sum(megabytes(pid) for pid in [own, *map(int, children)])))
    return curve


def readable(samples: VideoSamples) -> list[int]:
    """The samples that decord reads rightly, so that all sides do the same work."""
    kept = []
    for index in range(len(samples)):
        try:
            with readers.Decord().open(samples.name(index)) as opened:
                opened.take([0, opened.track.frames - 1], None)
            kept.append(index)
        except Exception as problem:
            print(f"left out: {samples.name(index)}: {problem}".splitlines()[0][:150])
    return kept


def rates(samples: VideoSamples, clips: int, rounds: int) -> dict[str, list[Rate]]:
    """Every side over the same clips, in turn, round after round."""
    usable = readable(samples)

    def with_reader(choice: readers.Choice) -> Callable[[list[int], int], Rate]:
        chosen = replace(samples, source=replace(samples.source, reader=choice))
        return lambda order, seed: decode(chosen, order, seed)

    sides: dict[str, Callable[[list[int], int], Rate]] = {
        "decord (bare)": lambda order, seed: bare_decord(samples, order, seed),
        **{choice: with_reader(choice) for choice in readers.installed()},
        "load": lambda order, seed: load(samples, order, seed),
        "loader": lambda order, seed: one_worker(samples, order, seed),
    }
    measured: dict[str, list[Rate]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        order = [usable[index % len(usable)] for index in range(clips)]
        # clip by clip in turn, as a machine's speed drifts; a loader process, which takes time to start, once a round
        taken: dict[str, list[Rate]] = {name: [] for name in sides}
        for index in order:
            for name in sides:
                if name != "loader":
                    taken[name].append(sides[name]([index], number))
        taken["loader"].append(sides["loader"](order, number))
        if number:  # the first warms the disk's cache and the allocator
            for name, parts in taken.items():
                measured[name].append(Rate(*(sum(part) for part in zip(*parts, strict=True))))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of videos, or a list of them")
    parser.add_argument("--clips", type=int, default=40, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-clips", type=int, default=2000)
    parser.add_argument("--only", choices=("rates", "memory"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    samples = Videos(root=given.data, flip=True).open(SIZE)
    print(f"{samples!r}; {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    result: dict[str, Any] = {}
    if given.only != "memory":
        measured = rates(samples, given.clips, given.rounds)
        by_cpu = {name: statistics.median(one.clips_per_cpu_second for one in all_) for name, all_ in measured.items()}
        by_clock = {name: statistics.median(one.clips_per_second for one in all_) for name, all_ in measured.items()}
        print("| side | clips a CPU second | clips a second |\n| --- | --- | --- |")
        for name in measured:
            print(f"| {name} | {by_cpu[name]:.1f} | {by_clock[name]:.1f} |")
        of = readers.in_turn()[0].name
        print("| share, medians over rounds | by processor time | by the clock |\n| --- | --- | --- |")
        for side in ("load", "loader"):
            for base in ("decord (bare)", of):
                pairs = list(zip(measured[side], measured[base], strict=True))
                by_core = statistics.median(
                    one.clips_per_cpu_second / other.clips_per_cpu_second for one, other in pairs
                )
                clock = statistics.median(one.clips_per_second / other.clips_per_second for one, other in pairs)
                print(f"| {side} / {base} | {by_core:.2f} | {clock:.2f} |")
                result[f"{side} / {base}"] = {"processor": by_core, "clock": clock}
        result.update(by_cpu=by_cpu, by_clock=by_clock)
    if given.only != "rates":
        curve = memory(samples, given.memory_clips)
        settled = [megabytes for clips, megabytes in curve if clips >= given.memory_clips // 4] or [curve[-1][1]]
        print(
            "memory, MB after clips: "
            + ", ".join(f"{mb:.0f} ({clips})" for clips, mb in curve[:: max(1, len(curve) // 8)])
        )
        half = max(1, len(settled) // 2)
        early, late = statistics.median(settled[:half]), statistics.median(settled[-half:])
        print(f"medians of the first and the second half, after a quarter: {early:.0f}, {late:.0f} MB")
        result.update(memory=curve)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
