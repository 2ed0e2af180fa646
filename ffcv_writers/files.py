"""Images as files: a folder for each class, or text files that list them (the format of ImageNet-LT)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from .errors import SourceError

_log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def class_folders(folder: Path) -> tuple[str, ...]:
    """The folders in `folder`, sorted by name, without the hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def read_folder(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """The image files FOLDER/CLASS/FILE, sorted within a class, and their labels, int64 (N,). Hidden files and, with
    a warning, those that are not named like an image are passed over.

    Raises:
        SourceError: a class without an image.
    """
    paths: list[str] = []
    counts, passed_over = [], 0
    for name in classes:
        with os.scandir(folder / name) as entries:
            files = [e.path for e in entries if e.is_file() and not e.name.startswith(".")]
        images = sorted(path for path in files if path.lower().endswith(EXTENSIONS))
        if not images:
            raise SourceError(f"class {name} has no image in {folder / name}: add some or remove the class")
        paths += images
        counts.append(len(images))
        passed_over += len(files) - len(images)
    if passed_over:
        _log.warning("%s: passed over %d files that are not named like an image", folder, passed_over)
    return paths, np.repeat(np.arange(len(classes)), counts)


def read_list(path: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Relative paths, labels int64 (N,) and line numbers int64 (N,) of a list without its empty lines."""
    names, labels, lines = [], [], []
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
                if not (label.isascii() and label.isdecimal() and len(label) < 10):
                    raise SourceError(f"{path}:{number}: the label is not an integer from 0 but {label!r}")
                names.append(name)
                labels.append(int(label))
                lines.append(number)
    except OSError as error:
        raise SourceError(f"cannot read the list {path}: {error.strerror}") from error
    if not names:
        raise SourceError(f"the list {path} has no lines: it needs 'relative/path label' for each image")
    return names, np.array(labels, dtype=np.int64), np.array(lines, dtype=np.int64)
