"""How long training waits for a checkpoint: the copy that a step waits for, against writing it there and then.

    python benchmarks/checkpoint_stall.py                      # VideoConvMAE-B, in the temporary folder
    python benchmarks/checkpoint_stall.py --folder /scratch/x  # on the file system that runs are kept on

Prints the seconds of each over some rounds, and their ratio. The state is that of AdamW after one step: weights and two
moments for each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from convmae import checkpoint
from convmae.distributed import state_of
from convmae.optimisation import adamw, parameter_groups
from video import VideoConvMAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base", "large", "huge"), default="base")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = getattr(VideoConvMAE, given.size)().build().to(device)
    optimiser = adamw(parameter_groups(model, 0.05), betas=(0.9, 0.95))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()

    copying, writing, size = [], [], 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "last.pt"
        for _ in range(given.rounds):
            began = time.perf_counter()
            weights, moments = state_of(model, optimiser)
            copied = time.perf_counter()
            checkpoint.write(path, checkpoint.pack(model, weights, optimiser=moments))
            copying.append(copied - began)
            writing.append(time.perf_counter() - copied)
        size = path.stat().st_size
    print(f"VideoConvMAE-{given.size} on {device}, torch {torch.__version__}: a checkpoint of {size / 1e6:.0f} MB")
    for name, seconds in (("copy, which a step waits for", copying), ("write, beside the training", writing)):
        print(f"{name:<30} median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}")
    ratios = [(copy + write) / copy for copy, write in zip(copying, writing, strict=True)]
    print(f"without the thread a step would wait {statistics.median(ratios):.1f} times as long")


if __name__ == "__main__":
    main()
