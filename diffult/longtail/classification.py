"""Training of the extractor and the final classifiers, their predictions and features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffult.config import TrainingConfig
from diffult.data.config import DataConfig
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import autocast
from diffult.engine.distributed import ALONE, World
from diffult.engine.loop import LoopConfig, Losses, learning_rate_factor, train_steps
from diffult.engine.weights import WeightAverage, frozen_statistics, sharpness_aware
from diffult.longtail.augment import Policy, cutout, mixed
from diffult.longtail.losses import Loss, Targets
from diffult.longtail.methods import Mix
from diffult.models.batch_norm import share_batch_norms
from diffult.models.cost import forward_flops
from diffult.models.heads import HEADS
from diffult.models.resnet import Classifier
from ffcv_writers import Batch, CenterCrop, ImageSet, Loader, Order, RandomResizedCrop
from kernels.augment import augment, center_crop, normalise

log = logging.getLogger(__name__)
_OF_PARTNERS = 2**40  # beyond all places in a stream
EVALUATED = 256  # images at a time
_SHOWN = 224 / 256  # of the shorter side of larger stored images, as usual on ImageNet
_SMALL_STEP = 1e12  # FLOP of a step below which a GPU has room for others beside it


@dataclass(frozen=True)
class TrainingPhase:
    """A stretch of a training: its steps, the order of its images, its loss and the order of the partners that images
    are mixed with; None: each image's partner is the one before it in the batch."""

    steps: int
    order: Order
    loss: Loss
    partners: Order | None = None


@dataclass(frozen=True)
class Training:
    """One classifier to train.

    Attributes:
        title: in the log as the training begins, and on the progress bar.
        model: trained in place, on the loader's device.
        loader: made by `training_loader` with the same config, seed and world.
        phases: one after the other, under one schedule of the learning rate.
        config: of its steps those of the phases count.
        checkpoint: NAMEstate.pt, from which it resumes; NAMEmetrics.jsonl beside it takes loss and speed.
        seed: the run's seed and the stage's number.
        config_hash: of the settings; a checkpoint of others is refused.
        dtype: of convolutions and products.
        world: the processes that share each batch; every one of them trains.
        mix: of the images; None: as the settings say.
        head_only: whether the trunk stays as it is.
    """

    title: str
    model: Classifier
    loader: Loader
    phases: tuple[TrainingPhase, ...]
    config: TrainingConfig
    checkpoint: Path
    seed: tuple[int, int]
    config_hash: str
    dtype: torch.dtype
    world: World = ALONE
    mix: Mix | None = None
    head_only: bool = False

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


def training_loader(
    images: ImageSet,
    data: DataConfig,
    config: TrainingConfig,
    seed: tuple[int, int],
    device: torch.device,
    world: World = ALONE,
) -> Loader:
    """Loads this process's share of each training batch; UserError if the processes do not divide the batch."""
    resized = RandomResizedCrop(config.image_size, _stream_seed(seed)) if config.augment.resized_crop else None
    crop = resized or data.view(config.image_size)
    return Loader(images, len(_local_rows(config, world)), device=device, crop=crop)


def evaluation_loader(images: ImageSet, data: DataConfig, image_size: int, device: torch.device) -> Loader:
    """Loads what a classifier sees of held-out images."""
    return Loader(images, EVALUATED, device=device, crop=evaluation_view(data, image_size))


def evaluation_view(data: DataConfig, image_size: int) -> CenterCrop | None:
    """The part of a held-out image that a classifier of `image_size` pixels sees; None if stored raw: all of it."""
    return data.view(image_size, _SHOWN)


def training_batches(
    loader: Loader, order: Order, seed: int, batch_size: int, start: int, steps: int, rows: np.ndarray | None = None,
    policy: Policy | None = None, offset: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Batches start..steps-1 of the training stream, all of `batch_size`; one may span two epochs.

    Args:
        loader: of batches of len(rows).
        rows: those of each batch to load, int64 [n]; None: all.
        policy: applied to their images; None: none.
        offset: added to the draws' places in the stream, which key what is random about them.
    """
    rows = np.arange(batch_size) if rows is None else rows
    for draws in order.steps(seed, batch_size, start, steps):
        samples, positions = (
            column.reshape(-1, batch_size)[:, rows] for column in (draws.samples, draws.positions + offset)
        )
        for batch, where in zip(loader.batches(samples.ravel(), positions.ravel()), positions, strict=True):
            yield batch if policy is None else replace(batch, images=policy(batch.images, where))


def batches_of(training: Training, start: int = 0) -> Iterator[tuple[int, Batch]]:
    """The number of the phase and the batch of each step from `start` on; partners follow the images in a batch."""
    loader, size, config = training.loader, training.config.batch_size, training.config
    rows, seed = _local_rows(config, training.world), _stream_seed(training.seed)
    policy = None if config.augment.policy == "none" else Policy(config.augment.policy, config.image_size, seed)
    first = 0
    for number, phase in enumerate(training.phases):
        begin, first = max(start, first), first + phase.steps
        images = training_batches(loader, phase.order, seed, size, begin, first, rows, policy)
        if phase.partners is None:
            yield from ((number, batch) for batch in images)
        else:
            others = training_batches(loader, phase.partners, seed, size, begin, first, rows, policy, _OF_PARTNERS)
            yield from ((number, _joined(*pair)) for pair in zip(images, others, strict=True))


def _joined(batch: Batch, partners: Batch) -> Batch:
    return Batch(*(torch.cat([getattr(batch, f.name), getattr(partners, f.name)]) for f in fields(Batch)))


def fit(training: Training) -> None:
    """Trains a model by SGD, resuming from its checkpoint; raises as `train_steps` does."""
    for _ in fit_all([training]):
        pass


def fit_all(trainings: Sequence[Training]) -> Iterator[Training]:
    """Fits each training and yields it when it is done.

    On one GPU, small networks train side by side, each on its own stream, to fill the card; the results are the same.
    """
    return (training for training, done in fit_steps(trainings) if done)


def fit_steps(trainings: Sequence[Training]) -> Iterator[tuple[Training, bool]]:
    """As `fit_all`, and yields a training, with False, after each of its steps, too."""
    together = side_by_side(trainings)
    if together:
        for training in trainings:  # a resident set must be on the device before several streams read it
            next(training.loader.batches(np.zeros(1, np.int64)))
    for group in [trainings] if together else [[training] for training in trainings]:
        lanes = [(t, _steps(t), _stream(t.loader.device) if together else nullcontext()) for t in group]
        while lanes:
            for lane in list(lanes):
                training, steps, stream = lane
                with stream:
                    goes_on = next(steps, None) is not None
                if goes_on:
                    yield training, False
                    continue
                lanes.remove(lane)
                if together:
                    torch.cuda.synchronize(training.loader.device)
                training.model.eval()
                yield training, True


def side_by_side(trainings: Sequence[Training]) -> bool:
    """Whether `fit_steps` lets them take turns."""
    alone = len(trainings) < 2 or any(t.loader.device.type != "cuda" or t.world.size > 1 for t in trainings)
    return not alone and all(_step_flops(training) < _SMALL_STEP for training in trainings)


def _step_flops(training: Training) -> float:
    """The backward pass is counted as two forwards."""
    config = training.config
    # Two images: in training mode batch norms refuse one.
    shape = (2, training.loader.image_set.channels, config.image_size, config.image_size)
    return 3.0 * config.batch_size * forward_flops(training.model, [torch.empty(shape, device="meta")])


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """A side stream that starts when all work queued so far is done."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _stream_seed(seed: tuple[int, int]) -> int:
    """The seed of order, crops and augmentation."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _local_rows(config: TrainingConfig, world: World) -> np.ndarray:
    """The rows of each batch that this process loads: its share and, of several processes, the row before it, the
    partner of its first image where images are mixed."""
    mine = world.local_slice(config.batch_size, "batch_size")
    return np.arange(mine.start - _halo(world), mine.stop) % config.batch_size


def _halo(world: World) -> int:
    return int(world.size > 1)


def _configured_mix(config: TrainingConfig) -> Mix | None:
    if config.mixup:
        return Mix("mixup", config.mixup)
    return Mix("cutmix", config.cutmix) if config.cutmix else None


def _steps(training: Training) -> Iterator[int]:
    """Trains; yields the number of steps done after each."""
    config, world, loader, seed = training.config, training.world, training.loader, _stream_seed(training.seed)
    steps = training.steps
    log.info("%s: %d steps", training.title, steps)
    step = _Step(training, seed)
    average = {"average": step.average} if step.average else {}
    schedule = (config.warmup * steps, config.milestones, config.decay, config.cosine_decay)
    factors = [learning_rate_factor(i, steps, *schedule) for i in range(steps)]
    rates = torch.tensor([config.learning_rate * factor for factor in factors], device=loader.device)
    # With several processes their exchange stays outside graphs.
    device = loader.device if world.size == 1 else torch.device("cpu")
    runs = [CUDAGraphRunner(partial(step, phase), device) for phase in training.phases]

    def run(i: int, numbered: tuple[int, Batch]) -> Losses:
        number, batch = numbered
        return runs[number](batch.images, batch.labels, batch.synthetic, batch.sample, batch.position, rates[i])

    name = training.checkpoint.name.removesuffix("state.pt")
    yield from train_steps(
        LoopConfig(
            training.title, steps, training.checkpoint, max(1, min(1000, steps // 2)),
            (*training.seed, world.rank), training.config_hash, config.batch_size,
            metrics=training.checkpoint.with_name(f"{name}metrics.jsonl"), world=world,
        ),
        partial(batches_of, training), run,
        {"model": training.model, "optimizer": step.optimizer} | average,
    )  # fmt: skip
    if step.average:
        step.average.copy_to_parameters()


class _Step:
    """Augmentation, forward, loss, backward, exchange and SGD on device tensors alone, as a CUDA graph needs."""

    def __init__(self, training: Training, seed: int) -> None:
        self.training, self.seed = training, seed
        config, model = training.config, training.model
        model.train()
        if training.head_only:
            model.trunk.eval().requires_grad_(False)
        else:
            share_batch_norms(model, training.world)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Fused on CUDA: only then does the rate stay on the device.
        self.optimizer = torch.optim.SGD(
            self.parameters, config.learning_rate, config.momentum, weight_decay=config.weight_decay,
            fused=training.loader.device.type == "cuda",
        )  # fmt: skip
        statistics = [] if training.head_only else [b for b in model.buffers() if b.is_floating_point()]
        self.average = WeightAverage([*self.parameters, *statistics], config.ema) if config.ema else None

    def __call__(
        self, phase: TrainingPhase, images: Tensor, labels: Tensor, synthetic: Tensor, sample: Tensor,
        positions: Tensor, rate: Tensor,
    ) -> Losses:  # fmt: skip
        """One step on the fields of a `Batch`, at the learning rate `rate`, float32 scalar."""
        config, world = self.training.config, self.training.world
        options = {"pad": config.augment.pad, "flip": config.augment.flip, "jitter": config.augment.jitter}
        size, dtype = config.image_size, self.training.dtype
        x = augment(images, self.seed, positions, size=size, dtype=dtype, **options)  # type: ignore[arg-type]
        if config.augment.cutout:
            x = cutout(x, self.seed, positions, config.augment.cutout)
        x, targets = self._mixed(x, Targets(labels, synthetic, sample), positions)
        value = self._backward(phase.loss, x, targets)
        if config.sam:
            with sharpness_aware(self.parameters, config.sam), frozen_statistics(self.training.model):
                self._backward(phase.loss, x, targets)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        if self.average:
            self.average.update()
        world.sum_(value)
        return {"loss": value}

    def _backward(self, loss: Loss, x: Tensor, targets: Targets) -> Tensor:
        """Makes the gradients of the whole batch's loss; returns this process's part of it."""
        with autocast(self.training.dtype, self.training.loader.device):
            outputs = self.training.model.outputs(x)
        total = loss(outputs.float(), targets)
        self.training.world.sum_(total.weight)
        value = total.mean
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self._exchange()
        return value.detach()

    def _mixed(self, x: Tensor, targets: Targets, positions: Tensor) -> tuple[Tensor, Targets]:
        """Images and targets, each image mixed with its partner where the method or the settings say so."""
        halo, mix = _halo(self.training.world), self.training.mix or _configured_mix(self.training.config)
        if mix is None:
            labels, synthetic, sample, _ = targets
            return x[halo:], Targets(labels[halo:], synthetic[halo:], sample[halo:])
        pairs = [(y, y.roll(1, 0)) if mix.partners is None else y.chunk(2) for y in (x, *targets[:3])]
        (x, others), *columns = pairs
        x, share = (y[halo:] for y in mixed(x, others, self.seed, positions[: len(x)], mix))
        labels, synthetic, sample = (torch.cat([own[halo:], other[halo:]]) for own, other in columns)
        return x, Targets(labels, synthetic, sample, torch.cat([share, 1 - share]))

    def _exchange(self) -> None:
        """Sums the gradients over the processes, in one exchange."""
        if self.training.world.size > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            joined = torch.cat([gradient.flatten() for gradient in gradients])
            self.training.world.sum_(joined)
            for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))


@torch.inference_mode()
def _forward(function: Callable[[Tensor], Tensor], size: int, images: Tensor, dtype: torch.dtype) -> Tensor:
    with autocast(dtype, images.device):
        return function(center_crop(normalise(images), size)).float()


def _apply(
    function: Callable[[Tensor], Tensor], size: int, loader: Loader, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    outputs, labels = [], []
    for batch in loader.sequential():
        outputs.append(_forward(function, size, batch.images, dtype))
        labels.append(batch.labels)
    return torch.cat(outputs), torch.cat(labels)


def classify(model: Classifier, images: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Predicted labels int64 [N], as `predict` gives them, and their probabilities float32 [N], the softmax of the
    logits as the loss scales them, of images uint8 [N, H, W, C] on the model's device."""
    logits = _forward(model, model.image_size, images, dtype)
    labels = logits.argmax(1)
    probabilities = torch.softmax(HEADS[model.heads].scale * logits, dim=1)
    return labels.cpu().numpy(), probabilities.gather(1, labels[:, None])[:, 0].cpu().numpy()


def predict(model: Classifier, loader: Loader, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true labels of the whole set in its order, int64 [N] each."""
    logits, labels = _apply(model, model.image_size, loader, dtype)
    return logits.argmax(1).cpu().numpy(), labels.cpu().numpy()


def extract_features(model: Classifier, loader: Loader, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Penultimate features, float32 [N, F], and labels, int64 [N], of the whole set in its order."""
    return _apply(model.features, model.image_size, loader, dtype)
