"""The splits of a run.

train   long-tailed; the only images that anything is trained on
val     for choices only (when to stop, which setting)
test    the source's whole test split, or a share of each class where it has none; for evaluation only
"""

from __future__ import annotations

import logging

import numpy as np

from diffult.data.config import DataConfig
from diffult.data.profiles import class_counts, draw, positions_by_class
from diffult.errors import UserError
from ffcv_writers.readers import Source

_log = logging.getLogger(__name__)
MIN_IMAGES_FOR_TEST = 3  # a smaller class gives none away


def choose_splits(config: DataConfig, source: Source) -> dict[str, np.ndarray]:
    """The sample numbers of each split, int64.

    The test split is the source's own, if it has one; otherwise `test_share` of each class. The validation split is the
    source's own, if it has one. Otherwise it has up to `val_per_class` images of each class that the profile did not
    draw; the natural profile draws all, so there min(val_per_class, n_c // 10) images of each class are taken out of
    the training set. Without any, there is no "val".

    Returns:
        "train" as numbers in the source's training split, as "val" and "test" where they are taken out of it; of the
        source's own splits all numbers.

    Raises:
        UserError: no class can spare a test image, or see `class_counts` and `draw`.
    """
    labels, num_classes = source.splits["train"].labels, len(source.classes)
    numbers = {name: np.arange(len(split.labels)) for name, split in source.splits.items() if name != "train"}
    pool = np.arange(len(labels))
    if "test" not in numbers:
        sizes = test_sizes(np.bincount(labels, minlength=num_classes), config.test_share)
        if not sizes.any():
            raise UserError(
                f"no class has {MIN_IMAGES_FOR_TEST} images: none can be spared for a test split; add images"
            )
        numbers["test"] = _take(labels, pool, sizes, (0, 2))  # one test split, whatever the seed: no seed trains on it
        pool = np.setdiff1d(pool, numbers["test"])
        _warn_without("test", source, np.flatnonzero(sizes == 0))
    available = np.bincount(labels[pool], minlength=num_classes)
    counts = class_counts(config, available)
    natural = config.profile == "natural"
    whole = natural and counts == available.tolist()
    chosen = pool if whole else pool[draw(labels[pool], counts, config.seed)]
    if "val" not in numbers and config.val_per_class > 0:
        limits = np.minimum(config.val_per_class, available // 10 if natural else available)
        free = pool if natural else np.setdiff1d(pool, chosen)
        held_out = _take(labels, free, limits, (config.seed, 1))  # another stream than the draw of the training images
        chosen = chosen[~np.isin(chosen, held_out)]
        if len(held_out):
            numbers["val"] = held_out
        given = np.bincount(labels[held_out], minlength=num_classes)
        _warn_without("validation", source, np.flatnonzero(given == 0))
        _warn_of_few(config.val_per_class, source, given)
    sizes = np.bincount(labels[chosen], minlength=num_classes)
    _log.info(
        "%s, %s profile: %d training images of %d classes (%d to %d a class), %d for validation, %d for test",
        *(config.source, config.profile, len(chosen), len(sizes), sizes.max(), sizes.min()),
        *(len(numbers.get("val", ())), len(numbers["test"])),
    )
    return {"train": chosen, **numbers}


def test_sizes(counts: np.ndarray, share: float) -> np.ndarray:
    """Images of each class that become the test split, int64 [C]: the share of its images, at least one and never all;
    none of a class of fewer than three."""
    sizes = np.clip(np.rint(counts * share).astype(np.int64), 1, np.maximum(counts - 1, 1))
    return np.where((counts >= MIN_IMAGES_FOR_TEST) & (share > 0), sizes, 0)


def _take(labels: np.ndarray, pool: np.ndarray, sizes: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Up to so many numbers of each class out of the pool, class after class, int64 (M,)."""
    generator = np.random.default_rng(seed)
    by_class = positions_by_class(labels[pool], len(sizes))
    return pool[np.concatenate([generator.permutation(p)[:size] for p, size in zip(by_class, sizes, strict=True)])]


def _warn_without(split: str, source: Source, empty: np.ndarray) -> None:
    if len(empty):
        names = ", ".join(source.classes[label] for label in empty[:5]) + (", ..." if len(empty) > 5 else "")
        _log.warning("no %s image is left for %d of %d classes: %s", split, len(empty), len(source.classes), names)


def _warn_of_few(wanted: int, source: Source, given: np.ndarray) -> None:
    few = np.flatnonzero((given > 0) & (given < wanted))
    if len(few):
        names = ", ".join(f"{source.classes[label]} ({given[label]})" for label in few[:5])
        _log.warning(
            "fewer than %d validation images, as a class gives what it can spare, for %d of %d classes: %s",
            *(wanted, len(few), len(given), names + (", ..." if len(few) > 5 else "")),
        )
