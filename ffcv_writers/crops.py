"""Which part of an image a batch shows, where images differ in size or training crops at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

_ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the middle
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # share of the area; width over height, whose logarithm is uniform


@dataclass(frozen=True)
class CenterCrop:
    """The middle square whose side is `share` of the shorter side, at `size` x `size` pixels; 224 and 224 / 256 are
    usual in evaluation."""

    size: int
    share: float = 1.0
    random: ClassVar[bool] = False

    def boxes(self, sizes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 (n, 4) top, left, height, width, for images of int64 (n, 2) height and width, drawn at int64 (n,)
        positions of the stream."""
        side = np.maximum(1, np.rint(sizes.min(1) * self.share)).astype(np.int64)
        return _middle(sizes, side, side)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image (Szegedy et al. 2015), drawn as torchvision draws it.

    A box is a function of the seed and the draw's position in the stream: the same whatever the batch size, the number
    of threads or processes, and after any restart.

    Attributes:
        size: height and width of the result in pixels.
        seed: of the training run.
    """

    size: int
    seed: int
    random: ClassVar[bool] = True

    def boxes(self, sizes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `CenterCrop.boxes`."""
        height, width = sizes[:, :1], sizes[:, 1:]
        u = _uniform(self.seed, positions, 2 * _ATTEMPTS + 2)
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * u[:, :_ATTEMPTS])
        low, high = np.log(_RATIO)
        ratio = np.exp(low + (high - low) * u[:, _ATTEMPTS:-2])
        w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        rows, first = np.arange(len(sizes)), fits.argmax(1)
        w, h = w[rows, first], h[rows, first]
        top, left = ((sizes - np.stack([h, w], 1) + 1) * u[:, -2:]).astype(np.int64).T
        # Where no attempt fits, the middle, with the ratio nearest to the image's own.
        height = np.minimum(sizes[:, 0], np.rint(sizes[:, 1] / _RATIO[0]).astype(np.int64))
        width = np.minimum(sizes[:, 1], np.rint(sizes[:, 0] * _RATIO[1]).astype(np.int64))
        middle = _middle(sizes, height, width)
        return np.where(fits.any(1, keepdims=True), np.stack([top, left, h, w], 1), middle)


Crop = CenterCrop | RandomResizedCrop


def _middle(sizes: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    return np.stack([(sizes[:, 0] - height) // 2, (sizes[:, 1] - width) // 2, height, width], 1)


def _uniform(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """(n, count) numbers in [0, 1), SplitMix64 (Steele et al. 2014) of (seed, position, column)."""
    keys = positions.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    z = _mix(np.full(1, seed % 2**64, np.uint64)) + (keys + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(z) >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
