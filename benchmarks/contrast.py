"""What contrast adds to reconstruction: CMAE against the same masked autoencoder without it, over several seeds.

    python benchmarks/contrast.py video                              # the demo clips, whose classes are motions
    python benchmarks/contrast.py images --data photos               # any folder with train/ and val/, of classes each

Both sides are pretrained for equally many epochs, on the settings of `transfer.py`, whose pretraining runs are the
plain side: in the same folder they are done once for both scripts. The table has k-NN and the linear probe of the
frozen online encoder at the end, mean and spread over seeds, and what a step costs beside a plain one, by the median;
the picture both losses, agreement and spread over time, and the probes. Nothing is chosen on the samples for tests.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transfer import Setting, carry_out, finish, parser, pretraining, seconds

from convmae import CMAE
from convmae.files import lines
from convmae.pictures import smoothed
from convmae.run import Pretrain
from convmae.two_views import TwoViews

SIDES = ("without contrast", "CMAE")
MOMENTUM = 0.99
"""Of the target: less than the published 0.996, for runs of a few thousand steps."""


def contrastive(setting: Setting, seed: int, folder: Path, workers: int) -> Pretrain:
    """The same run with a target and contrast; views are a seventh of the input apart, as published, and 3 frames."""
    run = pretraining(setting, seed, folder, workers)
    assert not isinstance(run.model, CMAE)
    decoder = run.model.decoder
    model = CMAE(mae=run.model).decode_features(dim=decoder.dim, depth=1, heads=decoder.heads)
    size = setting.model.size
    shift = (*(4 for _ in size[:-2]), *(round(side / 7) for side in size[-2:]))
    return replace(
        run,
        model=model.project(hidden=256, dim=64).follow(MOMENTUM),
        data=TwoViews(source=run.data, shift=shift),
        folder=folder / f"contrastive-{seed}",
    )


def one_seed(setting: Setting, seed: int, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Both sides of a seed."""
    found = []
    for run in (pretraining(setting, seed, folder, workers), contrastive(setting, seed, folder, workers)):
        finish(run)
        found.append(
            {
                "probes": list(lines(run.folder / "scores.jsonl")),
                "metrics": list(lines(run.folder / "metrics.jsonl")),
                "seconds": seconds(run),
            }
        )
    return found


def table(found: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Mean and spread over seeds of the probes at the end, and the cost of a step."""
    rows = []
    for kind in ("knn", "linear"):
        for number, side in enumerate(SIDES):
            values = [100 * one[number]["probes"][-1][f"{kind}_top1"] for one in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            seeds = ", ".join(f"{value:.1f}" for value in values)
            rows.append(f"| {kind}, {side} | {statistics.mean(values):.1f}{spread} | {seeds} |")
    ratios = [cmae["seconds"] / plain["seconds"] for plain, cmae in found]
    rows.append(
        f"| time of a step over a plain one's | {statistics.mean(ratios):.2f} | "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
    )
    return "| | mean | seeds |\n| --- | --- | --- |\n" + "\n".join(rows)


def draw(found: Sequence[Sequence[dict[str, Any]]], path: Path) -> None:
    """Both losses, what tells of a collapse, and the probes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    colours = dict(zip(SIDES, ("#808790", "#4287f5"), strict=True))
    curves = [("reconstruction", "reconstruction loss"), ("contrast", "contrastive loss")]
    curves += [
        ("agreement", "agreement: cosine of query and key"),
        ("spread", "spread of keys: 0 is a collapse"),
    ]
    for panel, (name, title) in zip(panels, curves, strict=False):
        for number, one in enumerate(found):
            for side, what in zip(SIDES, one, strict=True):
                key = "loss" if name == "reconstruction" and side == SIDES[0] else name
                told = [(line["epoch"], line[key]) for line in what["metrics"] if line.get(key) is not None]
                if told:
                    epochs, values = torch.tensor(told, dtype=torch.float64).T.numpy()
                    label = None if number else side
                    panel.plot(epochs, smoothed(values), color=colours[side], linewidth=1.4, label=label)
        panel.set_title(title, fontsize=10)
    for panel, kind in zip(panels[4:], ("knn", "linear"), strict=True):
        for number, one in enumerate(found):
            for side, what in zip(SIDES, one, strict=True):
                points = [(line["epoch"], 100 * line[f"{kind}_top1"]) for line in what["probes"]]
                label = None if number else side
                panel.plot(*zip(*points, strict=True), "o-", color=colours[side], markersize=3, label=label)
        panel.set_title(f"{kind} probe, top-1, %", fontsize=10)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_xlabel("epoch", fontsize=9)
    for panel in (panels[0], panels[5]):
        panel.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    carry_out(parser(__doc__).parse_args(), "contrast", one_seed, table, draw, picture="contrast.png")


if __name__ == "__main__":  # checkpoints name the classes by their module, which is then not __main__
    importlib.import_module("contrast").main()
