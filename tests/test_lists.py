"""Lists of videos, good and malformed, and what a data set is held in."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from convmae.data import UNLABELLED
from convmae.listing import Listing, Names, listing
from video.lists import VIDEO_SUFFIXES, from_labeled_paths, labeled_paths, read_list


def read(folder: Path, text: str | bytes) -> Listing:
    path = folder / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_list(path)


# --- good ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "files", "labels"),
    [
        ("a.mp4 3\nb/c d.mp4 0\n", ["a.mp4", "b/c d.mp4"], [3, 0]),
        ("a.mp4,3\nb/c, d.mp4,0\n", ["a.mp4", "b/c, d.mp4"], [3, 0]),
        ('"b/c, d.mp4",1\na.mp4, 0\n', ["b/c, d.mp4", "a.mp4"], [1, 0]),
        ("a.mp4\t3\r\nb c.mp4\t0\r\n", ["a.mp4", "b c.mp4"], [3, 0]),
        ("path,label\na.mp4,3\n# a remark\n\nb.mp4,0", ["a.mp4", "b.mp4"], [3, 0]),
        ("\ufeffa.mp4 3\n", ["a.mp4"], [3]),
        ("frames/a 250 3\nframes/b 16 0\n", ["frames/a", "frames/b"], [3, 0]),
        ("frames/a,250,3\nframes/b,16,0\n", ["frames/a", "frames/b"], [3, 0]),
        ("a.mp4\nb c.mp4\n/d/e.webm\n", ["a.mp4", "b c.mp4", "/d/e.webm"], [UNLABELLED] * 3),
        ("a.mp4 -1\nb.mp4 0\n", ["a.mp4", "b.mp4"], [UNLABELLED, 0]),
        ("größe/ä.mp4 1\n", ["größe/ä.mp4"], [1]),
        ('"b c.mp4" 1\n"a.mp4" 0\n', ["b c.mp4", "a.mp4"], [1, 0]),
        ("video_path,label_id\na.mp4,1\n#20 Rules.avi,0\n", ["a.mp4", "#20 Rules.avi"], [1, 0]),
        ("a,b.mp4 3\nc, d.mp4 1\n", ["a,b.mp4", "c, d.mp4"], [3, 1]),
        ("a,b.mp4\t3\nc,d.mp4\t1\n", ["a,b.mp4", "c,d.mp4"], [3, 1]),
        ("path label\na.mp4 1\n", ["a.mp4"], [1]),
        ("v/a.mp4 0 -1\nv/b.mp4 0 -1\n", ["v/a.mp4", "v/b.mp4"], [UNLABELLED] * 2),
        ("frames/a_1.5 250 3\nframes/b 16 0\n", ["frames/a_1.5", "frames/b"], [3, 0]),
        ("a.avi (mended).mp4 2\nb.mp4 1\n", ["a.avi (mended).mp4", "b.mp4"], [2, 1]),
        ("a\u2028b.mp4 1\nc.mp4 2\n", ["a\u2028b.mp4", "c.mp4"], [1, 2]),
    ],
    ids=[
        *("space", "comma", "quoted", "tab", "header", "mark", "frames", "frames,", "paths", "none", "letters"),
        *("quoted path", "not a remark"),
        *("comma in path", "comma in path, tab", "header of one", "VideoMAE", "dot", "two endings", "line separator"),
    ],
)
def test_a_list_gives_paths_and_labels(tmp_path: Path, text: str, files: list[str], labels: list[int]) -> None:
    found = read(tmp_path, text)
    assert list(found.files) == files
    assert found.labels.tolist() == labels
    assert len(found.classes) == max(labels) + 1


def test_a_class_may_be_a_quoted_sentence(tmp_path: Path) -> None:
    found = read(tmp_path, 'clip,label\n1.webm,"Lifting something up, then letting it drop"\n2.webm,Poking\n')
    assert found.classes == ("Lifting something up, then letting it drop", "Poking")
    assert list(found.files) == ["1.webm", "2.webm"]


@pytest.mark.parametrize("text", ["x.mp4 swim\ny.mp4 run\nz.mp4 swim\n", "x.mp4,swim\ny.mp4,run\nz.mp4,swim\n"])
def test_classes_by_name_are_numbered_in_sorted_order(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, text)
    assert found.classes == ("run", "swim")
    assert found.labels.tolist() == [1, 0, 1]


# --- malformed ones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no video: it is empty"),
        ("# nothing\n\n", "lists no video: it is empty"),
        ("path,label\n", "lists no video"),
        ("a.mp4,1\nb.mp4\nc.mp4,2\n", r"expected `path,label`:\n  line 2: 'b.mp4'"),
        ("a.mp4 1\nb.mp4 0\nc.mp4\n", r"expected `path label`:\n  line 3: 'c.mp4'"),
        ("a.mp4,1\nb.mp4,\nc.mp4,2\n", r"line 2: 'b.mp4,'"),
        ("a.mp4,1\nb.mp4,run\nc.mp4,2\n", r"all labels numbers or all names, unlike here:\n  line 2: 'b.mp4,run'"),
        ("a.mp4,swim\nb.mp4,run\nc.mp4,2\n", r"unlike here:\n  line 3: 'c.mp4,2'"),
        ("a.mp4,1\nb.mp4,-7\n", r"labels are numbers from 0, or -1 for none:\n  line 2"),
        ("a.mp4\nb.mp4\nc.mp4 3\n", r"expected a path alone .*:\n  line 3: 'c.mp4 3'"),
        ("a.mp4 swim\nb.mp4 run\nx y.mp4\n", r"expected `path label`:\n  line 3: 'x y.mp4'"),
        ("a.mp4 ride a bike\nb.mp4 ride a car\n", "names of classes with spaces go after a comma or a tab"),
        ("f/a 120 3\nf/b 2\nf/c 50 2\n", r"expected `path frames label`:\n  line 2: 'f/b 2'"),
        ("a.mp4 --3\nb.mp4 1\n", r"unlike here:\n  line 1: 'a.mp4 --3'"),
        ("a.mp4 1\nb.mp4 5000000000\n", r"numbers of classes, below 1000000:\n  line 2"),
        ("a.mp4 1\nb.mp4 2\na.mp4 1\n", r"listed once.*:\n  line 3: 'a.mp4 1'"),
        (
            "clip_name,clip_path,label\nv,/train/A/v.avi,A\n",
            "has the columns clip_name,clip_path,label: keep path,label",
        ),
        ("a.mp4;3\nb.mp4;0\n", r"line 1: 'a.mp4;3'"),
        (b"\xff\xd8\xff\xe0 1\n", "it is not text"),
        (b"a\x00b 1\n", "zero bytes"),
    ],
)
def test_a_malformed_list_names_its_first_wrong_lines(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        read(tmp_path, text)
    assert str(tmp_path / "list.csv") in str(raised.value)


def test_of_many_wrong_lines_five_are_named_and_the_others_counted(tmp_path: Path) -> None:
    good, bad = "".join(f"{n}.mp4,1\n" for n in range(20)), "".join(f"bad{n}.mp4\n" for n in range(9))
    with pytest.raises(ValueError, match="and 4 more") as raised:
        read(tmp_path, good + bad)
    assert str(raised.value).count("line ") == 5


def test_a_list_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_list(tmp_path / "gone.csv")


# --- folders of frames ------------------------------------------------------------------------------------------------


def test_a_folder_of_frames_is_a_video_among_others(tmp_path: Path) -> None:
    for name in ("run/f/1.jpg", "run/f/2.JPG", "run/one/1.jpg", "run/v.mp4", "walk/both/1.png", "walk/both/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "walk" / "both" / "w.mp4").touch()
    (tmp_path / "walk" / "1.jpg").touch()
    (tmp_path / "walk" / "2.jpg").touch()
    found = listing(tmp_path, VIDEO_SUFFIXES, frames=frozenset([".jpg", ".png"]))
    assert list(found.files) == ["run/f", "run/v.mp4", "walk/both/w.mp4"]
    assert (found.labels.tolist(), found.classes) == ([0, 0, 1], ("run", "walk"))
    assert list(listing(tmp_path, VIDEO_SUFFIXES).files) == ["run/v.mp4", "walk/both/w.mp4"]


# --- pytorchvideo -----------------------------------------------------------------------------------------------------


def test_lists_go_to_pytorchvideo_and_come_back(tmp_path: Path) -> None:
    from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

    found = read(tmp_path, "a.mp4 3\nb.mp4 0\n")
    theirs = labeled_paths(found, tmp_path)
    assert theirs[0] == (str(tmp_path / "a.mp4"), {"label": 3})
    plain = LabeledVideoPaths.from_csv(str(tmp_path / "list.csv"))
    assert from_labeled_paths(plain) == found


# --- what it is held in -----------------------------------------------------------------------------------------------


def test_names_are_a_sequence_of_strings() -> None:
    words = ["a", "", "größe", "b/c", "odd\udcff"]
    names = Names.of(words)
    assert list(names) == words
    assert (names[2], names[-1], len(names)) == ("größe", "odd\udcff", 5)
    assert list(names[1:3]) == words[1:3]
    assert names == pickle.loads(pickle.dumps(names))
    assert hash(names) == hash(Names.of(words))
    assert names != Names.of(words[:-1])
    assert "b/c" in names
    with pytest.raises(IndexError):
        names[5]
    assert repr(names) == "Names('a', '', 'größe', ...; 5)"
    assert list(Names.of([])) == []


def test_a_listing_of_many_files_takes_no_object_for_each() -> None:
    found = Listing.of((f"class {n % 400}/video {n}.mp4" for n in range(20_000)), (n % 400 for n in range(20_000)))
    assert len(pickle.dumps(found)) < 20_000 * 45
    part = found.take(np.arange(0, 20_000, 7).tolist())
    assert (part.files[3], int(part.labels[3])) == ("class 21/video 21.mp4", 21)
    assert part == part.take(range(len(part.files)))
    assert part != found
