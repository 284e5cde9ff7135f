"""What a model of clips looks at: `convmae.attention_pictures`, of the clip in the middle of each video.

python -m video.attention_pictures runs/a clip.mp4 another.mp4 --folder seen
python -m video.attention_pictures runs/a clip.mp4 --query 2 3 7 --stride 2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convmae import attention_pictures, command
from convmae.grids import Grid
from convmae.weights import load_taking
from video.clips import Dense
from video.videos import Clips


@dataclass(frozen=True, kw_only=True)
class _Options(attention_pictures.Options):
    __doc__ = f"""{attention_pictures.Options.__doc__}    stride: frames that a clip advances at a time.
    """

    stride: int = 4


def _draw(options: _Options) -> int:
    model = load_taking(3, options, other="convmae.attention_pictures")
    clips = Clips(sampling=Dense(stride=options.stride)).as_test()

    def pixels_of(file: Path, size: Grid) -> Tensor:
        return clips.load(str(file), (size[0], size[1], size[2]), torch.Generator())

    return attention_pictures.carry_out(options, model, pixels_of)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw clips; exit codes as `convmae.attention_pictures.main`."""
    return command.run(_Options, "video.attention_pictures", _draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
