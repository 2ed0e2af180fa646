"""One or several .beton files as one set: the tables of their samples, and the pixels.

A file is mapped, not read: raw images are copied out of the page cache, JPEGs decoded. Pointers in a file's tables are
checked when it is opened, so that no read can leave the file.
"""

from __future__ import annotations

import errno
import mmap
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .decoding import resized_crop
from .errors import ForeignError, SampleError, counted
from .format import (
    ALLOCATION,
    DESCRIPTOR,
    FIELDS,
    HEADER,
    JPG,
    RAW,
    VERSION,
    Shape,
    Stored,
    array_shape,
    check_seal,
    field_names,
    metadata_type,
)
from .jpeg import decode_jpeg
from .jpeg import part as jpeg_part


def open_set(paths: Sequence[Path], *, mixed_sizes: bool = False) -> ImageSet:
    """Files that `write` wrote, as one set.

    Args:
        mixed_sizes: images may differ in size, for a loader that crops.

    Raises:
        ValueError: no files, a file that is missing, damaged or of other fields, images of several sizes or channels.
        OSError: the system does not give a file.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run the stage that writes it")
    image_set = ImageSet(paths)
    if not mixed_sizes:
        _ = image_set.image_shape
    return image_set


class ImageSet:
    """Files joined end to end: sample numbers run through the first file, then through the second, and so on.

    Only the files' tables are in memory, some 60 bytes an image, not the pixels. See `open_set`.

    Attributes:
        paths: the files.
        starts: (files + 1,) int64; file k holds the samples [starts[k], starts[k + 1]).
        sizes: (N, 2) int64 heights and widths.
        channels: 1 or 3.
        labels: (N,) int64 classes.
        synthetic: (N,) bool, true for generated samples.
        index: (N,) int64, the sample's name as it was given to `write`.
        encoded: (N,) bool, which images are JPEGs.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise ValueError("an image set needs at least one file")
        self.paths = tuple(paths)
        self._files = [open_file(path) for path in paths]
        self.channels = self._files[0].channels
        for path, file in zip(paths, self._files, strict=True):
            if file.channels != self.channels:
                raise ValueError(
                    f"{path} holds images of {counted(file.channels, 'channel(s)')}, {paths[0]} of {self.channels}: "
                    "write both with one kind"
                )
        self.starts = np.cumsum([0, *(len(file.labels) for file in self._files)])
        self.sizes, self.labels, self.synthetic, self.index, self.encoded, self._pointers, self._lengths = (
            np.concatenate([getattr(file, name) for file in self._files])
            for name in ("sizes", "labels", "synthetic", "index", "encoded", "pointers", "lengths")
        )
        self._windows = None  # for raw images of one size: all runs of so many bytes, one a file
        if self.one_size and not self.encoded.any():
            length = int(self._lengths[0])
            self._windows = [np.lib.stride_tricks.sliding_window_view(file.content, length) for file in self._files]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def one_size(self) -> bool:
        """Whether all images have one height and width."""
        return bool((self.sizes == self.sizes[0]).all())

    @property
    def mapped(self) -> bool:
        """Whether images are raw and of one size, so that reading is copying out of the page cache."""
        return self._windows is not None

    @property
    def image_shape(self) -> Shape:
        """(H, W, C) of every image.

        Raises:
            ValueError: images differ in size.
        """
        if not self.one_size:
            odd = int((self.sizes != self.sizes[0]).any(1).argmax())
            (h, w), (other_h, other_w) = self.sizes[[0, odd]].tolist()
            raise ValueError(
                f"{self.name(odd)} is {other_h} x {other_w} pixels, {self.name(0)} {h} x {w}: "
                "write them with one size, or open them with mixed_sizes and let the loader crop"
            )
        height, width = self.sizes[0].tolist()
        return height, width, self.channels

    def name(self, sample: int) -> str:
        """How messages name a sample: its file, its number there, and its index."""
        file = self._file_of(sample)
        return f"{self.paths[file]}: sample {sample - self.starts[file]} (index {self.index[sample]})"

    def _file_of(self, sample: int) -> int:
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def stored(self, sample: int) -> Stored:
        """One image as it lies in its file."""
        content = self._files[self._file_of(sample)].content
        begin, length = int(self._pointers[sample]), int(self._lengths[sample])
        height, width = self.sizes[sample].tolist()
        return Stored(content[begin : begin + length], (height, width, self.channels), bool(self.encoded[sample]))

    def image(self, sample: int, *, reuse_buffer: bool = False) -> np.ndarray:
        """One image, uint8 (H, W, C), decoded; not to be written to. `reuse_buffer`: see `jpeg.decode_jpeg`.

        Raises:
            SampleError: it does not decode.
        """
        stored = self.stored(sample)
        if not stored.jpg:
            return stored.data.reshape(stored.shape)
        pixels = self._decoded(sample, stored.data, reuse_buffer)
        if pixels.shape != stored.shape:
            raise SampleError(f"{self.name(sample)} is {pixels.shape}, its file's table says {stored.shape}")
        return pixels

    def _part(self, sample: int, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A part of an image that holds the box, uint8 (H, W, C), and the box in it."""
        stored = self.stored(sample)
        cut = jpeg_part(stored.data, stored.shape[:2], box) if stored.jpg else None
        if cut is None:
            return self.image(sample, reuse_buffer=True), box
        file, place = cut
        return self._decoded(sample, file, reuse_buffer=True), place

    def _decoded(self, sample: int, content: np.ndarray, reuse_buffer: bool) -> np.ndarray:
        try:
            return decode_jpeg(content, reuse_buffer=reuse_buffer)
        except ValueError as error:
            raise SampleError(f"{self.name(sample)} does not decode: {error}") from error

    def take(self, samples: np.ndarray) -> np.ndarray:
        """The images of a set of one size, uint8 (n, H, W, C), in memory of their own."""
        if self._windows is None:
            out = np.empty((len(samples), *self.image_shape), np.uint8)
            self.read(samples, out)
            return out
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
        """Puts the (n,) int64 samples into `out`, uint8 (n, H, W, C). Any number of threads may call at once.

        Args:
            boxes: (n, 4) int64 top, left, height, width: of each image this part, resized to H x W; None takes
                images as they are, which must be H x W.

        Raises:
            SampleError: an image does not decode; it is named.
        """
        if boxes is None and self._windows is not None:
            out[:] = self.take(samples)
            return
        for k, sample in enumerate(samples.tolist()):
            try:
                if boxes is None:
                    out[k] = self.image(sample, reuse_buffer=True)
                else:
                    out[k] = resized_crop(*self._part(sample, boxes[k]), out.shape[1:3])
            except SampleError:
                raise
            except Exception as error:
                raise SampleError(f"{self.name(sample)} cannot be read: {error!r}") from error


@dataclass(frozen=True)
class _File:
    """One file's tables, (n,) each as in `ImageSet`, and all its bytes, uint8."""

    content: np.ndarray
    channels: int
    sizes: np.ndarray
    labels: np.ndarray
    synthetic: np.ndarray
    index: np.ndarray
    encoded: np.ndarray
    pointers: np.ndarray
    lengths: np.ndarray


def open_file(path: Path) -> _File:
    """Maps a file and checks everything in its tables that reading relies on.

    Raises:
        ValueError: it is damaged, or it has other fields.
        OSError: the system does not give it, for its permissions or the number of open files.
    """
    try:
        return _checked(_mapped(path))
    except ForeignError as error:
        raise ValueError(
            f"{path} is no image set of ours: {error}; python -m ffcv_writers write makes one of its images"
        ) from error
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            reason = f"a process may have {limit} files open here (ulimit -n) and these are more"
        raise OSError(error.errno, reason, str(path)) from error
    except Exception as error:  # a broken table makes numpy raise almost anything
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(
            f"{path} is damaged or not an image set of ours ({reason}): "
            "if a run wrote it, delete it and run the stage again"
        ) from error


def _mapped(path: Path) -> np.ndarray:
    # Before Python 3.13 a map keeps a file descriptor.
    keep_none: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **keep_none), np.uint8)


def _descriptors(content: np.ndarray, count: int) -> np.ndarray:
    """The field descriptors of a file that has so many.

    Raises:
        ForeignError: the fields are others than ours; it says which are missing.
    """
    fields = np.frombuffer(content, DESCRIPTOR, count, HEADER.itemsize)
    names = field_names(fields)
    if tuple(names) == FIELDS:
        return fields
    if not all(name.isprintable() and name for name in names):
        raise ValueError("no fields")
    missing = [name for name in FIELDS if name not in names]
    lacks = f"lacks {', '.join(missing)}" if missing else f"needs {', '.join(FIELDS)} alone and in this order"
    raise ForeignError(f"it has the fields {', '.join(names)} and {lacks}")


def _checked(content: np.ndarray) -> _File:
    header = np.frombuffer(content, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise ValueError(f"format {header['version']}")
    fields = _descriptors(content, int(header["num_fields"]))
    shape = array_shape(fields)
    count, end = int(header["num_samples"]), int(header["alloc_table"])
    if count == 0 or end + count * ALLOCATION.itemsize != len(content):
        raise ValueError("cut short")
    metadata = np.frombuffer(content, metadata_type(shape), count, HEADER.itemsize + fields.nbytes)
    table = np.frombuffer(content, ALLOCATION, count, end)
    check_seal(header, fields, metadata, table)
    room = end - np.minimum(table["ptr"], end)  # unsigned: a sum could wrap
    if (table["ptr"] > end).any() or (table["size"] > room).any():
        raise ValueError("cut short or overwritten")
    image = metadata["image"]
    if shape is None:
        pointers, encoded, channels = image["data_ptr"], image["mode"] == JPG, 3
        sizes = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)
        if not (encoded | (image["mode"] == RAW)).all():
            raise ValueError("images are stored in an unknown way")
    else:
        pointers, encoded, channels = image, np.zeros(count, bool), shape[2]
        sizes = np.broadcast_to(np.array(shape[:2]), (count, 2))
    lengths, row, place = np.empty(count, np.int64), np.argsort(pointers), np.argsort(table["ptr"])
    if not np.array_equal(pointers[row], table["ptr"][place]):
        raise ValueError("its tables disagree")
    lengths[row] = table["size"][place]
    if (sizes < 1).any() or (~encoded & (lengths != sizes.prod(1) * channels)).any():
        raise ValueError("images are not as long as their size asks for")
    labels, synthetic, index = (metadata[name].copy() for name in FIELDS[1:])
    pointers = pointers.astype(np.int64)
    return _File(content, channels, sizes, labels, synthetic.astype(bool), index, encoded, pointers, lengths)
