"""Features of videos: `convmae.features`, of one clip of each, or of several.

    python -m video.features runs/a clips features
    python -m video.features runs/a/last.pt train.csv features --clips 5 --stride 2

The folder is as `convmae.features` describes it. A clip is the centre in time and space; with `--clips 5`, five evenly
spaced ones of each video are taken, and arrays have an axis more, `vector (n, 5, D)`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from convmae import command, features, weights
from video.clips import Dense
from video.videos import Videos


@dataclass(frozen=True, kw_only=True)
class _Options(features.Options):
    __doc__ = (
        f"{features.Options.__doc__}"
        """    clips: of each video: one is the centre, several are evenly spaced from its beginning to its end.
        stride: frames that a clip advances at a time.
    """
    )

    clips: int = 1
    stride: int = 4


def _extract(options: _Options) -> int:
    model = weights.load_taking(3, options, other="convmae.features")
    videos = Videos(root=options.data.absolute(), sampling=Dense(stride=options.stride))
    return features.carry_out(options, model, videos.as_test(clips=options.clips))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the features of videos; exit codes as `convmae.features.main`."""
    return command.run(_Options, "video.features", _extract, arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
