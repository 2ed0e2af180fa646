"""The splits of a run.

train   long-tailed; the only images that anything is trained on
val     for choices only (when to stop, which setting)
test    the source's whole test split, for evaluation only
"""

from __future__ import annotations

import logging

import numpy as np

from diffult.data.config import DataConfig
from diffult.data.profiles import class_counts, draw
from ffcv_writers.readers import Source

_log = logging.getLogger(__name__)


def choose_splits(config: DataConfig, source: Source) -> dict[str, np.ndarray]:
    """The sample numbers of each split, int64.

    The validation split is the source's own, if it has one. Otherwise it has up to `val_per_class` images of each
    class that the profile did not draw; the natural profile draws all, so there min(val_per_class, n_c // 10) images
    of each class are taken out of the training set. Without any, there is no "val".

    Returns:
        "train" and "val" as numbers in the source's training split; "test", and a "val" of the source, in their own.

    Raises:
        UserError: see `class_counts` and `draw`.
    """
    labels = source.splits["train"].labels
    available = np.bincount(labels, minlength=len(source.classes))
    if config.profile == "natural":
        chosen = np.arange(len(labels))
    else:
        chosen = draw(labels, class_counts(config, available), config.seed)
    numbers = {name: np.arange(len(split.labels)) for name, split in source.splits.items() if name != "train"}
    if "val" not in numbers and config.val_per_class > 0:
        held_out = _hold_out(config, source, chosen)
        chosen = chosen[~np.isin(chosen, held_out)]
        if len(held_out):
            numbers["val"] = held_out
    sizes = np.bincount(labels[chosen], minlength=len(source.classes))
    _log.info(
        "%s, %s profile: %d training images of %d classes (%d to %d a class), %d for validation, %d for test",
        *(config.source, config.profile, len(chosen), len(sizes), sizes.max(), sizes.min()),
        *(len(numbers.get("val", ())), len(numbers["test"])),
    )
    return {"train": chosen, **numbers}


def _hold_out(config: DataConfig, source: Source, chosen: np.ndarray) -> np.ndarray:
    """The validation images among the training split's, class after class, int64 (M,)."""
    labels = source.splits["train"].labels
    free = np.ones(len(labels), dtype=bool)
    limits = np.full(len(source.classes), config.val_per_class)
    if config.profile == "natural":
        limits = np.minimum(limits, np.bincount(labels, minlength=len(limits)) // 10)
    else:
        free[chosen] = False
    generator = np.random.default_rng([config.seed, 1])  # another stream than the draw of the training images
    held_out, without = [], []
    for label, name in enumerate(source.classes):
        positions = generator.permutation(np.flatnonzero(free & (labels == label)))[: limits[label]]
        held_out.append(positions)
        if len(positions) == 0:
            without.append(name)
    if without:
        names = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        _log.warning("no validation image is left for %d of %d classes: %s", len(without), len(limits), names)
    return np.concatenate(held_out)
