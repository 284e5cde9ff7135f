"""The field's data sets as they lie on disk, whole and with what is wrong with them in practice."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from convmae.augmentation import Flip
from video.clips import Segments
from video.datasets import HMDB51, UCF101, Kinetics, SomethingSomething
from video.demo import encode


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(root: Path, name: str, content: str | list[Any] | dict[str, Any]) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- Kinetics ---------------------------------------------------------------------------------------------------------

ROWS = (
    "label,youtube_id,time_start,time_end,split\n"
    "abseiling,aaa_bbb-ccc,0,10,train\n"
    "zumba dance,ddd,20,30,train\n"
    "zumba dance,eee,5,15,val\n"
    "abseiling,fff,1,11,train\n"
)


@pytest.mark.parametrize("inside", ["train/abseiling", "train", "abseiling", ""])
def test_kinetics_finds_the_videos_of_its_csv_wherever_they_lie(
    tmp_path: Path, inside: str, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, f"{inside}/aaa_bbb-ccc_000000_000010.mp4".lstrip("/"), f"{inside}/ddd.mkv".lstrip("/"))
    source = Kinetics(root=tmp_path, annotations=write(tmp_path.parent, f"{tmp_path.name}.csv", ROWS))
    with caplog.at_level(logging.WARNING, "video"):
        found = source.listing()
    assert found.classes == ("abseiling", "zumba dance")
    assert [Path(name).name for name in found.files] == ["aaa_bbb-ccc_000000_000010.mp4", "ddd.mkv"]
    assert all((source.base / name).is_file() for name in found.files)
    assert found.labels.tolist() == [0, 1]
    assert any("1 of 3 videos" in message for message in caplog.messages)


def test_kinetics_without_a_csv_takes_folders_of_classes(tmp_path: Path) -> None:
    touch(tmp_path, "val/swim/a.mp4", "train/run/b.mp4", "train/swim/c.mp4")
    found = Kinetics(root=tmp_path).listing()
    assert (list(found.files), found.classes) == (["train/run/b.mp4", "train/swim/c.mp4"], ("run", "swim"))
    part = Kinetics(root=tmp_path, split="val").listing()
    assert (part.classes, part.labels.tolist()) == (("run", "swim"), [1])  # numbered alike in all splits


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("youtube_id,time_start,time_end,split\nx,0,10,test\n", "has no column label"),
        (ROWS + "abseiling,,0,10,train\n", r"line 6: 'abseiling,,0,10,train'"),
        (ROWS + "abseiling,x,zero,10,train\n", r"times as whole seconds:\n  line 6"),
        (ROWS.replace("train", "test"), "no row of split 'train'"),
        (ROWS, "of 3 videos .* none is below"),
    ],
)
def test_a_malformed_kinetics_csv_is_refused(tmp_path: Path, text: str, said: str) -> None:
    touch(tmp_path, "other.mp4")
    with pytest.raises(ValueError, match=said):
        Kinetics(root=tmp_path, annotations=write(tmp_path, "k.csv", text)).listing()


def test_classes_have_the_same_numbers_in_every_split_of_a_csv(tmp_path: Path) -> None:
    touch(tmp_path, "eee_000005_000015.mp4")
    found = Kinetics(root=tmp_path, split="val", annotations=write(tmp_path, "k.csv", ROWS)).listing()
    assert (found.classes, found.labels.tolist()) == (("abseiling", "zumba dance"), [1])


def test_kinetics_does_not_take_its_splits_for_classes(tmp_path: Path) -> None:
    touch(tmp_path, "val/swim/a.mp4", "train/run/b.mp4")
    for split in ("validate", None):
        with pytest.raises(ValueError, match=f"holds no split={split!r}, but train, val"):
            Kinetics(root=tmp_path, split=split).listing()


def test_a_csv_that_is_not_there_or_no_text_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "k.csv").write_bytes(b"\xff\xfe")
    for name in ("gone.csv", "k.csv"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            Kinetics(root=tmp_path, annotations=tmp_path / name).listing()


@pytest.mark.parametrize("kind", [Kinetics, SomethingSomething, UCF101, HMDB51])
def test_the_folder_above_a_root_that_is_not_there_is_not_taken_for_it(
    tmp_path: Path, kind: type[Kinetics | SomethingSomething | UCF101 | HMDB51]
) -> None:
    touch(tmp_path, "train/run/a.mp4")
    for root in (tmp_path / "gone", None):
        with pytest.raises(ValueError, match="root is not a folder with the data set"):
            kind(root=root).listing()


@pytest.mark.parametrize("kind", [Kinetics, SomethingSomething, UCF101, HMDB51])
def test_a_list_stands_in_for_the_layout_of_a_set(
    tmp_path: Path, kind: type[Kinetics | SomethingSomething | UCF101 | HMDB51]
) -> None:
    found = kind(root=write(tmp_path, "mine.csv", "a.mp4 1\nb.mp4 0\n")).listing()
    assert (list(found.files), found.labels.tolist()) == (["a.mp4", "b.mp4"], [1, 0])


def test_a_set_of_which_nothing_is_there_is_refused(tmp_path: Path) -> None:
    source = UCF101(root=write(tmp_path, "mine.csv", "".join(f"{number}.mp4 1\n" for number in range(30))))
    with pytest.raises(ValueError, match=r"UCF101: of its first 20 videos none is there, such as .*/0\.mp4"):
        source.open((2, 16, 16))
    touch(tmp_path, "19.mp4")
    assert len(source.open((2, 16, 16))) == 30  # what else is lost is counted


def test_a_csv_of_kinetics_is_no_list_of_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no files: it is for annotations="):
        Kinetics(root=write(tmp_path, "k.csv", ROWS)).listing()


@pytest.mark.parametrize("place", ["train", "mine"])
def test_kinetics_takes_no_training_videos_for_those_of_another_split(tmp_path: Path, place: str) -> None:
    touch(tmp_path, f"{place}/run/a.mp4")
    assert len(Kinetics(root=tmp_path / place).listing().files) == 1  # what is there, to train on
    assert len(Kinetics(root=tmp_path / place, split=None).listing().files) == 1
    with pytest.raises(ValueError, match="holds no split='val', but no parts at all"):
        Kinetics(root=tmp_path / place, split="val").listing()


def test_a_test_on_kinetics_counts_the_videos_that_are_not_there(tmp_path: Path) -> None:
    touch(tmp_path, "train/zumba dance/ddd.mkv")
    source = Kinetics(root=tmp_path, annotations=write(tmp_path, "k.csv", ROWS))
    assert len(source.listing().files) == 1
    found = source.as_test().listing()
    assert (len(found.files), found.labels.tolist()) == (3, [0, 1, 0])
    assert [(tmp_path / name).is_file() for name in found.files] == [False, True, False]


# --- Something-Something ----------------------------------------------------------------------------------------------

LABELS = {"Pushing something from left to right": "1", "Approaching something with your camera": "0"}
TRAIN = [
    {"id": "78687", "label": "pushing potato", "template": "Pushing [something] from left to right"},
    {"id": "42326", "label": "approaching cup", "template": "Approaching [something] with your camera"},
]


@pytest.mark.parametrize(
    ("annotations", "inside"),
    [("something-something-v2-{}.json", "20bn-something-something-v2"), ("labels/{}.json", ""), ("{}.json", "")],
)
def test_something_something_labels_by_template(tmp_path: Path, annotations: str, inside: str) -> None:
    for split, content in (("train", TRAIN), ("labels", LABELS), ("test", [{"id": "7"}])):
        write(tmp_path, annotations.format(split), content)
    touch(tmp_path / inside, "78687.webm")
    found = SomethingSomething(root=tmp_path).listing()
    assert list(found.files) == [str(Path(inside) / name) for name in ("78687.webm", "42326.webm")]
    assert found.labels.tolist() == [1, 0]
    assert found.classes == ("Approaching something with your camera", "Pushing something from left to right")
    unlabelled = SomethingSomething(root=tmp_path, split="test").listing()
    assert (list(unlabelled.files), unlabelled.labels.tolist()) == ([str(Path(inside) / "7.webm")], [-1])


def test_something_something_may_be_folders_of_frames_and_is_never_flipped(tmp_path: Path) -> None:
    write(tmp_path, "train.json", TRAIN)
    write(tmp_path, "labels.json", LABELS)
    (tmp_path / "78687").mkdir()
    assert list(SomethingSomething(root=tmp_path).listing().files) == ["78687", "42326"]
    assert SomethingSomething(root=tmp_path).sampling == Segments()
    with pytest.raises(ValueError, match="left and right tell its classes apart"):
        SomethingSomething(root=tmp_path, flip=True)
    with pytest.raises(ValueError, match="left and right tell its classes apart"):
        SomethingSomething(root=tmp_path, augment=(Flip(),))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            [*TRAIN, {"id": "9", "template": "Flying [something]"}],
            "(?s)a template that is among.*line 3.*Flying",
        ),
        ([*TRAIN, {"template": "Pushing [something] from left to right"}], "entries with an id"),
        ({"78687": 1}, "not those of Something-Something V2"),
        ("[{", "cannot be read"),
        ([], "lists no video"),
    ],
)
def test_malformed_annotations_of_something_something_are_refused(tmp_path: Path, train: Any, said: str) -> None:
    write(tmp_path, "train.json", train)
    write(tmp_path, "labels.json", LABELS)
    with pytest.raises(ValueError, match=said):
        SomethingSomething(root=tmp_path).listing()


@pytest.mark.parametrize("numbers", [("0", "x"), ("1", "2"), ("0", "0")])
def test_labels_of_something_something_are_numbered_from_0(tmp_path: Path, numbers: tuple[str, str]) -> None:
    write(tmp_path, "train.json", TRAIN)
    write(tmp_path, "labels.json", dict(zip(LABELS, numbers, strict=True)))
    with pytest.raises(ValueError, match=r"labels\.json: expected a number for each template"):
        SomethingSomething(root=tmp_path).listing()


def test_annotations_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of something-something-v2-train\.json, labels/train\.json"):
        SomethingSomething(root=tmp_path).listing()


# --- UCF101 and HMDB51 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lists", "videos"), [("ucfTrainTestlist", "UCF-101"), ("", "")])
def test_ucf101_follows_its_splits(tmp_path: Path, lists: str, videos: str) -> None:
    write(tmp_path / lists, "classInd.txt", "1 ApplyEyeMakeup\n2 Archery\n")
    write(tmp_path / lists, "trainlist02.txt", "Archery/v_Archery_g08_c01.avi 2\nApplyEyeMakeup/v_a_g08_c02.avi 1\n")
    write(tmp_path / lists, "testlist02.txt", "Archery/v_Archery_g01_c01.avi\n")
    touch(tmp_path / videos, "Archery/v_Archery_g08_c01.avi")
    found = UCF101(root=tmp_path, split=2).listing()
    assert found.files[0] == str(Path(videos) / "Archery/v_Archery_g08_c01.avi")
    assert (found.labels.tolist(), found.classes) == ([1, 0], ("ApplyEyeMakeup", "Archery"))
    (tmp_path / found.files[0]).rename((tmp_path / found.files[0]).with_suffix(".mp4"))
    assert UCF101(root=tmp_path, split=2).listing().files[0] == found.files[0].replace(".avi", ".mp4")  # prepared
    assert UCF101(root=tmp_path, split=2, train=False).listing().labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"holds no trainlist01\.txt"):
        UCF101(root=tmp_path).listing()
    write(tmp_path / lists, "trainlist01.txt", "Archery/a.avi 2\nFencing/b.avi 3\n")
    with pytest.raises(ValueError, match=r"a class of classInd\.txt:\n  line 2: 'Fencing/b\.avi'"):
        UCF101(root=tmp_path).listing()
    write(tmp_path / lists, "classInd.txt", "ApplyEyeMakeup\n")
    with pytest.raises(ValueError, match=r"expected 2 words in a line:\n  line 1"):
        UCF101(root=tmp_path).listing()


def test_hmdb51_follows_its_splits(tmp_path: Path) -> None:
    splits = tmp_path / "testTrainMulti_7030_splits"
    write(splits, "brush_hair_test_split1.txt", "a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    write(splits, "wave_test_split1.txt", "d.avi 1 \n")
    touch(tmp_path, "hmdb51_org/brush_hair/a.avi")
    found = HMDB51(root=tmp_path).listing()
    assert list(found.files) == ["hmdb51_org/brush_hair/a.avi", "hmdb51_org/wave/d.avi"]
    assert (found.labels.tolist(), found.classes) == ([0, 1], ("brush_hair", "wave"))
    assert list(HMDB51(root=tmp_path, train=False).listing().files) == ["hmdb51_org/brush_hair/b.avi"]
    with pytest.raises(ValueError, match=r"holds no list CLASS_test_split3\.txt"):
        HMDB51(root=tmp_path, split=3).listing()
    write(splits, "wave_test_split1.txt", "#20_Rhythm_wave_0.avi 1\n")  # some of its files are named so
    assert HMDB51(root=tmp_path).listing().files[1] == "hmdb51_org/wave/#20_Rhythm_wave_0.avi"
    write(splits, "wave_test_split1.txt", "d.avi 1\ne.avi 7\n")
    with pytest.raises(ValueError, match=r"expected FILE\.avi and 0, 1 or 2:\n  line 2: 'e\.avi 7'"):
        HMDB51(root=tmp_path).listing()


def test_a_data_set_gives_clips_like_any_source(tmp_path: Path) -> None:
    splits = tmp_path / "splits"
    write(splits, "wave_test_split1.txt", "d.avi 1\n")
    (tmp_path / "wave").mkdir()
    encode(tmp_path / "wave" / "d.mp4", torch.zeros(20, 32, 48, 3, dtype=torch.uint8).numpy())
    (tmp_path / "wave" / "d.mp4").rename(tmp_path / "wave" / "d.avi")
    samples = HMDB51(root=tmp_path).open((4, 32, 32))
    sample = samples.load(0, torch.Generator())
    assert (sample.pixels.shape, sample.label) == ((3, 4, 32, 32), 0)
