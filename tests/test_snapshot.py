"""A job runs the code that it was submitted with."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from convmae import __version__, snapshot

ROOT = Path(__file__).parent.parent


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a package and a module of the user's, both imported; modules are forgotten after."""
    desk = tmp_path / "desk"
    models = desk / "our_models"
    for folder in ("inner/deep", "pictures/many", "__pycache__", ".hidden"):
        (models / folder).mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/deep/part.py", ".hidden/secret.py"):
        (models / name).write_text(f"# {name}\n")
    (models / "names.json").write_text("[]")
    (models / "inner" / "weights.bin").write_bytes(bytes(2 << 20))
    (models / "pictures" / "many" / "one.png").touch()
    (models / "__pycache__" / "old.pyc").touch()
    (desk / "our_runs.py").write_text("import our_models\nANSWER = 41\n")
    (desk / "notes.py").write_text("never imported")
    monkeypatch.chdir(desk)
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [str(desk), *sys.path]):
        __import__("our_runs")
        yield desk


def git(*arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_what_is_imported_from_the_working_directory_is_copied_beside_the_framework(desk: Path, tmp_path: Path) -> None:
    code = snapshot.take(tmp_path / "run")
    assert code.parent == tmp_path / "run" / "code"
    there = {path.name for path in code.iterdir()}
    assert there == {"convmae", "video", "our_models", "our_runs.py", "origin.json", "origin.diff"}
    assert (code / "convmae" / "report.html").read_text() == (ROOT / "convmae" / "report.html").read_text()
    assert [path.name for path in code.parent.iterdir()] == [code.name]


def test_modules_and_small_files_are_copied_and_the_rest_is_linked(desk: Path, tmp_path: Path) -> None:
    models = snapshot.take(tmp_path / "run") / "our_models"
    assert {path.name for path in models.iterdir()} == {"__init__.py", "inner", "names.json", "pictures"}
    links = {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_symlink()}
    assert links == {"inner/weights.bin", "pictures"}
    assert (models / "pictures").resolve() == desk / "our_models" / "pictures"
    assert (models / "inner" / "deep" / "part.py").read_text() == "# inner/deep/part.py\n"


def test_modules_that_are_named_come_from_wherever_they_are(tmp_path: Path) -> None:
    code = snapshot.take(tmp_path / "run", ["submitit.core", "not_there_at_all", "__main__", "sys"])
    assert (code / "submitit" / "core" / "core.py").is_file()
    origins = json.loads((code / "origin.json").read_text())
    assert set(origins) == {"convmae", "video", "submitit"}
    assert origins["submitit"]["commit"] is None


def test_the_same_code_is_kept_once_and_other_code_beside_it(desk: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run")
    assert snapshot.take(tmp_path / "run") == first
    assert snapshot.take(tmp_path / "another").name == first.name
    (desk / "our_models" / "inner" / "deep" / "part.py").write_text("# better\n")
    second = snapshot.take(tmp_path / "run")
    assert {path.name for path in first.parent.iterdir()} == {first.name, second.name}
    assert first != second


def test_another_run_s_copy_is_the_same_whatever_the_checkout_has_become(desk: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run")
    (desk / "our_runs.py").write_text("ANSWER = 42\n")
    for _ in range(2):
        other = snapshot.copy(first, tmp_path / "another")
        assert [path.name for path in (tmp_path / "another" / "code").iterdir()] == [first.name]
    assert (other / "our_runs.py").read_text() == "import our_models\nANSWER = 41\n"
    assert (other / "origin.json").read_text() == (first / "origin.json").read_text()
    assert (other / "our_models" / "pictures").resolve() == desk / "our_models" / "pictures"


def test_a_process_imports_the_copy_whatever_the_checkout_has_become(desk: Path, tmp_path: Path) -> None:
    code = snapshot.take(tmp_path / "run")
    (desk / "our_runs.py").write_text("ANSWER = 42\n")
    show = "import our_runs, convmae, json, convmae.snapshot as s; print(our_runs.ANSWER, convmae.__file__)"
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": f"{code}{os.pathsep}{desk}"}
    done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"41 {code}/convmae/__init__.py\n"


def test_commit_branch_and_changes_are_told_where_git_tracks_the_code(desk: Path, tmp_path: Path) -> None:
    git("init", "-q", "-b", "trunk")
    git("remote", "add", "origin", "https://token@example.org/secret")
    git("add", "our_runs.py")
    git("commit", "-q", "-m", "begin")
    commit = git("rev-parse", "HEAD")

    def told(code: Path) -> tuple[dict[str, object], str]:
        origin = json.loads((code / "origin.json").read_text())["our_runs"]
        return origin, (code / "origin.diff").read_text()

    clean, _ = told(snapshot.take(tmp_path / "run"))
    assert clean == {"path": f"{desk}/our_runs.py", "commit": commit, "branch": "trunk", "dirty": False}
    (desk / "our_runs.py").write_text("import our_models\nANSWER = 42\n")
    code = snapshot.take(tmp_path / "run")
    dirty, diff = told(code)
    assert (dirty["commit"], dirty["dirty"]) == (commit, True)
    assert "-ANSWER = 41\n+ANSWER = 42\n" in diff
    assert json.loads((code / "origin.json").read_text())["our_models"]["commit"] is None  # git does not track it
    assert not any("example.org" in path.read_text() for path in code.glob("origin.*"))


def test_a_copy_knows_its_version_and_where_it_came_from(tmp_path: Path) -> None:
    here = snapshot.version()
    assert set(here) == {"version", "path", "commit", "branch", "dirty"}
    assert (here["version"], here["path"]) == (__version__, str(ROOT / "convmae"))
    code = snapshot.take(tmp_path / "run")
    show = "import json; from convmae import snapshot; print(json.dumps(snapshot.version()))"
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == here


def test_without_git_there_is_a_version_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert snapshot.version() == {
        "version": __version__,
        "path": str(ROOT / "convmae"),
        "commit": None,
        "branch": None,
        "dirty": None,
    }
