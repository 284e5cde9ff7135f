"""A run's folder as one HTML page that needs nothing else: no server, no network, no script.

`python -m convmae.report RUN` writes it again, from whatever a run has left so far.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from . import pictures
from .files import lines, write_whole
from .pictures import curve, scores, series, smoothed

ALWAYS = (
    *("step", "steps", "since", "epoch", "samples", "seconds", "time", "loss", "learning_rate", "gradient_norm"),
    *("bad_steps", "samples_per_second", "data_wait", "skipped"),
)
"""What every run tells of its steps."""

_EARLIER, _THUMBNAIL, _ROWS = 12, 720, 100


def write(folder: Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all, from the files that are there.

    Reads `run.txt`, `environment.json`, `metrics.jsonl`, `scores.jsonl`, `skipped.jsonl` and `pictures/`. Any may be
    missing, or end in the middle of a line: the page shows what can be read.

    Raises:
        ValueError: there is no such folder.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"no run's folder at {folder}")
    metrics, skipped = list(lines(folder / "metrics.jsonl")), list(lines(folder / "skipped.jsonl"))
    last = metrics[-1] if metrics else {}
    latest, earlier = _pictures(folder / "pictures")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("convmae").joinpath("report.html").read_text(encoding="utf-8")
    text = page.from_string(template).render(
        name=folder.name,
        status=_status(last),
        figures=_figures(metrics, skipped, of="clips" if len(latest.get("images", [])) > 1 else "samples"),
        curve=_curve(metrics) if metrics else None,
        watched=_watched(metrics),
        scores=_scores(list(lines(folder / "scores.jsonl"))),
        latest=latest,
        earlier=earlier,
        recipe=_text(folder / "run.txt").strip(),
        environment=_object(_text(folder / "environment.json")),
        skipped=Counter((str(line.get("file")), str(line.get("reason"))) for line in skipped).most_common(),
        rows=_ROWS,
    )
    return write_whole(folder / "report.html", text)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty where the text is cut off, or something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(line: Mapping[str, Any], name: str) -> float | None:
    value = line.get(name)
    return value if isinstance(value, int | float) and np.isfinite(value) else None


def _status(last: Mapping[str, Any]) -> dict[str, Any]:
    step, steps, time = (_number(last, name) for name in ("step", "steps", "time"))
    words = "not started"
    if step is not None:
        words = f"step {step:,.0f}" + (f" of {steps:,.0f}" if steps else "")
    if steps and step is not None and step >= steps:
        words = f"finished: {steps:,.0f} steps"
    updated = "" if time is None else f"{datetime.fromtimestamp(time).astimezone():%Y-%m-%d %H:%M:%S %Z}"
    return {"words": words, "share": min(1, (step or 0) / steps) if steps else 0, "updated": updated}


def _figures(
    metrics: Sequence[Mapping[str, Any]], skipped: Sequence[Mapping[str, Any]], *, of: str
) -> list[tuple[str, str]]:
    """The headline: pairs of a label and a value, for what is known."""
    last = metrics[-1] if metrics else {}
    _, loss = series(metrics, "loss")
    _, speed = series(metrics, "samples_per_second")
    epoch, seen, waited, seconds = (_number(last, n) for n in ("epoch", "samples", "data_wait", "seconds"))
    known = [
        ("loss", f"{loss[0]:.4g} → {smoothed(loss)[-1]:.4g}" if len(loss) else None),
        (f"{of} / s", f"{np.median(speed[-20:]):,.3g}" if len(speed) else None),
        ("time", None if seconds is None else _duration(seconds)),
        ("epoch", None if epoch is None else f"{epoch:.4g}"),
        (f"{of} seen", None if seen is None else f"{seen:,.0f}"),
        ("waiting for data", None if waited is None else f"{waited:.0%}"),
        ("skipped files", f"{len({str(line.get('file')) for line in skipped}):,}"),
    ]
    return [(label, value) for label, value in known if value is not None]


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"


def _curve(metrics: Sequence[Mapping[str, Any]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return _embedded("image/svg+xml", curve(metrics, Path(folder) / "curve.svg").read_bytes())


def _watched(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Curves of what this kind of run tells beside what all do; empty where it is nothing."""
    names = [name for name in dict.fromkeys(name for line in metrics for name in line) if name not in ALWAYS]
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        drawn = pictures.watched(metrics, names, Path(folder) / "watched.svg").read_bytes()
    return {"names": ", ".join(names), "curve": _embedded("image/svg+xml", drawn)}


def _scores(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The curve of what a run's examinations gave, and the latest of them; empty where there was none."""
    told = [line for line in told if _number(line, "epoch") is not None]
    if not told:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        drawn = _embedded("image/svg+xml", scores(told, Path(folder) / "scores.svg").read_bytes())
    latest = [(name, f"{value:.4g}") for name in told[-1] if (value := _number(told[-1], name)) is not None]
    return {"epoch": told[-1]["epoch"], "curve": drawn, "latest": latest}


def _embedded(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


def _pictures(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The latest pictures as they are, the moving one first; and some earlier ones, small, newest first."""
    found = sorted(folder.glob("*.png"), key=lambda path: (_step(path), path.name), reverse=True)
    if not found:
        return {}, []
    animated = found[0].with_suffix(".gif")
    images = [_embedded("image/gif", animated.read_bytes())] if animated.is_file() else []
    images.append(_embedded("image/png", found[0].read_bytes()))
    chosen = np.unique(np.linspace(1, len(found) - 1, min(len(found) - 1, _EARLIER)).round().astype(int))
    earlier = [{"step": _step(found[at]), "image": _thumbnail(found[at])} for at in chosen]
    return {"step": _step(found[0]), "images": images}, [shown for shown in earlier if shown["image"]]


def _step(path: Path) -> int:
    return int("".join(re.findall(r"\d+", path.stem)[-1:]) or 0)


def _thumbnail(path: Path) -> str:
    """A small JPEG of a picture; empty where the picture cannot be read."""
    data = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((_THUMBNAIL, 2 * _THUMBNAIL))
            picture.convert("RGB").save(data, "JPEG", quality=80)
    except OSError:
        return ""
    return _embedded("image/jpeg", data.getvalue())


def main() -> None:
    """The command line: `python -m convmae.report RUN`."""
    parser = argparse.ArgumentParser(description="Write the report.html of a run's folder again.")
    parser.add_argument("run", type=Path, help="the run's folder")
    try:
        print(write(parser.parse_args().run))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
