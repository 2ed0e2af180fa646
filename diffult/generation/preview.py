"""Previews of a training: a grid of the same few samples of each class at every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffult.config import DiffusionConfig
from diffult.generation.config import GenerateConfig
from diffult.generation.sampler import Sampler
from diffult.reporting.pictures import MAX_CLASSES, ArraySamples, evenly, sample_grid
from diffult.runs.files import atomic_write
from kernels.adamw_ema import AdamWEma

_PER_CLASS, _STEPS = 4, 10  # by count of network evaluations 2 % of digits-lt's training, below 0.6 % elsewhere


def preview_settings(timesteps: int) -> GenerateConfig:
    """DPM-Solver++ in 10 steps without guidance."""
    return GenerateConfig(balance_to=0, sampler="dpm++", steps=min(_STEPS, timesteps))


class Preview:
    """Writes samples-STEP.png at every checkpoint, drawn with the averaged weights.

    Noise is keyed by (seed, class, index), so successive grids show the same samples getting better: the first that
    `generate` will try. Training is not affected: the weights are copied, and torch's generators are not used. On CUDA
    it waits only until the weights are copied; a side stream draws the grid, which is written at the next reading of
    the loss. A process killed in between leaves that grid out.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        sampler: Sampler | None,
        optimizer: AdamWEma,
        folder: Path,
        classes: tuple[str, ...],
        batch_size: int,
    ) -> None:
        """
        Args:
            sampler: with a network of its own, like the one that `optimizer` averages; see `preview_settings`. None on
                all processes but the first: they share their part of the averages.
            batch_size: images drawn at a time; as many as the training computes at a time fit.
        """
        self.config, self.sampler, self.optimizer = config, sampler, optimizer
        self.folder, self.classes, self.batch_size = folder, classes, batch_size
        self.labels = np.repeat(evenly(np.arange(len(classes)), MAX_CLASSES), _PER_CLASS)
        device = optimizer.ema.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._drawn: tuple[int, torch.Tensor] | None = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """The callback of the training loop, after `step` steps."""
        self.write()
        if step % self.config.checkpoint_every == 0 or step == self.config.steps:
            weights = self.optimizer.ema_state_dict()
            if self.sampler is not None:
                self.sampler.unet.load_state_dict(weights)
                self._drawn = step, self._draw(self.sampler)
            if self._side is None:
                self.write()

    def _draw(self, sampler: Sampler) -> torch.Tensor:
        """uint8 [N, H, W, C] on the device, perhaps still being computed."""
        device = sampler.device
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            count, size = len(self.labels), min(self.batch_size, len(self.labels))
            labels = torch.from_numpy(np.pad(self.labels, (0, -count % size))).to(device)  # a graph has one batch size
            indices = torch.arange(len(labels), device=device) % _PER_CLASS
            parts = zip(labels.split(size), indices.split(size), strict=True)
            return torch.cat([sampler.draw(*part) for part in parts])[:count]

    def write(self) -> None:
        """Writes what has been drawn and is not on disk yet."""
        if self._drawn is None:
            return
        step, on_device = self._drawn
        self._drawn = None
        with torch.cuda.stream(self._side):
            images = on_device.cpu().numpy()
        with atomic_write(self.folder / f"samples-{step:07d}.png") as temporary:
            sample_grid(ArraySamples(images, self.labels), self.classes, temporary, _PER_CLASS)
