"""What a reader gives: splits of samples with labels, the classes' names, and a survey by which to know it again."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError
from ..writing import Samples

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Place:
    """Where a reader looks.

    Attributes:
        path: the folder or archive; "list": where the paths in the lists start.
        lists: "list": the text file of each split.
        class_index: "folder": a file of labels by class name, see `ffcv_writers.readers.folder.read_class_index`.
    """

    path: Path
    lists: Mapping[str, Path] = field(default_factory=dict)
    class_index: Path | None = None


@dataclass(frozen=True)
class Split:
    """N samples, read when they are asked for (an array is in memory), and their labels, int64 (N,)."""

    samples: Samples
    labels: np.ndarray


class Source:
    """Images with labels, in splits.

    Attributes:
        survey: what shows whether the source has changed, cheap and ready for JSON: "classes" and, for each of
            "splits", "counts" of images per class and a "digest" of names, byte sizes and labels; for archives, "files"
            with their sizes in bytes.
    """

    def __init__(self, survey: dict[str, Any], content: Callable[[], tuple[dict[str, Split], tuple[str, ...]]]) -> None:
        """
        Args:
            content: gives splits and classes; called when either is first wanted.
        """
        self.survey = survey
        self._content = functools.cache(content)

    @property
    def splits(self) -> dict[str, Split]:
        """By their names, "train", "val" and "test", those that there are; a source without splits is "train"."""
        return self._content()[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, by label."""
        return self._content()[1]


class Contents:
    """Encoded images, each read when it is asked for; `name` gives what messages call them."""

    def __init__(self, count: int, read: Callable[[int], bytes], name: Callable[[int], str]) -> None:
        self._count, self._read, self.name = count, read, name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int, /) -> bytes:
        return self._read(number)


def image_files(paths: Sequence[str], name: Callable[[int], str]) -> Contents:
    """Files as samples."""

    def read(number: int) -> bytes:
        with open(paths[number], "rb", buffering=0) as file:
            return file.read()

    return Contents(len(paths), read, name)


def file_source(
    root: Path, paths: Mapping[str, Sequence[str]], splits: dict[str, Split], classes: tuple[str, ...]
) -> Source:
    """A source of files below `root`, surveyed."""
    surveyed = {}
    for split, files in paths.items():
        digest, labels = hashlib.sha256(), splits[split].labels
        for path, label in zip(files, labels.tolist(), strict=True):
            try:
                size = os.stat(path).st_size
            except OSError:  # reading it will say so
                size = -1
            digest.update(os.fsencode(f"{path.removeprefix(str(root))}\0{size}\0{label}\n"))
        counts = np.bincount(labels, minlength=len(classes)).tolist()
        surveyed[split] = {"counts": counts, "digest": digest.hexdigest()}
    return Source({"classes": list(classes), "splits": surveyed}, lambda: (splits, classes))


def file_sizes(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The survey of an archive in these files.

    Raises:
        SourceError: a file cannot be looked at.
    """
    try:
        return {"files": {os.path.relpath(file, root): file.stat().st_size for file in files}}
    except OSError as error:
        raise SourceError(f"cannot read {error.filename}: {error.strerror}") from error


def array_split(images: np.ndarray, labels: np.ndarray, where: object) -> Split:
    """Images uint8 (N, H, W[, C]) and labels (N,) or (N, 1) as a split.

    Raises:
        SourceError: arrays of another type or shape.
    """
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise SourceError(
            f"{where}: need uint8 images (N, H, W, C) and N integer labels, "
            f"got {images.dtype} {images.shape} and {labels.dtype} {labels.shape}"
        )
    if len(images) != len(labels):
        raise SourceError(f"{where}: {len(images)} images but {len(labels)} labels")
    return Split(images, labels.astype(np.int64))


def numbered(splits: dict[str, Split]) -> tuple[str, ...]:
    """Names of classes that have none: their numbers, up to the largest label of the training split."""
    labels = next(iter(splits.values())).labels if "train" not in splits else splits["train"].labels
    return tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def survey_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed between two surveys of a source, a line each; [] if nothing has."""
    lines = []
    old, new = before.get("classes", []), now.get("classes", [])
    lines += [f"class {name!r} is gone" for name in old if name not in set(new)]
    lines += [f"class {name!r} is new" for name in new if name not in set(old)]
    for what, key in (("split", "splits"), ("file", "files")):
        lines += [f"the {what} {name} is gone" for name in before.get(key, {}) if name not in now.get(key, {})]
        lines += [f"the {what} {name} is new" for name in now.get(key, {}) if name not in before.get(key, {})]
    for name, size in before.get("files", {}).items():
        if now.get("files", {}).get(name, size) != size:
            lines.append(f"the file {name} has {now['files'][name]} bytes, not {size}")
    for split in (name for name in before.get("splits", {}) if name in now.get("splits", {})):
        one, other = before["splits"][split], now["splits"][split]
        counts = dict(zip(new, other["counts"], strict=False))
        changes = {name: counts[name] - n for name, n in zip(old, one["counts"], strict=False) if name in counts}
        lines += [
            f"{split}: {abs(n)} image{'s' * (abs(n) > 1)} {'more' if n > 0 else 'fewer'} in class {name!r}"
            for name, n in changes.items()
            if n
        ]
        if old == new and not any(changes.values()) and one["digest"] != other["digest"]:
            lines.append(f"{split}: other files or sizes")
    return lines
