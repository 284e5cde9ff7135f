"""Recorded numbers of the authors' code: where they lie, and how they are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "reference" / "golden"

needs_shared = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"the recorded numbers are not beside this checkout, at {GOLDEN}"
)


def explanation(name: str) -> dict[str, Any]:
    """What a golden file's JSON says about it."""
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return content


def tensors(name: str) -> dict[str, Tensor]:
    """All tensors of a golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def under(content: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
