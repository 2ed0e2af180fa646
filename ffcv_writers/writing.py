"""Writing one image set in either format: samples are checked, and files appear whole or not at all."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from . import memory
from .available import have_ffcv
from .decoding import decode_rgb, shrink
from .image_set import Shape

_log = logging.getLogger(__name__)

_READ_TOGETHER = 32  # samples a task of a reading thread
_NO_LIMIT = 2**16 - 1  # pixels a side, of the file format


class Samples(Protocol):
    """What `write` takes images from; a uint8 (N, H, W, C) array is one. `workers` threads read at once.

    Each is a uint8 (H, W, C) array, or the content of an image file. The method `name(number)`, where there is one,
    says how messages call a sample.
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
    storage: Literal["raw", "jpg", "smart"] = "raw",
    quality: int = 95,
    max_side: int = _NO_LIMIT,
    workers: int = 1,
    shards: int = 1,
) -> list[Path]:
    """Writes one image set to `path`: with ffcv if it ends in .beton, as the in-memory twin if in .npz.

    Files are written beside `path` as NAME.partial and renamed when all are there; parent directories are made.

    Args:
        path: the file; see `suffix` for the ending that this machine serves.
        samples: N images with 1 or 3 channels. Arrays must be of one shape; what is decoded here is RGB and, in a
            .beton, may be of any size.
        labels: (N,) integers, the class.
        synthetic: (N,) integers or booleans, 0 for real and 1 for generated.
        index: (N,) integers, the sample's name, such as its number in the set it comes from.
        storage: "raw" keeps every bit; "jpg" (C = 3) is smaller: the content of a JPEG file is stored without loss,
            with restarts, so that crops decode in part; all else loses some; "smart" stores images of up to 64 KiB raw,
            larger ones as JPEG. .npz: raw.
        quality: of the JPEGs that are encoded here, 1 to 100.
        max_side: larger images are scaled down until their longer side has so many pixels.
        workers: threads that read and encode ahead.
        shards: files to write, NAME-00000-of-00004.beton and so on, of almost equal length; in order they are the set.

    Returns:
        The files.

    Raises:
        ValueError: no samples; a sample that cannot be read or is of another shape or type, which is named;
            columns or settings that do not fit; .beton without ffcv.
    """
    path = Path(path)
    _check(path, len(samples), storage, quality, max_side, workers, shards)
    named = {"label": labels, "synthetic": synthetic, "index": index}
    columns = {name: _column(path, name, values, len(samples)) for name, values in named.items()}
    if not np.isin(columns["synthetic"], (0, 1)).all():
        raise ValueError(f"{path}: synthetic must be 0 or 1")

    in_memory = path.suffix == ".npz"
    if in_memory:
        reader = _Reader(path, samples, partial(shrink, max_side=max_side), decode=True)
    else:
        from .beton_writer import encode

        encoder = partial(encode, storage=storage, quality=quality, max_side=max_side)
        reader = _Reader(path, samples, encoder, decode=False)
    first = reader.sample(0)
    shape = None  # any
    if not isinstance(first, bytes):
        if storage != "raw" and first.shape[2] != 3:
            raise ValueError(f"{path}: {storage} needs 3 channels, the images have {first.shape[2]}: store them raw")
        if storage == "raw" or in_memory:
            shape = shrink(first, max_side).shape

    def images(numbers: range) -> Generator[Any, None, None]:
        return _read_ahead(reader.encoded, numbers, workers)

    return _pack(path, shards, columns, images, shape)


def join(path: Path, paths: Sequence[Path], *, shards: int = 1) -> list[Path]:
    """Writes several .beton files' samples to `path`, each image as it is stored, whatever its size.

    Nothing needs this to train: `open_set` takes a list of files.

    Args:
        path, shards: as in `write`.
        paths: the files, in the order in which to join them.

    Raises:
        ValueError: a file that is damaged or no .beton, or that has other channels than the first.
    """
    path = Path(path)
    if {path.suffix, *(Path(other).suffix for other in paths)} != {".beton"}:
        raise ValueError(f"{path}: only .beton files can be joined, to a .beton file")
    if not have_ffcv():
        raise ValueError(f"{path}: ffcv is not there: install it to join .beton files")
    from .beton import BetonSet

    joined = BetonSet([Path(other) for other in paths])
    columns = {"label": joined.labels, "synthetic": joined.synthetic.astype(np.int64), "index": joined.index}
    one_size = joined.decoded and bool((joined.sizes == joined.sizes[0]).all())
    if joined.channels == 1 and not one_size:
        raise ValueError(f"{path}: grey images of several sizes cannot lie in one file")

    def images(numbers: range) -> Generator[Any, None, None]:
        yield from map(joined.stored, numbers)

    return _pack(path, shards, columns, images, joined.image_shape if one_size else None)


def shard_paths(path: Path, shards: int) -> list[Path]:
    """The files of a set in so many shards."""
    if shards == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05}-of-{shards:05}{path.suffix}") for number in range(shards)]


def _pack(
    path: Path,
    shards: int,
    columns: dict[str, np.ndarray],
    images: Callable[[range], Generator[Any, None, None]],
    shape: Shape | None,
) -> list[Path]:
    """Writes all shards beside their names, then renames them."""
    count = len(columns["label"])
    if path.suffix == ".npz":
        write_file: Any = memory.write_npz
    else:
        from .beton_writer import write_beton as write_file
    bounds = np.linspace(0, count, shards + 1).astype(int).tolist()
    files = shard_paths(path, shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    partials = [file.with_name(file.name + ".partial") for file in files]
    try:
        for partial_file, begin, end in zip(partials, bounds, bounds[1:], strict=False):
            part = {name: values[begin:end] for name, values in columns.items()}
            with closing(images(range(begin, end))) as some:
                write_file(partial_file, some, part, shape)
            with partial_file.open("rb") as written:
                os.fsync(written.fileno())
        for partial_file, file in zip(partials, files, strict=True):
            os.replace(partial_file, file)
    finally:
        for partial_file in partials:
            partial_file.unlink(missing_ok=True)
    return files


def _check(path: Path, count: int, storage: str, quality: int, max_side: int, workers: int, shards: int) -> None:
    if path.suffix not in (".beton", ".npz"):
        raise ValueError(f"{path}: an image set ends in .beton or .npz")
    if path.suffix == ".beton" and not have_ffcv():
        raise ValueError(f"{path}: ffcv is not there to write it: write a .npz or install ffcv")
    if count == 0:
        raise ValueError(f"{path}: no samples to write")
    if storage not in ("raw", "jpg", "smart") or not 1 <= quality <= 100 or not 1 <= max_side <= _NO_LIMIT:
        raise ValueError(
            f"need storage raw, jpg or smart, quality 1 to 100 and max_side 1 to {_NO_LIMIT}, "
            f"got storage {storage!r}, quality {quality} and max_side {max_side}"
        )
    if workers < 1 or not 1 <= shards <= count:
        raise ValueError(f"need workers >= 1 and 1 to {count} shards, got {workers} and {shards}")


def _column(path: Path, name: str, values: Any, length: int) -> np.ndarray:
    column = np.asarray(values)
    if column.shape != (length,) or column.dtype.kind not in "iub":
        got = f"{column.dtype} of shape {column.shape}"
        raise ValueError(f"{path}: {name} must be {length} integers, one a sample, got {got}")
    return column.astype(np.int64)


class _Reader:
    """Samples, checked and encoded; what goes wrong with one is told with its name."""

    def __init__(self, path: Path, samples: Samples, encoder: Callable[[Any], Any], decode: bool) -> None:
        self._path, self._samples, self._encoder, self._decode = path, samples, encoder, decode
        self._shape: Shape | None = None
        first = self.sample(0)
        if not isinstance(first, bytes):
            self._shape = first.shape

    def sample(self, number: int) -> np.ndarray | bytes:
        """One sample as it is given, decoded if all are to be."""
        try:
            sample = self._samples[number]
            if isinstance(sample, bytes):
                return decode_rgb(sample) if self._decode else sample
            image = np.asarray(sample)
        except Exception as error:
            raise self._unreadable(number, error) from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
            got = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"{self._name(number)} must be uint8 (height, width, 1 or 3), got {got}")
        if self._shape is not None and image.shape != self._shape:
            got = f"{image.shape}, sample 0 has {self._shape}"
            raise ValueError(f"{self._name(number)} has shape {got}: make them one size")
        return image

    def encoded(self, number: int) -> Any:
        sample = self.sample(number)
        try:
            encoded = self._encoder(sample)
        except Exception as error:
            raise self._unreadable(number, error) from error
        if defect := getattr(encoded, "defect", ""):
            _log.warning("%s has a defect: %s; what can be seen of it is stored", self._name(number), defect)
        return encoded

    def _name(self, number: int) -> str:
        name = getattr(self._samples, "name", None)
        return f"{self._path}: sample {number}" + (f" ({name(number)})" if name else "")

    def _unreadable(self, number: int, error: Exception) -> ValueError:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        return ValueError(f"{self._name(number)} could not be read: {reason}")


def _read_ahead(read: Callable[[int], Any], numbers: range, workers: int) -> Generator[Any, None, None]:
    def task(begin: int) -> list[Any]:
        return [read(number) for number in numbers[begin : begin + _READ_TOGETHER]]

    pending: deque[Future[list[Any]]] = deque()
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
