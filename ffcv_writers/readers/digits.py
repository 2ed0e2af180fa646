"""scikit-learn's 1797 grey 8x8 digits."""

from __future__ import annotations

import numpy as np

from .source import Place, Source, Split, array_split


def read(place: Place) -> Source:
    """The test split is 719 of them, stratified, always the same. `place` is not looked at."""
    return Source({"files": {}}, _content)


def _content() -> tuple[dict[str, Split], tuple[str, ...]]:
    # Imported here: it takes longer than all else in this package, and only this source needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # values are 0..16
    train, test, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.4, stratify=digits.target, random_state=0
    )
    splits = {"train": array_split(train, train_labels, "digits"), "test": array_split(test, test_labels, "digits")}
    return splits, tuple(map(str, digits.target_names))
