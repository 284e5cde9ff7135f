"""Whether pretraining pays: pretrained and finetuned on few labels, against from scratch, over several seeds.

    python benchmarks/transfer.py video                              # the demo clips, whose classes are motions
    python benchmarks/transfer.py images --data photos               # any folder with train/ and val/, of classes each
    python benchmarks/transfer.py images --data photos --pretrain-epochs 400 --seeds 5

A seed pretrains a small model on all samples for training, without labels (and on those of `unlabelled/`, if there is
such a folder), probed meanwhile by k-NN and a linear layer; finetunes it on a few labelled samples of each class; and
trains the same network from scratch on these, once for as many epochs, and once for as long as pretraining and
finetuning took together, by the median time of a step. All are trained with the published mixup, cutmix, smoothing and
erasing, at one learning rate; the last state counts. What is done is done once: the same command goes on.

The table has top-1 on the samples for tests, mean and spread over seeds; the picture the curves.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from motions import Motions

from convmae import AttentionStage, ConvMAE, ConvStage, masking, targets
from convmae.builders import MAE
from convmae.data import Sample, Samples, Source
from convmae.files import lines, write_whole
from convmae.finetune import Finetune
from convmae.images import ImageFolder
from convmae.probe import Few, Probe
from convmae.run import Pretrain, Run
from convmae.training import fit
from video import VideoConvMAE
from video.clips import Dense

F = TypeVar("F")
"""What is found of a seed."""


@dataclass(frozen=True, kw_only=True)
class Fewer:
    """So many samples of each class of another source."""

    source: Source
    per_class: int
    seed: int

    def open(self, size: tuple[int, ...]) -> Samples:
        """They are drawn from the seed."""
        return Few(self.source.open(size), self.per_class, self.seed)


@dataclass(frozen=True, kw_only=True)
class Together:
    """All samples of several sources, without labels."""

    sources: tuple[Source, ...]

    def open(self, size: tuple[int, ...]) -> Samples:
        """One source after the other."""
        return _Joined([source.open(size) for source in self.sources])


class _Joined:
    def __init__(self, parts: list[Samples]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.parts))

    def _of(self, index: int) -> tuple[Samples, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def name(self, index: int) -> str:
        part, place = self._of(index)
        return part.name(place)

    def load(self, index: int, generator: torch.Generator) -> Sample:
        part, place = self._of(index)
        return Sample(part.load(place, generator).pixels)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, on what, and for how long."""

    model: MAE
    unlabelled: Source
    train: Source
    test: Source
    per_class: int
    pretrain_epochs: float
    contrast_epochs: float
    pretrain_batch: int
    pretrain_lr: float
    finetune_epochs: float
    finetune_batch: int = 32
    finetune_lr: float
    layer_decay: float
    drop_path: float


def for_images(data: Path) -> Setting:
    """A small ConvMAE on photographs of 48 pixels."""
    train = ImageFolder(root=data, split="train")
    more = data / "unlabelled"
    stages = (
        ConvStage(dim=32, depth=1, stride=(4, 4), kernel=(5, 5)),
        ConvStage(dim=64, depth=1, stride=(2, 2), kernel=(5, 5)),
        AttentionStage(dim=128, depth=4, stride=(1, 1), heads=4),
    )
    return Setting(
        model=ConvMAE().input(48).stages(*stages).mask(masking.random(0.6)).decode(dim=64, depth=2, heads=4),
        unlabelled=Together(sources=(train, ImageFolder(root=more))) if more.is_dir() else train,
        train=train,
        test=ImageFolder(root=data, split="val").as_test(),
        per_class=10,
        pretrain_epochs=32,
        contrast_epochs=12,
        pretrain_batch=64,
        pretrain_lr=6e-3,
        finetune_epochs=192,
        finetune_lr=8e-3,
        layer_decay=0.75,
        drop_path=0.1,
    )


def for_video() -> Setting:
    """A small VideoConvMAE on the demo clips, 8 frames of 32 pixels, whose classes are motions.

    There are 100 clips of each of 8 motions, and 50 for tests: more than in the usual demo set, so that one can tell.

    Masks are random, at 60 %. Under tubes nothing of a place is ever shown, so that a frame is filled in from itself,
    and motion was not learnt in a few thousand steps: k-NN stayed near chance (single tries; see README.md).
    """
    stages = (
        ConvStage(dim=32, depth=1, stride=(4, 4), kernel=(5, 5)),
        ConvStage(dim=64, depth=1, stride=(2, 2), kernel=(5, 5)),
        AttentionStage(dim=96, depth=4, stride=(1, 1), heads=4),
    )
    image = ConvMAE().input(32).stages(*stages).decode(dim=64, depth=1, heads=4).predict(targets.pixels())
    train = Motions(sampling=Dense(stride=4))
    return Setting(
        model=VideoConvMAE.inflate(image, frames=8).mask(masking.random(0.6)),
        unlabelled=train,
        train=train,
        test=replace(train, split="val").as_test(),
        per_class=10,
        pretrain_epochs=80,
        contrast_epochs=36,
        pretrain_batch=32,
        pretrain_lr=1.6e-2,
        finetune_epochs=240,
        finetune_lr=4e-3,
        layer_decay=1.0,
        drop_path=0.0,
    )


def pretraining(setting: Setting, seed: int, folder: Path, workers: int, *, probes: int = 6) -> Pretrain:
    """The run without labels, probed so often after its start."""
    return Pretrain(
        model=setting.model,
        data=setting.unlabelled,
        epochs=setting.pretrain_epochs,
        batch_size=setting.pretrain_batch,
        base_lr=setting.pretrain_lr,
        warmup_epochs=setting.pretrain_epochs / 20,
        clip_gradient=1.0,
        seed=seed,
        workers=workers,
        pictures=3,
        probe=Probe(train=setting.train, test=setting.test, every=setting.pretrain_epochs / probes),
        folder=folder / f"pretrained-{seed}",
    )


def finetuning(setting: Setting, seed: int, folder: Path, workers: int, start: Path | None, times: float) -> Finetune:
    """The run with few labels, from a checkpoint or from scratch, for so many times its epochs."""
    epochs = times * setting.finetune_epochs
    return Finetune(
        model=setting.model,
        data=Fewer(source=setting.train, per_class=setting.per_class, seed=seed),
        test=setting.test,
        test_every=epochs / 8,
        epochs=epochs,
        batch_size=setting.finetune_batch,
        base_lr=setting.finetune_lr,
        min_lr=0.0,
        warmup_epochs=epochs / 10,
        clip_gradient=1.0,
        layer_decay=setting.layer_decay if start else 1.0,
        drop_path=setting.drop_path if start else 0.0,
        seed=seed,
        workers=workers,
        checkpoint=start,
        folder=folder / f"{'finetuned' if start else 'scratch'}{'' if times == 1 else '-long'}-{seed}",
    )


def seconds(run: Run) -> float:
    """What a run's steps take by their median time: other programs on the machine count less."""
    told = list(lines(run.folder / "metrics.jsonl"))
    each = [
        (line["samples_per_second"], line["step"] - line["since"] + 1) for line in told if line["samples_per_second"]
    ]
    return float(told[-1]["samples"] / statistics.median([speed for speed, steps in each if steps > 1]))


def score(run: Run, name: str = "top1") -> float:
    """The last one of a run."""
    return float(list(lines(run.folder / "scores.jsonl"))[-1][name])


ROWS = ("pretrained, finetuned", "from scratch, as many epochs", "from scratch, as much time")


def one_seed(setting: Setting, seed: int, folder: Path, workers: int) -> dict[str, Any]:
    """All runs of a seed."""
    before = pretraining(setting, seed, folder, workers)
    finish(before)
    after = finetuning(setting, seed, folder, workers, before.folder, 1)
    finish(after)
    scratch = finetuning(setting, seed, folder, workers, None, 1)
    finish(scratch)
    kept = folder / f"times-{seed}.json"  # the second time it must be the same run
    if not kept.exists():
        times = 1 + seconds(before) / seconds(after)
        write_whole(kept, json.dumps(round(max(times, 1.01), 2)))
    longer = finetuning(setting, seed, folder, workers, None, json.loads(kept.read_text()))
    finish(longer)
    runs = (after, scratch, longer)
    return {
        "top1": dict(zip(ROWS, map(score, runs), strict=True)),
        "probes": list(lines(before.folder / "scores.jsonl")),
        "tests": {name: list(lines(run.folder / "scores.jsonl")) for name, run in zip(ROWS, runs, strict=True)},
        "times": json.loads(kept.read_text()),
    }


def finish(run: Run) -> None:
    """Carry a run out; asked to stop, stop."""
    print(f"\n== {run.folder}", flush=True)
    if not fit(run):
        raise KeyboardInterrupt


def row(name: str, values: Sequence[float]) -> str:
    """Of a table: mean, spread, and the figures of all seeds."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"| {name} | {statistics.mean(values):.1f}{spread} | {', '.join(f'{value:.1f}' for value in values)} |"


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean and spread over seeds."""
    rows = [row(name, [100 * one["top1"][name] for one in found]) for name in ROWS]
    for kind in ("knn", "linear"):
        for at, what in ((0, "at its start"), (-1, "at its end")):
            rows.append(row(f"{kind} {what}", [100 * one["probes"][at][f"{kind}_top1"] for one in found]))
    times = ", ".join(f"{one['times']:g}" for one in found)
    head = "| | top-1, % | seeds |\n| --- | --- | --- |\n"
    return head + "\n".join(rows) + f"\n\nAs much time is {times} times the epochs of finetuning."


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Probes over pretraining, and tests over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, colour in (("knn", "#4287f5"), ("linear", "#e08a3c")):
        for number, one in enumerate(found):
            points = [(line["epoch"], 100 * line[f"{kind}_top1"]) for line in one["probes"]]
            left.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=None if number else kind)
    colours = dict(zip(ROWS, ("#3aa87a", "#c9524f", "#8a7f5c"), strict=True))
    for name, colour in colours.items():
        for number, one in enumerate(found):
            told = one["tests"][name]
            points = [(line["epoch"] / told[-1]["epoch"], 100 * line["top1"]) for line in told]
            right.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=None if number else name)
    left.set(xlabel="epochs of pretraining", ylabel="top-1, %", title="probes of frozen features")
    right.set(xlabel="part of training on few labels", title="trained on few labels")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def parser(about: str | None) -> argparse.ArgumentParser:
    """The flags that scripts over several seeds have in common."""
    flags = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("kind", choices=("video", "images"))
    flags.add_argument(
        "--data", type=Path, help="for images: a folder with train/ and val/; without it the demo stills"
    )
    flags.add_argument("--folder", type=Path, help="of the runs (default: runs/transfer-KIND)")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--only", type=int, metavar="SEED", help="this seed alone, without table: for several at a time")
    flags.add_argument("--workers", type=int, default=1)
    flags.add_argument("--picture", type=Path, help="(default: in the folder)")
    return flags


def carry_out(
    given: argparse.Namespace,
    name: str,
    one_seed: Callable[[Setting, int, Path, int], F],
    table: Callable[[Sequence[F]], str],
    draw: Callable[[Sequence[F], Path], None],
    *,
    picture: str,
) -> None:
    """All seeds, their table, picture and figures; or the one that is asked for."""
    if given.kind == "images":
        from convmae.demo import make

        setting = for_images(make() if given.data is None else given.data.absolute())
    else:
        setting = for_video()
    numbers = ("pretrain_epochs", "contrast_epochs", "finetune_epochs", "per_class")
    setting = replace(setting, **{number: value for number in numbers if (value := vars(given).get(number))})
    folder = given.folder or Path(f"runs/transfer-{given.kind}")
    if given.only is not None:
        one_seed(setting, given.only, folder, given.workers)
        return
    began = time.monotonic()
    found = [one_seed(setting, seed, folder, given.workers) for seed in range(given.seeds)]
    print(f"\n{setting}\n\n{table(found)}\n{(time.monotonic() - began) / 60:.0f} minutes, torch {torch.__version__}")
    path = given.picture or folder / picture
    draw(found, path)
    write_whole(folder / f"{name}.json", json.dumps(found, indent=1))
    print(path)


def main() -> None:
    """The command line."""
    flags = parser(__doc__)
    flags.add_argument("--pretrain-epochs", type=float)
    flags.add_argument("--finetune-epochs", type=float)
    flags.add_argument("--per-class", type=int, help="labelled samples of each class")
    carry_out(flags.parse_args(), "transfer", one_seed, table, draw, picture="curves.png")


if __name__ == "__main__":  # checkpoints name the classes by their module, which is then not __main__
    importlib.import_module("transfer").main()
