"""The picture of what a classifier takes for what."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 40  # classes that have a name at each row and column; above, numbers at some
WRITTEN = 20  # classes with numbers in the cells
LISTED = 24  # mistakes in the list beside

_BLUE, _QUIET = "#1f5fc4", "#606870"


def draw(matrix: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Draw samples by class (rows) and prediction (columns), int `(K, K)`, as a PNG.

    A cell is as dark as the part of its row is large, faint parts made visible. Beside it, the most frequent mistakes
    are listed. A few classes have their names at the axes, many have their numbers, as `classes.csv` has them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    count = len(classes)
    figure = Figure(figsize=(13, 8.6), layout=ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15), facecolor="white")
    FigureCanvasAgg(figure)
    axes, beside = figure.subplots(1, 2, width_ratios=(8, 5))
    part = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(part, cmap="Blues", norm=PowerNorm(0.4, 0, 1), interpolation="nearest", aspect="equal")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_label("part of the class's samples", color=_QUIET)
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1])
    _label_axes(axes, classes)
    if count <= WRITTEN:
        for row, column in np.argwhere(matrix > 0).tolist():
            light = part[row, column] > 0.4
            number = f"{matrix[row, column]:,}"
            axes.text(column, row, number, ha="center", va="center", fontsize=9, color="white" if light else "black")
    _list_mistakes(beside, matrix, classes)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    return drawn.getvalue()


def _label_axes(axes: Axes, classes: Sequence[str]) -> None:
    count = len(classes)
    axes.set_ylabel("class", color=_QUIET)
    axes.set_xlabel("prediction", color=_QUIET)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    if count <= NAMED:
        size = 10 if count <= WRITTEN else 7
        names = [_short(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if count > 6 else 0, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    axes.tick_params(length=0 if count <= NAMED else 3, colors=_QUIET)
    axes.spines[:].set_color(_QUIET)


def _list_mistakes(axes: Axes, matrix: NDArray[np.int64], classes: Sequence[str]) -> None:
    """The most frequent mistakes by name: those of the largest numbers, equal ones by class and prediction."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(place), len(classes)) for place in order if wrong.flat[place] > 0]
    total, right = int(matrix.sum()), int(matrix.trace())
    axes.set_axis_off()
    axes.set_title("Most frequent mistakes", loc="left", fontsize=12, color=_BLUE)
    lines = [f"{right:,} of {total:,} samples are right, {100 * right / max(total, 1):.2f} %"]
    lines += [
        f"{wrong[row, column]:>4,} of {matrix[row].sum():<4,}  {row} {_short(classes[row])}  →  "
        f"{column} {_short(classes[column])}"
        for row, column in pairs
    ]
    if not pairs:
        lines.append("none")
    for place, line in enumerate(lines):
        text = axes.text(0, 0.985 - 0.0385 * place, line, transform=axes.transAxes, fontsize=8, va="top")
        text.set_parse_math(False)
        text.set_in_layout(False)  # the matrix has the same place whatever is listed


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
