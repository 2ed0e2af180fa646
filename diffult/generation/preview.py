"""What the diffusion model draws so far: a grid of the same few samples of each class at every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffult.artifacts import build_unet
from diffult.config import GenerateConfig
from diffult.data import ArrayImages
from diffult.diffusion.schedule import Schedule
from diffult.diffusion.trainer import Trainer
from diffult.engine.device import compute_dtype
from diffult.generation.generator import Generator
from diffult.longtail.extractor import Extractor
from diffult.plots import MAX_CLASSES, evenly, sample_grid
from diffult.runs.files import atomic_write
from diffult.runs.run_dir import RunDir

_PER_CLASS, _STEPS = 4, 10  # by count of network evaluations 2 % of digits-lt's training, below 0.6 % elsewhere


class Preview:
    """Writes diffusion/samples-STEP.png at every checkpoint, drawn with the averaged weights.

    A sample's noise is keyed by its name (the run's seed, class, index), so successive grids show the same samples
    getting better: those that `generate` will try first, in 10 steps of DPM-Solver++ without guidance. Nothing of the
    training is touched: the weights are copied, and torch's generators are not used.

    On CUDA the grid is drawn in a stream beside the training, which waits only until the weights are copied, and is
    written at the loop's next look at the loss: a process killed between the two leaves that grid out.
    """

    def __init__(self, run: RunDir, trainer: Trainer, extractor: Extractor, classes: tuple[str, ...]) -> None:
        config, device = run.config, trainer.device
        dtype = compute_dtype(config.precision, device)
        settings = GenerateConfig(balance_to=0, sampler="dpm++", steps=min(_STEPS, config.diffusion.timesteps))
        self.optimizer, self.device = trainer.optimizer, device
        self.folder, self.classes = run.folder("diffusion"), classes
        self.every, self.steps = config.diffusion.checkpoint_every, config.diffusion.steps
        self.batch_size = trainer.micro_batch  # with its backward pass it fits the memory: forward it does too
        self.labels = np.repeat(evenly(np.arange(len(classes)), MAX_CLASSES), _PER_CLASS)
        self.generator = Generator(
            unet=build_unet(config, len(classes)).eval().requires_grad_(False).to(device, dtype),
            schedule=Schedule(config.diffusion.schedule, config.diffusion.timesteps, device),
            prediction=config.diffusion.prediction,
            settings=settings,
            extractor=extractor,
            shape=(config.data.channels, config.data.image_size, config.data.image_size),
            null_label=len(classes),
            seed=config.seed,
            dtype=dtype,
            device=device,
        )
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self.generator.unet.load_state_dict(self.optimizer.ema_state_dict())
            copied = None if self._side is None else self._side.record_event()
            labels = torch.from_numpy(self.labels).to(self.device)
            indices = torch.arange(len(labels), device=self.device) % _PER_CLASS
            parts = zip(labels.split(self.batch_size), indices.split(self.batch_size), strict=True)
            images = torch.cat([self.generator.draw(*part) for part in parts])
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
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
            sample_grid(ArrayImages(images, self.labels, self.classes), self.classes, temporary, _PER_CLASS)


def grid_path(folder: Path, step: int) -> Path:
    return folder / f"samples-{step:07d}.png"
