"""The python archives of CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read without calling what pickles ask for.

An archive is a folder of Python 2 pickles, each a dictionary: `data` uint8 (n, 3072), a row the red, green and blue
plane of a 32x32 image, and `labels` or `fine_labels` as a list. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import SourceError
from .labels import as_labels
from .pickles import unpickle
from .source import Place, Source, Split, array_split, file_sizes

_LARGEST_FILE = 1 << 30  # bytes; CIFAR-100's training file has 155 MB


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
        unpacked = (path / layout.meta).is_file() and (path / layout.test).is_file()  # classes may have such names, too
        if path.name == layout.archive or unpacked or any((path / part).exists() for part in layout[:2]):
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
    names = unpickle(contents[layout.meta], f"{place}: {layout.meta}").get(layout.names)
    if isinstance(names, list):
        names = [name.decode(errors="surrogateescape") if isinstance(name, bytes) else name for name in names]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{place}: {layout.meta} has no list '{layout.names}' of class names")
    if twice := [name for name in names if names.count(name) > 1]:
        raise SourceError(
            f"{place}: {layout.meta} '{layout.names}' has {twice[0]!r} twice: classes need names of their own"
        )

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
            end = -1
            for member in archive:
                if member.offset <= end:
                    raise tarfile.ReadError(f"damaged at byte {member.offset}")
                end, name = member.offset, member.name.removeprefix("./")
                stream = archive.extractfile(member) if member.isreg() and name in wanted else None
                if stream is not None:
                    if member.issparse() or member.size > _LARGEST_FILE:
                        raise tarfile.ReadError(f"{member.name} of {member.size} bytes is no file of it")
                    contents[wanted[name]] = stream.read()
    except PermissionError:
        raise
    except Exception as error:  # whatever arbitrary bytes lead to
        raise SourceError(f"cannot read {path}: {error or type(error).__name__}; fetch it again") from error
    for file in files:
        if file not in contents:
            raise SourceError(f"{path} has no file {folder}/{file}: is it the right archive, and whole?")
    return contents


def _batch(content: bytes, key: str, classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 32, 32, 3) and labels int64 (n,) of one file."""
    batch = unpickle(content, where)
    data, labels = batch.get("data"), batch.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise SourceError(f"{where} has no 'data' of uint8 (n, 3072)")
    if not isinstance(labels, list | tuple | np.ndarray) or not len(labels):
        raise SourceError(f"{where} has no list '{key}'")
    try:
        numbers = as_labels(np.asarray(labels), f"{where} '{key}'")
    except (ValueError, TypeError, OverflowError) as error:
        raise error if isinstance(error, SourceError) else SourceError(f"{where} '{key}': {error}") from error
    if numbers.max() >= classes:
        row = int(numbers.argmax())
        raise SourceError(f"{where} '{key}': the label of row {row} is {numbers[row]}, not in 0..{classes - 1}")
    if len(numbers) != len(data):
        raise SourceError(f"{where} has {len(data)} images but {len(numbers)} labels")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), numbers
