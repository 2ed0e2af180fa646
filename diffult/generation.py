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
from diffult.distributed import ALONE, World
from diffult.longtail.extractor import Extractor
from diffult.longtail.filter import judge
from diffult.longtail.quota import Quota
from kernels.augment import denormalise, normalise
from kernels.denoise_step import COLUMNS, denoise_step, dynamic_limit
from kernels.random import normal

_ROUND = 4  # batches that each process draws before they tell each other what passed


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
        plan = settings.grid(self.schedule)
        grid = [t for t, _ in plan]
        rows = samplers.solver_rows(settings.sampler, grid, self.schedule.alphas_cumprod, settings.eta)
        # All numbers of all steps go to the device at once, so that no step waits for the host.
        coefficients = self._coefficients(grid, rows).to(self.device)[:, None].repeat(1, len(labels), 1)
        steps = torch.arange(len(grid) + 1, device=self.device)[:, None].repeat(1, len(labels))

        x, x0 = normal(self.seed, labels, indices, steps[0], self.shape), None
        for i, (t, guided) in enumerate(plan):
            out = self._predict(x, t, labels, guided)
            if settings.threshold:
                limit = dynamic_limit(x, out, coefficients[i], settings.threshold)
                coefficients[i, :, COLUMNS.index("limit")] = limit
            _, _, c_previous, c_noise = rows[i].tolist()
            x, x0 = denoise_step(
                x, out, coefficients[i], x0 if c_previous else None, self.seed, labels, indices, steps[i + 1],
                with_noise=c_noise != 0,
            )  # fmt: skip
        return denormalise(x)

    def _coefficients(self, grid: list[int], rows: torch.Tensor) -> torch.Tensor:
        """What `denoise_step` takes at each step, float32 [steps, 8], with x0 clipped to [-1, 1]."""
        conversions = [self.schedule.x0_coefficients(self.prediction, t) for t in grid]
        guidance, limit = torch.full((len(grid), 1), self.settings.guidance), torch.ones(len(grid), 1)
        return torch.cat([torch.tensor(conversions, dtype=torch.float64), guidance, limit, rows], dim=1).float()

    def _predict(self, x: torch.Tensor, t: int, labels: torch.Tensor, guided: bool) -> torch.Tensor:
        """The network's output, [B, C, H, W], or with guidance [2B, C, H, W], the second half without class: both
        passes run as one doubled batch."""
        if guided:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        times = torch.full((len(x),), t, device=x.device)
        return self.unet(x, times, labels)

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


def generate(generator: Generator, quota: Quota, world: World = ALONE) -> Iterator[Wave]:
    """Waves of candidates until every class has its quota or has spent its limit. Memory does not grow with the quota.

    Several processes take turns by batch: all make the same list of candidates, each draws every size-th batch of it,
    and after a round of a few batches they tell each other the verdicts. So none waits at each batch, and the kept set
    is that of one process.

    Args:
        quota: may already hold verdicts of an earlier run, which are not drawn again; the same on every process.

    Yields:
        The waves that this process drew.
    """
    size = generator.settings.batch_size
    while True:
        labels, indices = quota.next_batch(size if world.size == 1 else size * world.size * _ROUND)
        if len(labels) == 0:
            return
        judged: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start in range(world.rank * size, len(labels), size * world.size):
            some = slice(start, start + size)
            wave = generator.wave(labels[some], indices[some], quota)
            judged.append((wave.labels, wave.indices, wave.verdict))
            quota.record(*judged[-1])
            yield wave
        for verdicts in world.gather(judged):  # one's own are in it too, and are entered once
            for told in verdicts:
                quota.record(*told)
