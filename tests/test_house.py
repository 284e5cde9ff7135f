"""The architecture: which room imports which, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a module imports those on floors below its own, and a new file chooses its floor here.
FLOORS: list[set[str]] = [
    {"convmae.command", "convmae.files", "convmae.grids", "convmae.log_lines", "convmae.plain", "convmae.watchdog"},
    {"convmae.masking", "convmae.nn.positions", "convmae.nn.squared_error", "convmae.targets"},
    {"convmae.nn.tile_kernels", "convmae.nn.tile_planes"},
    {"convmae.nn.tile_convolution"},
    {"convmae.nn.layers"},
    {"convmae.nn.trunk"},
    {"convmae.nn.backbone", "convmae.nn.classifier", "convmae.nn.masked_autoencoder"},
    {"convmae.nn.contrast", "convmae.nn.initialisation", "convmae.nn"},
    {"convmae.builders"},
    {"convmae.checkpoint", "convmae.cmae"},
    {"convmae.official"},
    {"convmae.foreign", "convmae.official_cmae"},
    {"convmae"},
    {
        "convmae.data",
        "convmae.demo",
        "convmae.distributed",
        "convmae.lars",
        "convmae.location",
        "convmae.optimisation",
        "convmae.pictures",
        "convmae.run_folder",
        "convmae.snapshot",
    },
    {"convmae.average", "convmae.listing", "convmae.manifest", "convmae.report", "convmae.weights"},
    {"convmae.confusion", "convmae.folder"},
    {"convmae.evaluation"},
    {"convmae.images"},
    {"convmae.augmentation", "convmae.export", "convmae.features", "convmae.hub", "convmae.probe", "convmae.shards"},
    {"convmae.learners", "convmae.two_views"},
    {"convmae.run"},
    {"convmae.finetune", "convmae.progress"},
    {"convmae.attention_pictures", "convmae.gallery", "convmae.keeper"},
    {"convmae.training"},
    {"convmae.journal"},
    {"convmae.evaluate"},
    {"convmae.job", "convmae.place", "convmae.recipes", "convmae.watch"},
    {"convmae.slurm"},
    {"convmae.launch"},
    {"convmae.micro_batch"},
]

LATE = {
    ("convmae.training", "convmae.journal"),
    ("convmae.weights", "convmae.hub"),
    ("convmae.probe", "convmae.launch"),
}
"""Arrows that point up, inside a function: the loop takes up its journal when a run with one begins; how the hub's form
is read is known there; and the command that probes reads recipes as the launchers do."""

HEAVY = ("decord", "submitit", "matplotlib", "torchvision", "transformers", "tensorboard", "av", "pytorchvideo")


def modules() -> dict[str, Path]:
    found = {}
    for package in ("convmae", "video", "launchers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, *, everywhere: bool = True) -> set[str]:
    """The modules that a file imports by name, ours as full names; `everywhere` counts those inside functions."""
    known = modules()
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else list(top_level(tree))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run at import: all but function bodies and `if TYPE_CHECKING:`."""
    found: list[ast.stmt] = []
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("convmae", "video", "launchers", "tests")}


def test_no_arrow_points_up() -> None:
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    arrows = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if name in floor_of
        for target in sorted(ours(imports(name, path)) - {name})
        if floor_of.get(target, len(FLOORS)) >= floor_of[name] and (name, target) not in LATE
    ]
    assert not arrows


def test_late_arrows_are_inside_functions() -> None:
    for name, target in LATE:
        assert target not in imports(name, modules()[name], everywhere=False)
        assert target in imports(name, modules()[name]), "no longer needed: take it out of the list"


def test_every_file_of_convmae_has_a_floor_and_every_floor_its_files() -> None:
    known = {name for names in FLOORS for name in names}
    assert known == {name for name in modules() if name.split(".")[0] == "convmae"}


def test_launchers_import_video_and_convmae_and_nobody_imports_launchers() -> None:
    for name, path in modules().items():
        for target in ours(imports(name, path)):
            assert target.split(".")[0] != "launchers", f"{name} imports {target}"
            assert target.split(".")[0] != "tests", f"{name} imports {target}"


def test_convmae_never_imports_video() -> None:
    for name, path in modules().items():
        if name.split(".")[0] == "convmae":
            assert not {target for target in ours(imports(name, path)) if target.split(".")[0] == "video"}, name


def test_modules_know_tensors_and_not_builders() -> None:
    for name, path in modules().items():
        if name.startswith("convmae.nn."):
            allowed = {"convmae.grids", "convmae.masking", "convmae.targets"}
            strangers = {
                target
                for target in ours(imports(name, path))
                if target not in allowed and not target.startswith("convmae.nn")
            }
            assert not strangers, name


def test_there_is_no_circle_of_imports() -> None:
    edges = {name: ours(imports(name, path, everywhere=False)) - {name} for name, path in modules().items()}
    for start in edges:
        reached: set[str] = set()
        todo = list(edges[start])
        while todo:
            name = todo.pop()
            # a package's __init__ gathers its modules: that is no circle
            if name in reached or name in ("convmae", "video"):
                continue
            reached.add(name)
            todo += edges.get(name, ())
        assert start not in reached, f"{start} imports itself through {sorted(reached)}"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["convmae", "video"])
def test_an_import_loads_no_reader_no_launcher_and_no_plots_changes_nothing_and_costs_little(
    package: str,
) -> None:
    out = run(
        f"""
import logging, sys, time
import torch

def settings():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), logging.getLogger().handlers

random, before = torch.get_rng_state(), settings()
began = time.process_time()
import {package}
print(time.process_time() - began)
print(*[name for name in {HEAVY!r} if name in sys.modules])
assert torch.get_rng_state().equal(random) and settings() == before
"""
    )
    seconds, loaded = out.splitlines()
    assert loaded == "", f"import {package} loads {loaded}"
    assert float(seconds) < 0.5


def test_every_public_name_is_there() -> None:
    import convmae
    import video

    for package in (convmae, video):
        for name in package.__all__:
            assert hasattr(package, name), name
