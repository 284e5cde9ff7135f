"""Probes: how good the features of a frozen trunk are, without finetuning it.

    python -m convmae.probe runs/image_demo                         # on the demo set
    python -m convmae.probe runs/a --data /data/imagenet --kinds knn linear attentive

`python -m video.probe` does the same for videos. A trunk sees every sample whole and once, as a test does, and the
probes work on what it gave. So they are quick, and a first word on whether a run is any good; the papers' linear probe
draws new crops and flips in every epoch instead, and reaches more.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from . import command, weights
from .data import UNLABELLED, Samples, Source, StartMethod, Stream, generator, repeats, usable_cpus
from .distributed import World
from .evaluation import at_rest, glanced, renumbered
from .files import write_whole
from .images import ImageFolder
from .lars import LARS
from .location import located, same, whole
from .nn.layers import ATTENTION_EPS
from .nn.masked_autoencoder import MaskedAutoencoder
from .optimisation import learning_rate
from .targets import normalize

Kind = Literal["knn", "linear", "attentive"]
MOST_BYTES = 16 << 30
"""Bytes of tokens that an attentive probe may keep."""


# ---- features --------------------------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """What a trunk gave for N samples, in the order of their listing.

    features float32 `(N, D)`: the mean of the last stage's tokens, before any norm; tokens float16 `(N, L, D)`, or
    None; labels int64 `(N)`; unusable: how many samples could not be loaded, and are not among them.
    """

    features: Tensor
    tokens: Tensor | None
    labels: Tensor
    unusable: int

    def to(self, device: torch.device) -> Embedded:
        """On another device; tokens, which may be many, stay in float16."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return Embedded(self.features.to(device), tokens, self.labels.to(device), self.unusable)


def embed(
    model: nn.Module,
    samples: Samples,
    *,
    size: tuple[int, ...],
    world: World,
    batch_size: int,
    tokens: bool = False,
    workers: int = 0,
    autocast: AbstractContextManager[Any] | None = None,
    seconds: float = math.inf,
    method: StartMethod | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Embedded:
    """Features of every sample; all processes call it, share the samples out, and get the same.

    Args:
        model: one with a `trunk`, on the world's device; it is left as it was.
        samples: of a source's `as_test()`: one view each.
        size: of the input in pixels.
        world: the processes.
        batch_size: samples of a process at a time.
        tokens: keep all tokens of the last stage as well.
        workers, seconds, method: see `convmae.data.Stream.batches`.
        autocast: the precision of the forward pass; None: as it is.
        beat: called after every batch, equally often by all processes.

    Raises:
        ValueError: samples give several views, or the tokens take too much memory.
    """
    if repeats(samples) != 1:
        raise ValueError(f"a probe looks at one view of each sample, these give {repeats(samples)}: as_test()")
    trunk: Any = model.get_submodule("trunk")
    if tokens:
        _affordable(trunk, samples)
    stream = Stream(samples, size, 0, world.size * batch_size, rank=world.rank, world=world.size, once=True)
    sharded = isinstance(model, FSDPModule)
    features = model.features if isinstance(model, MaskedAutoencoder) else trunk  # the first knows of sharding
    found: list[tuple[list[int], list[int], Tensor, Tensor | None]] = []
    unusable = 0
    batches = stream.batches(
        0,
        stream.steps_in(1),
        workers=workers,
        pin_memory=world.device.type == "cuda",
        seconds=seconds,
        method=method,
    )
    with at_rest(model), closing(batches) as arriving:
        for [batch] in arriving:
            unusable += len(batch.skipped)
            count = len(batch.pixels)
            if count or sharded:  # a sharded model's forward pass needs all processes
                pixels = batch.pixels if count else torch.zeros(1, 3, *size, dtype=torch.uint8)
                with autocast or nullcontext():
                    out = features(normalize(pixels.to(world.device, non_blocking=True))).tokens[:count]
                kept = out.half().cpu() if tokens else None
                found.append((batch.indices.tolist(), batch.labels.tolist(), out.float().mean(1).cpu(), kept))
            beat()
    parts = world.gather(found)
    lost = sum(world.gather([unusable]))
    indices = torch.tensor([index for part in parts for index in part[0]], dtype=torch.long)
    if not len(indices):
        raise ValueError(f"none of {len(samples)} samples can be used: there is nothing to probe")
    order = indices.argsort()
    return Embedded(
        torch.cat([part[2] for part in parts])[order],
        torch.cat([part[3] for part in parts if part[3] is not None])[order] if tokens else None,
        torch.tensor([label for part in parts for label in part[1]], dtype=torch.long)[order],
        lost,
    )


def _affordable(trunk: Any, samples: Samples) -> None:
    """Refuse to keep more tokens than memory is for."""
    needed = 2 * len(samples) * trunk.length * trunk.dims[-1]
    if needed > MOST_BYTES:
        raise ValueError(
            f"the attentive probe would keep {needed / 2**30:.1f} GiB of tokens of {len(samples)} samples; at most "
            f"{MOST_BYTES >> 30} are kept, those of {MOST_BYTES * len(samples) // needed}. Probe on fewer (--per-class "
            "for training; for tests, --test with a part of them), or with --kinds knn linear"
        )


# ---- probes ----------------------------------------------------------------------------------------------------------


class Accuracy(NamedTuple):
    """Parts of the test samples whose class is the first, or among the first five (None below five classes)."""

    top1: float
    top5: float | None


def accuracy(votes: Tensor, labels: Tensor) -> Accuracy:
    """Of votes `(N, classes)` for labels `(N)`; of equal votes the lower class comes first."""
    best = torch.argsort(votes, dim=1, descending=True, stable=True)[:, :5]
    hits = (best == labels[:, None]).cumsum(1).double().mean(0)
    return Accuracy(float(hits[0]), float(hits[4]) if votes.shape[1] >= 5 else None)


def knn(train: Embedded, test: Embedded, *, neighbours: int = 20, temperature: float = 0.07) -> Accuracy:
    """Weighted nearest neighbours (Wu et al., 2018, arXiv 1805.01978, section 3.4; so DINO's).

    Features lose the mean of the training set and are scaled to length 1; each of the nearest votes for its class with
    exp(cosine / temperature). Where there are fewer training samples, all of them vote; of equally near ones, the first
    in the listing.

    Raises ValueError for less than one neighbour, or samples without labels.
    """
    if neighbours < 1:
        raise ValueError(f"{neighbours=} is below 1")
    classes = _classes(train, test)
    mean = train.features.mean(0)
    near, of = (F.normalize(each.features - mean, dim=1) for each in (train, test))
    votes = torch.zeros(len(of), classes, dtype=torch.float64, device=of.device)
    rows = max(1, _SORTED // len(near))
    for start in range(0, len(of), rows):
        part = slice(start, start + rows)
        cosine = of[part] @ near.T
        which = torch.argsort(cosine, dim=1, descending=True, stable=True)[:, :neighbours]
        weight = (cosine.gather(1, which).double() / temperature).exp()
        votes[part] = votes[part].scatter_add(1, train.labels[which], weight)
    return accuracy(votes, test.labels)


RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Learning rates for 256 samples that a linear probe of few samples chooses from; the papers' is the first."""

_FOLD = 5
"""One sample of so many is held out where a linear probe chooses its rate."""

_SORTED = 1 << 27
"""Cosines that k-NN sorts at a time: with the sorted values and their places, 2 GiB."""

MANY = 100_000
"""Samples from which on a linear probe takes the papers' rate, unless it is given others."""


def linear(
    train: Embedded, test: Embedded, *, epochs: int = 90, rates: Sequence[float] | None = None, seed: int = 0
) -> tuple[Accuracy, float]:
    """A linear layer on features normalised over the batch, by LARS: MAE's probe (arXiv 2111.06377, appendix A.1).

    BatchNorm without affine, a Linear, LARS with momentum 0.9 and no decay, 10 of 90 epochs as warm-up, a cosine to 0.
    The papers' batch is 4096; here it is that, and at most an eighth of the set. On few samples, so in few steps, LARS
    wants larger rates than the papers': of `RATES`, the one is taken that is best on a fifth of the *training* samples,
    after training on the others; with less than 10 samples, the first. It runs where the features are.

    Returns the accuracy and the rate that was taken. Raises ValueError where samples have no labels, and for a single
    one to train on.
    """
    classes = _classes(train, test)
    if len(train.labels) < 2:
        raise ValueError("a linear probe normalises features over samples: it needs 2 or more, not 1")
    rates = rates or (RATES if len(train.labels) < MANY else RATES[:1])
    chosen = rates[0]
    if len(rates) > 1 and len(train.labels) >= 2 * _FOLD:
        order = torch.randperm(len(train.labels), generator=generator(seed, 1))
        held, rest = order[: len(order) // _FOLD], order[len(order) // _FOLD :]
        parts = [train._replace(features=train.features[part], labels=train.labels[part]) for part in (rest, held)]
        found = [accuracy(_fit(parts[0], parts[1], classes, epochs, rate, seed), parts[1].labels) for rate in rates]
        chosen = rates[max(range(len(rates)), key=lambda number: found[number].top1)]
    return accuracy(_fit(train, test, classes, epochs, chosen, seed), test.labels), chosen


def _fit(train: Embedded, test: Embedded, classes: int, epochs: int, rate: float, seed: int) -> Tensor:
    """Train a linear probe: logits `(N, classes)` of the test samples."""
    count, width = train.features.shape
    batch = min(count, max(2, min(4096, count // 8)))  # of one sample there is no variance
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm, head = nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, classes)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    norm, head = norm.to(train.features.device), head.to(train.features.device)
    optimiser = LARS(head.parameters(), lr=0.0)
    steps = max(1, count // batch) * epochs
    with torch.enable_grad():
        for step in range(steps):
            at = step % (steps // epochs)
            if at == 0:
                order = torch.randperm(count, generator=generator(seed, 2, step))
            chosen = order[at * batch : (at + 1) * batch]
            loss = F.cross_entropy(head(norm(train.features[chosen])), train.labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step / steps, peak=rate * batch / 256, floor=0.0, warmup=1 / 9)
            optimiser.step()
    norm.eval()
    with torch.no_grad():
        logits: Tensor = head(norm(test.features))
    return logits


class AttentivePool(nn.Module):
    """A learned query attends to a sample's tokens; then a norm and a linear layer."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.into = nn.LayerNorm(width, eps=ATTENTION_EPS)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=ATTENTION_EPS)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (B, L, D) -> (B, classes)`."""
        x = self.into(tokens)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        out: Tensor = self.head(self.norm(pooled[:, 0]))
        return out


def attentive(
    train: Embedded,
    test: Embedded,
    *,
    heads: int = 12,
    epochs: int = 60,
    rate: float = 1e-3,
    weight_decay: float = 0.05,
    batch_size: int = 128,
    seed: int = 0,
) -> Accuracy:
    """A learned query over the last stage's tokens, trained by AdamW (CAE, arXiv 2202.03026; V-JEPA, arXiv 2404.08471).

    It reads what a mean over tokens leaves out, such as where something is. Its numbers are common ones, not a paper's:
    10 % of the epochs as warm-up, a cosine to 0. `heads` is lowered until it divides the width.

    Raises ValueError where there are no tokens, or samples have no labels.
    """
    if train.tokens is None or test.tokens is None:
        raise ValueError("an attentive probe needs embed(..., tokens=True)")
    classes, (count, _, width) = _classes(train, test), train.tokens.shape
    heads = max(number for number in range(1, heads + 1) if width % number == 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = AttentivePool(width, classes, heads).to(train.tokens.device)
    optimiser = torch.optim.AdamW(pool.parameters(), lr=0.0, weight_decay=weight_decay)
    batch = min(batch_size, max(1, count // 4))
    steps = max(1, count // batch) * epochs
    with torch.enable_grad():
        for step in range(steps):
            at = step % (steps // epochs)
            if at == 0:
                order = torch.randperm(count, generator=generator(seed, 3, step))
            chosen = order[at * batch : (at + 1) * batch]
            loss = F.cross_entropy(pool(train.tokens[chosen].float()), train.labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step / steps, peak=rate, floor=0.0, warmup=0.1)
            optimiser.step()
    with torch.no_grad():
        logits = torch.cat([pool(part.float()) for part in torch.split(test.tokens, batch_size)])
    return accuracy(logits, test.labels)


def _classes(train: Embedded, test: Embedded) -> int:
    labels = torch.cat([train.labels, test.labels])
    if int(labels.min()) < 0:
        raise ValueError("a probe needs labels: give folders named by class, or a list with labels")
    return int(labels.max()) + 1


# ---- all of them, of a model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a trunk is probed on, and how; a run that has one as its `probe` takes it now and then.

    Args:
        train, test: sources of labelled samples; each is looked at as a test does, in one view.
        every: epochs between two probes of a run.
        kinds: knn, linear, attentive.
        neighbours: of knn.
        per_class: so many training samples of each class, always the same ones; None: all.
        batch_size: samples of a process at a time.
        seed: of what is drawn.

    Raises ValueError for a number below 1, or an unknown kind.
    """

    train: Source
    test: Source
    every: float = 10
    kinds: tuple[Kind, ...] = ("knn", "linear")
    neighbours: int = 20
    per_class: int | None = None
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"neighbours": self.neighbours, "per_class": self.per_class or 1, "batch_size": self.batch_size}
        if wrong := [f"{name}={count}" for name, count in counts.items() if count < 1]:
            raise ValueError(f"Probe: {', '.join(wrong)}: must be 1 or more")
        if not self.every > 0:
            raise ValueError(f"Probe: every={self.every} must be positive")
        if unknown := set(self.kinds) - {"knn", "linear", "attentive"} or not self.kinds:
            raise ValueError(f"Probe: kinds are knn, linear and attentive; got {unknown or self.kinds!r}")


class Probing:
    """A probe of a model that is or was trained: all processes make one, and `take` it together.

    Args:
        probe: what is looked at, and how.
        model: one with a `trunk`; on the world's device when it is probed.
        size: of the input in pixels.
        world: the processes.
        workers, seconds, method: of loading; see `convmae.data.Stream.batches`.
        autocast: the precision of the forward pass.
        beat: called after every batch, equally often by all processes.

    Raises ValueError where the sources hold nothing, or their classes have other names.
    """

    at_start = True

    def __init__(
        self,
        probe: Probe,
        model: nn.Module,
        *,
        size: tuple[int, ...],
        world: World,
        workers: int = 0,
        autocast: AbstractContextManager[Any] | None = None,
        seconds: float = math.inf,
        method: StartMethod | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.probe, self.every, self.model, self.world = probe, probe.every, model, world
        sources = [glanced(source) for source in (probe.train, probe.test)]
        train, test = (world.tell(partial(source.open, size)) for source in sources)
        names = [tuple(getattr(samples, "classes", ())) for samples in (train, test)]
        numbers = all(name.isdecimal() for name in (*names[0], *names[1]))
        if renumbered(*names) or (all(names) and names[0] != names[1] and not numbers):
            raise ValueError(f"the probe's classes differ: {', '.join(names[0][:5])}...; {', '.join(names[1][:5])}...")
        self.samples = (train if probe.per_class is None else Few(train, probe.per_class, probe.seed), test)
        if "attentive" in probe.kinds:  # said before any is looked at
            for samples in self.samples:
                _affordable(model.get_submodule("trunk"), samples)
        self.loading: dict[str, Any] = {
            "size": size,
            "world": world,
            "batch_size": probe.batch_size,
            "tokens": "attentive" in probe.kinds,
            "workers": workers,
            "autocast": autocast,
            "seconds": seconds,
            "method": method,
            "beat": beat,
        }

    def take(self, *, last: bool = False) -> dict[str, float]:
        """Figures by name, the same on all processes."""
        train, test = (embed(self.model, samples, **self.loading) for samples in self.samples)
        return self.world.tell(lambda: self._judged(train.to(self.world.device), test.to(self.world.device)))

    def _judged(self, train: Embedded, test: Embedded) -> dict[str, float]:
        probe, figures = self.probe, dict[str, float]()
        for kind in probe.kinds:
            if kind == "knn":
                found = knn(train, test, neighbours=probe.neighbours)
            elif kind == "linear":
                found, figures["linear_rate"] = linear(train, test, seed=probe.seed)
            else:
                found = attentive(train, test, seed=probe.seed)
            figures[f"{kind}_top1"] = found.top1
            if found.top5 is not None:
                figures[f"{kind}_top5"] = found.top5
        return {**figures, "unusable": float(train.unusable + test.unusable)}


class Few:
    """So many samples of each class, drawn from a seed; classes that have less give all they have."""

    def __init__(self, samples: Samples, per_class: int, seed: int) -> None:
        self.samples = samples
        owner: Any = next((one for one in (samples, getattr(samples, "listing", None)) if hasattr(one, "labels")), None)
        owner = getattr(samples, "members", None) if owner is None else owner
        if owner is None:
            raise ValueError(f"{samples!r} has no list of labels, so that none can be drawn by class")
        labels = torch.as_tensor(owner.labels, dtype=torch.long)
        order = torch.randperm(len(labels), generator=generator(seed, 4))
        drawn = [order[labels[order] == label][:per_class] for label in sorted({*labels.tolist()} - {UNLABELLED})]
        self.chosen = torch.cat(drawn).sort().values.tolist() if drawn else []

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(getattr(self.samples, "classes", ()))

    def __len__(self) -> int:
        return len(self.chosen)

    def __repr__(self) -> str:
        return f"{len(self)} of {self.samples!r}"

    def name(self, index: int) -> str:
        """The file of a sample."""
        return self.samples.name(self.chosen[index])

    def load(self, index: int, generator: torch.Generator) -> Any:
        """Load one of them."""
        return self.samples.load(self.chosen[index], generator)


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """Probe the features of a frozen trunk, without finetuning it.

    Args:
        model: a run's folder, or a file that convmae.weights.load reads.
        data: a folder with train/ and val/, of classes each, or a list of videos; the demo set without one.
        test: the samples for tests, where they are elsewhere.
        recipe: module:function of a finetuning recipe, on whose sets to probe; data and test say where they are.
        kinds: knn, linear, attentive.
        per_class: so many training samples of each class. (default: all)
        neighbours: of knn.
        size: side of the input in pixels. (default: the model's)
        encoder: of a CMAE: online or target.
        channels: of the authors' CMAE: rgb, or bgr, which the released weights saw.
        batch_size: samples at a time.
        workers: loader processes. (default: one a CPU)
        device: auto, cpu, cuda.
        json: a file for the figures.
    """

    model: Path
    data: Path | None = None
    test: Path | None = None
    recipe: str | None = None
    kinds: tuple[Kind, ...] = ("knn", "linear")
    per_class: int | None = None
    neighbours: int = 20
    size: int | None = None
    encoder: weights.Encoder = "online"
    channels: weights.Channels = "rgb"
    batch_size: int = 32
    workers: int | None = None
    device: str = "auto"
    json: Path | None = None


def _placed(options: Options, train: Source, test: Source) -> tuple[Source, Source]:
    """Those samples, or a recipe's, at the places that the options name."""
    if options.recipe is not None:
        from .launch import find_recipe

        task: Any = find_recipe(options.recipe)[0]
        if getattr(task, "data", None) is None or getattr(task, "test", None) is None:
            raise ValueError(f"--recipe {options.recipe} does not say what to train and test on: give a finetuning one")
        train, test = task.data, task.test
    if options.data is not None:
        train, test = located(train, options.data), test if options.test else located(test, options.data)
        if options.test is None and same(train, test):
            raise ValueError(f"--data {options.data} has no part for tests: say where they are with --test")
    if options.test is not None:
        test = located(whole(test), options.test)
    return train, test


def carry_out(options: Options, train: Source, test: Source, *, axes: int, other: str) -> int:
    """Probe the model of the options on these samples, unless it says others, and print what it gave.

    Raises ValueError where there is no such model or recipe, or the samples cannot be had.
    """
    train, test = _placed(options, train, test)
    model = weights.load_taking(axes, options, other=other)
    if options.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = torch.device(options.device)
    probe = Probe(
        train=train,
        test=test,
        kinds=options.kinds,
        neighbours=options.neighbours,
        per_class=options.per_class,
        batch_size=options.batch_size,
    )
    probing = Probing(
        probe,
        model.to(device),
        size=model.get_submodule("trunk").size,
        world=World(0, 1, device),
        workers=usable_cpus() if options.workers is None else options.workers,
    )
    for samples in probing.samples:
        print(repr(samples))
    figures = probing.take()
    for name, figure in figures.items():
        print(f"{name:<16}{figure:.4g}")
    if options.json is not None:
        kept = {name: str(value) for name, value in asdict(options).items()}
        write_whole(options.json, json.dumps({"options": kept, **figures}, indent=1) + "\n")
    return 0


def _probe(options: Options) -> int:
    data = ImageFolder(split="train")
    return carry_out(options, data, replace(data, split="val"), axes=2, other="video.probe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe on images; the exit code, 2 where it cannot be done."""
    return command.run(Options, "convmae.probe", _probe, arguments)


if __name__ == "__main__":
    sys.exit(main())
