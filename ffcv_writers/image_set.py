"""One or several files of images as one set: what is known of each sample, and the way to its pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .decoding import resized_crop
from .errors import SampleError

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One file: what is known of its n samples.

    Attributes:
        sizes: (n, 2) int64 heights and widths.
        channels: 1 or 3.
        labels, index: (n,) int64. synthetic: (n,) bool.
    """

    path: Path
    sizes: np.ndarray
    channels: int
    labels: np.ndarray
    synthetic: np.ndarray
    index: np.ndarray


class ImageSet(ABC):
    """Files joined end to end: sample numbers run through the first file, then through the second, and so on.

    Attributes:
        paths: the files.
        starts: (files + 1,) int64; file k holds the samples [starts[k], starts[k + 1]).
        sizes: (N, 2) int64 heights and widths.
        channels: 1 or 3.
        labels: (N,) int64 classes.
        synthetic: (N,) bool, true for generated samples.
        index: (N,) int64, the sample's name as it was given to `write`.
        decoded: whether the pixels lie there as they are, so that reading is copying.
    """

    decoded = True

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise ValueError("an image set needs at least one file")
        for part in parts[1:]:
            if part.channels != parts[0].channels:
                raise ValueError(
                    f"{part.path} holds images of {part.channels} channel(s), {parts[0].path} of "
                    f"{parts[0].channels}: write both with one kind"
                )
        self.paths = tuple(part.path for part in parts)
        self.starts = np.cumsum([0, *(len(part.labels) for part in parts)])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.channels = parts[0].channels
        self.labels = np.concatenate([part.labels for part in parts])
        self.synthetic = np.concatenate([part.synthetic for part in parts])
        self.index = np.concatenate([part.index for part in parts])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> Shape:
        """(H, W, C) of every image.

        Raises:
            ValueError: images differ in size.
        """
        odd = np.flatnonzero((self.sizes != self.sizes[0]).any(1))
        if odd.size:
            (h, w), (other_h, other_w) = self.sizes[[0, odd[0]]].tolist()
            raise ValueError(
                f"{self.name(odd[0])} is {other_h} x {other_w} pixels, {self.name(0)} {h} x {w}: "
                "write them with one size, or open them with mixed_sizes and let the loader crop"
            )
        height, width = self.sizes[0].tolist()
        return height, width, self.channels

    def name(self, sample: int) -> str:
        """How messages call a sample: its file, its number there, and its index."""
        file = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return f"{self.paths[file]}: sample {sample - self.starts[file]} (index {self.index[sample]})"

    @abstractmethod
    def image(self, sample: int, *, passing: bool = False) -> np.ndarray:
        """One image, uint8 (H, W, C), decoded; not to be written to. Any number of threads may ask at once.

        Args:
            passing: the pixels need last no longer than until this thread asks for the next image so.

        Raises:
            SampleError: it does not decode.
        """

    def part(self, sample: int, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a box shows of an image, and as much around it as comes along; passing, see `image`.

        Args:
            box: int64 top, left, height, width, within the image.

        Returns:
            uint8 (H, W, C), and the box in it.
        """
        return self.image(sample, passing=True), box

    def take(self, samples: np.ndarray) -> np.ndarray:
        """The images of a set of one size, uint8 (n, H, W, C), fresh memory."""
        out = np.empty((len(samples), *self.image_shape), np.uint8)
        self.read(samples, out)
        return out

    def read(self, samples: np.ndarray, out: np.ndarray, boxes: np.ndarray | None = None) -> None:
        """Puts images into `out`. Any number of threads may ask at once.

        Args:
            samples: (n,) int64.
            out: uint8 (n, H, W, C), written to.
            boxes: (n, 4) int64 top, left, height, width: of each image this part, resized to H x W; None takes
                images as they are, which must be H x W.

        Raises:
            SampleError: an image does not decode.
        """
        for k, sample in enumerate(samples.tolist()):
            try:
                if boxes is None:
                    out[k] = self.image(sample, passing=True)
                else:
                    out[k] = resized_crop(*self.part(sample, boxes[k]), out.shape[1:3])
            except SampleError:
                raise
            except Exception as error:
                raise SampleError(f"{self.name(sample)} cannot be read: {error!r}") from error


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a file that cannot be used as it is."""
    return ValueError(
        f"{path} is damaged or not an image set of ours ({reason}): delete it and run the stage that writes it again"
    )
