"""What the diffusion model draws so far: a grid of the same few samples of each class at every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffult.config import GenerateConfig
from diffult.generation.sampler import Sampler
from diffult.plots import MAX_CLASSES, ArraySamples, evenly, sample_grid
from diffult.runs.files import atomic_write
from kernels.adamw_ema import AdamWEma

_PER_CLASS, _STEPS = 4, 10  # by count of network evaluations 2 % of digits-lt's training, below 0.6 % elsewhere


def preview_settings(timesteps: int) -> GenerateConfig:
    """How a preview draws: DPM-Solver++ in 10 steps without guidance."""
    return GenerateConfig(balance_to=0, sampler="dpm++", steps=min(_STEPS, timesteps))


class Preview:
    """Writes samples-STEP.png at every checkpoint, drawn with the averaged weights.

    A sample's noise is keyed by its name (seed, class, index), so successive grids show the same samples getting
    better: those that `generate` will try first. Nothing of the training is touched: the weights are copied, and
    torch's generators are not used.

    On CUDA the grid is drawn in a stream beside the training, which waits only until the weights are copied, and is
    written at the loop's next look at the loss: a process killed between the two leaves that grid out.
    """

    def __init__(
        self,
        sampler: Sampler,
        optimizer: AdamWEma,
        folder: Path,
        classes: tuple[str, ...],
        every: int,
        steps: int,
        batch_size: int,
    ) -> None:
        """
        Args:
            sampler: its network is this preview's own, of the model that `optimizer` averages; see `preview_settings`.
            every: steps between checkpoints.
            steps: of the training; a grid is also drawn after the last one.
            batch_size: images drawn at a time. What the training computes at a time, with its backward pass, fits.
        """
        self.sampler, self.optimizer = sampler, optimizer
        self.folder, self.classes = folder, classes
        self.every, self.steps, self.batch_size = every, steps, batch_size
        self.labels = np.repeat(evenly(np.arange(len(classes)), MAX_CLASSES), _PER_CLASS)
        self._side = torch.cuda.Stream(sampler.device) if sampler.device.type == "cuda" else None
        self._drawn: tuple[int, torch.Tensor] | None = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """What the loop calls at each look at the loss, `step` steps being done."""
        self.write()
        if step % self.every == 0 or step == self.steps:
            self._drawn = step, self._draw()
            if self._side is None:
                self.write()

    def _draw(self) -> torch.Tensor:
        """uint8 [N, H, W, C] on the device, where it may not be finished yet."""
        device = self.sampler.device
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            self.sampler.unet.load_state_dict(self.optimizer.ema_state_dict())
            copied = None if self._side is None else self._side.record_event()
            labels = torch.from_numpy(self.labels).to(device)
            indices = torch.arange(len(labels), device=device) % _PER_CLASS
            parts = zip(labels.split(self.batch_size), indices.split(self.batch_size), strict=True)
            images = torch.cat([self.sampler.draw(*part) for part in parts])
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)
        return images

    def write(self) -> None:
        """Writes what has been drawn and is not on disk yet."""
        if self._drawn is None:
            return
        step, on_device = self._drawn
        self._drawn = None
        with torch.cuda.stream(self._side):
            images = on_device.cpu().numpy()
        with atomic_write(grid_path(self.folder, step)) as temporary:
            sample_grid(ArraySamples(images, self.labels), self.classes, temporary, _PER_CLASS)


def grid_path(folder: Path, step: int) -> Path:
    return folder / f"samples-{step:07d}.png"
