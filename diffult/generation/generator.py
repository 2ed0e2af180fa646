"""The generation engine: fill a batch from the quota, draw, judge, enter the verdicts, hand the batch on.

Every batch has one static shape. All noise of a sample is keyed by (seed, class, index, step), so a sample is the same
whatever batch it sits in. Samples without a disk, from a finished run, exactly as many as each class needs:

    run = RunDir.open(Path("runs/digits-lt"))
    generator = build_generator(run, run.config.generate, seed=0)
    quota = Quota(np.full(10, 100), run.config.generate.max_draws)
    for images, labels, indices in accepted(generator, quota):
        ...  # uint8 [N, H, W, C], int64 [N], int64 [N]
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from diffult.artifacts import load_diffusion, load_extractor
from diffult.config import GenerateConfig
from diffult.diffusion import samplers
from diffult.diffusion.samplers import Step
from diffult.diffusion.schedule import Prediction, Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import autocast, compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World
from diffult.errors import UserError
from diffult.generation.shards import CandidateBatch
from diffult.longtail.extractor import Extractor
from diffult.longtail.filter import judge
from diffult.longtail.quota import Quota
from diffult.models.cost import forward_flops
from diffult.models.unet import UNet
from diffult.runs.run_dir import RunDir
from kernels.augment import denormalise, normalise
from kernels.denoise_step import COLUMNS, denoise_step, dynamic_limit
from kernels.random import normal

log = logging.getLogger(__name__)
_ROUND = 4  # batches that each process draws before they tell each other what passed


@dataclass
class Generator:
    """Draws and judges samples of a trained diffusion model.

    Attributes:
        unet: the denoising network in evaluation mode.
        schedule, prediction: the process it was trained for.
        settings: sampler, steps, guidance, caching and batch size.
        extractor: phi0, which judges.
        shape: (C, H, W) of a sample.
        null_label: the label for "no class".
        seed: of the noise.
        compiled: the network goes through torch.compile.
    """

    unet: UNet
    schedule: Schedule
    prediction: Prediction
    settings: GenerateConfig
    extractor: Extractor
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
        self._rows = samplers.solver_coefficients(settings.sampler, grid, self.schedule.alphas_cumprod, settings.eta)
        # All numbers of all steps go to the device now, so that no step waits for the host.
        self._coefficients = self._coefficient_table(grid).to(self.device)
        # One graph for each shape: a doubled batch is no reason to make the batch size variable.
        self._evaluate = torch.compile(self.unet.evaluate, dynamic=False) if self.compiled else self.unet.evaluate
        # On CUDA one recorded graph an evaluation, for each kind of step: a whole draw's would be of any length.
        self._recorded = defaultdict[tuple[int, bool], CUDAGraphRunner](
            lambda: CUDAGraphRunner(self._network, self.device)
        )

    def _coefficient_table(self, grid: list[int]) -> torch.Tensor:
        """What `denoise_step` takes at each step, float32 [steps, 8], with x0 clipped to [-1, 1]."""
        conversions = [self.schedule.x0_coefficients(self.prediction, t) for t in grid]
        guidance, limit = torch.full((len(grid), 1), self.settings.guidance), torch.ones(len(grid), 1)
        return torch.cat([torch.tensor(conversions, dtype=torch.float64), guidance, limit, self._rows], dim=1).float()

    @torch.no_grad()
    def prepare(self) -> None:
        """Runs the network at each kind of step that there is, so that it is compiled before any clock runs, and tells
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
        x, deep, met = normal(self.seed, labels, labels, 0, self.shape), None, set()
        for step in self._plan:
            if (kind := (step.guided, step.whole)) not in met:
                met.add(kind)
                _, deep = self._predict(x, step, labels, deep)

    def flops(self) -> int:
        """Work of the network for one sample, FLOP: its whole evaluations, and those of its first level alone."""
        image, label = torch.empty(1, *self.shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
        whole = first_level = forward_flops(self.unet, [image, label, label])
        if self.settings.cache_interval > 1:
            deep = torch.empty(1, *self.unet.deep_shape, dtype=self.dtype, device="meta")
            first_level = forward_flops(self.unet, [image, label, label], deep=deep)
        return sum((1 + step.guided) * (whole if step.whole else first_level) for step in self._plan)

    @torch.no_grad()
    def draw(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Samples named by class and index, both int64 [B] -> uint8 [B, H, W, C]. Nothing here waits for the host."""
        coefficients = self._coefficients[:, None].repeat(1, len(labels), 1)
        numbers = torch.arange(len(self._plan) + 1, device=self.device)[:, None].repeat(1, len(labels))

        x, x0, deep = normal(self.seed, labels, indices, numbers[0], self.shape), None, None
        for i, step in enumerate(self._plan):
            out, deep = self._predict(x, step, labels, deep)
            if self.settings.threshold:
                limit = dynamic_limit(x, out, coefficients[i], self.settings.threshold)
                coefficients[i, :, COLUMNS.index("limit")] = limit
            _, _, c_previous, c_noise = self._rows[i].tolist()
            x, x0 = denoise_step(
                x, out, coefficients[i], x0 if c_previous else None, self.seed, labels, indices, numbers[i + 1],
                with_noise=c_noise != 0,
            )  # fmt: skip
        return denormalise(x)

    def _predict(
        self, x: torch.Tensor, step: Step, labels: torch.Tensor, deep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's output, [B, C, H, W], or with guidance [2B, C, H, W], the second half without class: both
        passes run as one doubled batch. Beside it what the deep levels gave, here or, as `deep`, before."""
        if step.guided:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        if self.compiled:  # the compiler tells strides apart, also those of one channel, which mean nothing
            x = x.clone(memory_format=torch.channels_last)
        times = torch.full((len(x),), step.t, device=x.device)
        kept = () if step.whole or deep is None else (deep[: len(x)],)  # guidance may have ended: half is enough
        return self._recorded[len(x), bool(kept)](x, times, labels, *kept)

    def _network(
        self, x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, deep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._evaluate(x, times, labels, deep=deep)

    @torch.no_grad()
    def judge(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances float32 [B] and verdicts uint8 [B] of samples as they will be stored, uint8 [B, H, W, C]."""
        with autocast(self.dtype, self.device):
            features = self.extractor.features(normalise(images))
            predicted = self.extractor.classify(features) if self.settings.filter == "distance+label" else None
        return judge(features, labels, self.extractor.statistics, predicted)

    def wave(self, labels: np.ndarray, indices: np.ndarray, quota: Quota) -> CandidateBatch:
        """Draws and judges up to a batch of candidates; a short one is padded to the full shape."""
        count, size = len(labels), self.settings.batch_size
        padded = [np.concatenate([names, np.zeros(size - count, np.int64)]) for names in (labels, indices)]
        names = [torch.from_numpy(part).to(self.device) for part in padded]
        drawn = self.draw(*names)
        images, distance, verdict = (output[:count].cpu().numpy() for output in (drawn, *self.judge(drawn, names[0])))
        passed = quota.passes(verdict)
        return CandidateBatch(labels, indices, distance, verdict, passed, images[passed])


def build_generator(run: RunDir, settings: GenerateConfig, seed: int, compiled: bool = False) -> Generator:
    """Opens a finished run's diffusion model and extractor for drawing on this machine.

    Args:
        compiled: the network goes through torch.compile on a CPU too; on a card it always does.

    Raises:
        UserError: a stage is not finished, or a file is damaged.
    """
    device, config = pick_device(), run.config
    dtype = compute_dtype(config.precision, device)
    extractor = load_extractor(run, device)
    return Generator(
        unet=load_diffusion(run, device, dtype, settings.ema_length),
        schedule=Schedule(config.diffusion.schedule, config.diffusion.timesteps, device),
        prediction=config.diffusion.prediction,
        settings=settings,
        extractor=extractor,
        shape=(config.data.channels, config.data.image_size, config.data.image_size),
        null_label=len(extractor.statistics.radii),
        seed=seed,
        dtype=dtype,
        device=device,
        compiled=compiled or device.type == "cuda",
    )


def generate(generator: Generator, quota: Quota, world: World = ALONE) -> Iterator[CandidateBatch]:
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


def accepted(generator: Generator, quota: Quota) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The kept samples alone, by wave: images uint8 [N, H, W, C], labels and indices int64 [N]; over all waves exactly
    what the quota asks for, but for a class that spent its limit. One process; see the example above."""
    for wave in generate(generator, quota):
        labels, indices = wave.labels[wave.passed], wave.indices[wave.passed]
        kept = {c: set(quota.kept(c)) for c in np.unique(labels).tolist()}
        rows = [index in kept[c] for c, index in zip(labels.tolist(), indices.tolist(), strict=True)]
        yield wave.images[rows], labels[rows], indices[rows]
