"""Images to .beton files: samples are checked, and a file appears whole or not at all.

Threads read and encode, the calling thread writes: an error is an exception, and there is nothing to leave behind.
Memory grows with the set's tables alone, some 0.1 KB an image.
"""

from __future__ import annotations

import itertools
import logging
import os
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

import numpy as np

from .encoding import Storage, Transform, encode
from .errors import SampleError
from .format import ALLOCATION, FIELDS, HEADER, JPG, RAW, VERSION, Shape, Stored, descriptors, metadata_type
from .image_set import open_file

_log = logging.getLogger(__name__)

_READ_TOGETHER = 32  # samples a task of a reading thread
_PAGE, _LARGEST_PAGE = 1 << 23, 1 << 26  # bytes: ffcv's default, and the page of files whose images differ in size
_LARGEST_SIDE = 2**16 - 1


class Samples(Protocol):
    """What `write` takes images from; a uint8 (N, H, W, C) array is one. `workers` threads read at once.

    Each is a uint8 (H, W, C) array, or the content of an image file. An optional method `name(number)` gives what
    messages call a sample.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> np.ndarray | bytes: ...


def write(
    path: Path,
    samples: Samples,
    *,
    labels: np.ndarray,
    synthetic: np.ndarray,
    index: np.ndarray,
    storage: Storage = "raw",
    transform: Transform | None = None,
    workers: int = 1,
    progress: Callable[[], object] | None = None,
) -> None:
    """Writes one image set to `path`. Every sample is read and decoded once.

    The file is written beside `path` as NAME.partial and renamed at the end; parent directories are made.

    Args:
        path: the file, NAME.beton.
        samples: N images of 3 channels and any size, or of 1 channel and one size. Image files are decoded to RGB.
        labels: (N,) integers, the class.
        synthetic: (N,) integers or booleans, 0 for real and 1 for generated.
        index: (N,) integers, the sample's name, such as its number in the set it comes from.
        storage: "raw" keeps every bit. "jpg" (C = 3) is smaller: JPEG files are stored without loss, with restarts, so
            that crops decode in part; all else is encoded at quality 95.
        transform: uint8 (H, W, C) to what is stored of it, such as `ffcv_writers.decoding.centre_square`; a JPEG file
            that it returns as it is loses nothing.
        workers: threads that read and encode ahead.
        progress: called for each sample.

    Raises:
        SampleError: a sample cannot be read or is of another shape or type; it is named.
        ValueError: no samples; columns or settings that do not fit.
    """
    path, count = Path(path), len(samples)
    if path.suffix != ".beton":
        raise ValueError(f"{path}: the name of an image set must end in .beton")
    if count == 0:
        raise ValueError(f"{path}: no samples to write")
    if storage not in get_args(Storage) or workers < 1:
        raise ValueError(f"{path}: need storage raw or jpg and workers >= 1, got {storage!r} and {workers}")
    columns = {
        name: _column(path, name, values, count)
        for name, values in (("label", labels), ("synthetic", synthetic), ("index", index))
    }
    if not np.isin(columns["synthetic"], (0, 1)).all():
        raise ValueError(f"{path}: synthetic must be 0 or 1")
    encoder = _Encoder(path, samples, storage, transform)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(_read_ahead(encoder, count, workers)) as images:
            _write_file(partial, _one_kind(images, encoder.name, progress), columns)
        open_file(partial)  # fails if the disk took less than it was given
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _column(path: Path, name: str, values: np.ndarray, length: int) -> np.ndarray:
    column = np.asarray(values)
    if column.shape != (length,) or column.dtype.kind not in "iub":
        got = f"{column.dtype} of shape {column.shape}"
        raise ValueError(f"{path}: {name} must be {length} integers, one a sample, got {got}")
    return column.astype(np.int64)


@dataclass(frozen=True)
class _Encoder:
    """Samples, checked and encoded by number; errors name the sample."""

    path: Path
    samples: Samples
    storage: Storage
    transform: Transform | None

    def __call__(self, number: int) -> Stored:
        try:
            sample = self.samples[number]
            if not isinstance(sample, bytes):
                sample = self._checked(number, np.asarray(sample))
            encoded = encode(sample, self.storage, self.transform)
        except SampleError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise SampleError(f"{self.name(number)} could not be read: {reason}") from error
        if encoded.defect:
            _log.warning("%s has a defect: %s; what can be seen of it is stored", self.name(number), encoded.defect)
        return encoded

    def _checked(self, number: int, image: np.ndarray) -> np.ndarray:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
            got = f"{image.dtype} of shape {image.shape}"
            raise SampleError(f"{self.name(number)} must be uint8 (height, width, 1 or 3), got {got}")
        if self.storage == "jpg" and image.shape[2] != 3:
            raise SampleError(f"jpg needs 3 channels, {self.name(number)} has 1: store it raw")
        return image

    def name(self, number: int) -> str:
        name = getattr(self.samples, "name", None)
        return f"{self.path}: sample {number}" + (f" ({name(number)})" if name else "")


def _read_ahead(read: Callable[[int], Stored], count: int, workers: int) -> Generator[Stored, None, None]:
    def task(begin: int) -> list[Stored]:
        return [read(number) for number in range(begin, min(begin + _READ_TOGETHER, count))]

    pending: deque[Future[list[Stored]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for begin in range(0, count, _READ_TOGETHER):
                pending.append(pool.submit(task, begin))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_kind(
    images: Iterator[Stored], name: Callable[[int], str], progress: Callable[[], object] | None
) -> Iterator[Stored]:
    """The images, checked: all of 3 channels and no larger than the format allows, or grey and of one size."""
    first: Shape | None = None
    for number, image in enumerate(images):
        first = first or image.shape
        if image.shape != first and 1 in (image.shape[2], first[2]):
            raise SampleError(f"{name(number)} has shape {image.shape}, sample 0 has {first}: make them one size")
        if max(image.shape) > _LARGEST_SIDE or len(image.data) > _LARGEST_PAGE:
            raise SampleError(f"{name(number)} of shape {image.shape} is too large for the format: shrink it")
        if progress is not None:
            progress()
        yield image


def _write_file(path: Path, images: Iterator[Stored], columns: dict[str, np.ndarray]) -> None:
    """Writes images as they are given, and the (n,) int64 columns label, synthetic and index."""
    first = next(images)
    shape = None if first.shape[2] == 3 else first.shape
    page = _LARGEST_PAGE if shape is None else max(_PAGE, 1 << (len(first.data) - 1).bit_length())
    count, fields = len(columns["label"]), descriptors(shape)
    metadata = np.zeros(count, metadata_type(shape))
    rows = array("q")  # of each image: place, bytes, mode, width, height
    with path.open("wb") as file:
        place = file.seek(HEADER.itemsize + fields.nbytes + metadata.nbytes)
        for image in itertools.chain([first], images):
            size = len(image.data)
            if place // page != (place + size - 1) // page:
                place = file.seek((place // page + 1) * page)  # no image lies across pages
            file.write(image.data.data)
            rows.extend((place, size, JPG if image.jpg else RAW, image.shape[1], image.shape[0]))
            place += size
        table = np.zeros(count, ALLOCATION)
        table["sample_id"] = np.arange(count)
        table["ptr"], table["size"], *rest = np.frombuffer(rows, np.int64).reshape(count, 5).T
        for name in FIELDS[1:]:
            metadata[name] = columns[name]
        if shape is None:
            for name, values in zip(("mode", "width", "height"), rest, strict=True):
                metadata["image"][name] = values
            metadata["image"]["data_ptr"] = table["ptr"]
        else:
            metadata["image"] = table["ptr"]
        file.write(table.data)
        file.seek(0)
        header = np.array((VERSION, len(FIELDS), page, count, place), HEADER)
        for part in (header, fields, metadata):
            file.write(part.data)
        file.flush()
        os.fsync(file.fileno())
