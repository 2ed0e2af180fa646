"""The denoising loss of images at fixed noise: the same few thousand questions, whenever a model is asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from diffult.config import DiffusionConfig
from diffult.diffusion.losses import ddpm_loss
from diffult.diffusion.schedule import Schedule
from diffult.engine.distributed import ALONE, World
from ffcv_writers import Loader
from kernels.diffuse import diffuse


def fixed_items(
    labels: np.ndarray, classes: np.ndarray, per_class: int, timesteps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which images are noised to which timesteps: `per_class` items of each class, class by class.

    The timesteps of a class lie in the middle of as many equal parts of [0, T), moved a little from class to class, so
    that all together they cover it evenly. A class with fewer images shows each of them at several timesteps, one with
    more shows some of them, evenly chosen.

    Args:
        labels: int64 [N], of the images.
        classes: int64 [K], those that count; each has at least one image.

    Returns:
        Rows of the images and timesteps, int64 [K * per_class] each.
    """
    place = np.arange(per_class)
    rows, t = [], []
    for number, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        count = len(members)
        rows.append(members[place * count // per_class if count > per_class else place % count])
        t.append(((place + (number + 0.5) / len(classes)) * timesteps / per_class).astype(np.int64))
    return np.concatenate(rows), np.concatenate(t)


class FixedNoiseLoss:
    """L_DDPM over the `fixed_items` of a set, with the min-SNR weight of the training; a mean over the classes that
    counts each alike. Images are neither mirrored nor augmented, labels not dropped.

    Timesteps and noise are those of an item's number alone. So the losses of two models differ by their weights, and
    those of one model on two sets by the images: held-out loss minus training loss says how much is memorised.
    """

    def __init__(
        self,
        images: Loader,
        classes: np.ndarray,
        per_class: int,
        config: DiffusionConfig,
        schedule: Schedule,
        seed: int,
        dtype: torch.dtype,
        world: World = ALONE,
    ) -> None:
        """
        Args:
            images: the set on the model's device, in batches that the model has memory for.
            classes: int64 [K], those that count, the same for sets to be compared; each has images.
            dtype: of x_t.
            world: the processes that share the items.
        """
        self.images, self.config, self.schedule, self.seed, self.dtype = images, config, schedule, seed, dtype
        rows, timesteps = fixed_items(images.image_set.labels, classes, per_class, schedule.timesteps)
        self.items = np.arange(len(rows))[world.rank :: world.size]
        self.rows = rows[self.items]
        self._timesteps = torch.from_numpy(timesteps).to(images.device)

    @torch.no_grad()
    def __call__(self, model: Callable[..., torch.Tensor]) -> tuple[float, int]:
        """The sum of the loss over this process's items, and their number.

        Args:
            model: (x_t, t, labels) -> prediction.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.images.device)
        prediction, gamma = self.config.prediction, self.config.min_snr
        for batch in self.images.batches(self.rows, self.items):
            t = self._timesteps[batch.position]
            coefficients = self.schedule.diffuse_coefficients(prediction, t)
            x_t, target, _ = diffuse(batch.images, self.seed, batch.position, coefficients, None, self.dtype)
            weight = self.schedule.min_snr_weight(prediction, t, gamma) if gamma else None
            total += ddpm_loss(model(x_t, t, batch.labels).float(), target, weight).double() * len(t)
        return float(total), len(self.items)
