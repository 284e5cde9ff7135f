"""Probes of a video model's frozen features: `convmae.probe`, on clips.

python -m video.probe runs/demo                                  # on the demo set
python -m video.probe runs/kinetics_pretrain --data /data/kinetics400 --stride 4
python -m video.probe runs/ssv2_pretrain --recipe video.recipes:ssv2_finetune --data /data/ssv2
python -m video.probe runs/mine --data train.csv --test test.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from convmae import command, probe
from video.clips import Dense
from video.videos import Videos


@dataclass(frozen=True, kw_only=True)
class _Options(probe.Options):
    __doc__ = (
        f"{probe.Options.__doc__}    stride: frames a clip advances at a time. (default: the recipe's, or 4)\n    "
    )

    stride: int | None = None


def _probe(options: _Options) -> int:
    if options.recipe is not None and options.stride is not None:
        raise ValueError("--stride is for folders and lists: with --recipe, its sets choose the frames")
    train = Videos(split="train", sampling=Dense(stride=4 if options.stride is None else options.stride))
    return probe.carry_out(options, train, replace(train, split="val"), axes=3, other="convmae.probe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe on videos; exit codes as `convmae.probe.main`."""
    return command.run(_Options, "video.probe", _probe, arguments)


if __name__ == "__main__":
    sys.exit(main())
