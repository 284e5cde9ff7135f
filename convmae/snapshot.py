"""The code that a job was submitted with: copied into the run's folder, with where it came from.

A job that is queued again, days later perhaps, runs what was submitted, whatever became of the checkout meanwhile.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("convmae", "video")
CODE = "code"  # the folder of snapshots, in a run's
ORIGIN, DIFF = "origin.json", "origin.diff"
_LARGE = 1 << 20  # bytes; what is larger is data, not code


def take(folder: Path, modules: Iterable[str] = ()) -> Path:
    """Copy the code that a run needs to `folder/code/DIGEST`, where it is imported from as it is from its own place.

    Copied are this framework, the packages of the given modules, and all that was imported from the working directory:
    modules and the files beside them; of those, the large ones are links, and so are folders that have no modules.
    `origin.json` says where each package comes from, and its commit and branch where git tracks it; `origin.diff` how
    it differs from the commit. The same code has the same digest and is copied once.

    Raises:
        OSError: the folder cannot be written to.
    """
    names = {*PACKAGES, *(name.partition(".")[0] for name in modules), *_from_working_directory()}
    sources = {name: source for name in sorted(names) if (source := _source(name)) is not None}
    with _unfinished(folder) as made:
        made.mkdir()
        for source in sources.values():
            _copy(source, made / source.name, whole=True)
        digest = _digest(made)
        _describe(sources, made)
        return _keep(made, folder / CODE / digest)


def copy(code: Path, folder: Path) -> Path:
    """Copy a snapshot to the folder of another run that has the same code: the copy.

    Raises:
        OSError: the folder cannot be written to.
    """
    with _unfinished(folder) as made:
        shutil.copytree(code, made, symlinks=True)
        return _keep(made, folder / CODE / code.name)


def version() -> dict[str, Any]:
    """What this code is: version, and commit, branch and whether it differs from them; None where git cannot tell."""
    from . import __version__

    package = Path(__file__).parent
    record = package.parent / ORIGIN  # in a copy
    origin = json.loads(record.read_text())[package.name] if record.is_file() else _origin(package)[0]
    return {"version": __version__, **origin}


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A path for a snapshot that is being made in a run's folder."""
    (folder / CODE).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder / CODE, prefix=".") as temporary:
        yield Path(temporary) / CODE


def _keep(made: Path, code: Path) -> Path:
    if not code.exists():
        made.rename(code)
    return code


def _from_working_directory() -> set[str]:
    here = Path.cwd()
    return {
        name
        for name, module in list(sys.modules.items())
        if "." not in name and getattr(module, "__spec__", None) is not None and name != "__main__"
        if (source := _source(name)) is not None and source.parent == here
    }


def _source(name: str) -> Path | None:
    """The file or folder that a top-level module is imported from; None where there is none."""
    spec = importlib.util.find_spec(name) if name != "__main__" else None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.has_location and spec.origin else None


def _copy(source: Path, target: Path, *, whole: bool = False) -> None:
    if source.is_dir() and (whole or (_has_modules(source) and not source.is_symlink())):
        target.mkdir()
        for inner in source.iterdir():
            if inner.name != "__pycache__" and not inner.name.startswith("."):
                _copy(inner, target / inner.name)
    elif source.is_file() and (source.suffix == ".py" or source.stat().st_size <= _LARGE):
        shutil.copyfile(source, target)
    else:
        target.symlink_to(source)


def _has_modules(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.py", "*/*.py"))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_file():
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _describe(sources: dict[str, Path], copy: Path) -> None:
    origins = {name: _origin(source) for name, source in sources.items()}
    (copy / ORIGIN).write_text(json.dumps({name: origin for name, (origin, _) in origins.items()}, indent=1))
    (copy / DIFF).write_bytes(b"".join(diff for _, diff in origins.values()))


def _origin(source: Path) -> tuple[dict[str, Any], bytes]:
    """Where a module or package is, its commit and branch, whether it differs from the commit, and how."""

    def git(*arguments: str) -> bytes:
        command = ["git", "--no-optional-locks", "-C", str(source.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return b""
        return b"" if done.returncode else done.stdout

    origin: dict[str, Any] = {"path": str(source), "commit": None, "branch": None, "dirty": None}
    if not git("ls-files", "--", source.name):
        return origin, b""
    origin["commit"] = git("rev-parse", "HEAD").decode().strip() or None
    origin["branch"] = git("rev-parse", "--abbrev-ref", "HEAD").decode().strip() or None
    origin["dirty"] = bool(git("status", "--porcelain", "--", source.name))
    return origin, git("diff", "--no-ext-diff", "--no-color", "HEAD", "--", source.name)
