"""Every block of the README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_the_python_blocks_run_in_order(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be built" in done.stdout
    assert (tmp_path / "runs/readme/last.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_the_python_blocks_of_the_docs_run(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks("python", page.read_text())))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_as_promised() -> None:
    shell = "".join(blocks("bash"))
    assert "pip install -e . && python launchers/slurm_pretrain.py\n" in shell
    assert 'pip install -e ".[test]" && pytest\n' in shell


LAUNCHES = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python launchers/")]


@pytest.mark.slow
@pytest.mark.parametrize("line", LAUNCHES)
def test_every_launcher_line_is_valid_as_typed(line: str, tmp_path: Path) -> None:
    """Up to submission: paths of a cluster are replaced by a folder that is here, and nothing is queued."""
    (tmp_path / "clip.mp4").touch()
    for run in ("demo", "demo_finetune"):
        (tmp_path / "runs" / run / "slurm" / "7").mkdir(parents=True)
    words = [str(tmp_path) if word.startswith("/data/") else word for word in shlex.split(line)]
    command = [sys.executable, str(ROOT / words[1]), *words[2:], "--dry-run", "--folder", str(tmp_path / "run")]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    answers = {"sbatch": "", "sinfo": "all*|8|64|256000|1-00:00:00|gpu:8", "squeue": "RUNNING"}
    for name, answer in answers.items():
        program = bin_folder / name
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_it_names_is_there() -> None:
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
