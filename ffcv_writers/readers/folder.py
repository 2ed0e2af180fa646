"""Images as files in a folder for each class: SPLIT/CLASS/FILE, or CLASS/FILE without splits."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .source import EXTENSIONS, SPLITS, Place, Source, Split, file_source, image_files

_log = logging.getLogger(__name__)


def read(place: Place) -> Source:
    """Classes are the folders of the training split, sorted by name."""
    root = place.path
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder")
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    folders = {split: folder for split, folder in folders.items() if _class_folders(folder)} or {"train": root}
    first = next(iter(folders.values()))
    classes = _class_folders(first)
    if not classes:
        raise SourceError(f"{first} has no class folders: an image folder needs CLASS/FILE or SPLIT/CLASS/FILE")
    paths, splits = {}, {}
    for split, folder in folders.items():
        odd = set(_class_folders(folder)).symmetric_difference(classes)
        if odd:
            raise SourceError(f"{folder} and {first} must have the same classes, but only one has {min(odd)}")
        paths[split], counts = _files(folder, classes)
        labels = np.repeat(np.arange(len(classes)), counts)
        splits[split] = Split(image_files(paths[split], paths[split].__getitem__), labels)
    return file_source(root, paths, splits, classes)


def _class_folders(folder: Path) -> tuple[str, ...]:
    """The folders in `folder`, sorted by name, without the hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _files(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """The image files FOLDER/CLASS/FILE, sorted within a class, and how many each class has. Hidden files and, with a
    warning, those that are not named like an image are skipped.

    Raises:
        SourceError: a class without an image.
    """
    paths: list[str] = []
    counts, skipped = [], 0
    for name in classes:
        with os.scandir(folder / name) as entries:
            files = [e.path for e in entries if e.is_file() and not e.name.startswith(".")]
        images = sorted(path for path in files if path.lower().endswith(EXTENSIONS))
        if not images:
            raise SourceError(f"class {name} has no image in {folder / name}: add some or remove the class")
        paths += images
        counts.append(len(images))
        skipped += len(files) - len(images)
    if skipped:
        _log.warning("%s: skipped %d file(s) not named like an image", folder, skipped)
    return paths, counts
