"""The twin of `beton` for machines without ffcv: .npz files, held in memory whole; and arrays as a set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .image_set import ImageSet, Part, Shape, damaged


def write_npz(path: Path, images: Iterable[np.ndarray], columns: Mapping[str, np.ndarray], shape: Shape) -> None:
    """Writes uint8 images of one shape and the (n,) int64 columns label, synthetic and index."""
    pixels = np.empty((len(columns["label"]), *shape), np.uint8)
    for number, image in enumerate(images):
        pixels[number] = image
    with path.open("wb") as file:  # a file object: given a name, numpy would add .npz to it
        np.savez(file, allow_pickle=False, image=pixels, **columns)


class _PixelSet(ImageSet):
    """Images of one size in an array."""

    def __init__(self, parts: Sequence[Part], pixels: np.ndarray) -> None:
        super().__init__(parts)
        self._pixels = pixels

    def image(self, sample: int, *, passing: bool = False) -> np.ndarray:
        """See `ImageSet`."""
        return self._pixels[sample]

    def take(self, samples: np.ndarray) -> np.ndarray:
        """See `ImageSet`."""
        return self._pixels[samples]


class ArraySet(_PixelSet):
    """Images that are in memory already, all real.

    Args:
        pixels: (N, H, W, C) uint8.
        labels: (N,) integers.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        count = len(pixels)
        part = _part(Path("memory"), pixels, np.asarray(labels), np.zeros(count, bool), np.arange(count))
        super().__init__([part], pixels)


class MemorySet(_PixelSet):
    """A set of .npz files of one image size.

    Args:
        paths: at least one file that `write` wrote.

    Raises:
        ValueError: a file that is damaged or of another image shape.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        parts, pixels = zip(*map(_read, paths), strict=True) if paths else ((), ())
        for part, array in zip(parts, pixels, strict=True):
            if array.shape[1:] != pixels[0].shape[1:]:
                raise ValueError(
                    f"{part.path} holds images of (height, width, channels) {array.shape[1:]}, "
                    f"{parts[0].path} of {pixels[0].shape[1:]}: write both with one size"
                )
        super().__init__(parts, np.concatenate(pixels))


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
    return _part(path, pixels, labels, synthetic.astype(bool), index), pixels


def _part(path: Path, pixels: np.ndarray, labels: np.ndarray, synthetic: np.ndarray, index: np.ndarray) -> Part:
    count, height, width, channels = pixels.shape
    sizes = np.broadcast_to(np.array([height, width], np.int64), (count, 2))
    return Part(path, sizes, channels, labels, synthetic, index)
