"""Where images come from: each format read into a `Source`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from diffult.data.cifar import load_cifar
from diffult.data.config import FASHION_MNIST_PATH, DataConfig
from diffult.data.files import load_folder, load_list
from diffult.data.idx import load_idx
from diffult.data.image_set import Source, array_source
from diffult.errors import UserError


def load_source(config: DataConfig) -> Source:
    """The splits of the configured data set, whole and as they are.

    Raises:
        UserError: a path is missing, a file is not of its format, a label is out of range, a class is empty,
            or the images have another size or other channels than configured.
    """
    path = Path(config.path).expanduser()
    match config.source:
        case "digits":
            source = _load_digits()
        case "idx":
            source = load_idx(path if config.path else Path(FASHION_MNIST_PATH))
        case "cifar10" | "cifar100":
            source = load_cifar(config.source, path)
        case "folder":
            source = load_folder(path, config.image_size)
        case "list":
            train, test, val = map(os.path.expanduser, (config.train_list, config.test_list, config.val_list))
            source = load_list(path, train, test, val, config.image_size)
    height, width, channels = source.train.shape
    size = config.image_size
    if (height, width) != (size, size):
        raise UserError(f"{config.source} images are {height}x{width}, but data.image_size is {size}")
    if channels != config.channels:
        raise UserError(f"{config.source} images have {channels} channel(s), not data.channels = {config.channels}")
    return source


def _load_digits() -> Source:
    """scikit-learn's 1797 grey 8x8 digits; the test split is 719 of them, stratified, always the same."""
    # Imported here: it takes longer than all else in this package, and only this source needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # values are 0..16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.4, stratify=digits.target, random_state=0
    )
    classes = tuple(str(name) for name in digits.target_names)
    return array_source((train_images, train_labels), (test_images, test_labels), classes, "digits")
