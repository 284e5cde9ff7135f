"""The pictures of a pretraining run: the same few samples, under the same masks, reconstructed again and again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from . import pictures
from .data import Stream, generator, repeats
from .nn.masked_autoencoder import MaskedAutoencoder
from .progress import Start
from .targets import normalize

STRIPS = 4  # samples in a picture
OTHER_ORDER = 2**31  # of the samples for pictures: a detour that no run takes


class Gallery:
    """The samples that a run's pictures show; a forward pass needs all processes where the model is sharded."""

    def __init__(self, start: Start) -> None:
        assert isinstance(start.model, MaskedAutoencoder)
        self.start, self.model = start, start.model
        self.x, self.mask = start.world.tell(self._choose) if start.sharded else self._choose()

    def _choose(self) -> tuple[Tensor | None, Tensor | None]:
        run, samples, model = self.start.run, self.start.samples, self.model
        stream = Stream(samples, run.model.size, run.seed, batch_size=repeats(samples), detour=OTHER_ORDER)
        loaded = stream.batches(
            0, len(samples), workers=min(run.workers, 1), seconds=run.sample_seconds, method=run.worker_start
        )
        chosen: list[Tensor] = []
        with contextlib.closing(loaded):
            for [batch] in loaded:
                chosen += batch.pixels[:1]
                if len(chosen) == STRIPS:
                    break
        if not chosen:
            return None, None
        masks = model.masking(len(chosen), model.trunk.grid, generator(run.seed, 4))
        return normalize(torch.stack(chosen)), masks[:: len(masks) // len(chosen)]

    def draw(self, stem: Path) -> list[Path]:
        """Reconstruct and save; nothing where the target cannot be turned back into pixels."""
        model, device = self.model, self.start.world.device
        if self.x is None or self.mask is None or not hasattr(model.target, "invert"):
            return []
        training = model.training
        model.eval()
        # eager: to compile for these few samples would take longer than all pictures of a run
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            x = self.x.to(device)
            out = model(x, mask=self.mask)
            rebuilt = model.reconstruct(x, out["prediction"], out["mask"])
        model.train(training)
        if not self.start.world.first:
            return []
        return pictures.save(stem, x.cpu(), out["mask"].cpu(), rebuilt.cpu(), rows=STRIPS)
