"""Which synthetic images are copies of training images.

Of an image x, the distance to the training images r of its class, each of D numbers in [0, 1], and the same in the
extractor's features f:

    pixels: min over r of sqrt(sum (x - r)^2 / D)        features: min over r of |f(x) - f(r)|

Where the diffusion model trains on mirrored images as well, x counts as the nearer of itself and its mirror image.

Real images that nothing was trained on have such distances too. A sample is a copy where it is nearer in pixels than
95 % of the held-out images of its class, so that about 5 % of a generator's samples are copies if it draws from the
distribution of real images, and more where it repeats what it was trained on. (A sample that is only smoother than real
images is nearer to all of them too: the classes with many training images show by how much.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffult.engine.device import autocast
from diffult.engine.progress import progress_bar
from diffult.longtail.extractor import Extractor
from ffcv_writers import Loader
from kernels.augment import normalise

log = logging.getLogger(__name__)
EXPECTED = 0.05  # share of copies among images like the held-out ones
MIN_HELD_OUT = 20  # images of a class: the nearest of so many is nearer than 95 %
MIN_IMAGES_FOR_SCALE = 3  # two have one distance, which says little
_WARN_PERCENT, _WARN_SAMPLES = 50.0, 5  # more copies than this in a class of at least so many samples: hardly by chance
_NUMBERS = 2**24  # of the images of a batch: 64 MiB as float32
_ROWS = 1024
_SCALE_ROWS = 256  # training images of a class that its scale is measured on
_NAMED = 10  # classes in a warning


def rows_at_a_time(image_size: int, channels: int) -> int:
    """A batch size for the loaders of `nearest` that bounds its memory."""
    return max(1, min(_ROWS, _NUMBERS // (channels * image_size**2)))


def measure_copies(
    train: Loader,
    kept: Loader | None,
    held_out: Loader | None,
    extractor: Extractor,
    dtype: torch.dtype,
    mirrored: bool,
) -> dict[str, Tensor]:
    """Which of the kept samples are copies, and what that rests on.

    Args:
        train, kept, held_out: the images at the size that the diffusion model draws, loaded on its device in batches of
            `rows_at_a_time`; None where there are none.
        dtype: of the extractor's convolutions and products.
        mirrored: whether the diffusion model trains on mirror images.

    Returns:
        Of kept samples "labels" and "nearest" int64 [N], "pixels" and "features" float32 [N] (see `Nearest`), "copy"
        bool [N]; of held-out images "held_out_labels" int64 [M], "held_out_pixels" and "held_out_features" float32 [M];
        of classes "threshold" float32 [num_classes], see `copy_thresholds`.
    """
    titled = {"copies": kept, "held-out images": held_out}
    (labels, found), (held_out_labels, real) = (
        (images.image_set.labels, nearest(title, images, train, extractor, dtype, mirrored)) if images else _NOTHING
        for title, images in titled.items()
    )
    threshold = copy_thresholds(real.pixels.numpy(), held_out_labels, _scales(train, extractor, dtype, mirrored))
    return {
        "labels": torch.from_numpy(labels),
        "nearest": found.row,
        "pixels": found.pixels,
        "features": found.features,
        "copy": torch.from_numpy(found.pixels.numpy() < threshold[labels]),
        "held_out_labels": torch.from_numpy(held_out_labels),
        "held_out_pixels": real.pixels,
        "held_out_features": real.features,
        "threshold": torch.from_numpy(threshold.astype(np.float32)),
    }


def copy_shares(copies: dict[str, Tensor], classes: Sequence[str]) -> dict[str, Any]:
    """The share of copies in percent, over all samples and by class name, with the "expected" one; None where there is
    no sample, or were too few held-out images to tell. Logs a warning where a class is mostly copies.

    Args:
        copies: from `measure_copies`.
    """
    labels, copy = copies["labels"].numpy(), copies["copy"].numpy()
    known = not copies["threshold"].isnan().any()
    samples, found = (np.bincount(x, minlength=len(classes)).tolist() for x in (labels, labels[copy]))

    def percent(hits: int, count: int) -> float | None:
        return 100.0 * hits / count if known and count else None

    by_class = dict(zip(classes, map(percent, found, samples), strict=True))
    mostly = [
        f"{name} ({hits} of {count})"
        for name, hits, count in zip(classes, found, samples, strict=True)
        if mostly_copies(percent(hits, count), count)
    ]
    if mostly:
        log.warning(
            "most synthetic images of %d of %d classes are copies of training images: %s; train the diffusion model "
            "for fewer steps (diffusion.steps), or until it stops by itself (diffusion.early_stopping)",
            len(mostly),
            len(classes),
            ", ".join(mostly[:_NAMED]) + (", ..." if len(mostly) > _NAMED else ""),
        )
    return {"share": percent(sum(found), sum(samples)), "by_class": by_class, "expected": 100 * EXPECTED}


def mostly_copies(share: float | None, samples: int) -> bool:
    """Whether a class is warned of, from its percent of copies, None where not known, and its number of samples."""
    return share is not None and share > _WARN_PERCENT and samples >= _WARN_SAMPLES


@dataclass(frozen=True)
class Nearest:
    """Of each of N images, its nearest training images of the same class.

    Attributes:
        row: int64 [N], the nearest in pixels: its number in the training set; -1 where the class has no other image.
        pixels: float32 [N], the distance to it: root mean square over pixels in [0, 1].
        features: float32 [N], Euclidean distance to the nearest in features, which may be another.
    """

    row: Tensor
    pixels: Tensor
    features: Tensor


_NOTHING = np.empty(0, np.int64), Nearest(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))


@torch.inference_mode()
def nearest(
    title: str,
    images: Loader,
    train: Loader,
    extractor: Extractor,
    dtype: torch.dtype,
    mirrored: bool,
    rows: np.ndarray | None = None,
) -> Nearest:
    """The nearest training images, on the CPU; each class's are streamed past a batch of its images at a time.

    Args:
        title: on the progress bar.
        images: what is measured, of the size that the diffusion model draws. If it is `train` itself, no image is
            compared with itself.
        train: the training images at that size.
        dtype: of the extractor's convolutions and products.
        mirrored: whether mirror images count.
        rows: int64 [N], the images to measure; None: all.
    """
    rows = np.arange(len(images.image_set)) if rows is None else rows
    labels = images.image_set.labels[rows]
    row = torch.full((len(rows),), -1)
    pixels, features = (torch.full((len(rows),), torch.inf) for _ in range(2))

    def embed(x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(dtype, train.device):
            return _pixels(x), extractor.features(x).float()

    for label in progress_bar(np.unique(labels), title, unit="class"):
        members, of_class = np.flatnonzero(labels == label), np.flatnonzero(train.image_set.labels == label)
        parts = np.split(members, range(images.batch_size, len(members), images.batch_size))
        for part, batch in zip(parts, images.batches(rows[members]), strict=True):
            own = batch.sample if images is train else torch.full_like(batch.sample, -1)
            found = _stream(normalise(batch.images), own, train, of_class, embed, mirrored)
            place = torch.from_numpy(part)
            row[place], pixels[place], features[place] = (column.cpu() for column in found)
    return Nearest(row, pixels, features)


def _stream(
    images: Tensor,
    own: Tensor,
    train: Loader,
    of_class: np.ndarray,
    embed: Callable[[Tensor], tuple[Tensor, Tensor]],
    mirrored: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, pixels and features as in `Nearest` of images, float [B, C, H, W], among the training images `of_class`
    except each one's `own`, int64 [B]."""
    embedded = [embed(x) for x in ([images, images.flip(3)] if mirrored else [images])]
    x, fx = (torch.stack(part) for part in zip(*embedded, strict=True))
    row, pixels = torch.full_like(own, -1), torch.full(own.shape, torch.inf, device=own.device)
    features = pixels.clone()
    for batch in train.batches(of_class):
        r, fr = embed(normalise(batch.images))
        excluded = own[:, None] == batch.sample
        distance, place = _least(x, r, excluded)
        row = torch.where(distance < pixels, batch.sample[place], row)
        pixels = torch.minimum(pixels, distance)
        features = torch.minimum(features, _least(fx, fr, excluded)[0])
    return row, pixels, features


@torch.inference_mode()
def copies_among(
    images: Tensor, labels: np.ndarray, train: Loader, thresholds: np.ndarray, mirrored: bool
) -> np.ndarray:
    """Which images are copies, bool [N].

    Args:
        images: uint8 [N, H, W, C], of the size of the training images, on their device.
        labels: int64 [N].
        train: as for `measure_copies`.
        thresholds: float [num_classes], from there.
        mirrored: as there.
    """
    copies = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = labels == label
        x = normalise(images[torch.from_numpy(of_class)])
        x = torch.stack([_pixels(y) for y in ([x, x.flip(3)] if mirrored else [x])])
        nearest = torch.full((x.shape[1],), torch.inf, device=x.device)
        for batch in train.batches(np.flatnonzero(train.image_set.labels == label)):
            r = _pixels(normalise(batch.images))
            excluded = torch.zeros(x.shape[1], len(r), dtype=torch.bool, device=x.device)
            nearest = torch.minimum(nearest, _least(x, r, excluded)[0])
        copies[of_class] = nearest.cpu().numpy() < thresholds[label]
    return copies


def _pixels(x: Tensor) -> Tensor:
    """Images, float [B, C, H, W] in [-1, 1], as points whose Euclidean distance is the one in pixels, [B, D]."""
    return x.flatten(1) / (2 * x[0].numel() ** 0.5)


def _least(x: Tensor, r: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """The least distance from the orientations x, [O, B, D], to r, [R, D], and its row, [B] each.

    The matrix of distances is a product, which loses digits between close images: the least is computed again.
    """
    distances, orientation = torch.cdist(x.flatten(0, 1), r).view(*x.shape[:2], len(r)).min(0)
    place = distances.masked_fill(excluded, torch.inf).argmin(1)
    image = torch.arange(len(place), device=place.device)
    least = torch.linalg.vector_norm(x[orientation[image, place], image] - r[place], dim=1)
    return least.masked_fill(excluded[image, place], torch.inf), place


def _scales(train: Loader, extractor: Extractor, dtype: torch.dtype, mirrored: bool) -> np.ndarray:
    """`class_scales` from the first training images of each class."""
    labels = train.image_set.labels
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = order[place < _SCALE_ROWS]
    distances = nearest("scale of classes", train, train, extractor, dtype, mirrored, rows)
    return class_scales(distances.pixels.numpy(), labels[rows], len(counts))


def class_scales(distances: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How far apart the images of a class lie: the median distance of its training images to the nearest other one,
    float64 [num_classes]; that of the median class where there are fewer than MIN_IMAGES_FOR_SCALE.

    Args:
        distances: float [N], of training images to the nearest other of their class.
        labels: int64 [N].
    """
    counts = np.bincount(labels, minlength=num_classes)
    scales = np.full(num_classes, np.nan)
    for label in np.flatnonzero(counts >= MIN_IMAGES_FOR_SCALE):
        scales[label] = np.median(distances[labels == label])
    return np.where(np.isnan(scales), np.nanmedian(scales), scales)


def copy_thresholds(distances: np.ndarray, labels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The distance below which an image of each class is a copy, float64 [num_classes]: that of the nearest 5 % of its
    held-out images.

    A class with fewer than MIN_HELD_OUT of them takes the quantile of all classes' distances, each in its class's
    scale, times its own scale. This is rougher the fewer training images the class has: with three, a tenth of new real
    images is nearer, and a quarter at times. Without MIN_HELD_OUT images in all classes together there is no threshold:
    NaN.

    Quantiles are Weibull's, at place p (n + 1) of n: another image of the same distribution lies below with
    probability p, however small n is.

    Args:
        distances: float [M], of held-out images to the nearest training image of their class.
        labels: int64 [M].
        scales: float64 [num_classes], from `class_scales`.
    """
    if len(distances) < MIN_HELD_OUT:
        return np.full(len(scales), np.nan)
    distances = distances.astype(np.float64)
    ratios = np.divide(distances, scales[labels], out=np.ones_like(distances), where=scales[labels] > 0)
    thresholds = scales * np.quantile(ratios, EXPECTED, method="weibull")
    for label, count in enumerate(np.bincount(labels, minlength=len(scales))):
        if count >= MIN_HELD_OUT:
            thresholds[label] = np.quantile(distances[labels == label], EXPECTED, method="weibull")
    return thresholds
