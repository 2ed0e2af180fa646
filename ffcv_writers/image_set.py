"""One or several files of images as one set: what is known of each sample, and the way to its pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Shape = tuple[int, int, int]

# Takes (n,) int64 sample numbers of the joined set; yields uint8 (b, H, W, C) arrays, the taker's to keep, of
# batch_size samples in that order (the last may hold fewer). Closing the generator stops its threads.
PixelReader = Callable[[np.ndarray], Generator[np.ndarray, None, None]]


@dataclass(frozen=True)
class Part:
    """One file: what is known of its n samples. Arrays are (n,): int64 labels and index, bool synthetic."""

    path: Path
    image_shape: Shape
    labels: np.ndarray
    synthetic: np.ndarray
    index: np.ndarray


class ImageSet(ABC):
    """Files joined end to end: sample numbers run through the first file, then through the second, and so on.

    Attributes:
        paths: the files.
        starts: (files + 1,) int64; file k holds the samples [starts[k], starts[k + 1]).
        image_shape: (H, W, C) of every image.
        labels: (N,) int64 classes.
        synthetic: (N,) bool, true for generated samples.
        index: (N,) int64, the sample's name as it was given to `write`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise ValueError("an image set needs at least one file")
        for part in parts[1:]:
            if part.image_shape != parts[0].image_shape:
                raise ValueError(
                    f"{part.path} holds images of (height, width, channels) {part.image_shape}, "
                    f"{parts[0].path} of {parts[0].image_shape}: write both with one size"
                )
        self.paths = tuple(part.path for part in parts)
        self.starts = np.cumsum([0, *(len(part.labels) for part in parts)])
        self.image_shape = parts[0].image_shape
        self.labels = np.concatenate([part.labels for part in parts])
        self.synthetic = np.concatenate([part.synthetic for part in parts])
        self.index = np.concatenate([part.index for part in parts])

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pixel_reader(self, batch_size: int, num_workers: int) -> PixelReader:
        """The way to the pixels; made once, it serves any number of orders."""


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a file that cannot be used as it is."""
    return ValueError(
        f"{path} is damaged or not an image set of ours ({reason}): delete it and run the stage that writes it again"
    )
