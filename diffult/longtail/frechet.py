"""The Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017)."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, float [N, F] and [M, F]:
    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). Few samples bias it upwards: compare values of the same N and
    M."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return float(means + _between_covariances(np.cov(a, rowvar=False), np.cov(b, rowvar=False)))


def class_frechet_distance(drawn: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """How far samples are from real images class by class, with few of either: between Gaussians that have a mean for
    each class and one covariance, that within classes. The mean over classes of the squared distance of means, plus the
    term of covariances.

    A class of five images has no covariance of its own; the shared one is known from all of them.

    Args:
        drawn: float [N, F], features of samples, and `labels`, int64 [N], their classes.
        real: float [M, F], features of real images, one or more of each of these classes; others are left out.
        real_labels: int64 [M].
    """
    classes = np.unique(labels)
    means, covariance = _by_class(drawn, labels, classes)
    real_means, real_covariance = _by_class(real, real_labels, classes)
    return float(np.square(means - real_means).sum(1).mean()) + _between_covariances(covariance, real_covariance)


def _by_class(features: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each class, float64 [classes, F], and the covariance within classes, [F, F]."""
    groups = [features[labels == c].astype(np.float64) for c in classes]
    means = np.stack([group.mean(0) for group in groups])
    rest = np.concatenate([group - mean for group, mean in zip(groups, means, strict=True)])
    return means, rest.T @ rest / max(1, len(rest) - len(classes))


def _between_covariances(a: np.ndarray, b: np.ndarray) -> float:
    root = _root(a)
    cross = _root(root @ b @ root)  # has the trace of (C_a C_b)^(1/2), and is symmetric
    return float(np.trace(a) + np.trace(b) - 2 * np.trace(cross))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
