"""What a reader gives: splits of samples with labels, the classes' names, and a survey that shows later changes."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError
from ..writing import Samples
from .labels import as_labels

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Place:
    """Where a reader looks: the folder or archive, for "list" the text file of each split, and for "folder" whether a
    class may have no image."""

    path: Path
    lists: Mapping[str, Path] = field(default_factory=dict)
    allow_empty: bool = False


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
        """`content` gives splits and classes; it is called when either is first wanted."""
        self.survey = survey
        self._content = functools.cache(functools.partial(_read, content))

    @property
    def splits(self) -> dict[str, Split]:
        """Those of "train", "val" and "test" that there are; a source without splits is "train"."""
        return self._content()[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, by label."""
        return self._content()[1]


def _read(content: Callable[[], tuple[dict[str, Split], tuple[str, ...]]]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """What `content` gives. A file that the system does not give is a SourceError."""
    try:
        return content()
    except OSError as error:
        raise unreadable(error) from error


class Contents:
    """Encoded images, each read when it is asked for; `name` gives what messages call them, `paths` the file of each
    where it has one of its own."""

    def __init__(
        self, count: int, read: Callable[[int], bytes], name: Callable[[int], str], paths: Sequence[str] = ()
    ) -> None:
        self._count, self._read, self.name, self.paths = count, read, name, paths

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int, /) -> bytes:
        return self._read(number)


def image_files(paths: Sequence[str], name: Callable[[int], str]) -> Contents:
    """Files as samples."""
    return Contents(len(paths), lambda number: _file_bytes(paths[number]), name, paths)


def _file_bytes(path: str) -> bytes:
    """A file's content. Raises OSError, also of a pipe or a device, which may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", path)
    return Path(path).read_bytes()


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
            except OSError:  # reported when it is read
                size = -1
            digest.update(os.fsencode(f"{path.removeprefix(str(root))}\0{size}\0{label}\n"))
        counts = np.bincount(labels, minlength=len(classes)).tolist()
        surveyed[split] = {"counts": counts, "digest": digest.hexdigest()}
    return Source({"classes": list(classes), "splits": surveyed}, lambda: (splits, classes))


def unreadable(error: OSError, what: object = "") -> SourceError:
    """The error of a file or folder that the system does not give, `what` where the system does not name it."""
    return SourceError(f"cannot read {error.filename or what or 'the source'}: {error.strerror or error}")


def file_sizes(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The survey of an archive in these files."""
    return {"files": {os.path.relpath(file, root): file.stat().st_size for file in files}}


def array_split(images: np.ndarray, labels: np.ndarray, where: object) -> Split:
    """Images uint8 (N, H, W[, C]) with C 1 or 3 and labels, see `as_labels`, as a split.

    Raises:
        SourceError: arrays of another type or shape, no images, or a label that is none; its row is named.
    """
    labels = as_labels(labels, where)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0:
        raise SourceError(
            f"{where}: need uint8 images (N, height, width, 1 or 3 channels), got {images.dtype} {images.shape}"
        )
    if len(images) != len(labels):
        raise SourceError(f"{where}: {len(images)} images but {len(labels)} labels")
    return Split(images, labels)


def numbered(splits: dict[str, Split]) -> tuple[str, ...]:
    """Names of classes that have none: their numbers, up to the largest label of the training split."""
    labels = splits.get("train", next(iter(splits.values()))).labels
    return tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def survey_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed between two surveys of a source, a line each; [] if nothing has."""
    nothing: dict[str, Any] = {"classes": [], "splits": {}, "files": {}}
    before, now = nothing | before, nothing | now
    lines = []
    for key, what in (("classes", "class {!r}"), ("splits", "the split {}"), ("files", "the file {}")):
        old, new = dict.fromkeys(before[key]), dict.fromkeys(now[key])
        lines += [f"{what.format(name)} is gone" for name in old if name not in new]
        lines += [f"{what.format(name)} is new" for name in new if name not in old]
    for name, size in before["files"].items():
        if now["files"].get(name, size) != size:
            lines.append(f"the file {name} has {now['files'][name]} bytes, not {size}")
    for split in (name for name in before["splits"] if name in now["splits"]):
        one, other = before["splits"][split], now["splits"][split]
        counts = dict(zip(now["classes"], other["counts"], strict=False))
        then = zip(before["classes"], one["counts"], strict=False)
        changes = {name: counts[name] - n for name, n in then if counts.get(name, n) != n}
        lines += [
            f"{split}: {abs(n)} image{'s' * (abs(n) > 1)} {'more' if n > 0 else 'fewer'} in class {name!r}"
            for name, n in changes.items()
        ]
        if before["classes"] == now["classes"] and not changes and one["digest"] != other["digest"]:
            lines.append(f"{split}: other files or sizes")
    return lines
