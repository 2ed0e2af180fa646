"""Drawing: class and index of a sample in, its pixels out; what becomes of it is no matter here.

All noise of a sample is keyed by (seed, class, index, step), so a sample is the same whatever batch it sits in.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from diffult.config import GenerateConfig
from diffult.diffusion.samplers import SAMPLERS, Step, sample
from diffult.diffusion.schedule import Prediction, Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.errors import UserError
from diffult.models.cost import forward_flops
from diffult.models.unet import UNet
from kernels.augment import denormalise
from kernels.denoise_step import COLUMNS, denoise_step, dynamic_limit
from kernels.random import normal

log = logging.getLogger(__name__)


@dataclass
class Sampler:
    """Draws samples of a trained diffusion model.

    Attributes:
        unet: the denoising network in evaluation mode.
        schedule, prediction: the process it was trained for.
        settings: sampler, steps, guidance, caching and batch size.
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
        settings = self.settings
        self._plan = settings.plan(self.schedule)
        grid = [step.t for step in self._plan]
        self._solver = SAMPLERS[settings.sampler](grid, self.schedule.alphas_cumprod, settings.eta)
        # All numbers of all steps go to the device now, so that no step waits for the host.
        self._coefficients = self._coefficient_table(grid).to(self.device)
        # One graph for each shape: a doubled batch is no reason to make the batch size variable.
        network = self.unet.forward_with_features
        self._network = torch.compile(network, dynamic=False) if self.compiled else network
        # On CUDA one recorded graph an evaluation, for each kind of step: a whole draw's would be of any length.
        self._recorded = defaultdict[tuple[int, bool], CUDAGraphRunner](
            lambda: CUDAGraphRunner(self._evaluate, self.device)
        )

    def _coefficient_table(self, grid: list[int]) -> torch.Tensor:
        """What `denoise_step` takes at each step, float32 [steps, 8], with x0 clipped to [-1, 1]."""
        conversions = [self.schedule.x0_coefficients(self.prediction, t) for t in grid]
        guidance, limit = torch.full((len(grid), 1), self.settings.guidance), torch.ones(len(grid), 1)
        return torch.cat([torch.tensor(conversions, dtype=torch.float64), guidance, limit, self._solver], dim=1).float()

    @torch.no_grad()
    def prepare(self) -> None:
        """Runs the network at each kind of step that there is, so that it is compiled before any clock runs, and logs
        the time which that took.

        Raises:
            UserError: this CPU's network does not compile, for want of a C++ compiler for one.
        """
        begun = time.perf_counter()
        try:
            self._evaluate_each_kind()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if self.device.type == "cuda":
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: {reason}; it needs g++, leave it out to go without") from None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.compiled:
            log.info("network compiled in %.1f s", time.perf_counter() - begun)

    def _evaluate_each_kind(self) -> None:
        labels = torch.zeros(self.settings.batch_size, dtype=torch.int64, device=self.device)
        x, features, met = normal(self.seed, labels, labels, 0, self.shape), None, set()
        for step in self._plan:
            if (kind := (step.guided, step.full)) not in met:
                met.add(kind)
                _, features = self._predict(x, step, labels, features)

    def flops(self) -> int:
        """Work of the network for one sample, FLOP: its full evaluations, and those of its first level alone."""
        image, label = torch.empty(1, *self.shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
        full = first_level = forward_flops(self.unet, [image, label, label])
        if self.settings.cache_interval > 1:
            features = torch.empty(1, *self.unet.features_shape, dtype=self.dtype, device="meta")
            first_level = forward_flops(self.unet, [image, label, label], cached_features=features)
        return sum((1 + step.guided) * (full if step.full else first_level) for step in self._plan)

    @torch.no_grad()
    def draw(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Samples named by class and index, both int64 [B] -> uint8 [B, H, W, C]. Nothing here waits for the host."""
        coefficients = self._coefficients[:, None].repeat(1, len(labels), 1)
        numbers = torch.arange(len(self._plan) + 1, device=self.device)[:, None].repeat(1, len(labels))

        def evaluate(
            x: torch.Tensor, step: Step, features: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._predict(x, step, labels, features)

        def update(
            i: int, x: torch.Tensor, out: torch.Tensor, previous: torch.Tensor | None, with_noise: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self.settings.threshold:
                limit = dynamic_limit(x, out, coefficients[i], self.settings.threshold)
                coefficients[i, :, COLUMNS.index("limit")] = limit
            return denoise_step(
                x, out, coefficients[i], previous, self.seed, labels, indices, numbers[i + 1], with_noise=with_noise
            )

        noise = normal(self.seed, labels, indices, numbers[0], self.shape)
        return denormalise(sample(noise, self._plan, self._solver, evaluate, update))

    def _predict(
        self, x: torch.Tensor, step: Step, labels: torch.Tensor, features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's output, [B, C, H, W], or with guidance [2B, C, H, W], the second half without class: both
        passes run as one doubled batch. Beside it the features to cache, made here or, as `features`, before."""
        if step.guided:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        if self.compiled:  # the compiler tells strides apart, also those of one channel, which mean nothing
            x = x.clone(memory_format=torch.channels_last)
        times = torch.full((len(x),), step.t, device=x.device)
        # Guidance may have ended since they were cached: half of them is enough.
        cached = () if step.full or features is None else (features[: len(x)],)
        return self._recorded[len(x), bool(cached)](x, times, labels, *cached)

    def _evaluate(
        self, x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, cached_features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._network(x, times, labels, cached_features=cached_features)
