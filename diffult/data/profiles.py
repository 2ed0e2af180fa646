"""Long-tail profiles: how many training images each class keeps, and which.

With C classes in label order and the imbalance factor IF = n_max / n_min,

    exponential     n_i = int(n_max IF^(-i / (C - 1)))
    step            n_i = n_max for the first half of the classes (the larger half if C is odd),
                          int(n_max / IF) for the rest

as in the CIFAR-LT of Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss"
(NeurIPS 2019), and its code's `imbalance_cifar.py`.
"""

from __future__ import annotations

import numpy as np

from diffult.data.config import DataConfig
from diffult.errors import UserError


def exponential(n_max: int, imbalance: float, classes: int) -> list[int]:
    """Images per class, falling from n_max to int(n_max / imbalance)."""
    # A quotient of powers, not a negative power: 49 * 49.0**-1 is 0.999..., which int() makes 0.
    return [int(n_max / imbalance ** (i / max(classes - 1, 1))) for i in range(classes)]


def step(n_max: int, imbalance: float, classes: int) -> list[int]:
    """n_max images for the first half of the classes, int(n_max / imbalance) for the others."""
    tail = classes // 2
    return [n_max] * (classes - tail) + [int(n_max / imbalance)] * tail


def class_counts(config: DataConfig, available: np.ndarray) -> list[int]:
    """Training images of each class, from those available, int (C,); UserError if `counts` is of another length."""
    n_max = int(available.max()) if config.n_max is None else config.n_max
    match config.profile:
        case "natural":
            return [min(int(n), n_max) for n in available]
        case "counts":
            if len(config.counts) != len(available):
                raise UserError(f"data.counts has {len(config.counts)} numbers for {len(available)} classes")
            return list(config.counts)
        case "exponential" | "step":
            assert config.imbalance is not None  # checked by DataConfig
            rule = exponential if config.profile == "exponential" else step
            return rule(n_max, config.imbalance, len(available))


def positions_by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The positions of each class in `labels`, int (N,), rising."""
    sizes = np.bincount(labels, minlength=num_classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])


def draw(labels: np.ndarray, counts: list[int], seed: int) -> np.ndarray:
    """The training images that a profile keeps: with CIFAR and seed 0, those of the published CIFAR-LT.

    As in `imbalance_cifar.py`, numpy's legacy generator is seeded once; then, class after class, the positions of the
    class are shuffled and the first ones kept.

    Args:
        labels: int (N,), of the pool to draw from.
        counts: images wanted of each class, by label.
        seed: 0 <= seed < 2**32.

    Returns:
        int64 (sum of counts,): positions in `labels`, class after class.

    Raises:
        UserError: a class would be empty, or the pool has too few images of it.
    """
    generator = np.random.RandomState(seed)
    kept = []
    for label, positions in enumerate(positions_by_class(labels, len(counts))):
        wanted = counts[label]
        if wanted < 1:
            raise UserError(
                f"class {label} would get {wanted} images: raise data.n_max or data.counts, or lower data.imbalance"
            )
        if wanted > len(positions):
            raise UserError(
                f"class {label} should get {wanted} training images but the source has {len(positions)}:"
                " lower data.n_max or data.counts"
            )
        generator.shuffle(positions)
        kept.append(positions[:wanted])
    return np.concatenate(kept)
