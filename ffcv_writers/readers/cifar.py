"""The python archives of CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read without calling what pickles ask for.

An archive is a folder of Python 2 pickles, each a dictionary: `data` uint8 (n, 3072), a row the red, green and blue
plane of a 32x32 image, and `labels` or `fine_labels` as a list. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import SourceError
from .source import Place, Source, Split, array_split, file_sizes


class _Layout(NamedTuple):
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        return *self.train, self.test, self.meta


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch",
        "batches.meta", "labels", "label_names",
    ),
    "cifar100": _Layout(
        "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta", "fine_labels", "fine_label_names"
    ),
}  # fmt: skip


def read(name: str, place: Place) -> Source:
    """CIFAR-10 or CIFAR-100 with its fine labels, from the archive's folder, its .tar.gz, or a folder with either.

    A pickle that asks for any other global than those of a numpy array is refused, the file and the global named.
    """
    layout = _LAYOUTS[name]
    found = _find(layout, place.path)
    files = [found / file for file in layout.files] if found.is_dir() else [found]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{found} has no file {file.name}: unpack the archive again")
    return Source(file_sizes(found.parent, files), lambda: _splits(layout, found))


def guess(path: Path) -> str | None:
    """Which archive lies at `path`, "cifar10" or "cifar100", if any."""
    for name, layout in _LAYOUTS.items():
        marks = path / layout.meta, path / layout.folder, path / layout.archive
        if path.name == layout.archive or any(mark.exists() for mark in marks):
            return name
    return None


def _find(layout: _Layout, path: Path) -> Path:
    """The folder or the .tar.gz that `path` means."""
    if path.is_file() or (path / layout.meta).is_file():
        return path
    for place in (path / layout.folder, path / layout.archive):
        if place.exists():
            return place
    raise SourceError(f"{path} is neither {layout.archive} nor {layout.folder}, and holds neither")


def _splits(layout: _Layout, place: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    if place.is_dir():
        contents = {file: (place / file).read_bytes() for file in layout.files}
    else:
        contents = _read_tar(place, layout.folder, layout.files)
    names = _unpickle(contents[layout.meta], f"{place}: {layout.meta}").get(layout.names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{place}: {layout.meta} has no list '{layout.names}' of class names")

    def split(files: Sequence[str]) -> Split:
        parts = [_batch(contents[file], layout.labels, len(names), f"{place}: {file}") for file in files]
        images, labels = zip(*parts, strict=True)
        return array_split(np.concatenate(images), np.concatenate(labels), place)

    return {"train": split(layout.train), "test": split([layout.test])}, tuple(names)


def _read_tar(path: Path, folder: str, files: tuple[str, ...]) -> dict[str, bytes]:
    """The files out of the archive, in memory: nothing is written, so no member can be put anywhere."""
    wanted = {f"{folder}/{file}": file for file in files}
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() and member.name in wanted else None
                if stream is not None:
                    contents[wanted[member.name]] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise SourceError(f"cannot read {path}: {error}; fetch it again") from error
    for file in files:
        if file not in contents:
            raise SourceError(f"{path} has no file {folder}/{file}: is it the right archive, and whole?")
    return contents


def _uint8_dtype(code: str, *_: Any) -> np.dtype:
    """In place of numpy.dtype: the archives hold no other type."""
    if code != "u1":
        raise pickle.UnpicklingError(f"an array of type {code!r}")
    return np.dtype(np.uint8)


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # numpy's own function, wherever this version keeps it
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # the same when written by numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _uint8_dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits plain Python values and uint8 arrays; no other global is looked up, so none can be called."""

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")  # Python 2 strings, array bytes among them
        self._where = where

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ADMITTED:
            name = f"{module_name}.{global_name}"
            raise SourceError(f"{self._where} asks for {name}, as no CIFAR archive does: do not trust it")
        return _ADMITTED[module_name, global_name]


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = _ArrayUnpickler(content, where).load()
    except SourceError:
        raise
    except Exception as error:  # whatever arbitrary bytes lead to
        raise SourceError(f"{where} is not a CIFAR pickle ({type(error).__name__}): fetch it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where} is not a CIFAR pickle (no dictionary): fetch it again")
    return value


def _batch(content: bytes, key: str, classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 32, 32, 3) and labels int64 (n,) of one file."""
    batch = _unpickle(content, where)
    data, labels = batch.get("data"), batch.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise SourceError(f"{where} has no 'data' of uint8 (n, 3072)")
    if not isinstance(labels, list) or not all(isinstance(y, int) and 0 <= y < classes for y in labels):
        raise SourceError(f"{where} has no list '{key}' of integers in 0..{classes - 1}")
    if len(labels) != len(data):
        raise SourceError(f"{where} has {len(data)} images but {len(labels)} labels")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)
