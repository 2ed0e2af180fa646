"""Drawing: class and index of a sample in, its pixels out.

All noise of a sample is keyed by (seed, class, index, step), so it does not depend on the batch.
"""

from __future__ import annotations

import logging
import math
import time
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from diffult.config import Config
from diffult.diffusion.samplers import SAMPLERS, SPACINGS, sample
from diffult.diffusion.schedule import Prediction, Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import compute_dtype
from diffult.errors import UserError
from diffult.generation.config import GenerateConfig
from diffult.generation.levels import match
from diffult.generation.starts import OtherClasses
from diffult.models.cost import forward_flops
from diffult.models.unet import UNet
from kernels.augment import denormalise, normalise
from kernels.denoise_step import denoise_step
from kernels.random import normal

log = logging.getLogger(__name__)


@dataclass
class Sampler:
    """Draws samples of a trained diffusion model.

    Attributes:
        unet: the denoising network in evaluation mode.
        schedule, prediction: the process it was trained for.
        shape: (C, H, W) of a sample.
        null_label: the label for "no class".
        seed: of the noise.
        dtype: the network's compute type.
        compiled: the network goes through torch.compile.
        levels: uint8 [C, 256], what the pixel levels of each channel become, see `diffult.generation.levels`; None:
            they stay.
        starts: the images that samples start from, with the first timestep's noise; None: noise alone.
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
    levels: torch.Tensor | None = None
    starts: OtherClasses | None = None

    @classmethod
    def for_run(
        cls, config: Config, unet: UNet, settings: GenerateConfig, seed: int, compiled: bool = False
    ) -> Sampler:
        """Draws with a network built by this configuration, on the network's device."""
        diffusion, data, device = config.diffusion, config.data, next(unet.parameters()).device
        return cls(
            unet, Schedule(diffusion.schedule, diffusion.timesteps, device), diffusion.prediction, settings,
            (data.channels, data.image_size, data.image_size), unet.label_embedding.num_embeddings - 1, seed,
            compute_dtype(config.precision, device), device, compiled,
        )  # fmt: skip

    def __post_init__(self) -> None:
        self._prepare_steps()
        self._prepared = False
        # A graph for each shape: a doubled batch must not make the batch size variable.
        self._network = torch.compile(self.unet, dynamic=False) if self.compiled else self.unet
        # On CUDA a recorded graph for each evaluation: one for a whole draw would grow with the steps.
        self._evaluate = CUDAGraphRunner(self._network, self.device)

    def _prepare_steps(self) -> None:
        settings, abar = self.settings, self.schedule.alphas_cumprod
        spaced = SPACINGS[settings.spacing]
        self._grid = list(settings.timesteps) or spaced(abar, settings.steps, settings.sigmas)
        self._solver = SAMPLERS[settings.sampler](self._grid, abar, settings.eta)
        # The numbers of all steps go to the device now, so that no step waits for the host.
        self._coefficients = self._coefficient_table().to(self.device)

    @property
    def timesteps(self) -> list[int]:
        """Falling, one for each step."""
        return list(self._grid)

    def at(self, timesteps: list[int], seed: int | None = None) -> Sampler:
        """A sampler at other timesteps, and with other noise if a seed is given, on the same network, which is not
        compiled or recorded again. Its samples are as drawn, not matched."""
        other = copy(self)
        listed = {"timesteps": tuple(timesteps), "steps": len(timesteps), "search": 0}
        other.settings = self.settings.model_copy(update=listed)
        other.seed = self.seed if seed is None else seed
        other.levels = None
        other._prepare_steps()
        return other

    def _coefficient_table(self) -> torch.Tensor:
        """The coefficients of `denoise_step` for each step, float32 [steps, 8]; x0 is clipped to [-1, 1]."""
        conversions = [self.schedule.x0_coefficients(self.prediction, t) for t in self._grid]
        steps = len(conversions)
        guidance, limit = torch.full((steps, 1), self.settings.guidance), torch.ones(steps, 1)
        return torch.cat([torch.tensor(conversions, dtype=torch.float64), guidance, limit, self._solver], dim=1).float()

    @torch.no_grad()
    def prepare(self) -> None:
        """Runs the network once, so that it is compiled before any clock runs, and logs how long that took. A second
        call does nothing.

        Raises:
            UserError: the network does not compile on this CPU, for example without a C++ compiler.
        """
        if self._prepared:
            return
        begun = time.perf_counter()
        try:
            self._predict_once()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if self.device.type == "cuda":
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: {reason}; it needs g++; --no-compile runs without") from None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.compiled:
            log.info("network compiled in %.1f s", time.perf_counter() - begun)
        self._prepared = True

    def _predict_once(self) -> None:
        labels = torch.zeros(self.settings.batch_size, dtype=torch.int64, device=self.device)
        self._predict(normal(self.seed, labels, labels, 0, self.shape), self._grid[0], labels)

    @torch.no_grad()
    def seconds(self, samples: int) -> float:
        """How long drawing so many takes on a CPU, from the time of one evaluation of the network."""
        self._predict_once()
        begun = time.perf_counter()
        self._predict_once()
        return (time.perf_counter() - begun) * len(self._grid) * samples / self.settings.batch_size

    def flops(self) -> int:
        """Work of the network for one sample, in FLOP."""
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

        start = normal(self.seed, labels, indices, numbers[0], self.shape)
        if self.starts is not None:
            abar = float(self.schedule.alphas_cumprod[self._grid[0]])
            images = normalise(self.starts.choose(self.seed, labels, indices))
            start = math.sqrt(abar) * images + math.sqrt(1 - abar) * start
        drawn = denormalise(sample(start, self._grid, self._solver, evaluate, update))
        return drawn if self.levels is None else match(drawn, self.levels)

    def draw_all(self, labels: np.ndarray, indices: np.ndarray, batch_size: int | None = None) -> torch.Tensor:
        """As `draw`, any number of samples, int64 [N] each, in batches of one shape, the settings' or `batch_size`."""
        size = batch_size or self.settings.batch_size
        names = [torch.from_numpy(np.pad(part, (0, -len(part) % size))).to(self.device) for part in (labels, indices)]
        batches = zip(*(part.split(size) for part in names), strict=True)
        return torch.cat([self.draw(*batch) for batch in batches])[: len(labels)]

    def _predict(self, x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        """The network's output [B, C, H, W]; with guidance [2B, C, H, W] from one doubled batch, whose second half has
        no class."""
        if self.settings.guidance:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        if self.compiled:  # the compiler compares strides, even those of one channel, which mean nothing
            x = x.clone(memory_format=torch.channels_last)
        return self._evaluate(x, torch.full((len(x),), t, device=x.device), labels)
