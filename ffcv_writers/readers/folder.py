"""Images as files in a folder for each class: SPLIT/CLASS/FILE, or CLASS/FILE without splits."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .source import EXTENSIONS, SPLITS, Place, Source, Split, file_source, image_files

_log = logging.getLogger(__name__)


def read(place: Place) -> Source:
    """Classes are the folders of the training split, sorted by name; a class index renumbers them."""
    if not place.path.is_dir():
        raise SourceError(f"{place.path} is not a folder")
    folders = {split: place.path / split for split in SPLITS if (place.path / split).is_dir()}
    folders = {split: folder for split, folder in folders.items() if _class_folders(folder)} or {"train": place.path}
    first = next(iter(folders.values()))
    classes = _class_folders(first)
    if not classes:
        raise SourceError(f"{first} has no class folders: an image folder needs CLASS/FILE or SPLIT/CLASS/FILE")
    label_of = np.arange(len(classes))
    if place.class_index is not None:
        known = read_class_index(place.class_index)
        unknown = [name for name in classes if name not in known]
        if unknown:
            raise SourceError(f"{place.class_index} has no class {unknown[0]}, which {first} has")
        label_of = np.array([known[name] for name in classes])
    paths, splits = {}, {}
    for split, folder in folders.items():
        odd = set(_class_folders(folder)).symmetric_difference(classes)
        if odd:
            raise SourceError(f"{folder} and {first} must have the same classes, but only one has {min(odd)}")
        paths[split], counts = _files(folder, classes)
        labels = np.repeat(label_of, counts).astype(np.int64)
        splits[split] = Split(image_files(paths[split], paths[split].__getitem__), labels)
    if place.class_index is not None:
        classes = tuple(sorted(known, key=lambda name: known[name]))
    return file_source(place.path, paths, splits, classes)


def _class_folders(folder: Path) -> tuple[str, ...]:
    """The folders in `folder`, sorted by name, without the hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _files(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """The image files FOLDER/CLASS/FILE, sorted within a class, and how many each class has. Hidden files and, with a
    warning, those that are not named like an image are passed over.

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
    return paths, counts


def read_class_index(path: Path) -> dict[str, int]:
    """Labels of classes by their names.

    Args:
        path: JSON, {"0": ["n01440764", "tench"], ...} as torchvision and Keras have it or {"n01440764": 0, ...}; or
            text, a class in each line, its name the first word (synset_words.txt).

    Raises:
        SourceError: anything else, or a class twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            pairs = [
                (value[0], int(key)) if isinstance(value, list) else (key, int(value))
                for key, value in json.loads(text).items()
            ]
        else:
            pairs = [(line.split()[0], n) for n, line in enumerate(filter(str.strip, text.splitlines()))]
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise SourceError(f"{path} is not a class index: {error}") from error
    if not pairs or len(dict(pairs)) != len(pairs) or min(label for _, label in pairs) < 0:
        raise SourceError(f"{path} is not a class index: it has no class, one twice, or a negative label")
    return dict(pairs)
