"""Writing one image set in either format: samples are checked, and a file appears whole or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from . import memory
from .available import have_ffcv
from .image_set import Shape

_READ_TOGETHER = 64  # samples a task of a reading thread


class Samples(Protocol):
    """What `write` takes images from; a uint8 (N, H, W, C) array is one. `workers` threads read at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> np.ndarray: ...


def write(
    path: Path,
    samples: Samples,
    *,
    labels: np.ndarray,
    synthetic: np.ndarray,
    index: np.ndarray,
    storage: Literal["raw", "jpg"] = "raw",
    quality: int = 95,
    workers: int = 1,
) -> None:
    """Writes one image set to `path`: with ffcv if it ends in .beton, as the in-memory twin if in .npz.

    The file is written beside `path` as `path`.partial and renamed; parent directories are made.

    Args:
        path: the file; see `suffix` for the ending that this machine serves.
        samples: N uint8 (H, W, C) images of one shape, C 1 or 3.
        labels: (N,) integers, the class.
        synthetic: (N,) integers or booleans, 0 for real and 1 for generated.
        index: (N,) integers, the sample's name, such as its number in the set it comes from.
        storage: "raw" keeps every bit; "jpg" (C = 3) is smaller and loses some. A .npz file keeps every bit.
        quality: of JPEG, 1 to 100.
        workers: threads that read samples ahead.

    Raises:
        ValueError: no samples; a sample that cannot be read or is of another shape or type, which is named;
            columns or settings that do not fit; .beton without ffcv.
    """
    path = Path(path)
    if path.suffix not in (".beton", ".npz"):
        raise ValueError(f"{path}: an image set ends in .beton or .npz")
    if path.suffix == ".beton" and not have_ffcv():
        raise ValueError(f"{path}: ffcv is not there to write it: write a .npz or install ffcv")
    if len(samples) == 0:
        raise ValueError(f"{path}: no samples to write")
    if storage not in ("raw", "jpg") or not 1 <= quality <= 100 or workers < 1:
        raise ValueError(
            "need storage raw or jpg, quality 1 to 100 and workers >= 1, "
            f"got storage {storage!r}, quality {quality} and workers {workers}"
        )
    columns = {"label": labels, "synthetic": synthetic, "index": index}
    columns = {name: _column(path, name, values, len(samples)) for name, values in columns.items()}
    if not np.isin(columns["synthetic"], (0, 1)).all():
        raise ValueError(f"{path}: synthetic must be 0 or 1")
    shape = _sample(path, samples, 0, None).shape
    if storage == "jpg" and shape[2] != 3:
        raise ValueError(f"{path}: jpg needs 3 channels, the images have {shape[2]}: store them raw")

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    images = _read_ahead(path, samples, shape, workers)
    try:
        if path.suffix == ".npz":
            memory.write_npz(partial, images, shape, columns)
        else:
            from . import beton

            beton.write_beton(partial, images, shape, columns, quality if storage == "jpg" else None)
        os.replace(partial, path)
    finally:
        images.close()
        partial.unlink(missing_ok=True)


def _column(path: Path, name: str, values: Any, length: int) -> np.ndarray:
    column = np.asarray(values)
    if column.shape != (length,) or column.dtype.kind not in "iub":
        got = f"{column.dtype} of shape {column.shape}"
        raise ValueError(f"{path}: {name} must be {length} integers, one a sample, got {got}")
    return column.astype(np.int64)


def _sample(path: Path, samples: Samples, number: int, shape: Shape | None) -> np.ndarray:
    try:
        image = np.asarray(samples[number])
    except Exception as error:
        raise ValueError(f"{path}: sample {number} could not be read: {error!r}") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
        got = f"{image.dtype} of shape {image.shape}"
        raise ValueError(f"{path}: sample {number} must be uint8 (height, width, 1 or 3), got {got}")
    if shape is not None and image.shape != shape:
        got = f"{image.shape}, sample 0 has {shape}"
        raise ValueError(f"{path}: sample {number} has shape {got}: make them one size")
    return image


def _read_ahead(path: Path, samples: Samples, shape: Shape, workers: int) -> Generator[np.ndarray, None, None]:
    def read(begin: int) -> list[np.ndarray]:
        numbers = range(begin, min(begin + _READ_TOGETHER, len(samples)))
        return [_sample(path, samples, number, shape) for number in numbers]

    pending: deque[Future[list[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for begin in range(0, len(samples), _READ_TOGETHER):
                pending.append(pool.submit(read, begin))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
