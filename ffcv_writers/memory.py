"""The twin of `beton` for machines without ffcv: .npz files, held in memory whole."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .image_set import ImageSet, Part, PixelReader, Shape, damaged


def write_npz(path: Path, images: Iterable[np.ndarray], shape: Shape, columns: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 images of one shape and the (n,) int64 columns label, synthetic and index."""
    pixels = np.empty((len(columns["label"]), *shape), np.uint8)
    for number, image in enumerate(images):
        pixels[number] = image
    with path.open("wb") as file:  # a file object: given a name, numpy would add .npz to it
        np.savez(file, allow_pickle=False, image=pixels, **columns)


class ArraySet(ImageSet):
    """Images that are in memory already, all real.

    Args:
        pixels: (N, H, W, C) uint8.
        labels: (N,) integers.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        count, height, width, channels = pixels.shape
        shape = (height, width, channels)
        super().__init__([Part(Path("memory"), shape, labels, np.zeros(count, bool), np.arange(count))])
        self._pixels = pixels

    def pixel_reader(self, batch_size: int, num_workers: int) -> PixelReader:
        """See `ImageSet`. There is nothing to decode: `num_workers` makes no difference."""
        return _array_reader(self._pixels, batch_size)


class MemorySet(ImageSet):
    """A set of .npz files.

    Args:
        paths: at least one file that `write` wrote.

    Raises:
        ValueError: a file that is damaged or of another image shape.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        parts, pixels = zip(*map(_read, paths), strict=True) if paths else ((), ())
        super().__init__(parts)
        self._pixels = np.concatenate(pixels)

    def pixel_reader(self, batch_size: int, num_workers: int) -> PixelReader:
        """See `ImageSet`. There is nothing to decode: `num_workers` makes no difference."""
        return _array_reader(self._pixels, batch_size)


def _array_reader(pixels: np.ndarray, batch_size: int) -> PixelReader:
    def read(order: np.ndarray) -> Generator[np.ndarray, None, None]:
        for begin in range(0, len(order), batch_size):
            yield pixels[order[begin : begin + batch_size]]

    return read


def _read(path: Path) -> tuple[Part, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels = file["image"]
            labels, synthetic, index = (file[name] for name in ("label", "synthetic", "index"))
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise ValueError(f"images are {pixels.dtype} of shape {pixels.shape}")
        if not len(pixels) == len(labels) == len(synthetic) == len(index):
            raise ValueError("columns differ in length")
    except Exception as error:  # a broken archive raises almost anything
        raise damaged(path, error) from error
    _, height, width, channels = pixels.shape
    return Part(path, (height, width, channels), labels, synthetic.astype(bool), index), pixels
