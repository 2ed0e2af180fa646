"""Arrays in a .npz file: SPLIT_images and SPLIT_labels (as MedMNIST has them), or images and labels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .source import SPLITS, Place, Source, Split, array_split, file_sizes, numbered


def read(place: Place) -> Source:
    """Classes are named by the array `classes`, if there is one and of strings, else by their labels."""
    path = place.path

    def content() -> tuple[dict[str, Split], tuple[str, ...]]:
        arrays = _arrays(path)
        pairs = {split: (f"{split}_images", f"{split}_labels") for split in SPLITS}
        pairs = {split: pair for split, pair in pairs.items() if {*pair} & {*arrays}} or {"train": ("images", "labels")}
        missing = [name for pair in pairs.values() for name in pair if name not in arrays]
        if len(missing) == 2 and missing[0] == "images":
            raise SourceError(
                f"{path} has no arrays images and labels, nor train_images and train_labels, but {', '.join(arrays)}"
            )
        if missing:
            raise SourceError(f"{path} has no array {missing[0]}, but {', '.join(arrays)}")
        splits = {split: array_split(arrays[one], arrays[two], path) for split, (one, two) in pairs.items()}
        return splits, _classes(arrays, splits, path)

    return Source(file_sizes(path.parent, [path]), content)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name; those that are not for this are empty."""
    wanted = {"images", "labels", "classes"} | {f"{s}_{kind}" for s in SPLITS for kind in ("images", "labels")}
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
            return {name: _array(file, name) if name in wanted else np.empty(0) for name in names}
    except PermissionError:
        raise
    except Exception as error:  # whatever arbitrary bytes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot read {path}: {reason:.200}; it must be a .npz file of arrays") from error


def _array(file: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array. numpy.load reads no further than its header says, and so misses the checksum at the end."""
    with file.open(f"{name}.npy") as content:
        array = np.lib.format.read_array(content, allow_pickle=False)
        if content.read(1):
            raise ValueError(f"{name} has more values than its header says")
        return array


def _classes(arrays: dict[str, np.ndarray], splits: dict[str, Split], path: Path) -> tuple[str, ...]:
    """The classes' names."""
    names = arrays.get("classes")
    if names is None or names.dtype.kind != "U":
        return numbered(splits)
    if names.ndim != 1 or len({*names.tolist()}) != len(names):
        raise SourceError(f"{path}: classes must be different names, one a label, not {names.dtype} {names.shape}")
    largest = max(int(split.labels.max()) for split in splits.values())
    if largest >= len(names):
        raise SourceError(f"{path}: the label {largest} has no name, classes has {len(names)}")
    return tuple(names.tolist())
