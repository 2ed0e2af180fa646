"""The ways to train the final classifier that a run compares: one row of `METHODS` each.

A method differs from the others in the images it uses, the order it draws them in and its loss; network, steps, rate
and augmentation are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from diffult.longtail.losses import CrossEntropy, Loss, log_prior
from ffcv_writers import ClassBalanced, Natural, Order, Ratio, Weighted


class Settings(Protocol):
    """What methods read of a run's `classifier` section."""

    @property
    def batch_size(self) -> int: ...
    @property
    def omega(self) -> float: ...
    @property
    def synthetic_images(self) -> int: ...
    @property
    def resample_power(self) -> float: ...


@dataclass(frozen=True)
class TrainingSet:
    """The images that a method trains on, and the settings that it may read.

    Attributes:
        labels: int64 [N].
        synthetic: bool [N].
        num_classes: of the data set.
        settings: the `classifier` section.
        balance_to: N_t, up to which classes are filled.
    """

    labels: np.ndarray
    synthetic: np.ndarray
    num_classes: int
    settings: Settings
    balance_to: int


class Drawing(NamedTuple):
    """An order, and how often it draws each image relative to the others, float64 [N]."""

    order: Order
    frequency: np.ndarray


class ClassCounts(NamedTuple):
    """Float64 [num_classes] each: the real images, and the weight of each class in training, that is its images by how
    often they are drawn, each synthetic one weighing omega."""

    real: torch.Tensor
    effective: torch.Tensor


SPECIFIC = ("omega", "synthetic_share", "resample_power", "balance_to")  # settings that only some methods read


@dataclass(frozen=True)
class Method:
    """One way to train the classifier.

    Attributes:
        title: its name in tables.
        synthetic: whether it trains on synthetic images too.
        draw: makes the order in which it draws images.
        loss: makes its loss from class counts and omega.
        reads: which of SPECIFIC it reads: its classifier is trained again when one of these changes.
    """

    title: str
    synthetic: bool
    draw: Callable[[TrainingSet], Drawing]
    loss: Callable[[ClassCounts, float], Loss]
    reads: tuple[str, ...] = SPECIFIC


def class_counts(train: TrainingSet, drawing: Drawing, device: torch.device | str = "cpu") -> ClassCounts:
    weight = drawing.frequency * np.where(train.synthetic, train.settings.omega, 1.0)
    columns = (~train.synthetic).astype(np.float64), weight
    counts = (np.bincount(train.labels, column, train.num_classes) for column in columns)
    return ClassCounts(*(torch.from_numpy(count).to(device) for count in counts))


def natural(train: TrainingSet) -> Drawing:
    """Every image once an epoch; with `synthetic_share`, that share of each batch is synthetic."""
    synthetic, settings = train.synthetic, train.settings
    generated = settings.synthetic_images if synthetic.any() else 0
    if not generated:
        return Drawing(Natural(len(synthetic)), np.ones(len(synthetic)))
    real = settings.batch_size - generated
    frequency = np.where(synthetic, generated / synthetic.sum(), real / (~synthetic).sum())
    return Drawing(Ratio(synthetic, real, generated), frequency)


def resampled(train: TrainingSet) -> Drawing:
    """A class of n images in proportion to n^(1 - power): 1 for all classes alike, 1/2 for the square root."""
    counts = np.bincount(train.labels)
    if train.settings.resample_power == 1:
        return Drawing(ClassBalanced(train.labels), 1.0 / counts[train.labels])
    weights = counts[train.labels] ** -train.settings.resample_power
    return Drawing(Weighted(weights), weights)


def duplicated(train: TrainingSet) -> Drawing:
    counts = np.bincount(train.labels)
    frequency = np.maximum(counts, train.balance_to) / np.maximum(counts, 1)
    return Drawing(Duplicates(train.labels, train.balance_to), frequency[train.labels])


class Duplicates(Order):
    """Fills each class up to `balance_to` draws an epoch with its own images, each drawn equally often, give or take
    one: the control for what synthetic images add. `labels`: integers (N,)."""

    def __init__(self, labels: np.ndarray, balance_to: int) -> None:
        _, sizes = np.unique(labels, return_counts=True)
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        self._draws = np.maximum(sizes, balance_to)
        super().__init__(int(self._draws.sum()))

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((seed, epoch))
        draws = [np.resize(generator.permutation(m), d) for m, d in zip(self._members, self._draws, strict=True)]
        return generator.permutation(np.concatenate(draws))


def cross_entropy(counts: ClassCounts, omega: float) -> Loss:
    return CrossEntropy(omega)


def logit_adjusted(counts: ClassCounts, omega: float) -> Loss:
    """Cross-entropy whose logits have the log of the class frequency in training added."""
    return CrossEntropy(omega, log_prior(counts.effective))


METHODS = {
    "ce": Method("Cross-entropy", False, natural, cross_entropy, ()),
    "resample": Method("Re-sampling", False, resampled, cross_entropy, ("resample_power",)),
    "logit_adjust": Method("Logit adjustment", False, natural, logit_adjusted, ()),
    "duplicates": Method("Duplicates of real images", False, duplicated, cross_entropy, ("balance_to",)),
    "diffult": Method("DiffuLT", True, natural, cross_entropy, ("omega", "synthetic_share")),
    "diffult+resample": Method("DiffuLT + re-sampling", True, resampled, cross_entropy, ("omega", "resample_power")),
    "diffult+logit_adjust": Method(
        "DiffuLT + logit adjustment", True, natural, logit_adjusted, ("omega", "synthetic_share")
    ),
}
