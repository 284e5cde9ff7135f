"""What contrast adds to reconstruction: CMAE against the same masked autoencoder without it, over several seeds.

    python benchmarks/contrast.py video                              # the demo clips, whose classes are motions
    python benchmarks/contrast.py images --data photos               # any folder with train/ and val/, of classes each

Both sides are pretrained for equally many epochs, with the settings of `transfer.py` but for less time, on the same
views: the corners of larger crops, as CMAE's online encoder sees them. The table has k-NN and the linear probe
of the frozen online encoder, mean and spread over seeds; the picture both losses, agreement and spread over time, and
the probes. Nothing is chosen on the samples for tests. What a step costs beside a plain one: `pretrain_step.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transfer import Setting, carry_out, finish, parser, pretraining, row

from convmae import CMAE
from convmae.data import Sample, Samples
from convmae.files import lines
from convmae.pictures import smoothed
from convmae.run import Pretrain
from convmae.two_views import TwoViews

SIDES = ("without contrast", "CMAE")
MOMENTUM = 0.99
"""Of the target: less than the published 0.996, for runs of a thousand steps."""


@dataclass(frozen=True, kw_only=True)
class FirstView:
    """Of two views the online one alone, so that both sides see the same pixels."""

    source: TwoViews

    def open(self, size: tuple[int, ...]) -> Samples:
        """As the two views."""
        return _First(self.source.open(size))


class _First:
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"the first view of {self.samples!r}"

    def name(self, index: int) -> str:
        return self.samples.name(index)

    def load(self, index: int, generator: torch.Generator) -> Sample:
        return self.samples.load(index, generator)._replace(second=None)


def both(setting: Setting, seed: int, folder: Path, workers: int) -> tuple[Pretrain, Pretrain]:
    """The runs of a seed, without and with contrast; views are a seventh of the input apart, as published; 3 frames."""
    run = pretraining(replace(setting, pretrain_epochs=setting.contrast_epochs), seed, folder, workers, probes=3)
    decoder = setting.model.decoder
    cmae = CMAE(mae=setting.model).decode_features(dim=decoder.dim, depth=1, heads=decoder.heads)
    size = setting.model.size
    shift = (*(4 for _ in size[:-2]), *(round(side / 7) for side in size[-2:]))
    views = TwoViews(source=setting.unlabelled, shift=shift)
    return (
        replace(run, data=FirstView(source=replace(views, colour=())), folder=folder / f"plain-{seed}"),
        replace(
            run,
            model=cmae.project(hidden=256, dim=64).follow(MOMENTUM),
            data=views,
            folder=folder / f"contrastive-{seed}",
        ),
    )


def one_seed(setting: Setting, seed: int, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Both sides of a seed."""
    found = []
    for run in both(setting, seed, folder, workers):
        finish(run)
        found.append(
            {
                "probes": list(lines(run.folder / "scores.jsonl")),
                "metrics": list(lines(run.folder / "metrics.jsonl")),
            }
        )
    return found


def table(found: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Mean and spread over seeds of the probes, before and after."""
    rows = []
    for kind in ("knn", "linear"):
        of = [[[100 * line[f"{kind}_top1"] for line in side["probes"]] for side in one] for one in found]
        rows.append(row(f"{kind} at the start", [one[0][0] for one in of]))
        rows += [row(f"{kind}, {side}", [one[number][-1] for one in of]) for number, side in enumerate(SIDES)]
    return "| | top-1, % | seeds |\n| --- | --- | --- |\n" + "\n".join(rows)


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
    flags = parser(__doc__)
    flags.add_argument("--contrast-epochs", type=float)
    carry_out(flags.parse_args(), "contrast", one_seed, table, draw, picture="contrast.png")


if __name__ == "__main__":  # checkpoints name the classes by their module, which is then not __main__
    importlib.import_module("contrast").main()
