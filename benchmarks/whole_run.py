"""A whole run as it is trained, loader and all, in a group of one process: eager, compiled, and stopped midway.

    python benchmarks/whole_run.py --size base --batch-size 32      # bfloat16 on a GPU that has it
    python benchmarks/whole_run.py --steps 20                       # the demo's small model; CPUs too

Three runs on the demo clips, the same but for what they are called: eager; compiled; compiled, left midway and gone on
with in another session. Printed are the median seconds of a step without its wait for data, from the tenth on, their
ratio, and how far the losses of the third are from those of the second.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from convmae import checkpoint
from convmae.training import Pretrain, Step, steps
from video import VideoConvMAE
from video.recipes import demo


def the_run(folder: Path, given: argparse.Namespace) -> Pretrain:
    run = demo()
    model = run.model if given.size == "demo" else getattr(VideoConvMAE, given.size)()
    samples = len(run.data.open(model.size))
    epochs = given.steps * given.batch_size / samples
    changes = {"epochs": epochs, "warmup_epochs": epochs / 10, "batch_size": given.batch_size, "base_lr": 1e-3}
    return replace(run, model=model, folder=folder, workers=given.workers, **changes)


def carried_out(run: Pretrain, *, leave_at: int | None = None) -> list[Step]:
    done = []
    for step in steps(run):
        done.append(step)
        if step.number == leave_at:
            break
    return done


def seconds(done: list[Step]) -> float:
    return statistics.median(step.seconds - step.data_seconds for step in done[9:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("demo", "small", "base", "large", "huge"), default="demo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    given = parser.parse_args()
    if given.steps < 12:
        parser.error(f"--steps {given.steps}: times are taken from the tenth step on; 12 or more")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{given.size}, batches of {given.batch_size}, {given.steps} steps, on {where}, torch {torch.__version__}")

    with tempfile.TemporaryDirectory() as place:
        eager = carried_out(the_run(Path(place) / "eager", given))
        run = replace(the_run(Path(place) / "compiled", given), compile=True)
        compiled = carried_out(run)
        broken = replace(run, folder=Path(place) / "broken", checkpoint_steps=given.steps // 2)
        gone_on = carried_out(broken, leave_at=given.steps // 2) + carried_out(broken)
        weights = [checkpoint.read(one.folder / "last.pt")["weights"] for one in (run, broken)]

    print(f"a step: eager {seconds(eager):.4f} s, compiled {seconds(compiled):.4f} s")
    print(f"eager / compiled: {seconds(eager) / seconds(compiled):.2f}")
    print(f"loss: eager {eager[-1].loss:.6f}, compiled {compiled[-1].loss:.6f}, gone on {gone_on[-1].loss:.6f}")
    apart = max(abs(one.loss - other.loss) for one, other in zip(compiled, gone_on, strict=True))
    equal = all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    bits = "the same bits" if equal else "other bits"
    print(f"losses of the run gone on with are at most {apart:.2g} away; its weights have {bits}")


if __name__ == "__main__":
    main()
