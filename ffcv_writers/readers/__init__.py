"""Readers of image sources, one a format. A new one is a file here and a line in READERS."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import SourceError, UnknownFormatError
from . import cifar, digits, folder, idx, lists, npz, tar
from .lists import LIST_FORMAT
from .source import Place, Source, Split, survey_differences, unreadable

__all__ = [
    "LIST_FORMAT",
    "READERS",
    "Place",
    "Reader",
    "Source",
    "Split",
    "guess_format",
    "open_place",
    "open_source",
    "survey_differences",
]

Reader = Callable[[Place], Source]
READERS: dict[str, Reader] = {
    "digits": digits.read,
    "idx": idx.read,
    "cifar10": partial(cifar.read, "cifar10"),
    "cifar100": partial(cifar.read, "cifar100"),
    "folder": folder.read,
    "list": lists.read,
    "npz": npz.read,
    "tar": tar.read,
}
_ENDINGS = {".npz": "npz", ".tar": "tar"} | dict.fromkeys((".txt", ".lst", ".csv", ".tsv"), "list")


def open_source(
    format: str,
    path: Path | str,
    *,
    train_list: Path | str = "",
    val_list: Path | str = "",
    test_list: Path | str = "",
) -> Source:
    """The images at `path`, read when they are asked for.

    Args:
        format: a name in READERS. "folder": PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE, also in folders below CLASS.
            "list": text files, see LIST_FORMAT. "idx": the folder of the MNIST family. "cifar10", "cifar100": the
            python archive or its folder. "npz": arrays. "tar": WebDataset archives. "digits": scikit-learn's, no path.
        train_list, val_list, test_list: the text files of "list"; "" where there is none.

    Raises:
        SourceError: a file is missing, damaged or of another format; for archives also when `splits` or `classes` of
            the source is first asked for.
    """
    lists = {"train": train_list, "val": val_list, "test": test_list}
    return open_place(format, Place(Path(path), {split: Path(file) for split, file in lists.items() if file}))


def open_place(format: str, place: Place) -> Source:
    """As `open_source`; of a folder with `allow_empty`, empty class folders keep their labels."""
    if format not in READERS:
        raise SourceError(f"unknown format {format!r}: choose one of {', '.join(READERS)}")
    try:
        if format != "digits" and not place.path.exists():
            raise SourceError(f"{place.path} does not exist")
        return READERS[format](place)
    except OSError as error:
        raise unreadable(error, place.path) from error


def guess_format(path: Path) -> str:
    """The format of what lies at `path`.

    Raises:
        SourceError: nothing is there, it cannot be read, or (UnknownFormatError) it is a file of no known kind.
    """
    try:
        if not path.exists():
            raise SourceError(f"{path} does not exist")
        if archive := cifar.guess(path):
            return archive
        if path.is_file():
            if re.search(r"\.(tgz|tar\.\w{2,4})$", path.name.lower()):
                raise SourceError(f"{path} is compressed: unpack it to a .tar of images and .cls files, or to folders")
            if path.suffix.lower() not in _ENDINGS:
                raise UnknownFormatError(f"{path}: unknown format, give --format, one of {', '.join(READERS)}")
            return _ENDINGS[path.suffix.lower()]
        if any(file.is_file() for pattern in idx.PATTERNS for file in path.glob(pattern)):
            return "idx"
        archives = any(next(path.glob(pattern), None) for pattern in ("*.tar", "train/*.tar"))
        return "tar" if archives and not folder.has_classes(path) else "folder"  # an archive may lie beside its images
    except OSError as error:
        raise unreadable(error, path) from error
