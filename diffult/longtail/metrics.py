"""Accuracy over all classes and over the many, medium and few of a long-tailed set."""

from __future__ import annotations

import numpy as np

COLUMNS = ("top1", "many", "medium", "few")  # what `accuracies` gives for the groups of `class_groups`


def class_groups(train_counts: np.ndarray, many: int, few: int) -> dict[str, np.ndarray]:
    """Class numbers by group: many has more than `many` training images, few fewer than `few`, medium the rest.

    Args:
        train_counts: int64 [num_classes], real training images of each class.
        many, few: thresholds; 100 and 20 in the literature (Liu et al. 2019).
    """
    counts = np.asarray(train_counts)
    return {
        "many": np.flatnonzero(counts > many),
        "medium": np.flatnonzero((counts <= many) & (counts >= few)),
        "few": np.flatnonzero(counts < few),
    }


def accuracies(predictions: np.ndarray, labels: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Top-1 over all samples and over the samples of each group, in percent; None for a group without a test image.

    Args:
        predictions, labels: int64 [N].
        groups: class numbers by name, as from `class_groups`.
    """
    right = np.asarray(predictions) == np.asarray(labels)

    def percent(mask: np.ndarray) -> float | None:
        return 100.0 * float(right[mask].mean()) if mask.any() else None

    everything = np.ones(len(right), dtype=bool)
    return {"top1": percent(everything)} | {name: percent(np.isin(labels, classes)) for name, classes in groups.items()}


def class_accuracies(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> list[float | None]:
    """Accuracy on each class in percent, None for a class without a test image. predictions, labels: int64 [N]."""
    images = np.bincount(labels, minlength=num_classes).tolist()
    hits = np.bincount(labels[predictions == labels], minlength=num_classes).tolist()
    return [100.0 * hit / count if count else None for hit, count in zip(hits, images, strict=True)]
