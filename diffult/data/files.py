"""Images as files: a folder for each class, or text files that list them (the format of ImageNet-LT)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffult.data.image_set import FileImages, Source
from diffult.errors import UserError
from ffcv_writers.errors import SourceError
from ffcv_writers.files import class_folders, read_folder, read_list


def load_folder(root: Path, image_size: int) -> Source:
    """The splits ROOT/train/CLASS/FILE, ROOT/test/CLASS/FILE and, if it is there, ROOT/val/CLASS/FILE.

    Classes are sorted by name, the files of a class as well. Hidden names are passed over.

    Raises:
        UserError: a split is missing, has other classes than the training split, or a class without an image.
    """
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise UserError(f"no folder {root / split}: an image folder needs train/CLASS/FILE and test/CLASS/FILE")
    classes = class_folders(root / "train")
    if not classes:
        raise UserError(f"{root / 'train'} has no class folders: an image folder needs train/CLASS/FILE")
    val = _load_split(root / "val", classes, image_size) if (root / "val").is_dir() else None
    return Source(
        _load_split(root / "train", classes, image_size), _load_split(root / "test", classes, image_size), val
    )


def _load_split(folder: Path, classes: tuple[str, ...], image_size: int) -> FileImages:
    odd = set(class_folders(folder)).symmetric_difference(classes)
    if odd:
        raise UserError(f"{folder} and the train folder must have the same classes, but only one has {min(odd)}")
    with _told():
        return FileImages(*read_folder(folder, classes), classes, image_size)


def load_list(root: Path, train_list: str, test_list: str, val_list: str, image_size: int) -> Source:
    """The splits that text files list, a line `relative/path label` for each image.

    Labels are 0..C-1, C being one more than the largest training label; classes are named by their number.
    Paths are relative to `root`, may hold spaces, and are opened only when an image is read.

    Args:
        root: the folder that the paths in the lists start from.
        train_list, test_list, val_list: the text files; "" for `val_list` means that there is none.
        image_size: height and width in pixels.

    Raises:
        UserError: a list cannot be read, a line has another form or a label out of range (its file and number
            are named), or a class has no image in one of the lists.
    """
    if not root.is_dir():
        raise UserError(f"data.path {root} is not a folder")
    train = _read_list(train_list)
    class_count = int(train[1].max()) + 1
    if class_count > len(train[1]):  # before names are made for two thousand million classes
        missing = np.setdiff1d(np.arange(len(train[1])), train[1])[0]
        raise UserError(f"{train_list}: class {missing} has no image, but labels go up to {class_count - 1}")
    classes = tuple(str(label) for label in range(class_count))

    def split(path: str, content: tuple[list[str], np.ndarray, np.ndarray]) -> FileImages:
        names, labels, lines = content
        outside = np.flatnonzero(labels >= class_count)
        if len(outside):
            i = outside[0]
            raise UserError(f"{path}:{lines[i]}: label {labels[i]} is not in 0..{class_count - 1}, the training labels")
        empty = np.flatnonzero(np.bincount(labels, minlength=class_count) == 0)
        if len(empty):
            raise UserError(f"{path}: class {empty[0]} has no image, but labels go up to {class_count - 1}")
        return FileImages([os.path.join(root, name) for name in names], labels, classes, image_size, path, lines)

    val = split(val_list, _read_list(val_list)) if val_list else None
    return Source(split(train_list, train), split(test_list, _read_list(test_list)), val)


def _read_list(path: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    with _told():
        return read_list(path)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        raise UserError(str(error)) from None
