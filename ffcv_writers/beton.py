"""Sets of .beton files, read from the page cache. Importing this module needs ffcv.

A file is mapped, not read: raw images are copied out, JPEGs decoded. Pointers in a file's tables are checked when it
is opened, so that no read can leave the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import SampleError
from .format import (
    ALLOCATION,
    ARRAY_FIELD,
    DESCRIPTOR,
    FIELDS,
    HEADER,
    JPG,
    RAW,
    RGB_FIELD,
    VERSION,
    array_shape,
    metadata_type,
)
from .image_set import ImageSet, Part, damaged
from .jpeg_part import part as jpeg_part
from .turbojpeg import decode_jpeg


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as it lies in a file.

    Attributes:
        data: uint8 (n,), a JPEG file's content or raw pixels.
        defect: what is wrong with the file it comes from, although it could be decoded.
    """

    data: np.ndarray
    height: int
    width: int
    jpg: bool
    defect: str = ""


class BetonSet(ImageSet):
    """A set of .beton files. Only their tables are read here, not the pixels.

    Attributes:
        encoded: (N,) bool, which images are JPEGs.

    Args:
        paths: at least one file that `write` wrote.

    Raises:
        ValueError: a file that is damaged or has other channels than the first.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        files = [open_file(path) for path in paths]
        super().__init__([file.part for file in files])
        self._files = files
        self._pointers = np.concatenate([file.pointers for file in files])
        self._lengths = np.concatenate([file.lengths for file in files])
        self.encoded = np.concatenate([file.jpg for file in files])
        self.decoded = not self.encoded.any()
        length = int(self._lengths[0])
        self._windows = None  # for raw images of one size: all runs of so many bytes, one a file
        if self.decoded and (self.sizes == self.sizes[0]).all():
            self._windows = [np.lib.stride_tricks.sliding_window_view(file.content, length) for file in files]

    def stored(self, sample: int) -> Stored:
        """One image as it lies in its file."""
        file = self._files[int(np.searchsorted(self.starts, sample, side="right")) - 1]
        begin, length = int(self._pointers[sample]), int(self._lengths[sample])
        height, width = self.sizes[sample].tolist()
        return Stored(file.content[begin : begin + length], height, width, bool(self.encoded[sample]))

    def image(self, sample: int, *, passing: bool = False) -> np.ndarray:
        """See `ImageSet`."""
        stored = self.stored(sample)
        shape = stored.height, stored.width, self.channels
        if not stored.jpg:
            return stored.data.reshape(shape)
        pixels = self._decoded(sample, stored.data, passing)
        if pixels.shape != shape:
            raise SampleError(f"{self.name(sample)} is {pixels.shape}, its file's table says {shape}")
        return pixels

    def part(self, sample: int, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ImageSet`."""
        stored = self.stored(sample)
        cut = jpeg_part(stored.data, (stored.height, stored.width), box) if stored.jpg else None
        if cut is None:
            return super().part(sample, box)
        file, place = cut
        return self._decoded(sample, file, passing=True), place

    def _decoded(self, sample: int, content: np.ndarray, passing: bool) -> np.ndarray:
        try:
            return decode_jpeg(content, passing=passing)
        except ValueError as error:
            raise SampleError(f"{self.name(sample)} does not decode: {error}") from error

    def take(self, samples: np.ndarray) -> np.ndarray:
        """See `ImageSet`."""
        if self._windows is None:
            return super().take(samples)
        pointers = self._pointers[samples]
        if len(self._windows) == 1:
            pixels = self._windows[0][pointers]
        else:
            pixels = np.empty((len(samples), int(self._lengths[0])), np.uint8)
            file = np.searchsorted(self.starts, samples, side="right") - 1
            for k in np.unique(file):
                pixels[file == k] = self._windows[k][pointers[file == k]]
        return pixels.reshape(-1, *self.sizes[0], self.channels)

    def read(self, samples: np.ndarray, out: np.ndarray, boxes: np.ndarray | None = None) -> None:
        """See `ImageSet`."""
        if self._windows is None or boxes is not None:
            super().read(samples, out, boxes)
        else:
            out[:] = self.take(samples)


@dataclass(frozen=True)
class _File:
    part: Part
    content: np.ndarray  # uint8, all of the file
    pointers: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64
    jpg: np.ndarray  # (n,) bool


def open_file(path: Path) -> _File:
    """One file's tables.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return _checked(path, np.memmap(path, np.uint8, mode="r").view(np.ndarray))
    except Exception as error:  # a broken table makes numpy raise almost anything
        raise damaged(path, str(error) or repr(error)) from error


def _checked(path: Path, content: np.ndarray) -> _File:
    """The file's tables, once everything that reading will trust has been checked."""
    header = np.frombuffer(content, HEADER, 1)[0]
    if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
        raise ValueError(f"format {header['version']} with {header['num_fields']} fields")
    fields = np.frombuffer(content, DESCRIPTOR, len(FIELDS), HEADER.itemsize)
    shape = array_shape(fields)
    count, end = int(header["num_samples"]), int(header["alloc_table"])
    if count == 0 or end + count * ALLOCATION.itemsize != len(content):
        raise ValueError("cut short")
    kind = metadata_type(RGB_FIELD if shape is None else ARRAY_FIELD)
    metadata = np.frombuffer(content, kind, count, HEADER.itemsize + fields.nbytes)
    table = np.frombuffer(content, ALLOCATION, count, end)
    room = end - np.minimum(table["ptr"], end)  # unsigned: a sum could wrap
    if (table["ptr"] > end).any() or (table["size"] > room).any():
        raise ValueError("cut short or overwritten")
    image = metadata["image"]
    if shape is None:
        pointers, jpg, channels = image["data_ptr"], image["mode"] == JPG, 3
        sizes = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)
        if not (jpg | (image["mode"] == RAW)).all():
            raise ValueError("images are stored in an unknown way")
    else:
        pointers, jpg, channels = image, np.zeros(count, bool), shape[2]
        sizes = np.broadcast_to(np.array(shape[:2]), (count, 2))
    table = table[np.argsort(table["ptr"], kind="stable")]
    row = np.argsort(pointers, kind="stable")
    if not np.array_equal(pointers[row], table["ptr"]):
        raise ValueError("its tables disagree")
    lengths = np.empty(count, np.int64)
    lengths[row] = table["size"]
    if (sizes < 1).any() or (~jpg & (lengths != sizes.prod(1) * channels)).any():
        raise ValueError("images are not as long as their size asks for")
    labels, synthetic, index = (metadata[name].copy() for name in FIELDS[1:])
    part = Part(path, sizes, channels, labels, synthetic.astype(bool), index)
    return _File(part, content, pointers.astype(np.int64), lengths, jpg)
