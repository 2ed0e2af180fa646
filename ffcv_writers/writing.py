"""Images to .beton files: samples are checked, and a file appears whole or not at all.

Threads read and encode, the calling thread writes: an error is an exception, and there is nothing to leave behind.
Memory grows with the set's tables alone, some 0.1 KB an image.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import logging
import os
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, get_args

import numpy as np

from .encoding import Storage, Transform, encode
from .errors import SampleError
from .format import ALLOCATION, FIELDS, HEADER, JPG, RAW, VERSION, Shape, Stored, descriptors, metadata_type, sealed
from .image_set import open_file

_log = logging.getLogger(__name__)

_READ_TOGETHER = 32  # samples a task of a reading thread
_PAGE, _MIXED_PAGE = 1 << 23, 1 << 26  # bytes: ffcv's default, and the page of files whose images differ in size
_LARGEST_SIDE = 2**16 - 1
_NAMED = 3  # samples that cannot be read, in a message


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
) -> np.ndarray:
    """Writes one image set to `path`. Every sample is read and decoded once, also after one that cannot be read: the
    error counts them all.

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

    Returns:
        (N,) uint64, a digest of what is stored of each image, see `ffcv_writers.duplicates`.

    Raises:
        SampleError: samples cannot be read or are of another shape or type; the first ones are named, all are counted.
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
    with _alone(partial) as file:
        with closing(_read_ahead(encoder, count, workers)) as images:
            digests = _write_file(file, _one_kind(_readable(images, progress), encoder.name), columns)
        open_file(partial)  # fails if the disk took less than it was given
        os.replace(partial, path)
    return digests


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """An empty file that no other process writes, removed at the end unless it was renamed.

    Raises:
        ValueError: another process writes it.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process writes it; wait for it, or stop it") from None
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise ValueError(f"{path}: another process has just finished it; start again if it is to be replaced")
        try:
            file.truncate()
            yield file
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk has no name
            raise
        finally:
            path.unlink(missing_ok=True)


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
            reason = error.strerror if isinstance(error, OSError) and error.strerror else reason
            raise SampleError(f"{self.name(number)} could not be read: {reason}") from error
        if encoded.defect:
            _log.warning("%s has a defect: %s; what can be seen of it is stored", self.name(number), encoded.defect)
        content = hashlib.blake2b(encoded.data.data, digest_size=8, salt=repr(encoded.shape).encode()[:16])
        return dataclasses.replace(encoded, digest=int.from_bytes(content.digest()))

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


def _read_ahead(read: Callable[[int], Stored], count: int, workers: int) -> Generator[Stored | SampleError, None, None]:
    def task(begin: int) -> list[Stored | SampleError]:
        return [attempt(number) for number in range(begin, min(begin + _READ_TOGETHER, count))]

    def attempt(number: int) -> Stored | SampleError:
        try:
            return read(number)
        except SampleError as error:
            return error

    pending: deque[Future[list[Stored | SampleError]]] = deque()
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


def _readable(
    images: Iterator[Stored | SampleError], progress: Callable[[], object] | None
) -> Generator[Stored, None, None]:
    """The images up to the first that cannot be read; then an error that names some and counts all."""
    count, wrong, first = 0, 0, list[SampleError]()
    for image in images:
        count += 1
        if isinstance(image, SampleError):
            wrong += 1
            first += [image] if wrong <= _NAMED else []
        elif not wrong:
            yield image
        if progress is not None:
            progress()
    if wrong == 1:
        raise first[0]
    if wrong:
        more = "; ..." if wrong > len(first) else ""
        raise SampleError(f"{wrong} of {count} images cannot be read: {'; '.join(map(str, first))}{more}")


def _one_kind(images: Iterator[Stored], name: Callable[[int], str]) -> Iterator[Stored]:
    """The images, checked: all of 3 channels and no larger than the format allows, or grey and of one size."""
    first: Shape | None = None
    for number, image in enumerate(images):
        first = first or image.shape
        if image.shape != first and 1 in (image.shape[2], first[2]):
            raise SampleError(f"{name(number)} has shape {image.shape}, sample 0 has {first}: make them one size")
        if max(image.shape) > _LARGEST_SIDE:
            raise SampleError(f"{name(number)} is {image.shape[0]} x {image.shape[1]} pixels: {_LARGEST_SIDE} at most")
        yield image


def _write_file(file: BinaryIO, images: Iterator[Stored], columns: dict[str, np.ndarray]) -> np.ndarray:
    """Writes images as they are given, and the (n,) int64 columns label, synthetic and index. Returns the digests."""
    first = next(images)
    shape = None if first.shape[2] == 3 else first.shape
    page = _PAGE if shape else _MIXED_PAGE
    count, fields = len(columns["label"]), descriptors(shape)
    metadata = np.zeros(count, metadata_type(shape))
    rows = array("q")  # of each image: place, bytes, mode, width, height
    digests = array("Q")
    place = file.seek(HEADER.itemsize + fields.nbytes + metadata.nbytes)
    for image in itertools.chain([first], images):
        size = len(image.data)
        page = max(page, 1 << (size - 1).bit_length())  # images before lie in one page of any larger size, too
        if place // page != (place + size - 1) // page:
            place = file.seek((place // page + 1) * page)  # no image lies across pages
        file.write(image.data.data)
        rows.extend((place, size, JPG if image.jpg else RAW, image.shape[1], image.shape[0]))
        digests.append(image.digest)
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
    fields = sealed(header, fields, metadata, table)
    for part in (header, fields, metadata):
        file.write(part.data)
    file.flush()
    os.fsync(file.fileno())
    return np.array(digests)
