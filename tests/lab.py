"""A laboratory's desk for the tests of the launcher: recipes, a working directory, and a SLURM made of scripts."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from convmae.launch import main

ROOT = Path(__file__).parent.parent
VARIABLES = ("CONVMAE_DATA", "WORLD_SIZE", "RANK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
RECIPES = '''
"""Recipes of a lab."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from convmae import AttentionStage, ConvMAE, ConvStage
from convmae.data import Sample
from convmae.training import Pretrain


@dataclass(frozen=True)
class Pixels:
    count: int = 32

    def open(self, size):
        return Opened(self.count, size)


@dataclass(frozen=True)
class Placed(Pixels):
    root: Path | None = None


@dataclass(frozen=True)
class Crashing(Pixels):
    def open(self, size):
        return CrashingOpened(self.count, size)


@dataclass(frozen=True)
class Opened:
    count: int
    size: tuple[int, ...]

    def __len__(self):
        return self.count

    def name(self, index):
        return str(index)

    def load(self, index, generator):
        return Sample(torch.randint(0, 256, (3, *self.size), dtype=torch.uint8, generator=generator))


class CrashingOpened(Opened):
    def load(self, index, generator):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("rank one has had enough")
        return super().load(index, generator)


def tiny() -> Pretrain:
    """Random pixels, in seconds."""
    stages = [
        ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
        AttentionStage(dim=16, depth=1, stride=(4, 4), heads=2),
    ]
    model = ConvMAE().input(32).stages(*stages).decode(dim=16, depth=1, heads=2)
    return Pretrain(
        model=model, data=Pixels(), epochs=2, batch_size=8, warmup_epochs=1, workers=0, pictures=0, log_every=1,
        folder=Path("runs/tiny"),
    )


def placed() -> "Pretrain":
    return replace(tiny(), data=Placed())


def at_home() -> Pretrain:
    return replace(tiny(), data=Placed(root=Path("clips")))


def masked() -> Pretrain:
    from lab_masks import Half

    return replace(tiny(), model=tiny().model.mask(Half()))


def crashing() -> Pretrain:
    return replace(tiny(), data=Crashing())


def endless() -> Pretrain:
    return replace(tiny(), epochs=100000)


def odd() -> Pretrain:
    return replace(tiny(), model=tiny().model.input(30))


def backwards() -> Pretrain:
    return replace(tiny(), epochs=-1)


def scaled(factor: float) -> Pretrain:
    return tiny()


def poem() -> str:
    return "no run"
'''
MASKS = '''
"""A masking of the lab's, in a package of its own."""

from dataclasses import dataclass

from convmae import masking


@dataclass(frozen=True)
class Half:
    def __call__(self, batch, grid, generator=None):
        return masking.random(0.5)(batch, grid, generator)
'''


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab_recipes.py").write_text(RECIPES)
    (folder / "lab_masks.py").write_text(MASKS)
    (folder / "lab_broken.py").write_text("import not_there_at_all\n")
    return folder


@pytest.fixture(autouse=True)
def desk(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, a PATH and an environment of one's own, without SLURM; no GPU."""
    (tmp_path / "bin").mkdir()
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [str(lab), *sys.path]):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) or name in VARIABLES:
                del os.environ[name]
        os.environ["PATH"] = str(tmp_path / "bin")
        os.environ["PYTHONPATH"] = f"{lab}{os.pathsep}{ROOT}"
        os.environ["COLUMNS"] = "100"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        yield tmp_path


Says = Callable[..., tuple[int, str, str]]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """Run the launcher in this process: exit code, what it printed, what it complained about."""

    def run(*arguments: str, recipe: str = "lab_recipes:tiny") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slurm_pretrain.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(recipe)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def launcher(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launchers" / "slurm_pretrain.py"), *arguments]


def run_launcher(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(launcher(*arguments), capture_output=True, text=True, timeout=300)


def slurm(desk: Path, sinfo: str = "main*|4|128|1000|7-00:00:00|gpu:8\npreempt|4|128|1000|30:00|gpu:8\n") -> None:
    """A SLURM whose sinfo says this and whose sbatch takes everything."""
    command(desk, "sinfo", f"while read -r line; do echo \"$line\"; done <<'END'\n{sinfo}END\n")
    command(desk, "sbatch", f'echo "$@" > {desk}/asked; echo "Submitted batch job 123"\n')
    command(desk, "srun", "exit 1\n")


def command(desk: Path, name: str, does: str) -> None:
    path = desk / "bin" / name
    path.write_text(f"#!/bin/sh\n{does}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def asked(out: str) -> dict[str, str]:
    """What a dry run says would be asked of SLURM."""
    lines = out.partition("dry run")[2].splitlines()[1:]
    pairs = (line.split(maxsplit=1) for line in lines)
    return {name: value.strip() for name, value in pairs}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def place(out: str) -> str:
    """What the launcher says of the place it chose."""
    (line,) = [line for line in out.splitlines() if line.startswith("cluster")]
    return line.removeprefix("cluster").strip()
