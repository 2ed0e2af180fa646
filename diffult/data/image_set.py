"""Image sets: labelled images of one size, in memory or as files, read in one way."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffult.errors import UserError


class ImageSet(ABC):
    """Labelled images of one size.

    Attributes:
        labels: int64 (N,), values in [0, len(classes)).
        classes: the names of the classes, by label.
        shape: (H, W, C) of every image.
    """

    def __init__(self, labels: np.ndarray, classes: tuple[str, ...], shape: tuple[int, int, int]) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes
        self.shape = shape

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> np.ndarray:
        """The number of images of each class, int64 (len(classes),)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 (H, W, C).

        Raises:
            UserError: the file does not decode.
        """

    def image(self, i: int) -> np.ndarray:
        """As `read`: what a set of `ffcv_writers` calls it."""
        return self.read(i)

    @abstractmethod
    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices` (int (M,), repeats allowed), in that order."""

    @abstractmethod
    def load(self) -> np.ndarray:
        """All images in memory, uint8 (N, H, W, C); not to be written to.

        Raises:
            UserError: a file does not decode.
        """

    @abstractmethod
    def check(self) -> None:
        """Make sure that every image can be read.

        Raises:
            UserError: a file does not decode; the first such file, in the order of the set, is named.
        """


class ArrayImages(ImageSet):
    """Images that are in memory already.

    Args:
        images: uint8 (N, H, W, C).
        labels: integers (N,).
        classes: the names of the classes, by label.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(f"images must be uint8 (N, H, W, C) with N labels, not {images.dtype} {images.shape}")
        super().__init__(labels, classes, images.shape[1:])
        self._images = images

    def read(self, i: int) -> np.ndarray:
        return self._images[i]

    def subset(self, indices: np.ndarray) -> ArrayImages:
        return ArrayImages(self._images[indices], self.labels[indices], self.classes)

    def load(self) -> np.ndarray:
        return self._images

    def check(self) -> None:
        """Nothing to do: the images were decoded when the source was loaded."""


class FileImages(ImageSet):
    """Image files, decoded when read: to RGB, shorter side to `image_size`, centre-cropped to a square.

    Args:
        paths: of the files.
        labels: integers (N,).
        classes: the names of the classes, by label.
        image_size: height and width in pixels.
        list_path: the text file that lists the images, for error messages; "" if there is none.
        lines: int (N,), each image's line number in it.
    """

    def __init__(
        self,
        paths: list[str],
        labels: np.ndarray,
        classes: tuple[str, ...],
        image_size: int,
        list_path: str = "",
        lines: np.ndarray | None = None,
    ) -> None:
        super().__init__(labels, classes, (image_size, image_size, 3))
        self.paths = paths
        self._list_path = list_path
        self._lines = lines

    def read(self, i: int) -> np.ndarray:
        return np.array(_resize(self._decode(i), self.shape[0]))  # a copy: Pillow's own memory is read-only

    def subset(self, indices: np.ndarray) -> FileImages:
        chosen = np.arange(len(self))[indices]
        return FileImages(
            [self.paths[i] for i in chosen],
            self.labels[chosen],
            self.classes,
            self.shape[0],
            self._list_path,
            None if self._lines is None else self._lines[chosen],
        )

    def load(self) -> np.ndarray:
        images = np.empty((len(self), *self.shape), dtype=np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside of the GIL
            for i, image in enumerate(pool.map(self.read, range(len(self)))):
                images[i] = image
        return images

    def check(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(self._check_one, range(len(self))):  # in order; an error cancels what is queued
                pass

    def _check_one(self, i: int) -> None:
        self._decode(i, draft=True)

    def _decode(self, i: int, draft: bool = False) -> Image.Image:
        try:
            return _decode_rgb(self.paths[i], draft)
        except Exception as error:  # whatever a decoder raises on arbitrary bytes
            origin = "" if self._lines is None else f" ({self._list_path}:{self._lines[i]})"
            raise UserError(
                f"cannot decode {self.paths[i]}{origin}: {_reason(error)}; mend the file or take it out"
            ) from error


def _decode_rgb(path: str, draft: bool) -> Image.Image:
    """An image file as RGB, its orientation tag not applied, transparency dropped.

    A draft decodes JPEG at an eighth of its size: the whole entropy-coded stream is still read, so that a
    truncated file is found, at a fraction of the time.
    """
    with Image.open(path) as image:
        if draft:
            image.draft("RGB", (1, 1))
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
            deep = np.asarray(image)
            if deep.size and not 0 <= deep.min() <= deep.max() < 2**16:
                raise ValueError("its grey values do not fit 16 bits")
            return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, whose range is unknown")
        return image.convert("RGB")


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` (bicubic, antialiased), then the centre square, as torchvision does it."""
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        width, height = width * size // shorter, height * size // shorter
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _reason(error: Exception) -> str:
    """One line on why a file did not decode, without its path, which the message has already."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@dataclass(frozen=True)
class Source:
    """The splits that a data set comes with: all with the same classes, each with images of every class."""

    train: ImageSet
    test: ImageSet
    val: ImageSet | None = None


def array_source(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
    where: str,
) -> Source:
    """A source from arrays: (images uint8 (N, H, W, C), labels (N,)) of either split, read from `where`.

    Raises:
        UserError: images and labels do not belong together, a label is out of range, or a class is empty.
    """
    for split, (images, labels) in {"train": train, "test": test}.items():
        if len(images) != len(labels):
            raise UserError(f"{where}: the {split} split has {len(images)} images but {len(labels)} labels")
        if images.shape[1:] != train[0].shape[1:]:
            raise UserError(f"{where}: test images are {images.shape[1:]}, train images {train[0].shape[1:]}")
        outside = labels[(labels < 0) | (labels >= len(classes))]
        if len(outside):
            raise UserError(f"{where}: label {outside[0]} in the {split} split is not in 0..{len(classes) - 1}")
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty):
            raise UserError(f"{where}: class {classes[empty[0]]} has no image in the {split} split")
    return Source(ArrayImages(*train, classes), ArrayImages(*test, classes))
