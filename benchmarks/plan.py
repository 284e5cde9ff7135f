"""What a whole pretraining costs on 8, 64 and 256 GPUs: hours, GPU-hours, and what the exchange of gradients takes.

    python benchmarks/plan.py --read step.json                      # written by pretrain_step.py --json
    python benchmarks/plan.py --step-seconds convmae=0.0011 videoconvmae-k3=0.0042
    python benchmarks/plan.py --read step.json --gradient-bytes 2   # gradients exchanged in bfloat16

A projection from the time of a step on one GPU, not a measurement: all that it takes for granted is printed with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from pretrain_step import aligned
from rich.table import Table
from scaling import console_pair
from sides import base, sides

from convmae import MAE, masking
from convmae.builders import owner_of
from convmae.masking import Masking
from convmae.recipes import imagenet_cmae, imagenet_fast_pretrain, imagenet_pretrain
from convmae.training import Pretrain
from video.recipes import kinetics_cmae, kinetics_pretrain, ssv2_pretrain, ucf101_pretrain

GPUS_OF_A_NODE = 8
BACKWARD = 2 / 3
"""The share of a step that is backward, behind which gradients can be exchanged: it has twice the forward's work."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a whole pretraining costs on 8, 64 and 256 GPUs: hours, GPU-hours, and what exchanging gradients takes."""

    read: Path | None = None
    """Figures of pretrain_step.py, written with its --json; of each side those at the largest batch are taken."""
    step_seconds: tuple[str, ...] = ()
    """Seconds of a sample on one GPU, as SIDE=SECONDS: convmae=0.0011 videoconvmae-k3=0.0042. Before --read."""
    gpus: tuple[int, ...] = (8, 64, 256)
    """Numbers of GPUs, in nodes of 8."""
    gradient_bytes: int = 4
    """Bytes of a parameter's gradient in the exchange: 4 in float32, 2 where it is compressed to bfloat16."""
    hidden: float = 0.8
    """The share of the exchange that goes on behind the backward pass; no more than that pass takes."""
    reached: float = 0.8
    """The share of a network's stated bandwidth that an exchange reaches."""
    json: Path | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        for name in ("hidden", "reached"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it is a share, from 0 to 1")
        if self.reached == 0 or self.gradient_bytes < 1 or any(count < 1 for count in self.gpus):
            raise ValueError("--reached, --gradient-bytes and --gpus are positive")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pretraining to be costed.

    Args:
        recipe: gives model, batch and epochs.
        side: of pretrain_step.py, whose time it is.
        samples: of an epoch.
        epochs: where they are others than the recipe's, which are published too.
        published: GPU-hours that the authors say it took.
    """

    recipe: Callable[[], Pretrain]
    side: str
    samples: int
    epochs: int | None = None
    published: str = "-"

    def run(self) -> Pretrain:
        """The recipe's run, with the plan's epochs."""
        run = self.recipe()
        return run if self.epochs is None else replace(run, epochs=self.epochs)

    @property
    def title(self) -> str:
        """What the table calls it."""
        return f"{self.recipe.__name__}, {self.run().epochs} epochs"

    @property
    def masking(self) -> Masking:
        """What the recipe hides."""
        builder = owner_of(self.recipe().model)
        assert builder is not None
        return builder.masking


def kinetics_half_decoded() -> Pretrain:
    """`kinetics_pretrain` with the decoder on half of the hidden tokens."""
    run = kinetics_pretrain()
    assert isinstance(run.model, MAE)
    return replace(run, model=run.model.reconstruct_part(masking.running_cells(0.5)))


IMAGENET = 1_281_167  # images of ImageNet-1K's training set
KINETICS = 240_000  # clips of Kinetics-400's, about: VideoMAE, appendix
SSV2 = 168_913  # of Something-Something V2's
UCF101 = 9_537  # of UCF101's, first split

PLANS = (
    Plan(recipe=imagenet_pretrain, side="convmae", samples=IMAGENET, epochs=200, published="512"),
    Plan(recipe=imagenet_pretrain, side="convmae", samples=IMAGENET, published="4000"),
    Plan(recipe=imagenet_fast_pretrain, side="fastconvmae", samples=IMAGENET, published="266"),
    Plan(recipe=imagenet_cmae, side="mae-cmae", samples=IMAGENET),
    Plan(recipe=kinetics_pretrain, side="videoconvmae-k3", samples=KINETICS, epochs=200),
    Plan(recipe=kinetics_pretrain, side="videoconvmae-k3", samples=KINETICS),
    Plan(recipe=kinetics_half_decoded, side="videoconvmae-half", samples=KINETICS),
    Plan(recipe=kinetics_cmae, side="videoconvmae-cmae", samples=KINETICS),
    Plan(recipe=ssv2_pretrain, side="videoconvmae-k3", samples=SSV2),
    Plan(recipe=ucf101_pretrain, side="videoconvmae-tube75", samples=UCF101),
)

PEERS = (
    "MAE-B, ImageNet, 1600 epochs: 2069 GPU-hours, as ConvMAE's authors give them",
    "VideoMAE-B, Kinetics, 800 epochs: 27 hours on 64 V100, 1728 GPU-hours",
)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What gradients travel on: gigabytes a second of a GPU within a node, and of a whole node to the others."""

    name: str
    speed: str
    within: float = 450.0
    between: float

    def seconds(self, size: float, gpus: int, reached: float) -> float:
        """The time of a ring all-reduce of so many bytes: each crosses every link 2 (n - 1) / n times.

        The rings of a node share its way out, and the slower of the two ways decides. Latencies count nothing.
        """
        bandwidth = self.within if gpus <= GPUS_OF_A_NODE else min(self.within, self.between)
        return 2 * (gpus - 1) / gpus * size / (1e9 * bandwidth * reached)


NETWORKS = (
    Network(name="InfiniBand", speed="400 Gb/s a GPU", between=GPUS_OF_A_NODE * 400 / 8),
    Network(name="Ethernet", speed="100 Gb/s a node", between=100 / 8),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A plan on so many GPUs.

    Args:
        plan: its title.
        gpus: how many.
        network: between nodes; "NVLink" within one.
        share: samples of a step on a GPU.
        compute: seconds of a step without exchange.
        exchange: seconds that the gradients' exchange takes.
        exposed: seconds of it that a step waits for.
        steps: of the whole run.
        published: GPU-hours that the authors say it took.
    """

    plan: str
    gpus: int
    network: str
    share: int
    compute: float
    exchange: float
    exposed: float
    steps: int
    published: str

    @property
    def efficiency(self) -> float:
        """The share of a step in which the GPUs compute."""
        return self.compute / (self.compute + self.exposed)

    @property
    def hours(self) -> float:
        """From start to end."""
        return self.steps * (self.compute + self.exposed) / 3600


def project(plan: Plan, seconds: float, options: Options) -> Iterator[Row]:
    """A plan's rows, from the seconds of a sample on one GPU."""
    run = plan.run()
    with torch.device("meta"):
        model = run.model.build()
    size = options.gradient_bytes * sum(each.numel() for each in model.parameters() if each.requires_grad)
    for gpus in options.gpus:
        share = -(-run.batch_size // gpus)
        compute = seconds * share
        for network in NETWORKS if gpus > GPUS_OF_A_NODE else NETWORKS[:1]:
            exchange = network.seconds(size, gpus, options.reached)
            hidden = min(options.hidden * exchange, BACKWARD * compute)
            yield Row(
                plan=plan.title,
                gpus=gpus,
                network=network.name if gpus > GPUS_OF_A_NODE else "NVLink",
                share=share,
                compute=compute,
                exchange=exchange,
                exposed=exchange - hidden,
                steps=max(1, round(run.epochs * plan.samples / run.batch_size)),
                published=plan.published,
            )


def given_seconds(given: Sequence[str]) -> dict[str, float]:
    """Seconds of a sample by side, from SIDE=SECONDS; raises ValueError for what is not that."""
    found = {}
    for one in given:
        side, _, number = one.partition("=")
        try:
            found[side] = float(number)
        except ValueError as problem:
            raise ValueError(f"--step-seconds {one}: write SIDE=SECONDS, as convmae=0.0011") from problem
        if not found[side] > 0:
            raise ValueError(f"--step-seconds {one}: seconds are positive")
    return found


def read_seconds(path: Path) -> dict[str, tuple[int, float]]:
    """Samples of the largest step, and seconds of one of them, by side, from what pretrain_step.py wrote.

    Any object with the name of a side, its samples and its seconds, a number or one for each round, is taken.
    """
    found: dict[str, tuple[int, float]] = {}
    for each in objects(json.loads(path.read_text())):
        side, samples, seconds = each.get("side", each.get("name")), each.get("samples"), each.get("seconds")
        if isinstance(side, dict):
            side = side.get("name")
        times = seconds if isinstance(seconds, list) else [seconds]
        times = sorted(time for time in times if isinstance(time, int | float))
        if isinstance(side, str) and isinstance(samples, int) and samples > 0 and times:
            of_one = times[len(times) // 2] / samples
            found[side] = max(found.get(side, (0, 0.0)), (samples, of_one))
    return found


def measured_on(path: Path) -> str:
    """Where the times of pretrain_step.py were taken, and whether they mean anything."""
    found = json.loads(path.read_text())
    found = found if isinstance(found, dict) else {}
    device, tiny = found.get("device", "a device that is not stated"), found.get("quick", False)
    return f"- times in {path} are of {device}" + (", of tiny models: the figures mean nothing" if tiny else "")


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from objects(each)


def stand_ins(planned: Sequence[Plan]) -> Iterator[str]:
    """The plans whose step is timed by a side that hides something else."""
    hides = {side.name: side.source.masking for side in sides(base())}
    for plan in planned:
        if hides[plan.side] != plan.masking:
            yield (
                f"- {plan.side} stands in for {plan.recipe.__name__}: it hides {hides[plan.side]}, "
                f"the recipe {plan.masking}"
            )


def assumptions(options: Options, planned: Sequence[Plan], seconds: dict[str, float]) -> Iterator[str]:
    """All that the figures take for granted."""
    yield "Taken for granted:"
    for side, of_one in seconds.items():
        yield f"- a sample of {side} takes {1000 * of_one:.3f} ms on one GPU, forward and backward, whatever its share"
    if options.read is not None:
        yield measured_on(options.read)
    yield from stand_ins(planned)
    yield "- data are never waited for; the optimiser, a target's update, checkpoints and pictures cost nothing"
    yield f"- gradients of {options.gradient_bytes} bytes a parameter, all-reduced in rings once a step"
    ways = "; ".join(f"{network.name} of {network.speed}, {network.between:g} GB/s a node" for network in NETWORKS)
    yield f"- nodes of {GPUS_OF_A_NODE} with NVLink of {NETWORKS[0].within:g} GB/s a GPU; between them {ways}"
    yield f"- an exchange reaches {options.reached:.0%} of these bandwidths; latencies and stragglers are left out"
    yield f"- {options.hidden:.0%} of it goes on behind the backward pass, which is two thirds of a step"
    yield "- CMAE's exchange of keys and of BatchNorm's sums is left out"
    yield (
        f"- an epoch is {IMAGENET:,} images, {KINETICS:,} clips of Kinetics, {SSV2:,} of Something-Something V2, "
        f"{UCF101:,} of UCF101"
    )


def table(rows: Sequence[Row]) -> Table:
    """All figures."""
    out = aligned(
        "Whole pretraining runs; 'a GPU': its samples of a step; 'waited': of the exchange; 'published': GPU-hours",
        *("run", "GPUs", "network", "a GPU", "step ms", "exchange ms", "waited ms"),
        *("efficiency", "GPU-hours", "published", "hours"),
    )
    for row in rows:
        out.add_row(
            row.plan,
            str(row.gpus),
            row.network,
            str(row.share),
            f"{1000 * (row.compute + row.exposed):.1f}",
            f"{1000 * row.exchange:.2f}",
            f"{1000 * row.exposed:.2f}",
            f"{row.efficiency:.1%}",
            f"{row.hours * row.gpus:.0f}",
            row.published,
            f"{row.hours:.1f}",
        )
    return out


def main(options: Options) -> list[Row]:
    """Project what there are times for, and print it.

    Raises:
        ValueError: there are times for no plan, or one cannot be read.
    """
    console, _ = console_pair()
    if not console.is_terminal:
        console.width = 160
    read = read_seconds(options.read) if options.read is not None else {}
    seconds = {side: of_one for side, (_, of_one) in read.items()} | given_seconds(options.step_seconds)
    planned = [plan for plan in PLANS if plan.side in seconds]
    if not planned:
        sides = ", ".join(dict.fromkeys(plan.side for plan in PLANS))
        raise ValueError(f"no times: give --read FILE or --step-seconds SIDE=SECONDS, for any of {sides}")
    rows = [row for plan in planned for row in project(plan, seconds[plan.side], options)]
    timed = {plan.side: seconds[plan.side] for plan in planned}
    console.print(*assumptions(options, planned, timed), sep="\n", markup=False)
    console.print(table(rows))
    console.print("Published, not on the GPUs assumed here:", *PEERS, sep="\n- ", markup=False)
    if options.json is not None:
        listed = [{**asdict(row), "efficiency": row.efficiency, "hours": row.hours} for row in rows]
        options.json.write_text(json.dumps(listed, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (OSError, ValueError) as problem:
        sys.exit(str(problem))
