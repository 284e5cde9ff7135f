"""The page is read as a browser would: by its tags, and by the files embedded in it."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from convmae import pictures, report

SKIPPED = '<img src="http://x.org/a.png">&.mp4'


class Page(HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.rows: list[list[str]] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data

    def embedded(self, kind: str) -> list[bytes]:
        start = f"data:{kind};base64,"
        sources = [value for name, value in self.attributes if name == "src" and value.startswith(start)]
        return [base64.b64decode(source[len(start) :]) for source in sources]


def line(step: int, **more: Any) -> str:
    known = {
        "step": step,
        "steps": 10,
        "epoch": step / 5,
        "samples": 8 * step,
        "loss": 1 / step,
        "seconds": 7.0 * step,
    }
    rest = {"learning_rate": 1e-3, "samples_per_second": 12.34, "data_wait": 0.071, "time": 1.7e9}
    return json.dumps({**known, **rest, **more}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run & co"
    folder.mkdir()
    (folder / "run.txt").write_text("Pretrain(\n    name='<b>',\n)\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.9.1", "device": "cpu", "world": 1}))
    (folder / "metrics.jsonl").write_text("".join(line(step) for step in range(1, 11)))
    bad = {"file": SKIPPED, "reason": "no video stream", "step": 3}
    (folder / "skipped.jsonl").write_text((json.dumps(bad) + "\n") * 3)
    for step in (900, 1000, 11000):
        clip = torch.rand(1, 3, 2, 8, 8)
        pictures.save(folder / "pictures" / f"step-{step:08}", clip, torch.ones(1, 1, 2, 2) > 0, clip)
    return folder


def test_the_page_shows_the_whole_run(run: Path) -> None:
    path = report.write(run)
    page = Page(path)
    assert path == run / "report.html"
    headline = ["finished: 10 steps", "1 → 0.1", "12.3", "clips / s", "1 min 10 s", "7%", "2023-11-1"]
    rest = ["run & co", "Pretrain(\n    name='<b>',\n)", "2.9.1", "no video stream"]
    assert [words for words in headline + rest if words not in page.words] == []


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    page = Page(report.write(run))
    places = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "poster")]
    assert places
    assert all(place.startswith("data:") for place in places)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.html
    assert "@import" not in page.html


def test_names_of_files_are_text_and_never_tags(run: Path) -> None:
    page = Page(report.write(run))
    assert SKIPPED in page.words
    assert '<img src="http' not in page.html
    assert "b" not in page.tags


def test_a_file_skipped_often_is_one_row(run: Path) -> None:
    page = Page(report.write(run))
    assert page.rows[-2:] == [["file", "reason", "times"], [SKIPPED, "no video stream", "3"]]


def test_the_latest_pictures_come_first_and_unchanged(run: Path) -> None:
    page = Page(report.write(run))
    assert page.embedded("image/png") == [(run / "pictures/step-00011000.png").read_bytes()]
    assert page.embedded("image/gif") == [(run / "pictures/step-00011000.gif").read_bytes()]
    at = [page.words.index(words) for words in ("step 11,000", "step 1,000", "step 900")]
    assert at == sorted(at)


def test_a_long_run_shows_some_of_its_pictures(run: Path) -> None:
    small = (run / "pictures/step-00000900.png").read_bytes()
    for step in range(20_000, 60_000, 1000):
        (run / f"pictures/step-{step:08}.png").write_bytes(small)
    page = Page(report.write(run))
    assert len(page.embedded("image/jpeg")) == 12
    assert "step 59,000" in page.words
    assert "step 900" in page.words


@pytest.mark.parametrize("name", ["run.txt", "environment.json", "metrics.jsonl", "skipped.jsonl", "pictures"])
def test_the_page_comes_out_without_a_file(run: Path, name: str) -> None:
    (run / name).rename(run / "elsewhere")
    assert "run & co" in Page(report.write(run)).words


@pytest.mark.parametrize("name", ["run.txt", "environment.json", "metrics.jsonl", "skipped.jsonl"])
def test_the_page_comes_out_of_a_file_that_was_cut_off(run: Path, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:-9] + "é".encode()[:1])
    assert "run & co" in Page(report.write(run)).words


def test_a_cut_off_last_line_leaves_the_lines_before_it(run: Path) -> None:
    (run / "metrics.jsonl").write_text(line(1) + line(2) + line(3, loss=float("nan")) + line(4)[:-20])
    page = Page(report.write(run))
    assert "step 3 of 10" in page.words
    assert "1 → 0.75" in page.words, "the last loss is smoothed, like the curve's"


def test_a_picture_that_cannot_be_read_is_left_out(run: Path) -> None:
    (run / "pictures/step-00001000.png").write_bytes(b"\x89PNG cut")
    page = Page(report.write(run))
    assert len(page.embedded("image/jpeg")) == 1
    assert "step 900" in page.words


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    assert "not started" in Page(report.write(tmp_path)).words


def test_the_old_page_stays_until_the_new_one_is_whole(run: Path) -> None:
    path = report.write(run)
    before = path.stat().st_ino
    report.write(run)
    assert path.stat().st_ino != before, "a new file took its place"
    assert [other.name for other in run.iterdir() if "report" in other.name] == ["report.html"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run's folder at .*nowhere"):
        report.write(tmp_path / "nowhere")


def test_the_command_line_writes_the_page_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["convmae.report", str(run)])
    report.main()
    assert Path(capsys.readouterr().out.strip()) == run / "report.html"
    monkeypatch.setattr("sys.argv", ["convmae.report", str(run / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "no run's folder" in capsys.readouterr().err
