"""Shards: what WebDataset writes is read and the other way round, from disks and URLs, in an order for many nodes."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convmae import shards
from convmae.data import Packed, Stream, UnusableFileError, generator
from convmae.demo import clip
from convmae.images import read
from convmae.shards import Cache, ImageShards, Place, load_index, look_into, main, order_of_lanes, write_shard
from video.clips import Dense
from video.demo import encode
from video.shards import VideoShards
from video.videos import Videos

SIZE = (32, 32)


def picture(number: int) -> bytes:
    pixels = np.full((40, 48, 3), number * 5 % 256, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def samples(first: int, stop: int) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for number in range(first, stop):
        yield f"class{number % 3}/{number:04}", {"png": picture(number), "cls": str(number % 3).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of five pictures, and their index."""
    root = tmp_path / "shards"
    for number in range(4):
        write_shard(root / f"s-{number:03}.tar", samples(5 * number, 5 * number + 5))
    assert main([str(root)]) == 0
    return root


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WAITS", (0.0, 0.0))


# ---- what a shard holds ----------------------------------------------------------------------------------------------


def test_what_webdataset_writes_is_read_here(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            member = {"cls": number % 2} if number % 2 else {"json": {"label": 0, "caption": "grey"}}
            writer.write({"__key__": f"in/{number}", "PNG" if number == 4 else "png": picture(number), **member})
    opened = ImageShards(root=tmp_path).open(SIZE)
    assert [opened.name(index) for index in (0, 6)] == [
        f"{tmp_path}/w-000.tar/in/0.png",
        f"{tmp_path}/w-002.tar/in/6.png",
    ]
    assert opened.members.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for index in range(7):
        assert opened.members.read(index).data == picture(index)


def test_what_is_written_here_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    long = "folder/" * 20 + "name"
    path = write_shard(tmp_path / "a.tar", [*samples(0, 3), (long, {"png": picture(9), "cls": b"7"})])
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [one["__key__"] for one in found] == ["class0/0000", "class1/0001", "class2/0002", long]
    assert [one["cls"] for one in found] == [b"0", b"1", b"2", b"7"]
    assert [one["png"] for one in found] == [picture(number) for number in (0, 1, 2, 9)]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    turned = ((key, dict(reversed(list(members.items())))) for key, members in samples(0, 4))
    first, second = write_shard(tmp_path / "a.tar", samples(0, 4)), write_shard(tmp_path / "b.tar", turned)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] in (["a.tar", "b.tar"], ["b.tar", "a.tar"])


@pytest.mark.parametrize("key", ["", "a/b.c", "folder/", ".hidden"])
def test_a_key_that_readers_would_split_is_refused_and_leaves_no_file(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="a dot in its last part"):
        write_shard(tmp_path / "a.tar", [("good", {"png": b""}), (key, {"png": b""})])
    assert not list(tmp_path.iterdir())


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b""), ("a.png", b"")], "'a' comes twice"),
        ([("a.png", b""), ("b.png", b""), ("a.cls", b"1")], "'a' comes twice"),
        ([("a.png", b""), ("a.cls", b"cat")], r"label of 'a' is not one number from 0 \(.cls: b'cat'\)"),
        ([("a.png", b""), ("a.json", b'{"label": "cat"}')], "is not one number"),
        ([("a.png", b""), ("a.json", b'{"label": 2}'), ("a.cls", b"1")], "is not one number"),
        ([("a.png", b""), ("a.json", b"{")], "is not one number"),
        ([("a.png", b""), ("a.jpg", b"")], "which is it, 'a.png' or 'a.jpg'"),
        ([("a.txt", b"")], "no sample has a member"),
    ],
)
def test_a_shard_that_can_be_misunderstood_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        ImageShards(root=tmp_path).open(SIZE)


def test_unlabelled_samples_and_members_without_a_key_are_fine(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [(".hidden", b""), ("README", b""), ("v1.5/a.png", b"x"), ("v1.5/a.seg.png", b"")])
    assert [member.name for member in look_into(path).members] == ["v1.5/a.png", "v1.5/a.seg.png"]
    opened = ImageShards(root=path).open(SIZE)
    assert len(opened) == 1
    assert opened.members.labels.tolist() == [-1]


@pytest.mark.parametrize("at", [0, 100, 512, 600, 1024, 1500, 3 * 1024, "no end"])
def test_a_shard_that_is_cut_off_is_refused_and_its_last_whole_member_named(tmp_path: Path, at: int | str) -> None:
    path = write_shard(tmp_path / "a.tar", samples(0, 3))
    whole = look_into(path)
    end = whole.members[-1].offset + 512  # the pictures are below 512 bytes
    cut = end if at == "no end" else int(at)
    os.truncate(path, cut)
    with pytest.raises(ValueError, match=r"a\.tar is cut off or damaged: .*whole") as refused:
        ImageShards(root=tmp_path).open(SIZE)
    entries = sorted((entry.offset_data + entry.size, entry.name) for entry in entries_of(write_again(tmp_path)))
    last = [name for stop, name in entries if stop <= cut]
    assert (repr(last[-1]) if last else "no member") in str(refused.value)
    members = look_into(path, accept_cut=True).members
    assert members == tuple(member for member in whole.members if member.offset + member.size <= cut)


def write_again(folder: Path) -> Path:
    return write_shard(folder / "again" / "a.tar", samples(0, 3))


def entries_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as file:
        return file.getmembers()


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", samples(0, 3))
    second = look_into(path).members[1]
    with path.open("r+b") as file:
        file.seek(second.offset - 512)
        file.write(b"\xff" * 512)
    with pytest.raises(ValueError, match=r"'class1/0001.cls' is its last whole member"):
        look_into(path)


def test_what_is_no_tar_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(os.urandom(4096))
    with pytest.raises(ValueError, match="is not a tar file"):
        ImageShards(root=tmp_path).open(SIZE)


# ---- where shards are, and their index -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "folder", "names"),
    [
        ("s3://bucket/k400-{0008..0010}.tar", "s3://bucket", ("k400-0008.tar", "k400-0009.tar", "k400-0010.tar")),
        ("/data/a-{8..10}.tar", "/data", ("a-8.tar", "a-9.tar", "a-10.tar")),
        ("x/{0..1}-{00..01}.tar", "x", ("0-00.tar", "0-01.tar", "1-00.tar", "1-01.tar")),
        ("a.tar", ".", ("a.tar",)),
        ("https://host/data/", "https://host/data", None),
        (Path("/data"), "/data", None),
    ],
)
def test_a_root_is_a_folder_a_tar_or_a_pattern(root: Path | str, folder: str, names: tuple[str, ...] | None) -> None:
    assert Place.of(root) == Place(folder, names)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("a-{3..1}.tar", "the range 3..1 is empty"),
        ("a-{x,y}.tar", r"a range of numbers looks like \{000000\.\.000412\}"),
        ("{0..1}/a.tar", "all shards lie in one folder"),
        (Path("s3://bucket/a.tar"), "give it as a str"),
        ("nowhere", "not a folder, nor a tar"),
        ("nowhere/a.tar", "there is no a.tar"),
        ("nothing://bucket", "Protocol not known"),
    ],
)
def test_a_root_that_leads_nowhere_is_refused(root: Path | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageShards(root=root).open(SIZE)


def test_a_missing_backend_is_named() -> None:
    with pytest.raises(ValueError, match="dvc"):
        ImageShards(root="dvc://bucket").open(SIZE)


def test_shards_open_without_an_index_and_say_how_to_make_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_index = ImageShards(root=folder).open(SIZE).members
    assert not caplog.records
    (folder / "index.json").unlink()
    with caplog.at_level(logging.INFO):
        without = ImageShards(root=folder).open(SIZE).members
    assert f"python -m convmae.shards '{folder}'` writes one" in caplog.text
    assert without.names == with_index.names
    for name in ("counts", "offsets", "sizes", "labels"):
        assert np.array_equal(getattr(without, name), getattr(with_index, name)), name
    assert not (folder / "index.json").exists()


def test_an_index_that_does_not_fit_is_refused(folder: Path) -> None:
    write_shard(folder / "s-004.tar", samples(20, 21))
    with pytest.raises(ValueError, match=r"does not list s-004\.tar: run `python -m convmae\.shards"):
        ImageShards(root=folder).open(SIZE)
    assert len(ImageShards(root=f"{folder}/s-{{000..003}}.tar").open(SIZE)) == 20
    assert main([f"{folder}/s-004.tar"]) == 0
    assert len(ImageShards(root=folder).open(SIZE)) == 21

    os.truncate(folder / "s-002.tar", 700)
    with pytest.raises(ValueError, match=r"s-002\.tar had another length"):
        ImageShards(root=folder).open(SIZE)

    (folder / "s-002.tar").unlink()
    with pytest.raises(ValueError, match=r"lists shards that are not there: s-002\.tar"):
        ImageShards(root=folder).open(SIZE)

    (folder / "index.json").write_text('{"shardlist": []}')
    with pytest.raises(ValueError, match="is not an index of shards"):
        ImageShards(root=folder).open(SIZE)


def test_the_command_says_what_is_wrong_and_accepts_what_is_cut_off_when_told_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(folder / "s-001.tar", 3000)
    assert main([str(folder)]) == 2
    assert "s-001.tar is cut off or damaged" in capsys.readouterr().err
    assert main([str(folder), "--accept-cut", "--to", str(folder / "cut.json")]) == 0
    opened = ImageShards(root=folder, index=folder / "cut.json").open(SIZE)
    assert 15 < len(opened) < 20
    assert opened.load(len(opened) - 1, generator(0)).pixels.shape == (3, *SIZE)


# ---- shards at a URL -------------------------------------------------------------------------------------------------


def test_shards_at_a_url_give_what_shards_on_a_disk_give(folder: Path, tmp_path: Path) -> None:
    near = ImageShards(root=folder).open(SIZE)
    far = ImageShards(root=f"file://{folder}", cache=tmp_path / "cache").open(SIZE)
    assert far.name(7) == f"file://{folder}/s-001.tar/class1/0007.png"
    for index in (19, 0, 7, 8):
        one, other = near.load(index, generator(index)), far.load(index, generator(index))
        assert one.label == other.label
        assert one.pixels.equal(other.pixels)
    kept = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert sorted(path.name[-9:] for path in kept) == ["s-000.tar", "s-001.tar", "s-003.tar"]


def test_the_command_makes_the_index_of_shards_at_a_url(folder: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    with pytest.raises(ValueError, match=r"there is no memory://bucket/index\.json.*`python -m convmae\.shards"):
        ImageShards(root="memory://bucket").open(SIZE)
    assert main(["memory://bucket"]) == 0
    assert load_index("memory://bucket/index.json") == load_index(str(folder / "index.json"))
    opened = ImageShards(root="memory://bucket/s-{001..002}.tar", cache=tmp_path).open(SIZE)
    assert opened.members.read(9).data == picture(14)


def test_shards_come_over_http(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        opened = ImageShards(root=f"http://127.0.0.1:{port}", cache=tmp_path / "cache").open(SIZE)
        assert opened.members.read(13).data == picture(13)
    finally:
        server.kill()
        server.wait()


def test_what_was_used_longest_ago_gives_way_and_stays_readable_for_those_who_hold_it(
    folder: Path, tmp_path: Path
) -> None:
    size = (folder / "s-000.tar").stat().st_size
    cache = Cache(tmp_path / "cache", 2 * size)
    urls = [f"file://{folder}/s-{number:03}.tar" for number in range(4)]

    def kept() -> list[str]:
        return sorted(path.name[-7:-4] for path in (tmp_path / "cache").glob("[!.]*"))

    held = cache.open(urls[0], size)
    cache.open(urls[1], size).close()
    cache.open(urls[0], size).close()
    cache.open(urls[2], size).close()
    assert kept() == ["000", "002"]
    cache.open(urls[3], size).close()
    cache.open(urls[1], size).close()
    assert kept() == ["001", "003"]
    with held:
        assert held.read() == (folder / "s-000.tar").read_bytes()


def test_a_cache_too_small_for_a_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too little for a shard"):
        ImageShards(root=f"file://{folder}", cache=tmp_path / "cache", cache_gb=1e-6).open(SIZE)


def test_several_processes_fetch_a_shard_once_and_none_reads_a_part(folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from convmae import shards
fetch, fetched = shards._fetch, []
def counting(url, path, size):
    fetched.append(url)
    fetch(url, path, size)
shards._fetch = counting
samples = shards.ImageShards(root="file://{folder}", cache=shards.Path({str(tmp_path / "cache")!r})).open({SIZE})
print("ready", flush=True)
sys.stdin.readline()
for index in list(range(20)) * 3:
    assert len(samples.members.read(index).data) > 50
print(len(fetched))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert sum(map(int, outs)) == 4


def test_a_shard_that_cannot_be_fetched_is_blamed_and_what_a_killed_process_left_does_not_matter(
    folder: Path, tmp_path: Path, impatient: None
) -> None:
    samples_ = ImageShards(root=f"file://{folder}", cache=tmp_path / "cache").open(SIZE)
    samples_.load(0, generator(0))
    for left in list((tmp_path / "cache").glob("[!.]*")):
        left.rename(left.with_name(f".{left.name}.part"))
    assert samples_.members.read(0).data == picture(0)

    (folder / "s-001.tar").unlink()
    with pytest.raises(UnusableFileError, match=r"s-001\.tar/class2/0005\.png: .* there is no file://.*s-001\.tar"):
        samples_.load(5, generator(0))
    os.truncate(folder / "s-002.tar", 1000)
    with pytest.raises(UnusableFileError, match=r"could not be fetched in 3 tries \(OSError: 1000 bytes came"):
        samples_.load(10, generator(0))
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def test_a_fetch_that_fails_is_tried_again(
    folder: Path, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    fetch, tries = LocalFileSystem.get_file, []

    def shaky(self: LocalFileSystem, source: str, target: str) -> None:
        tries.append(source)
        if len(tries) < 3:
            raise ConnectionError("reset by peer")
        fetch(self, source, target)

    monkeypatch.setattr(LocalFileSystem, "get_file", shaky)
    samples_ = ImageShards(root=f"file://{folder}", cache=tmp_path / "cache").open(SIZE)
    assert samples_.members.read(0).data == picture(0)
    assert len(tries) == 3


def test_a_local_shard_that_is_gone_or_shorter_is_blamed(folder: Path) -> None:
    samples_ = ImageShards(root=folder).open(SIZE)
    os.truncate(folder / "s-000.tar", 1000)
    (folder / "s-001.tar").unlink()
    with pytest.raises(UnusableFileError, match="its shard is cut off"):
        samples_.load(4, generator(0))
    with pytest.raises(UnusableFileError, match=r"its shard cannot be read: .*No such file"):
        samples_.load(5, generator(0))


# ---- the order of an epoch -------------------------------------------------------------------------------------------

SIZES = {
    "one": [5],
    "empty ones": [0, 3, 0, 2, 0],
    "tiny": [1] * 300,
    "uneven": np.random.default_rng(0).integers(1, 60, 412).tolist(),
    "even": [40] * 128,
    "one large": [3, 1000, 2, 1],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("lanes", "window"), [(64, 4), (1, 1), (7, 3), (1000, 2)])
def test_the_order_is_a_permutation_for_any_sizes(sizes: list[int], lanes: int, window: int) -> None:
    order = order_of_lanes(np.array(sizes), lanes, window, generator(1))
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(sum(sizes)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("world", [1, 2, 4, 8, 64])
def test_processes_read_shards_of_their_own(sizes: list[int], world: int) -> None:
    order = order_of_lanes(np.array(sizes), 64, 4, generator(2)).numpy()
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    own = [set(shard[rank::world]) for rank in range(world)]
    assert sum(map(len, own)) - len(set(shard)) <= world - 1


def test_epochs_differ_and_follow_from_the_generator_alone() -> None:
    counts = np.array(SIZES["uneven"])
    first, again, second = (order_of_lanes(counts, 64, 4, generator(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert (first == second).float().mean() < 0.01


def test_a_batch_is_of_many_shards_and_a_lane_needs_few_at_a_time() -> None:
    sizes, lanes, window = [100] * 256, 16, 4
    order = order_of_lanes(np.array(sizes), lanes, window, generator(3)).numpy()
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    mixed = [len(set(batch)) / lanes for batch in np.split(shard, 100)]  # of 256: 16 of each lane
    assert min(mixed) > 1.5  # at the ends of an epoch
    assert min(mixed[15:85]) > 3
    for lane in range(lanes):
        own = shard[lane::lanes]
        places = {number: np.flatnonzero(own == number) for number in set(own)}
        assert len(places) == 16
        for place in places.values():  # whole shards here, and each is done with after a window
            assert len(place) == 100
            assert place[-1] - place[0] < 100 * (window + 1)


def test_a_lane_does_not_keep_the_order_in_which_shards_were_packed() -> None:
    order = order_of_lanes(np.array([200] * 32), 1, 4, generator(4)).numpy()
    places = np.empty(order.size, int)
    places[order] = np.arange(order.size)
    within = places.reshape(32, 200)
    correlations = [np.corrcoef(np.arange(200), one)[0, 1] for one in within]
    assert abs(float(np.mean(correlations))) < 0.05


# ---- clips -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips in three shards, and the same as files; one of them damaged."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(12):
        path = root / "files" / f"{number % 2}" / f"{number:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, clip("up", np.random.default_rng(number), frames=12, size=48))
    (root / "files" / "1" / "05.mp4").write_bytes(b"no video" * 100)
    for shard in range(3):
        paths = [root / "files" / f"{number % 2}" / f"{number:02}.mp4" for number in range(4 * shard, 4 * shard + 4)]
        write_shard(
            root / "shards" / f"{shard}.tar",
            ((path.stem, {"mp4": path.read_bytes(), "cls": path.parent.name.encode()}) for path in paths),
        )
    return root


def source(root: Path | str) -> VideoShards:
    return VideoShards(root=root, sampling=Dense(stride=2), lanes=4, window=2)


def test_a_clip_of_a_packed_video_is_that_of_the_file(packed: Path) -> None:
    from_shards = source(packed / "shards").open((4, *SIZE))
    from_files = Videos(root=packed / "files", sampling=Dense(stride=2)).open((4, *SIZE))
    places = {Path(from_files.name(index)).name: index for index in range(12)}
    for index in (0, 3, 11):
        one = from_shards.load(index, generator(index))
        other = from_files.load(places[Path(from_shards.name(index)).name], generator(index))
        assert one.label == other.label
        assert one.pixels.equal(other.pixels)
    with pytest.raises(UnusableFileError, match=r"shards/1\.tar/05\.mp4: not a video"):
        from_shards.load(5, generator(0))


def test_batches_of_shards_are_the_same_for_any_number_of_workers_and_processes(packed: Path, tmp_path: Path) -> None:
    samples_ = VideoShards(
        root=f"file://{packed}/shards/{{0..2}}.tar",
        index=packed / "shards" / "index.json",
        sampling=Dense(stride=2),
        lanes=4,
        cache=tmp_path / "cache",
    )
    assert main([str(packed / "shards")]) == 0
    opened = samples_.open((4, *SIZE))
    whole = Stream(opened, (4, *SIZE), seed=3, batch_size=4)
    alone = [batch for step in whole.batches(0, 6, workers=0) for batch in step]
    beside = [batch for step in whole.batches(0, 6, workers=2) for batch in step]
    assert sum(len(batch.skipped) for batch in alone) == 2
    for one, other in zip(alone, beside, strict=True):
        assert one.pixels.equal(other.pixels)
        assert one.labels.equal(other.labels)
        assert [str(problem) for problem in one.skipped] == [str(problem) for problem in other.skipped]
    ranks = [Stream(opened, (4, *SIZE), seed=3, batch_size=4, rank=rank, world=2) for rank in range(2)]
    shares = [{number for step in range(6) for part in rank.share(step) for number in part} for rank in ranks]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(range(24))


def test_the_wrong_shape_of_input_is_refused(packed: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"VideoShards loads \(T, H, W\) clips"):
        source(packed / "shards").open(SIZE)
    with pytest.raises(ValueError, match=r"ImageShards loads \(H, W\) pixels"):
        ImageShards(root=folder).open((4, *SIZE))
    with pytest.raises(ValueError, match=r"no sample has a member \.3gp"):
        VideoShards(root=folder).open((4, *SIZE))
    with pytest.raises(ValueError, match="lanes=0 is below 1"):
        ImageShards(root=folder, lanes=0).open(SIZE)


def test_an_opened_source_pickles_and_an_index_is_json_that_others_can_read(folder: Path) -> None:
    import pickle

    opened = ImageShards(root=folder).open(SIZE)
    again = pickle.loads(pickle.dumps(opened))
    assert again.load(3, generator(0)).pixels.equal(opened.load(3, generator(0)).pixels)
    found = json.loads((folder / "index.json").read_text())["shards"]["s-000.tar"]
    name, offset, size, label = found["members"][1]
    with (folder / "s-000.tar").open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    assert (name, data, label) == ("class1/0001.png", picture(1), 1)
    assert read(Packed(name, data)).shape == (3, 40, 48)
