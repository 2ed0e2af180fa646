"""Training a classifier on a loader, and asking it for predictions and features: shared by the extractor and the final
classifier, so that both are trained alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffult.config import TrainingConfig
from diffult.engine.device import autocast
from diffult.engine.loop import LoopConfig, learning_rate_factor, train_loop
from diffult.longtail.losses import weighted_cross_entropy
from ffcv_writers import Batch, Loader, Order
from kernels.augment import augment, center_crop, mixup, normalise


def training_batches(loader: Loader, order: Order, seed: int, start: int, steps: int) -> Iterator[Batch]:
    """Full batches start..steps-1 of the endless training stream; a batch may span two epochs."""
    for draws in order.steps(seed, loader.batch_size, start, steps):
        yield from loader.batches(*draws)


def fit(
    title: str,
    model: nn.Module,
    loader: Loader,
    order: Order,
    config: TrainingConfig,
    checkpoint: Path,
    seed: tuple[int, int],
    config_hash: str,
    dtype: torch.dtype,
    device: torch.device,
    omega: float = 1.0,
    prior: torch.Tensor | None = None,
) -> None:
    """Trains `model` in place for `config.steps` steps of SGD on cross-entropy, resuming from `checkpoint`.

    Args:
        order: of the training stream.
        seed: the run's seed and the stage's number.
        config_hash: of the run's configuration.
        omega: weight of a synthetic sample; a real one weighs 1.
        prior: float [num_classes], added to the logits in training alone; see `log_prior`.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.learning_rate,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=False,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: learning_rate_factor(i, config.steps, config.warmup * config.steps, config.milestones, config.decay),
    )
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])

    def step(i: int, batch: Batch) -> dict[str, torch.Tensor]:
        options = config.augment.model_dump()
        images = augment(batch.images, order_seed, batch.position, size=config.image_size, dtype=dtype, **options)
        share = None
        if config.mixup:
            images, share = mixup(images, order_seed, batch.position, config.mixup)
        with autocast(dtype, device):
            logits = model(images)
        logits = logits.float() if prior is None else logits.float() + prior
        value = mixed_cross_entropy(logits, batch.labels, torch.where(batch.synthetic, omega, 1.0), share)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        scheduler.step()
        return {"loss": value.detach()}

    model.train()
    job = LoopConfig(
        title, config.steps, checkpoint, max(1, min(1000, config.steps // 2)), seed, config_hash, config.batch_size
    )
    train_loop(
        job,
        lambda start: training_batches(loader, order, order_seed, start, config.steps),
        step,
        {"model": model, "optimizer": optimizer, "scheduler": scheduler},
    )
    model.eval()


def mixed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, share: torch.Tensor | None
) -> torch.Tensor:
    """`weighted_cross_entropy` of a batch after `mixup`, which counts twice: each sample with `share` of its own label
    and weight, and with the rest of the label and weight of the sample before it.

    Args:
        logits: float [B, num_classes]. labels: int64 [B]. weight: float [B].
        share: float [B], of its own image in each mixed one; None: nothing was mixed.
    """
    if share is not None:
        logits, labels = logits.repeat(2, 1), torch.cat([labels, labels.roll(1)])
        weight = torch.cat([share * weight, (1 - share) * weight.roll(1)])
    return weighted_cross_entropy(logits, labels, weight)


@torch.inference_mode()
def _apply(
    function: Callable[[torch.Tensor], torch.Tensor],
    loader: Loader,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, labels = [], []
    for batch in loader.sequential():
        with autocast(dtype, device):
            outputs.append(function(center_crop(normalise(batch.images), image_size)).float())
        labels.append(batch.labels)
    return torch.cat(outputs), torch.cat(labels)


def predict(
    model: nn.Module, loader: Loader, image_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true labels of the whole set in its order, int64 [N] each."""
    logits, labels = _apply(model, loader, image_size, dtype, device)
    return logits.argmax(1).cpu().numpy(), labels.cpu().numpy()


def extract_features(
    model: nn.Module, loader: Loader, image_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate features float32 [N, F] and labels int64 [N] of the whole set in its order."""
    return _apply(model.features, loader, image_size, dtype, device)  # type: ignore[arg-type]
