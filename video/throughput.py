"""How many clips a second your own videos give: which reader, and how many workers, a run on them should have.

    python -m video.throughput /data/kinetics400/train
    python -m video.throughput train.csv --frames 16 --side 224 --stride 4 --clips 200

It decodes the same random clips with every reader, in one thread, and then loads them as a run would, with more and
more workers, and once with two clips of each video that is decoded. A first reading warms the disk's cache: the first
epoch of a set that does not fit into memory also waits for the disk.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from convmae import command
from convmae.data import Stream, UnusableFileError, generator, usable_cpus
from video import readers
from video.clips import Dense
from video.videos import Videos, VideoSamples

Size = tuple[int, int, int]


class Rate(NamedTuple):
    """Clips, and the seconds and processor seconds that they took."""

    clips: int
    seconds: float
    cpu_seconds: float = 0.0

    @property
    def clips_per_second(self) -> float:
        """By the clock."""
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def clips_per_cpu_second(self) -> float:
        """By processor time, so that other programs count less."""
        return self.clips / self.cpu_seconds if self.cpu_seconds else 0.0


def decode(samples: VideoSamples, order: Iterable[int], seed: int = 0) -> Rate:
    """Decode the frames that `load` would take of these samples, and no more: in this process, in one thread."""
    source, (frames, *side) = samples.source, samples.size
    short_side = source.crop.short_side((side[0], side[1]))

    def one(index: int) -> None:
        intact, reader = samples.known(index)
        choose = source.choosing(frames, generator(seed, index), intact)
        readers.read(samples.name(index), choose, short_side=short_side, reader=reader)

    return _timed(samples, order, one)


def load(samples: VideoSamples, order: Iterable[int], seed: int = 0) -> Rate:
    """Load these samples with crops and augmentation, in this process, in one thread."""
    return _timed(samples, order, lambda index: samples.load(index, generator(seed, index)))


def _timed(samples: VideoSamples, order: Iterable[int], one: Callable[[int], object]) -> Rate:
    clips, began, cpu = 0, time.perf_counter(), time.process_time()
    for index in order:
        with suppress(UnusableFileError):
            one(index)
            clips += samples.repeats
    return Rate(clips, time.perf_counter() - began, time.process_time() - cpu)


def stream(samples: VideoSamples, clips: int, workers: int, batch_size: int = 8) -> Rate:
    """Load clips as a run does, with so many workers; what comes before the first batch is not counted."""
    batch_size = -(-batch_size // samples.repeats) * samples.repeats
    warm = max(1, 2 * workers)  # that many batches are loaded ahead when the first one comes
    steps = warm + max(2, -(-clips // batch_size))
    ordered = Stream(samples, samples.size, seed=0, batch_size=batch_size)
    began, count = 0.0, 0
    for step, [batch] in enumerate(ordered.batches(0, steps, workers=workers)):
        if step < warm:
            began = time.perf_counter()
        else:
            count += len(batch.pixels)
    return Rate(count, time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How many clips a second your own videos give, by reader and number of workers.

    Args:
        data: a folder of videos, or a list of them.
        frames: of a clip.
        side: of a clip, in pixels.
        stride: between its frames.
        clips: to measure each setting with; more are less noisy.
        workers: numbers of loader processes to try. (default: 1, 2, 4, ... up to the CPUs that this process may use)
    """

    data: Path
    frames: int = 16
    side: int = 224
    stride: int = 4
    clips: int = 64
    workers: tuple[int, ...] = ()


def _workers(given: tuple[int, ...]) -> list[int]:
    if given:
        return sorted(set(given))
    cpus = usable_cpus()
    return sorted({min(2**power, cpus) for power in range(cpus.bit_length() + 1)})


def recommend(by_workers: dict[int, Rate]) -> int:
    """The fewest workers that give 95 % of the most."""
    most = max(rate.clips_per_second for rate in by_workers.values())
    return min(workers for workers, rate in by_workers.items() if rate.clips_per_second >= 0.95 * most)


def _compare(options: _Options) -> int:
    if min(options.frames, options.side, options.stride, options.clips, *options.workers, 1) < 1:
        raise ValueError("--frames, --side, --stride, --clips and --workers are 1 or more")
    source = Videos(root=options.data, sampling=Dense(stride=options.stride))
    size = (options.frames, options.side, options.side)
    samples = source.open(size)
    print(f"{samples!r}; {options.clips} clips a setting")
    order = [index % len(samples) for index in torch.randperm(max(options.clips, len(samples))).tolist()]
    order = order[: options.clips]
    _describe(samples, order)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[readers.Choice, Rate] = {}
    for choice in ("auto", *readers.installed()):
        rates[choice] = decode(replace(samples, source=replace(source, reader=choice)), order)
        print(f"  decoding alone, {choice:<12}{rates[choice].clips_per_cpu_second:8.1f} clips a CPU second", flush=True)
    torch.set_num_threads(threads)
    if not rates["auto"].clips:
        raise ValueError("none of these videos can be read: `python -m video.scan` says why")
    best = max(rates, key=lambda choice: rates[choice].clips_per_cpu_second)
    reader = best if rates[best].clips_per_cpu_second > 1.1 * rates["auto"].clips_per_cpu_second else "auto"
    source = replace(source, reader=reader)
    samples = replace(samples, source=source)
    by_workers: dict[int, Rate] = {}
    for workers in _workers(options.workers):
        by_workers[workers] = stream(samples, options.clips, workers)
        print(
            f"  whole loader, {workers:>3} workers {by_workers[workers].clips_per_second:8.1f} clips a second",
            flush=True,
        )
    workers = recommend(by_workers)
    twice = stream(replace(samples, source=replace(source, repeats=2)), options.clips, workers)
    print(f"  the same, 2 clips a video  {twice.clips_per_second:8.1f} clips a second ({workers} workers)")
    print(f"recommended: --workers {workers}" + (f" and Videos(reader={reader!r})" if reader != "auto" else ""))
    print("  for each training process, where the CPUs are shared out to several: --workers CPUS / PROCESSES")
    return 0


def _describe(samples: VideoSamples, order: Sequence[int]) -> None:
    """Sizes of some of the videos, and what can be made of them."""
    seen: list[readers.Track] = []
    sides: list[int] = []

    def first(track: readers.Track) -> list[int]:
        seen.append(track)
        return [0]

    for index in order[:16]:
        try:
            sides.append(min(readers.read(samples.name(index), first).shape[1:3]))
        except UnusableFileError as problem:
            print(f"  {problem}")
    if not sides:
        return
    side = statistics.median(sides)
    print(f"  short side {side:.0f} pixels, {statistics.median(track.frames for track in seen):.0f} frames (medians)")
    if side > 400:
        print("  re-encoded to a short side of 320, such videos decode several times faster: python -m video.prepare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and recommend; the exit code, 2 where it cannot be done."""
    return command.run(_Options, "video.throughput", _compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
