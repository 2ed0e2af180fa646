"""Drawing: class and index of a sample in, its pixels out; what becomes of it is no matter here.

All noise of a sample is keyed by (seed, class, index, step), so a sample is the same whatever batch it sits in.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from diffult.config import GenerateConfig
from diffult.diffusion.samplers import SAMPLERS, SPACINGS, sample
from diffult.diffusion.schedule import Prediction, Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.errors import UserError
from diffult.models.cost import forward_flops
from diffult.models.unet import UNet
from kernels.augment import denormalise
from kernels.denoise_step import denoise_step
from kernels.random import normal

log = logging.getLogger(__name__)


@dataclass
class Sampler:
    """Draws samples of a trained diffusion model.

    Attributes:
        unet: the denoising network in evaluation mode.
        schedule, prediction: the process it was trained for.
        settings: sampler, steps, guidance and batch size.
        shape: (C, H, W) of a sample.
        null_label: the label for "no class".
        seed: of the noise.
        dtype: in which the network computes.
        compiled: the network goes through torch.compile.
    """

    unet: UNet
    schedule: Schedule
    prediction: Prediction
    settings: GenerateConfig
    shape: tuple[int, int, int]
    null_label: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool = False

    def __post_init__(self) -> None:
        settings, abar = self.settings, self.schedule.alphas_cumprod
        self._grid = SPACINGS[settings.spacing](abar, settings.steps)
        self._solver = SAMPLERS[settings.sampler](self._grid, abar, settings.eta)
        # All numbers of all steps go to the device now, so that no step waits for the host.
        self._coefficients = self._coefficient_table().to(self.device)
        # One graph for each shape: a doubled batch is no reason to make the batch size variable.
        self._network = torch.compile(self.unet, dynamic=False) if self.compiled else self.unet
        # On CUDA one recorded graph an evaluation: a whole draw's would be of any length.
        self._evaluate = CUDAGraphRunner(self._network, self.device)

    def _coefficient_table(self) -> torch.Tensor:
        """What `denoise_step` takes at each step, float32 [steps, 8], with x0 clipped to [-1, 1]."""
        conversions = [self.schedule.x0_coefficients(self.prediction, t) for t in self._grid]
        steps = len(conversions)
        guidance, limit = torch.full((steps, 1), self.settings.guidance), torch.ones(steps, 1)
        return torch.cat([torch.tensor(conversions, dtype=torch.float64), guidance, limit, self._solver], dim=1).float()

    @torch.no_grad()
    def prepare(self) -> None:
        """Runs the network once, so that it is compiled before any clock runs, and logs the time which that took.

        Raises:
            UserError: this CPU's network does not compile, for want of a C++ compiler for one.
        """
        begun = time.perf_counter()
        try:
            labels = torch.zeros(self.settings.batch_size, dtype=torch.int64, device=self.device)
            self._predict(normal(self.seed, labels, labels, 0, self.shape), self._grid[0], labels)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if self.device.type == "cuda":
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: {reason}; it needs g++, leave it out to go without") from None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.compiled:
            log.info("network compiled in %.1f s", time.perf_counter() - begun)

    def flops(self) -> int:
        """Work of the network for one sample, FLOP."""
        image, label = torch.empty(1, *self.shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
        return self.settings.evaluations * forward_flops(self.unet, [image, label, label])

    @torch.no_grad()
    def draw(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Samples named by class and index, both int64 [B] -> uint8 [B, H, W, C]. Nothing here waits for the host."""
        coefficients = self._coefficients[:, None].expand(-1, len(labels), -1).contiguous()
        numbers = torch.arange(len(self._grid) + 1, device=self.device)[:, None].expand(-1, len(labels)).contiguous()

        def evaluate(x: torch.Tensor, t: int) -> torch.Tensor:
            return self._predict(x, t, labels)

        def update(
            i: int, x: torch.Tensor, out: torch.Tensor, previous: torch.Tensor | None, with_noise: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return denoise_step(
                x, out, coefficients[i], previous, self.seed, labels, indices, numbers[i + 1], with_noise=with_noise
            )

        noise = normal(self.seed, labels, indices, numbers[0], self.shape)
        return denormalise(sample(noise, self._grid, self._solver, evaluate, update))

    def _predict(self, x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        """The network's output, [B, C, H, W], or with guidance [2B, C, H, W], the second half without class: both
        passes run as one doubled batch."""
        if self.settings.guidance:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        if self.compiled:  # the compiler tells strides apart, also those of one channel, which mean nothing
            x = x.clone(memory_format=torch.channels_last)
        return self._evaluate(x, torch.full((len(x),), t, device=x.device), labels)
