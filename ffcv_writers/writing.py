"""Images to .beton files: samples are checked, and files appear whole or not at all.

Threads read and encode, the calling thread writes: an error is an exception, and there is nothing to leave behind.
Memory does not grow with the set but for its tables, some 0.1 KB an image.
"""

from __future__ import annotations

import itertools
import logging
import os
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np

from .encoding import Storage, Transform, encode
from .errors import SampleError
from .format import (
    ALLOCATION,
    ARRAY_FIELD,
    FIELDS,
    HEADER,
    JPG,
    RAW,
    RGB_FIELD,
    VERSION,
    Stored,
    descriptors,
    metadata_type,
)
from .image_set import ImageSet, open_file

_log = logging.getLogger(__name__)

_READ_TOGETHER = 32  # samples a task of a reading thread
_PAGE, _LARGEST_PAGE = 1 << 23, 1 << 26  # bytes: ffcv's default, and where the size of images is not known before
_LARGEST_SIDE = 2**16 - 1


class Samples(Protocol):
    """What `write` takes images from; a uint8 (N, H, W, C) array is one. `workers` threads read at once.

    Each is a uint8 (H, W, C) array, or the content of an image file. The method `name(number)`, where there is one,
    says how messages name a sample.
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
    quality: int = 95,
    transform: Transform | None = None,
    workers: int = 1,
    shards: int = 1,
    progress: Callable[[], object] | None = None,
) -> list[Path]:
    """Writes one image set to `path`. Every sample is read and decoded once.

    Files are written beside `path` as NAME.partial and renamed when all are there; parent directories are made.

    Args:
        path: the file, NAME.beton.
        samples: N images of 3 channels and any size, or of 1 channel and one size. Image files are decoded to RGB.
        labels: (N,) integers, the class.
        synthetic: (N,) integers or booleans, 0 for real and 1 for generated.
        index: (N,) integers, the sample's name, such as its number in the set it comes from.
        storage: "raw" keeps every bit; "jpg" (C = 3) is smaller: the content of a JPEG file is stored without loss,
            with restarts, so that crops decode in part; all else loses some; "smart" stores images of up to 64 KiB raw,
            larger ones as JPEG.
        quality: of the JPEGs that are encoded here, 1 to 100.
        transform: uint8 (H, W, C) to what is stored of it; a JPEG file that it returns as it is loses nothing. See
            `limit_longer_side`, `limit_shorter_side` and `centre_square` in `ffcv_writers.decoding`.
        workers: threads that read and encode ahead.
        shards: files to write, NAME-00000-of-00004.beton and so on, of almost equal length; in order they are the set.
        progress: called for each sample.

    Returns:
        The files.

    Raises:
        SampleError: a sample cannot be read or is of another shape or type; it is named.
        ValueError: no samples; columns or settings that do not fit.
    """
    path = Path(path)
    _check(path, len(samples), storage, quality, workers, shards)
    named = {"label": labels, "synthetic": synthetic, "index": index}
    columns = {name: _column(path, name, values, len(samples)) for name, values in named.items()}
    if not np.isin(columns["synthetic"], (0, 1)).all():
        raise ValueError(f"{path}: synthetic must be 0 or 1")
    encoder = _Encoder(path, samples, storage, quality, transform)
    with closing(_read_ahead(encoder, range(len(samples)), workers)) as images:
        return _write_files(path, shards, columns, images, encoder.name, progress)


def join(path: Path, paths: Sequence[Path], *, shards: int = 1) -> list[Path]:
    """Writes several .beton files' samples to `path`, each image as it is stored, whatever its size.

    Nothing needs this to train: `open_set` takes a list of files.

    Args:
        path, shards: as in `write`.
        paths: the files, in the order in which to join them.

    Raises:
        ValueError: a file that is damaged or no .beton, or that has other channels than the first.
    """
    path, joined = Path(path), ImageSet([Path(other) for other in paths])
    _check(path, len(joined), "raw", 95, 1, shards)
    columns = {"label": joined.labels, "synthetic": joined.synthetic.astype(np.int64), "index": joined.index}
    return _write_files(path, shards, columns, map(joined.stored, range(len(joined))), joined.name)


def _check(path: Path, count: int, storage: str, quality: int, workers: int, shards: int) -> None:
    if path.suffix != ".beton":
        raise ValueError(f"{path}: the name of an image set must end in .beton")
    if count == 0:
        raise ValueError(f"{path}: no samples to write")
    if storage not in get_args(Storage) or not 1 <= quality <= 100:
        raise ValueError(f"need storage raw, jpg or smart and quality 1 to 100, got {storage!r} and {quality}")
    if workers < 1 or not 1 <= shards <= count:
        raise ValueError(f"need workers >= 1 and 1 to {count} shards, got {workers} and {shards}")


def _column(path: Path, name: str, values: Any, length: int) -> np.ndarray:
    column = np.asarray(values)
    if column.shape != (length,) or column.dtype.kind not in "iub":
        got = f"{column.dtype} of shape {column.shape}"
        raise ValueError(f"{path}: {name} must be {length} integers, one a sample, got {got}")
    return column.astype(np.int64)


class _Encoder:
    """Samples, checked and encoded by number; errors name the sample."""

    def __init__(
        self, path: Path, samples: Samples, storage: Storage, quality: int, transform: Transform | None
    ) -> None:
        self._path, self._samples, self._storage = path, samples, storage
        self._quality, self._transform = quality, transform

    def __call__(self, number: int) -> Stored:
        try:
            sample = self._samples[number]
            if not isinstance(sample, bytes):
                sample = self._checked(number, np.asarray(sample))
            encoded = encode(sample, self._storage, self._quality, self._transform)
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
        if self._storage != "raw" and image.shape[2] != 3:
            raise SampleError(f"{self._storage} needs 3 channels, {self.name(number)} has 1: store it raw")
        return image

    def name(self, number: int) -> str:
        name = getattr(self._samples, "name", None)
        return f"{self._path}: sample {number}" + (f" ({name(number)})" if name else "")


def _read_ahead(read: Callable[[int], Stored], numbers: range, workers: int) -> Generator[Stored, None, None]:
    def task(begin: int) -> list[Stored]:
        return [read(number) for number in numbers[begin : begin + _READ_TOGETHER]]

    pending: deque[Future[list[Stored]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for begin in range(0, len(numbers), _READ_TOGETHER):
                pending.append(pool.submit(task, begin))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def shard_paths(path: Path, shards: int) -> list[Path]:
    """The files of a set in so many shards."""
    if shards == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05}-of-{shards:05}{path.suffix}") for number in range(shards)]


def _write_files(
    path: Path,
    shards: int,
    columns: dict[str, np.ndarray],
    images: Iterator[Stored],
    name: Callable[[int], str],
    progress: Callable[[], object] | None = None,
) -> list[Path]:
    """Writes all shards under temporary names, then renames them."""
    bounds = np.linspace(0, len(columns["label"]), shards + 1).astype(int).tolist()
    files = shard_paths(path, shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    partials = [file.with_name(file.name + ".partial") for file in files]
    images = _one_kind(images, name, progress)
    try:
        for partial, (begin, end) in zip(partials, itertools.pairwise(bounds), strict=True):
            part = {key: values[begin:end] for key, values in columns.items()}
            _write_file(partial, itertools.islice(images, end - begin), part)
            open_file(partial)  # a disk that took less than it was given shows
        for partial, file in zip(partials, files, strict=True):
            os.replace(partial, file)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return files


def _one_kind(
    images: Iterable[Stored], name: Callable[[int], str], progress: Callable[[], object] | None
) -> Iterator[Stored]:
    """The images, checked: all of 3 channels and no larger than the format allows, or grey and of one size."""
    first = None
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
    metadata = np.zeros(count, metadata_type(RGB_FIELD if shape is None else ARRAY_FIELD))
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
