"""The splits of a run: long-tailed training images, validation images for choices, the whole test split.

What each is for:

    train   the only images that anything is trained on
    val     serves choices only (when to stop, which setting): never trained on
    test    seen at evaluation only, never drawn from, never chosen by
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from diffult.data.config import DataConfig
from diffult.data.image_set import ImageSet
from diffult.data.profiles import class_counts, draw
from diffult.data.sources import load_source

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The splits of a run. Those drawn here are disjoint; a source's own splits are taken as they come.

    Attributes:
        train: the long-tailed training set.
        val: images that serve choices only, never training; None if there are none.
        test: the source's test split, whole.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet

    def check(self) -> None:
        """Decode every image once, before any work starts.

        Raises:
            UserError: a file does not decode; the first one is named.
        """
        for split in (self.train, self.val, self.test):
            if split is not None:
                split.check()


def load_data(config: DataConfig) -> Data:
    """The configured data set under its long-tail profile.

    The validation split is the source's own, if it has one. Otherwise it has `val_per_class` images of each
    class out of those that the profile did not draw, or as many of them as there are. The natural profile
    draws all, so there min(val_per_class, n_c // 10) images of each class are taken out of the training set.
    Whatever its origin, it serves choices only, never training.

    Raises:
        UserError: see `load_source`, `class_counts` and `draw`.
    """
    source = load_source(config)
    pool = source.train
    if config.profile == "natural":
        chosen = np.arange(len(pool))
    else:
        chosen = draw(pool.labels, class_counts(config, pool.counts()), config.seed)
    val = source.val
    if val is None and config.val_per_class > 0:
        held_out = _hold_out(config, pool, chosen)
        chosen = chosen[~np.isin(chosen, held_out)]
        val = pool.subset(held_out) if len(held_out) else None
    data = Data(pool.subset(chosen), val, source.test)
    sizes = data.train.counts()
    _log.info(
        "%s, %s profile: %d training images of %d classes (%d to %d a class), %d for validation, %d for test",
        *(config.source, config.profile, len(data.train), len(sizes), sizes.max(), sizes.min()),
        *(0 if val is None else len(val), len(data.test)),
    )
    return data


def _hold_out(config: DataConfig, pool: ImageSet, chosen: np.ndarray) -> np.ndarray:
    """Positions in the pool of the validation images, class after class, int64 (M,)."""
    free = np.ones(len(pool), dtype=bool)
    limits = np.full(len(pool.classes), config.val_per_class)
    if config.profile == "natural":
        limits = np.minimum(limits, pool.counts() // 10)
    else:
        free[chosen] = False
    generator = np.random.default_rng([config.seed, 1])  # another stream than the draw of the training images
    held_out, without = [], []
    for label, name in enumerate(pool.classes):
        positions = generator.permutation(np.flatnonzero(free & (pool.labels == label)))[: limits[label]]
        held_out.append(positions)
        if len(positions) == 0:
            without.append(name)
    if without:
        names = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        _log.warning("no image is left to validate %d of %d classes: %s", len(without), len(limits), names)
    return np.concatenate(held_out)
