"""Samples in shards: the tar files of WebDataset, on a disk or in object storage, read in any order.

A sample is what lies in a shard under one key: `KEY.jpg` or `KEY.mp4`, its class as a number in `KEY.cls` or as `label`
in `KEY.json`. The key is the member's name, folders included, up to the first dot of its last part.

An index says where in a shard each member lies, so that one can be read without the others. It is kept in `index.json`
beside the shards; whoever packs them writes it, and so does `python -m convmae.shards ROOT`. Shards at a URL are
fetched as a whole when first needed, once for all processes of a node, and kept in a cache of limited size.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convmae.command import run
from convmae.data import UNLABELLED, Packed, Sample, UnusableFileError
from convmae.files import cache, write_whole, writing
from convmae.images import IMAGE_SUFFIXES, Stills
from convmae.listing import Names

log = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT = "convmae shards 1"
WAITS = (1.0, 4.0, 15.0)
"""Seconds to wait before a shard that could not be fetched is tried again; then its samples count as unusable."""


# ---- what a shard holds ----------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file in a shard: its name there, its first byte and how many there are, and the label of its sample."""

    name: str
    offset: int
    size: int
    label: int


class Shard(NamedTuple):
    """The members of a shard in order, those that hold labels left out, and its length in bytes."""

    bytes: int
    members: tuple[Member, ...]


class Index(NamedTuple):
    """What shards of a folder hold, by name, and the names of the classes, where they are known."""

    shards: dict[str, Shard]
    classes: tuple[str, ...] = ()


_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_LABELS = ("cls", "json")


def look_into(path: Path, *, accept_cut: bool = False) -> Shard:
    """Read the headers of a tar file, and the labels.

    Members without a key or without an ending are passed over, as WebDataset does.

    Raises ValueError for a file that is no tar; for one that is cut off or damaged, unless `accept_cut`: then its whole
    members count; for a key that comes twice; and for a label that is not a number.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    fields: dict[str, dict[str, bytes]] = {}
    last = key = ""
    length = path.stat().st_size
    with path.open("rb") as file:
        for entry in _entries(file, path, length, accept_cut=accept_cut):
            found = _NAME.fullmatch(entry.name)
            if found is None:
                continue
            key, ending = found[1], found[2]
            sample = samples.setdefault(key, {})
            if (sample and key != last) or ending in sample:
                raise ValueError(f"{path}: the key {key!r} comes twice; the members of a sample lie side by side")
            last, sample[ending] = key, entry
        for key, sample in samples.items():
            fields[key] = {ending: _bytes(file, sample[ending]) for ending in _LABELS if ending in sample}
    labels = {key: _label(path, key, found) for key, found in fields.items()}
    members = (
        Member(entry.name, entry.offset_data, entry.size, labels[key])
        for key, sample in samples.items()
        for ending, entry in sample.items()
        if ending not in _LABELS
    )
    return Shard(length, tuple(members))


def _entries(file: BinaryIO, path: Path, length: int, *, accept_cut: bool) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar that are wholly there; raises ValueError at the end of one that is cut off."""
    end, last, whole = 0, "", True
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.offset_data + entry.size > length:
                    whole = False
                    break
                end, last = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, entry.name
                if entry.isreg() and not entry.issparse():
                    yield entry
    except tarfile.ReadError as problem:
        if not end and length >= tarfile.BLOCKSIZE:
            raise ValueError(
                f"{path} is not a tar file ({problem}); compressed ones cannot be read in any order"
            ) from problem
        whole = False
    # tarfile takes a damaged header for the end, but a whole tar ends in a block of zeros
    file.seek(end)
    whole = whole and file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if not whole and not accept_cut:
        after = f"{last!r} is its last whole member" if last else "no member is whole"
        raise ValueError(
            f"{path} is cut off or damaged: {after}. Copy it anew, or accept what is there: "
            f"`python -m convmae.shards {path.parent} --accept-cut`"
        )


def _bytes(file: BinaryIO, entry: tarfile.TarInfo) -> bytes:
    file.seek(entry.offset_data)
    return file.read(entry.size)


def _label(path: Path, key: str, fields: Mapping[str, bytes]) -> int:
    """The label of a sample, `UNLABELLED` where it has none."""
    found: set[Any] = set()
    try:
        if "cls" in fields:
            found.add(int(fields["cls"]))
        if "json" in fields and isinstance(about := json.loads(fields["json"]), dict) and "label" in about:
            found.add(about["label"])
        (label,) = found or {UNLABELLED}
        if type(label) is not int or label < UNLABELLED:
            raise ValueError(f"{label!r}")
    except (TypeError, ValueError) as problem:
        given = ", ".join(f".{ending}: {data[:40]!r}" for ending, data in fields.items())
        raise ValueError(f"{path}: the label of {key!r} is not one number from 0 ({given})") from problem
    return label


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write a shard of samples, each a key and its members by ending, `("swim/01", {"mp4": ..., "cls": b"3"})`.

    The same samples give the same bytes. The file is there as a whole or not at all.

    Raises ValueError for a key with a dot in its last part, which readers would split there, and for one given twice.
    """
    keys: set[str] = set()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar,
    ):
        for key, members in samples:
            if key in keys or _NAME.fullmatch(f"{key}.x") is None or "." in key.rpartition("/")[2]:
                raise ValueError(f"{path}: the key {key!r} was given before, is empty or has a dot in its last part")
            keys.add(key)
            for ending in sorted(members):
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(members[ending])
                tar.addfile(entry, io.BytesIO(members[ending]))
    return path


# ---- where shards are, and their index -------------------------------------------------------------------------------


class Place(NamedTuple):
    """A folder or URL, and the shards there that are meant; None: all."""

    folder: str
    names: tuple[str, ...] | None

    @classmethod
    def of(cls, root: Path | str) -> Place:
        """Understand a folder, a tar, or a pattern of tars `name-{000000..000412}.tar`, on a disk or at a URL."""
        text = os.fspath(root)
        if re.match(r"[a-z][a-z0-9+]+:/[^/]", text):
            raise ValueError(f"root={text!r} was a URL, but a Path makes one slash of two: give it as a str")
        if not text.endswith(".tar"):
            return cls(text.rstrip("/") or "/", None)
        folder, _, pattern = text.rpartition("/")
        if "{" in folder:
            raise ValueError(f"root={text!r}: all shards lie in one folder; the pattern is in the name of the tar")
        return cls(folder or ("/" if text.startswith("/") else "."), tuple(_expanded(pattern)))

    @property
    def remote(self) -> bool:
        """Whether it is a URL."""
        return "://" in self.folder

    def path(self, name: str) -> str:
        """Where a file of the folder is."""
        return f"{self.folder.rstrip('/')}/{name}"


def _expanded(pattern: str) -> list[str]:
    """The names that a pattern with ranges of numbers stands for."""
    found = re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if found is None:
        if set("{}") & set(pattern):
            raise ValueError(f"{pattern!r} is not understood: a range of numbers looks like {{000000..000412}}")
        return [pattern]
    before, first, last, after = found.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern!r}: the range {first}..{last} is empty")
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    return [f"{before}{number:0{width}}{rest}" for number in numbers for rest in _expanded(after)]


def _filesystem(url: str) -> tuple[Any, str]:
    """What reads a URL, and its path there; raises ValueError where no installed package does."""
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise ValueError(f"{url} cannot be read: {problem}") from problem
    return found


def load_index(where: str) -> Index | None:
    """Read an index, from a path or a URL; None where there is none.

    Raises ValueError for a file that is no index, and for one that cannot be read.
    """
    try:
        if "://" in where:
            filesystem, path = _filesystem(where)
            text = filesystem.cat_file(path)
        else:
            text = Path(where).read_bytes()
    except FileNotFoundError:
        return None
    except ValueError:
        raise
    except Exception as problem:  # storage backends raise errors of their own
        raise ValueError(f"{where} cannot be read ({type(problem).__name__}: {problem})") from problem
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        shards = {
            name: Shard(shard["bytes"], tuple(Member(*member) for member in shard["members"]))
            for name, shard in found["shards"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{where} is not an index of shards ({type(problem).__name__}: {problem}): "
            f"remove it and run `python -m convmae.shards {where.rpartition('/')[0]}`"
        ) from problem
    return Index(shards, tuple(found.get("classes", ())))


def save_index(where: str, index: Index) -> None:
    """Write an index, to a path or a URL; raises ValueError where that cannot be done."""
    shards = {name: shard._asdict() for name, shard in sorted(index.shards.items())}
    text = json.dumps({"format": FORMAT, "classes": index.classes, "shards": shards}, ensure_ascii=True)
    try:
        if "://" in where:
            filesystem, path = _filesystem(where)
            filesystem.pipe_file(path, text.encode())
        else:
            write_whole(Path(where), text)
    except ValueError:
        raise
    except Exception as problem:  # storage backends raise errors of their own
        raise ValueError(
            f"{where} cannot be written ({problem or type(problem).__name__}): write it elsewhere"
        ) from problem


def index_of(place: Place, *, accept_cut: bool = False, seen: Callable[[str], None] = lambda name: None) -> Index:
    """Look into all shards of a place, several at once; those at a URL are fetched for it, once.

    `seen` is told the name of each. Raises ValueError as `look_into` does, and where there is no shard.
    """
    names = place.names or _listed(place)

    def one(name: str) -> Shard:
        if not place.remote:
            shard = look_into(Path(place.path(name)), accept_cut=accept_cut)
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                _fetch(place.path(name), path, None)
                shard = look_into(path, accept_cut=accept_cut)
        seen(name)
        return shard

    with ThreadPoolExecutor(4 if place.remote else 16) as threads:
        try:
            return Index(dict(zip(names, threads.map(one, names), strict=True)))
        except OSError as problem:
            raise ValueError(f"a shard cannot be read: {problem}") from problem
        finally:
            threads.shutdown(cancel_futures=True)


def _listed(place: Place) -> tuple[str, ...]:
    """The names of all tars of a folder, sorted; raises ValueError where there are none."""
    if place.remote:
        filesystem, path = _filesystem(place.folder)
        found = [os.path.basename(str(name)) for name in filesystem.glob(f"{path.rstrip('/')}/*.tar")]
    elif Path(place.folder).is_dir():
        found = [path.name for path in Path(place.folder).glob("[!.]*.tar")]
    else:
        raise ValueError(f"root={place.folder!r} is not a folder, nor a tar")
    if not found:
        raise ValueError(
            f"root={place.folder!r} holds no *.tar (compressed ones are no use: they cannot be read in any order)"
        )
    return tuple(sorted(found))


def _known(place: Place, where: str, root: str) -> Index:
    """The index of the shards that are meant, and of no others."""
    index = load_index(where)
    command = f"`python -m convmae.shards '{root}'`"
    if place.remote:
        _filesystem(place.folder)
        if index is None:
            raise ValueError(f"there is no {where}, and it takes reading all shards to make one: {command} does that")
        names = place.names or tuple(sorted(index.shards))
    else:
        names = place.names or _listed(place)
        sizes = {name: _size(place.path(name)) for name in names}
        if lost := [name for name, size in sizes.items() if size is None]:
            raise ValueError(f"root={place.folder!r}: there is no {_some(lost)}")
        if index is None:
            return _indexed_now(Place(place.folder, names), command)
        if place.names is None and (lost := sorted(set(index.shards) - set(names))):
            raise ValueError(f"{where} lists shards that are not there: {_some(lost)}. Fetch them, or run {command}")
        if other := [name for name in names if name in index.shards and index.shards[name].bytes != sizes[name]]:
            raise ValueError(f"{where} is of other shards: {_some(other)} had another length. Run {command}")
    if unknown := [name for name in names if name not in index.shards]:
        raise ValueError(f"{where} does not list {_some(unknown)}: run {command}")
    return Index({name: index.shards[name] for name in names}, index.classes)


def _indexed_now(place: Place, command: str) -> Index:
    began = time.monotonic()
    index = index_of(place)
    seconds = time.monotonic() - began
    log.info(
        "looked into %d shards in %.1f s, as they have no index: %s",
        len(index.shards),
        seconds,
        f"{command} writes one",
    )
    return index


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- shards at a URL -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Whole shards, fetched once for all processes of a node; those used longest ago give way.

    Args:
        folder: where they are kept, on a disk of the node's own.
        bytes: how many may be there; those that are being fetched come on top.
    """

    folder: Path
    bytes: int

    def open(self, url: str, size: int) -> BinaryIO:
        """A shard of so many bytes, open, so that it can be read even if it gives way meanwhile.

        Raises OSError where it cannot be fetched in several tries.
        """
        mark = hashlib.sha256(f"{url} {size}".encode()).hexdigest()[:16]
        path = self.folder / f"{mark}-{url.rpartition('/')[2]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if found := _used(path):
            return found
        with _locked(path.with_name(f".{path.name}.lock")):
            return _used(path) or self._fetched(url, size, path)

    def _fetched(self, url: str, size: int, path: Path) -> BinaryIO:
        part = path.with_name(f".{path.name}.part")  # what a killed process leaves, the next one overwrites
        try:
            _fetch(url, part, size)
            file = part.open("rb")
            with _locked(self.folder / ".lock"):
                self._make_room(size)
                part.replace(path)
            return file
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        kept = [(path.stat(), path) for path in self.folder.glob("[!.]*")]
        excess = sum(status.st_size for status, _ in kept) + size - self.bytes
        for status, path in sorted(kept, key=lambda one: one[0].st_mtime_ns):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= status.st_size


def _used(path: Path) -> BinaryIO | None:
    """A file of the cache, open, marked as used now; None where it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    os.utime(file.fileno())
    return file


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this node; the system lets go when a process ends, however it does."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, path: Path, size: int | None) -> None:
    """Fetch a file; raises OSError where it is not there, or several tries have failed or given another length."""
    for wait in (*WAITS, None):
        try:
            filesystem, source = _filesystem(url)
            filesystem.get_file(source, str(path))
            if size is not None and path.stat().st_size != size:
                raise OSError(f"{path.stat().st_size} bytes came, and its index says {size}")
            return
        except FileNotFoundError as problem:
            raise OSError(f"there is no {url}") from problem
        except Exception as problem:  # storage backends raise errors of their own
            if wait is None:
                reason = " ".join(f"{type(problem).__name__}: {problem}".split())
                raise OSError(f"{url} could not be fetched in {len(WAITS) + 1} tries ({reason})") from problem
            log.warning("%s could not be fetched (%s): trying again in %g s", url, problem, wait)
            time.sleep(wait)


# ---- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Where shards are, and how they are gone through: what all sources of shards have in common.

    Args:
        root: a folder of tars, one tar, or a pattern such as `name-{000000..000412}.tar`; on a disk, or at any URL that
            an installed package of fsspec reads (s3://, gs://, https://). URLs are given as str.
        index: where the index is, if not in `index.json` beside the shards.
        lanes: see `order_of_lanes`; a multiple of the number of processes, for each of them to read shards of its own.
        window: a lane's samples are shuffled over so many of its shards.
        cache: where shards from a URL are kept; None: in `$CONVMAE_CACHE`, or else `~/.cache/convmae`.
        cache_gb: how much of it; room for `lanes * window` shards, shared by the nodes, saves fetching them twice. A
            shard is fetched within the time that a run allows for a sample (`Pretrain.sample_seconds`).
    """

    root: Path | str
    index: Path | str | None = None
    lanes: int = 64
    window: int = 4
    cache: Path | None = None
    cache_gb: float = 200

    def members(self, suffixes: Set[str]) -> Members:
        """List the samples whose member ends in one of the suffixes; without an index, local shards are looked into.

        Raises ValueError where there is no shard, one is cut off or not as the index has it, no sample has such a
        member, or a sample has two.
        """
        for name, number in (("lanes", self.lanes), ("window", self.window)):
            if number < 1:
                raise ValueError(f"{name}={number} is below 1")
        place = Place.of(self.root)
        where = place.path(INDEX) if self.index is None else os.fspath(self.index)
        index = _known(place, where, os.fspath(self.root))
        largest = max(shard.bytes for shard in index.shards.values())
        if place.remote and self.cache_gb * 1e9 < largest:
            raise ValueError(f"cache_gb={self.cache_gb} is too little for a shard of {largest / 1e9:.3g} GB")
        chosen = [_chosen(place.path(name), shard, suffixes) for name, shard in index.shards.items()]
        flat = [member for members in chosen for member in members]
        if not flat:
            raise ValueError(f"root={os.fspath(self.root)!r}: no sample has a member {' '.join(sorted(suffixes))}")
        return Members(
            shards=tuple(place.path(name) for name in index.shards),
            bytes=tuple(shard.bytes for shard in index.shards.values()),
            counts=np.array([len(members) for members in chosen], np.int64),
            names=Names.of(member.name for member in flat),
            offsets=np.array([member.offset for member in flat], np.int64),
            sizes=np.array([member.size for member in flat], np.int64),
            labels=np.array([member.label for member in flat], np.int32),
            classes=index.classes,
            lanes=self.lanes,
            window=self.window,
            cache=Cache(self.cache or cache() / "shards", int(self.cache_gb * 1e9)) if place.remote else None,
        )


def _chosen(path: str, shard: Shard, suffixes: Set[str]) -> list[Member]:
    """The one member of each sample that ends in one of the suffixes."""
    chosen: dict[str, Member] = {}
    keys: set[str] = set()
    for member in shard.members:
        found = _NAME.fullmatch(member.name)
        assert found is not None
        keys.add(found[1])
        if f".{found[2].lower()}" in suffixes:
            if found[1] in chosen:
                raise ValueError(f"{path}: which is it, {chosen[found[1]].name!r} or {member.name!r}? Pack one of them")
            chosen[found[1]] = member
    if len(chosen) < len(keys):
        log.warning("%s: %d of its %d samples have no member that is wanted", path, len(keys) - len(chosen), len(keys))
    return list(chosen.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """The samples of some shards, and where they lie.

    Args:
        shards: their paths or URLs.
        bytes: their lengths.
        counts: how many samples each holds, int64 `(shards)`.
        names: of the member of each sample.
        offsets, sizes: where in its shard it lies, int64 `(N)`.
        labels: of the samples, int32 `(N)`.
        classes: their names, where they are known.
        lanes, window: see `order_of_lanes`.
        cache: where shards from a URL are kept; None: they are on a disk.
    """

    shards: tuple[str, ...]
    bytes: tuple[int, ...]
    counts: NDArray[np.int64]
    names: Names
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
    classes: tuple[str, ...]
    lanes: int
    window: int
    cache: Cache | None

    def __len__(self) -> int:
        return len(self.names)

    def shard(self, index: int) -> int:
        """The number of the shard that a sample is in."""
        return int(np.searchsorted(np.cumsum(self.counts), index, side="right"))

    def name(self, index: int) -> str:
        """The path of a sample: its shard's, and its name in there."""
        return f"{self.shards[self.shard(index)]}/{self.names[index]}"

    def read(self, index: int) -> Packed:
        """Read a sample's bytes.

        Raises `UnusableFileError` where its shard cannot be fetched or read, or ends before.
        """
        shard, size = self.shard(index), int(self.sizes[index])
        path = self.shards[shard]
        try:
            with open(path, "rb") if self.cache is None else self.cache.open(path, self.bytes[shard]) as file:
                file.seek(int(self.offsets[index]))
                data = file.read(size)
        except OSError as problem:
            raise UnusableFileError(self.name(index), f"its shard cannot be read: {problem}") from problem
        if len(data) < size:
            raise UnusableFileError(self.name(index), "its shard is cut off")
        return Packed(self.name(index), data)

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of an epoch; see `order_of_lanes`."""
        return order_of_lanes(self.counts, self.lanes, self.window, generator)


def order_of_lanes(counts: NDArray[np.int64], lanes: int, window: int, generator: torch.Generator) -> Tensor:
    """An order of samples in shards that mixes them well, and that many processes can follow with few shards each.

    The shards are shuffled and laid end to end, and this row is cut into `lanes` equal pieces, whatever the shards'
    sizes. The place p of the order belongs to lane p mod lanes; each lane goes through its piece, shuffled in a window
    that slides over it: a sample moves by up to half a window of shards, and at the ends of the piece is thrown back.

    So a batch is drawn from all lanes at once, and a process that takes every n-th place, where n divides `lanes`,
    meets the shards of its own lanes only. Pieces of lanes that fall to the same process lie side by side: where n is
    a power of two, at most n - 1 of all shards are read by two of n processes.

    Args:
        counts: samples in each shard, int64 `(shards)`.
        lanes, window: at least 1.
        generator: all randomness comes from it.

    Returns a permutation of all indices, int64; samples are numbered through, shard by shard.
    """
    shuffled = torch.randperm(len(counts), generator=generator).numpy()
    starts, sizes = (np.cumsum(counts) - counts)[shuffled], counts[shuffled]
    total = int(sizes.sum())
    lanes = min(lanes, total)
    shard = np.repeat(np.arange(len(sizes)), sizes)
    row = np.arange(total) + (starts - (np.cumsum(sizes) - sizes))[shard]
    # Bits read backwards: neighbours have as many low bits as possible in common, and so the remainders by 2, 4, ...
    pieces = [np.arange(lane, total, lanes) for lane in sorted(range(lanes), key=lambda lane: f"{lane:064b}"[::-1])]
    piece = np.repeat(np.arange(lanes), [len(places) for places in pieces])
    stop = np.cumsum([len(places) for places in pieces])
    first, last = (shard[place][piece] for place in (np.concatenate([[0], stop[:-1]]), stop - 1))
    shift = window * (torch.rand(total, dtype=torch.float64, generator=generator).numpy() - 0.5)
    moved, end = shard - first + 0.5 + shift, last - first + 1
    moved = np.minimum(moved % (2 * end), -moved % (2 * end))  # thrown back at 0 and at the end
    order = np.empty(total, np.int64)
    order[np.concatenate(pieces)] = row[np.lexsort((moved, piece))]
    return torch.from_numpy(order)


@dataclass(frozen=True, kw_only=True)
class ImageShards(Stills, Shards):
    """Images in shards."""

    def open(self, size: tuple[int, ...]) -> ImageShardSamples:
        """List the images, to be loaded at `size`, `(H, W)` pixels.

        Raises ValueError where `size` has not two axes, and as `Shards.members` does.
        """
        self.check(size)
        return ImageShardSamples(source=self, size=(size[0], size[1]), members=self.members(IMAGE_SUFFIXES))


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageShardSamples:
    """The images of opened `ImageShards`."""

    source: ImageShards
    size: tuple[int, int]
    members: Members

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, where the index has them."""
        return self.members.classes

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return (
            f"{len(self)} images of {self.size} in {len(self.members.shards)} shards of {os.fspath(self.source.root)!r}"
        )

    def name(self, index: int) -> str:
        """The path of an image: its shard's, and its name in there."""
        return self.members.name(index)

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of an epoch; see `order_of_lanes`."""
        return self.members.order(generator)

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load one image; see `Stills.load`.

        Raises `UnusableFileError` where it cannot be fetched, or is not a whole image.
        """
        pixels = self.source.load(self.members.read(index), self.size, generator)
        return Sample(pixels, int(self.members.labels[index]))


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Write the index of shards, beside them: where in each tar the samples lie. Shards at a URL are fetched for it.

    Args:
        root: a folder of tars, one tar, or a quoted pattern 'name-{000000..000412}.tar'; on a disk or at a URL.
        to: write the index there instead.
        accept_cut: of shards that are cut off or damaged, the whole members count.
    """

    root: str
    to: str | None = None
    accept_cut: bool = False


def write_index(root: Path | str, to: str | None = None, *, accept_cut: bool = False) -> tuple[str, Index]:
    """Look into shards and write their index; gives where it is. What it said of other shards there, it goes on to say.

    Raises ValueError as `look_into` does, and where it cannot be written.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    place = Place.of(root)
    where = place.path(INDEX) if to is None else to
    before = load_index(where) or Index({})
    place = Place(place.folder, place.names or _listed(place))
    assert place.names is not None
    console, columns = Console(stderr=True), (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("shards", total=len(place.names))
        found = index_of(place, accept_cut=accept_cut, seen=lambda name: progress.advance(task))
    others = {} if Place.of(root).names is None else before.shards
    save_index(where, Index({**others, **found.shards}, before.classes))
    return where, found


def _write(options: _Options) -> int:
    where, index = write_index(options.root, options.to, accept_cut=options.accept_cut)
    members = sum(len(shard.members) for shard in index.shards.values())
    print(f"{where}: {members} members in {len(index.shards)} shards")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the index of the shards that the command line names; the exit code, 2 where it cannot be done."""
    return run(_Options, "convmae.shards", _write, arguments)


if __name__ == "__main__":
    sys.exit(main())
