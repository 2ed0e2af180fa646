"""Fréchet distances against scipy's square root of a matrix."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from diffult.longtail.frechet import class_frechet_distance, frechet_distance


def test_frechet_distance_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 1
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        sum(covariances) - 2 * sqrtm(np.dot(*covariances)).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features_have_a_distance_that_a_shift_alone_explains() -> None:
    features = np.random.default_rng(1).normal(size=(5, 64))
    assert frechet_distance(features, features + 2) == pytest.approx(4 * 64, rel=1e-6)


def test_the_distance_by_class_shares_one_covariance() -> None:
    rng = np.random.default_rng(2)
    means = 3 * rng.normal(size=(4, 5))
    labels, real_labels = np.repeat([0, 1, 3], 40), np.repeat([0, 1, 2, 3], [30, 2, 50, 9])
    drawn = means[labels] + rng.normal(size=(120, 5))
    real = means[real_labels] + 2 * rng.normal(size=(91, 5))
    shift, products, real_products = 0.0, np.zeros((5, 5)), np.zeros((5, 5))
    for c in (0, 1, 3):
        a, b = drawn[labels == c], real[real_labels == c]
        shift += np.square(a.mean(0) - b.mean(0)).sum() / 3
        products += 39 / (120 - 3) * np.cov(a, rowvar=False)
        real_products += (len(b) - 1) / (30 + 2 + 9 - 3) * np.cov(b, rowvar=False)
    expected = shift + np.trace(products + real_products - 2 * sqrtm(products @ real_products).real)
    assert class_frechet_distance(drawn, labels, real, real_labels) == pytest.approx(expected, rel=1e-9)


def test_classes_of_one_image_have_a_distance_too() -> None:
    features, labels = np.random.default_rng(3).normal(size=(6, 64)), np.arange(6)
    assert class_frechet_distance(features, labels, features + 2, labels) == pytest.approx(4 * 64)
    assert class_frechet_distance(features, labels, features, labels) == 0
