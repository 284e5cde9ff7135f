"""Batches: the same ones whoever loads them, however often it is stopped, and whatever a file does to its decoder."""

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch
from media import MEDIA, needs_media
from torch import Tensor

from convmae import data
from convmae.data import Batch, Sample, StartMethod, Stream
from video.videos import Videos


@dataclass(frozen=True)
class Numbered:
    """Samples that show their index and a random number."""

    count: int
    repeats: int = 1

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"number {index}"

    def load(self, index: int, generator: torch.Generator) -> Sample:
        pixels = torch.randint(256, (self.repeats, 3, 2, 2), generator=generator).byte()
        pixels[:, 0] = index
        return Sample(pixels if self.repeats > 1 else pixels[0], index)


@dataclass(frozen=True)
class Troubled(Numbered):
    """Samples of which some do to their process what decoders do on damaged files."""

    hangs: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    home: int = 0

    def load(self, index: int, generator: torch.Generator) -> Sample:
        if index in self.hangs:
            time.sleep(1000)
        if index in self.dies and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().load(index, generator)


@dataclass(frozen=True)
class Backwards(Numbered):
    """Samples with an order of their own."""

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.arange(self.count).flip(0)


def random_mask(generator: torch.Generator) -> Tensor:
    return torch.rand(1, 2, 2, generator=generator) < 0.5


def taken(stream: Stream, start: int, stop: int, workers: int = 0, **how: object) -> list[list[Batch]]:
    return list(stream.batches(start, stop, workers=workers, **how))  # type: ignore[arg-type]


def assert_same(some: list[list[Batch]], others: list[list[Batch]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left.pixels, right.pixels)
            assert torch.equal(left.labels, right.labels)
            assert (left.mask is None) == (right.mask is None)
            assert left.mask is None or right.mask is None or torch.equal(left.mask, right.mask)
            assert [str(problem) for problem in left.skipped] == [str(problem) for problem in right.skipped]


def labels(batches: list[list[Batch]]) -> list[int]:
    return [int(label) for step in batches for batch in step for label in batch.labels]


# --- the same batches -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real clips in two classes, with some that cannot be used among them."""
    root = tmp_path_factory.mktemp("mixed")
    for place, path in enumerate(sorted((MEDIA / "clips").glob("*.*"))):
        if path.suffix != ".json" and "1080p" not in path.name and "720p" not in path.name:
            folder = root / f"class {place % 2}"
            folder.mkdir(exist_ok=True)
            (folder / path.name).symlink_to(path)
    for name in ("zero_bytes.mp4", "corrupt_moov.mp4", "text.mp4"):
        (root / "class 0" / name).symlink_to(MEDIA / "bad" / name)
    return root


@needs_media
@pytest.mark.slow
def test_real_clips_come_in_the_same_batches_from_any_number_of_workers_forked_or_spawned(mixed: Path) -> None:
    size = (4, 64, 64)
    samples = Videos(root=mixed, repeats=2, flip=True).open(size)
    stream = Stream(samples, size, seed=3, batch_size=8, micro_batch=4, draw_mask=random_mask)
    steps = math.ceil(len(samples) / stream.drawn)
    alone = taken(stream, 0, steps)
    skipped = {Path(problem.name).name for step in alone for batch in step for problem in batch.skipped}
    assert skipped == {"zero_bytes.mp4", "corrupt_moov.mp4", "text.mp4"}
    methods: tuple[tuple[int, StartMethod], ...] = ((1, "fork"), (4, "fork"), (1, "spawn"), (4, "spawn"))
    for workers, method in methods:
        assert_same(alone, taken(stream, 0, steps, workers, method=method))
    middle = steps // 2
    assert_same(alone, taken(stream, 0, middle, 1) + taken(stream, middle, steps, 4))


@needs_media
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_real_clips_out_without_overlap_or_loss(mixed: Path, world: int) -> None:
    size = (2, 32, 32)
    samples = Videos(root=mixed).open(size)
    whole = Stream(samples, size, seed=1, batch_size=len(samples))
    parts = [Stream(samples, size, seed=1, batch_size=len(samples), rank=rank, world=world) for rank in range(world)]
    shares = [taken(part, 0, 1)[0][0] for part in parts]
    [[batch]] = taken(whole, 0, 1)
    usable = iter(batch.pixels)
    names = whole.named(range(len(samples)))
    unusable = {problem.name for problem in batch.skipped}
    arriving = [iter(share.pixels) for share in shares]
    for place, name in enumerate(names):
        if name not in unusable:
            assert torch.equal(next(usable), next(arriving[place % world]))
    assert all(next(share, None) is None for share in arriving)
    assert sum(len(share.skipped) for share in shares) == len(unusable) == 3


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    stream = Stream(Numbered(10), (2, 2), seed=0, batch_size=4)
    seen = labels(taken(stream, 0, 5))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_samples_may_have_an_order_of_their_own() -> None:
    assert labels(taken(Stream(Backwards(6), (2, 2), seed=0, batch_size=3), 0, 2)) == [5, 4, 3, 2, 1, 0]


# --- micro-batches ----------------------------------------------------------------------------------------------------


def of_all(shares: list[list[list[int]]]) -> list[list[int]]:
    """The samples of each micro-batch, of all processes together."""
    return [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "sizes"),
    [
        (65, 64, [33, 32]),
        (64, 64, [64]),
        (128, 64, [64, 64]),
        (129, 64, [43, 43, 43]),
        (21, 5, [5, 4, 4, 4, 4]),
        (3, 1, [1, 1, 1]),
        (3, 8, [3]),
        (3, None, [3]),
    ],
)
def test_a_share_is_cut_evenly(batch_size: int, micro_batch: int | None, sizes: list[int]) -> None:
    for times in (1, 2):
        samples, most = Numbered(200, repeats=times), micro_batch and times * micro_batch
        stream = Stream(samples, (2, 2), seed=0, batch_size=times * batch_size, micro_batch=most)
        assert [len(numbers) for numbers in stream.share(3)] == sizes
        assert stream.most == times * sizes[0]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 5, 16])
def test_no_micro_batch_is_too_large_nor_far_smaller_and_all_processes_have_as_few_as_can_be(
    world: int, micro_batch: int
) -> None:
    for batch_size in range(1, 70):
        streams = [Stream(Numbered(9), (2, 2), 0, batch_size, rank, world, micro_batch) for rank in range(world)]
        shares = [stream.share(2) for stream in streams]
        own = -(-batch_size // world)
        assert {len(share) for share in shares} == {-(-own // micro_batch)}
        sizes = [len(numbers) for numbers in shares[0]]
        assert {stream.most for stream in streams} == {max(sizes)}
        assert max(sizes) <= micro_batch
        assert max(sizes) - min(sizes) <= 1
        assert list(chain(*of_all(shares))) == list(range(2 * batch_size, 3 * batch_size)), "in order"


@pytest.mark.parametrize(
    ("one", "other"), [((1, 8), (2, 4)), ((1, 8), (8, 1)), ((2, 6), (4, 3)), ((1, None), (3, None))]
)
def test_where_shares_are_equal_micro_batches_of_all_processes_are_the_same_on_other_layouts(
    one: tuple[int, int | None], other: tuple[int, int | None]
) -> None:
    found = []
    for world, micro_batch in (one, other):
        ranks = [Stream(Numbered(50), (2, 2), 0, 24, rank, world, micro_batch).share(1) for rank in range(world)]
        found.append(of_all(ranks))
    assert found[0] == found[1]


# --- several clips of a sample ----------------------------------------------------------------------------------------


def test_a_sample_may_give_several_clips_each_with_its_mask() -> None:
    stream = Stream(Numbered(6, repeats=2), (2, 2), seed=0, batch_size=4, micro_batch=2, draw_mask=random_mask)
    assert stream.steps_in(1) == 3
    batches = taken(stream, 0, 3, workers=1)
    assert sorted(labels(batches)) == sorted(2 * list(range(6)))
    for [batch, _] in batches:
        assert batch.pixels.shape == (2, 3, 2, 2)
        assert batch.labels[0] == batch.labels[1]
        assert (batch.pixels[0, 1] != batch.pixels[1, 1]).any()
        assert batch.mask is not None
        assert batch.mask.shape == (2, 2, 2)


def test_a_batch_that_would_cut_a_sample_in_two_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=5 is not a multiple of the data's repeats=2"):
        Stream(Numbered(6, repeats=2), (2, 2), seed=0, batch_size=5)
    with pytest.raises(ValueError, match="micro_batch=3 is not a multiple"):
        Stream(Numbered(6, repeats=2), (2, 2), seed=0, batch_size=4, micro_batch=3)


# --- processes that are lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (Troubled(12, hangs=(5,)), "took more than 1 s to load"),
        (Troubled(12, dies=(5,), home=os.getpid()), "ended the process that loaded it (SIGSEGV)"),
    ],
    ids=["hangs", "dies"],
)
def test_a_sample_that_takes_its_process_with_it_is_skipped_and_nothing_else(
    samples: Troubled, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(samples, (2, 2), seed=0, batch_size=3, draw_mask=random_mask)
    loaded = taken(stream, 0, 8, workers=2, seconds=1.0)
    skipped = [problem for step in loaded for batch in step for problem in batch.skipped]
    assert [(problem.name, problem.reason) for problem in skipped] == [("number 5", said)] * 2  # once an epoch
    met = len([message for message in caplog.messages if "number 5" in message])
    assert met == (2 if samples.hangs else 1)  # a crash is remembered; what is late may have other reasons
    sound = taken(Stream(Numbered(12), (2, 2), seed=0, batch_size=3, draw_mask=random_mask), 0, 8)
    assert labels(loaded) == [label for label in labels(sound) if label != 5]
    for [one], [other] in zip(loaded, sound, strict=True):
        kept = other.labels != 5
        assert torch.equal(one.pixels, other.pixels[kept])
        assert one.mask is not None
        assert other.mask is not None
        assert torch.equal(one.mask, other.mask[kept])


def test_where_every_process_dies_it_is_said_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MOST_DEATHS", 3)
    samples = Troubled(100, dies=tuple(range(100)), home=os.getpid())
    with pytest.raises(RuntimeError, match=r"[4-8] loader processes have died; the last over number \d+, which ended"):
        taken(Stream(samples, (2, 2), seed=0, batch_size=1), 0, 100, workers=4)


def test_a_lost_process_is_not_announced_in_the_middle_of_a_step() -> None:
    samples = Troubled(8, dies=(2,), home=os.getpid())
    stream = Stream(samples, (2, 2), seed=0, batch_size=1)
    before = signal.getsignal(signal.SIGCHLD)
    seen = []
    for [batch] in stream.batches(0, 8, workers=1):
        seen.append(len(batch.labels))
        time.sleep(0.2)  # a process that dies does so now; torch's own handler would raise here
    assert sorted(seen) == [0, *[1] * 7]
    assert signal.getsignal(signal.SIGCHLD) == before


def test_an_error_of_the_data_code_itself_is_not_taken_for_a_bad_file() -> None:
    stream = Stream(Mistaken(4), (2, 2), seed=0, batch_size=2)
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a mistake"):
            taken(stream, 0, 2, workers=workers)


@dataclass(frozen=True)
class Mistaken(Numbered):
    def load(self, index: int, generator: torch.Generator) -> Sample:
        raise RuntimeError("a mistake")


def test_leaving_early_leaves_no_process_behind() -> None:
    threads = threading.active_count()
    stream = Stream(Troubled(12, hangs=(3, 4, 5)), (2, 2), seed=0, batch_size=1)
    batches = stream.batches(0, 12, workers=2, seconds=600.0)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 3
    until = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= threads
