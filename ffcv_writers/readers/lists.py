"""Images as files that text files list, a line `relative/path label` each (the format of ImageNet-LT)."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .source import Place, Source, Split, file_source, image_files, numbered


def read(place: Place) -> Source:
    """Classes are named by their labels. Paths may hold spaces, and are opened only when an image is read."""
    if not place.lists:
        raise SourceError("a source of lists needs a train list")
    if not place.path.is_dir():
        raise SourceError(f"{place.path} is not a folder")
    paths, splits = {}, {}
    for split, file in place.lists.items():
        paths[split], labels, lines = _read_list(file, place.path)

        def name(i: int, file: Path = file, paths: list[str] = paths[split], lines: array = lines) -> str:
            return f"{paths[i]}, {file.name}:{lines[i]}"

        splits[split] = Split(image_files(paths[split], name), labels)
    return file_source(place.path, paths, splits, numbered(splits))


def _read_list(path: Path, root: Path) -> tuple[list[str], np.ndarray, array]:
    """Paths, labels int64 (N,) and line numbers of a list without its empty lines."""
    paths, labels, lines = [], array("q"), array("q")
    try:
        # surrogateescape: a file name need not be UTF-8, and goes back to the system as the bytes it was
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                parts = line.rsplit(maxsplit=1)
                if not parts:
                    continue
                if len(parts) != 2:
                    raise SourceError(f"{path}:{number}: a line must be 'relative/path label', not {line.strip()!r}")
                name, label = parts
                if not (label.isascii() and label.isdecimal() and len(label) < 7):
                    raise SourceError(f"{path}:{number}: the label is not an integer from 0 to 999999 but {label!r}")
                paths.append(os.path.join(root, name))
                labels.append(int(label))
                lines.append(number)
    except OSError as error:
        raise SourceError(f"cannot read the list {path}: {error.strerror}") from error
    if not paths:
        raise SourceError(f"the list {path} has no lines: it needs 'relative/path label' for each image")
    return paths, np.array(labels, dtype=np.int64), lines
