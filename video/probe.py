"""Probes of a video model's frozen features: `convmae.probe`, on clips.

python -m video.probe runs/demo                                  # on the demo set
python -m video.probe runs/kinetics_pretrain --data /data/kinetics400 --kinds knn attentive
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
    __doc__ = f"{probe.Options.__doc__}    stride: frames that a clip advances at a time.\n    "

    stride: int = 4


def _probe(options: _Options) -> int:
    root = None if options.data is None else options.data.absolute()
    data = Videos(root=root, split="train", sampling=Dense(stride=options.stride))
    test = replace(data, split="val")
    if options.test is not None:
        test = replace(data, root=options.test.absolute(), split=None)
    return probe.carry_out(options, data, test, axes=3, other="convmae.probe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe on videos; exit codes as `convmae.probe.main`."""
    return command.run(_Options, "video.probe", _probe, arguments)


if __name__ == "__main__":
    sys.exit(main())
