"""In which order a method draws images, and how often it draws each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from diffult.longtail.quota import quotas_to
from ffcv_writers import ClassBalanced, Natural, Order, Ratio, Weighted


class Settings(Protocol):
    """What methods read of a run's `classifier` section."""

    @property
    def steps(self) -> int: ...
    @property
    def epochs(self) -> float | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def omega(self) -> float: ...
    @property
    def synthetic_images(self) -> int: ...
    @property
    def label_smoothing(self) -> float: ...


@dataclass(frozen=True)
class TrainingSet:
    """The images that a method trains on, and the settings that it may read.

    Attributes:
        labels: int64 [N].
        synthetic: bool [N].
        num_classes: of the data set.
        settings: the `classifier` section.
        balance_to: N_t, up to which classes are filled.
        soft_labels: computes a distribution over the classes for each image, float [N, num_classes].
        dose: times what a class lacks; see `quotas_to`.
    """

    labels: np.ndarray
    synthetic: np.ndarray
    num_classes: int
    settings: Settings
    balance_to: int
    soft_labels: Callable[[], torch.Tensor] | None = None
    dose: float = 1.0


class Drawing(NamedTuple):
    """An order, and how often it draws each image in an epoch, on average, float64 [N]."""

    order: Order
    frequency: np.ndarray


class ClassCounts(NamedTuple):
    """Float64 [num_classes] each: the real images; the draws of real images in an epoch; and those of all images, each
    synthetic one weighing omega."""

    real: torch.Tensor
    real_weight: torch.Tensor
    effective: torch.Tensor


Draw = Callable[[TrainingSet], Drawing]


def class_counts(train: TrainingSet, drawing: Drawing, device: torch.device | str = "cpu") -> ClassCounts:
    real, omega = (~train.synthetic).astype(np.float64), train.settings.omega
    columns = real, drawing.frequency * real, drawing.frequency * np.where(train.synthetic, omega, 1.0)
    counts = (np.bincount(train.labels, column, train.num_classes) for column in columns)
    return ClassCounts(*(torch.from_numpy(count).to(device) for count in counts))


def natural(train: TrainingSet) -> Drawing:
    """Every image once an epoch."""
    return Drawing(Natural(len(train.labels)), np.ones(len(train.labels)))


def resampled(train: TrainingSet, power: float = 1.0) -> Drawing:
    """A class of n images in proportion to n^(1 - power): 1 for all classes alike, 1/2 for the square root (Kang et al.
    2020)."""
    counts = np.bincount(train.labels)
    weights = counts[train.labels] ** -power
    order = ClassBalanced(train.labels) if power == 1 else Weighted(weights)
    return Drawing(order, weights * (len(weights) / weights.sum()))


square_root = partial(resampled, power=0.5)


def duplicated(train: TrainingSet) -> Drawing:
    counts = np.bincount(train.labels)
    frequency = 1 + quotas_to(train.balance_to, counts, train.dose) / np.maximum(counts, 1)
    return Drawing(Duplicates(train.labels, train.balance_to, train.dose), frequency[train.labels])


class Duplicates(Order):
    """Fills each class up to `balance_to` draws an epoch with its own images, each drawn equally often, give or take
    one, and a copy weighing as much as the image: the control for what synthetic images add. `labels`: integers (N,);
    `dose`: times what a class lacks."""

    def __init__(self, labels: np.ndarray, balance_to: int, dose: float = 1.0) -> None:
        _, sizes = np.unique(labels, return_counts=True)
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        self._draws = sizes + quotas_to(balance_to, sizes, dose)
        super().__init__(int(self._draws.sum()))

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((seed, epoch))
        draws = [np.resize(generator.permutation(m), d) for m, d in zip(self._members, self._draws, strict=True)]
        return generator.permutation(np.concatenate(draws))


def mixed(train: TrainingSet, balanced: bool = False) -> Drawing:
    """`synthetic_share` of each batch synthetic, the rest real: each once an epoch, or with `balanced` every class
    equally often."""
    synthetic, settings = train.synthetic, train.settings
    of_real = real_balanced(train) if balanced else real_only(train)
    if not synthetic.any():
        return of_real
    generated = settings.synthetic_images
    real = settings.batch_size - generated
    draws = generated / real * (~synthetic).sum()  # of synthetic images, while every real one comes once
    order = ClassBalanced(train.labels[~synthetic]) if balanced else None
    return Drawing(
        Ratio(synthetic, real, generated, order), of_real.frequency + np.where(synthetic, draws / synthetic.sum(), 0.0)
    )


mixed_balanced = partial(mixed, balanced=True)


def real_only(train: TrainingSet) -> Drawing:
    """Every real image once an epoch."""
    (numbers,) = np.nonzero(~train.synthetic)
    return Drawing(Subset(Natural(len(numbers)), numbers), (~train.synthetic).astype(np.float64))


def real_balanced(train: TrainingSet) -> Drawing:
    """The real images alone, every class equally often."""
    (numbers,) = np.nonzero(~train.synthetic)
    counts = np.bincount(train.labels[numbers], minlength=train.num_classes)
    often = len(numbers) / np.count_nonzero(counts) / np.maximum(counts, 1)
    frequency = np.where(train.synthetic, 0.0, often[train.labels])
    return Drawing(Subset(ClassBalanced(train.labels[numbers]), numbers), frequency)


class Subset(Order):
    """The order of some samples, which have `numbers`, integers (n,), in the whole set."""

    def __init__(self, order: Order, numbers: np.ndarray) -> None:
        super().__init__(order.length)
        self._order, self._numbers = order, numbers

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        return self._numbers[self._order.epoch(seed, epoch)]
