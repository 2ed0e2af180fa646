"""Readers of image sources, one a format. A new one is a file here and a line in READERS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import SourceError
from . import cifar, digits, folder, idx, lists, npz, tar
from .source import Place, Source, Split, survey_differences

__all__ = ["READERS", "Place", "Reader", "Source", "Split", "guess_format", "open_source", "survey_differences"]

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
        format: a name in READERS. "folder": PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE. "list": text files, a line
            `path/from/PATH label` for each image. "idx": the folder of the MNIST family. "cifar10", "cifar100": the
            python archive or its folder. "npz": arrays. "tar": WebDataset archives. "digits": scikit-learn's, no path.
        train_list, val_list, test_list: the text files of "list"; "" where there is none.

    Raises:
        SourceError: a file is missing, damaged or of another format; for archives also when `splits` or `classes` of
            the source is first asked for.
    """
    if format not in READERS:
        raise SourceError(f"unknown format {format!r}: choose one of {', '.join(READERS)}")
    if format != "digits" and not Path(path).exists():
        raise SourceError(f"{path} does not exist")
    lists = {"train": train_list, "val": val_list, "test": test_list}
    return READERS[format](Place(Path(path), {split: Path(file) for split, file in lists.items() if file}))


def guess_format(path: Path) -> str:
    """The format of what lies at `path`.

    Raises:
        SourceError: nothing is there, or it is a file of no known kind.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    if archive := cifar.guess(path):
        return archive
    if path.is_file():
        endings = {".npz": "npz", ".tar": "tar", ".txt": "list", ".lst": "list"}
        if path.suffix not in endings:
            raise SourceError(f"{path}: unknown format, give --format, one of {', '.join(READERS)}")
        return endings[path.suffix]
    patterns = {"*-idx3-ubyte*": "idx", "*.tar": "tar", "train/*.tar": "tar"}
    return next((name for pattern, name in patterns.items() if next(path.glob(pattern), None)), "folder")
