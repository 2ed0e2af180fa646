"""The generation engine: fill a batch from the quota, draw, judge, enter the verdicts, hand the batch on.

Every batch has one static shape. All noise of a sample is keyed by (seed, class, index, step), so a sample is the same
whatever batch it sits in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from diffult.config import GenerateConfig
from diffult.data.shards import Wave
from diffult.device import autocast
from diffult.diffusion import samplers
from diffult.diffusion.schedule import Prediction, Schedule
from diffult.longtail.extractor import Extractor
from diffult.longtail.filter import judge
from diffult.longtail.quota import Quota
from kernels.augment import denormalise, normalise
from kernels.random import normal


@dataclass
class Generator:
    """Draws and judges samples of a trained diffusion model.

    Attributes:
        unet: the denoising network in evaluation mode.
        schedule, prediction: the process it was trained for.
        settings: sampler, steps, guidance and batch size.
        extractor: phi0, which judges.
        shape: (C, H, W) of a sample.
        null_label: the label for "no class".
        seed: of the noise.
    """

    unet: nn.Module
    schedule: Schedule
    prediction: Prediction
    settings: GenerateConfig
    extractor: Extractor
    shape: tuple[int, int, int]
    null_label: int
    seed: int
    dtype: torch.dtype
    device: torch.device

    @torch.inference_mode()
    def draw(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Samples named by class and index, both int64 [B] -> uint8 [B, H, W, C]."""
        settings = self.settings
        grid = samplers.timestep_grid(self.schedule.timesteps, settings.steps)
        abar = self.schedule.alphas_cumprod

        def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
            return self._predict_x0(x, t, labels)

        def noise(step: int) -> torch.Tensor:
            drawn = normal(self.seed, labels, indices, step, self.shape)
            return drawn.contiguous(memory_format=torch.channels_last)

        x = noise(0)
        if settings.sampler == "ddim":
            x = samplers.ddim(denoise, x, grid, abar, noise, settings.eta)
        elif settings.sampler == "ddpm":
            x = samplers.ddpm(denoise, x, grid, abar, noise)
        else:
            x = samplers.dpm_solver_pp(denoise, x, grid, abar)
        return denormalise(x)

    def _predict_x0(self, x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        """The clean image, clipped to [-1, 1]; guidance is eps + w (eps - eps_null) (Ho & Salimans 2022), which in
        the clean image reads x0 + w (x0 - x0_null). Both passes run as one doubled batch."""
        w = self.settings.guidance
        if w:
            x_in = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        else:
            x_in = x
        times = torch.full((len(x_in),), t, device=x.device)
        with autocast(self.dtype, self.device):
            out = self.unet(x_in, times, labels).float()
        x0 = self.schedule.to_x0(self.prediction, out, x_in, times)
        if w:
            x0, x0_null = x0.chunk(2)
            x0 = x0 + w * (x0 - x0_null)
        return x0.clamp(-1, 1)

    @torch.inference_mode()
    def judge(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances float32 [B] and verdicts uint8 [B] of samples as they will be stored, uint8 [B, H, W, C]."""
        with autocast(self.dtype, self.device):
            features = self.extractor.features(normalise(images))
            predicted = self.extractor.classify(features) if self.settings.filter == "distance+label" else None
        return judge(features, labels, self.extractor.statistics, predicted)

    def wave(self, labels: np.ndarray, indices: np.ndarray, quota: Quota) -> Wave:
        """Draws and judges up to a batch of candidates; a short one is padded to the full shape."""
        count, size = len(labels), self.settings.batch_size
        padded = [np.concatenate([names, np.zeros(size - count, np.int64)]) for names in (labels, indices)]
        on_device = [torch.from_numpy(names).to(self.device) for names in padded]
        images = self.draw(*on_device)
        distance, verdict = (value[:count].cpu().numpy() for value in self.judge(images, on_device[0]))
        passed = quota.passes(verdict)
        return Wave(labels, indices, distance, verdict, passed, images[:count].cpu().numpy()[passed])


def generate(generator: Generator, quota: Quota) -> Iterator[Wave]:
    """Waves of candidates until every class has its quota or has spent its limit. Memory does not grow with the quota.

    Args:
        quota: may already hold verdicts of an earlier run, which are not drawn again.
    """
    while True:
        labels, indices = quota.next_batch(generator.settings.batch_size)
        if len(labels) == 0:
            return
        wave = generator.wave(labels, indices, quota)
        quota.record(wave.labels, wave.indices, wave.verdict)
        yield wave
