"""Images as files in a folder for each class: SPLIT/CLASS/FILE, or CLASS/FILE without splits."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np

from ..errors import SourceError, counted
from .source import EXTENSIONS, SPLITS, Place, Source, Split, file_source, image_files

_log = logging.getLogger(__name__)
_SPLIT_NAMES = {name: name for name in SPLITS} | {  # what the folders of splits are called, in any case
    "training": "train", "valid": "val", "validation": "val", "testing": "test",
}  # fmt: skip


def read(place: Place) -> Source:
    """Classes are the folders of the training split, sorted by name; their images lie in them or in folders below, as
    torchvision's ImageFolder finds them. What is passed over is counted in a warning."""
    root = place.path
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder")
    folders = _split_folders(root)
    if folders:
        _warn_of_strays(root, {folder.name for folder in folders.values()}, "split")
    folders = folders or {"train": root}
    first = folders.get("train") or next(iter(folders.values()))
    classes = _class_folders(first)
    _check_classes(first, classes)
    paths, splits = {}, {}
    for split, folder in folders.items():
        odd = {*_class_folders(folder)}.symmetric_difference(classes)
        if odd:
            has, lacks = (folder, first) if (folder / min(odd)).is_dir() else (first, folder)
            raise SourceError(
                f"{folder} and {first} must have the same classes, but only one has {min(odd)}: it is in {has}, not in "
                f"{lacks}" + (f"; {len(odd)} classes differ" if len(odd) > 1 else "")
            )
        _warn_of_strays(folder, {*classes} | ({f.name for f in folders.values()} if folder == root else set()), "class")
        paths[split], counts = _files(folder, classes, place.allow_empty)
        labels = np.repeat(np.arange(len(classes)), counts)
        splits[split] = Split(image_files(paths[split], paths[split].__getitem__), labels)
    return file_source(root, paths, splits, tuple(map(as_utf8, classes)))


def has_classes(root: Path) -> bool:
    """Whether there are class folders, in `root` or in its splits."""
    return bool(_split_folders(root)) or any(name.lower() not in _SPLIT_NAMES for name in _class_folders(root))


def _class_folders(folder: Path) -> tuple[str, ...]:
    """The folders in `folder`, sorted by name, without the hidden ones and what macOS puts into a .zip."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if _is_folder(e) and not e.name.startswith(".") and e.name != "__MACOSX"]
    return tuple(sorted(names, key=as_utf8))


def as_utf8(name: str) -> str:
    """What the system gave as text in the encoding of the locale, as UTF-8 instead: the same under any locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _split_folders(root: Path) -> dict[str, Path]:
    """The splits' folders that have class folders."""
    found: dict[str, Path] = {}
    for name in _class_folders(root):
        split = _SPLIT_NAMES.get(name.lower())
        if split and _class_folders(root / name):
            if split in found:
                raise SourceError(f"{root}: {found[split].name} and {name} are both the {split} split: remove one")
            found[split] = root / name
    return {split: found[split] for split in SPLITS if split in found}


def _check_classes(folder: Path, classes: tuple[str, ...]) -> None:
    """Raises SourceError unless these can be classes. Warns where numbers are not in their order."""
    if not classes:
        raise SourceError(f"{folder} has no class folders: an image folder needs CLASS/FILE or SPLIT/CLASS/FILE")
    splits = [name for name in classes if name.lower() in _SPLIT_NAMES]
    if len(splits) > 1 or len(splits) == len(classes):
        raise SourceError(
            f"{folder}: {', '.join(splits)} is named like a split but holds no class folders: an image folder needs "
            "CLASS/FILE or SPLIT/CLASS/FILE"
        )
    numbers = [int(name) for name in classes if name.isascii() and name.isdecimal() and len(name) < 10]
    if len(numbers) == len(classes) and numbers != sorted(numbers):
        label = next(i for i, number in enumerate(numbers) if number != sorted(numbers)[i])
        _log.warning(
            "%s: the classes' numbers are sorted as text, as torchvision does: class %s has the label %d",
            *(folder, classes[label], label),
        )


def _files(folder: Path, classes: tuple[str, ...], allow_empty: bool) -> tuple[list[str], list[int]]:
    """The images of each class, one class after another, and how many each has. What is skipped is counted and logged.

    Raises:
        SourceError: a class without an image, unless that is allowed.
    """
    paths: list[str] = []
    counts, empty, nested = [], [], 0
    skipped: Counter[str] = Counter()
    for name in classes:
        mine: Counter[str] = Counter()
        images = images_below(os.path.join(folder, name), mine)
        if not images:
            seen = f" but {in_words(mine)}" if mine else ""
            empty.append(f"class {name} has no image in {folder / name}{seen}: add some or remove the class")
        paths += images
        counts.append(len(images))
        nested += sum(os.path.dirname(path) != os.path.join(folder, name) for path in images)
        skipped += mine
    if empty and not (allow_empty and paths):
        raise SourceError(empty[0] + (f"; {len(empty)} classes have none" if len(empty) > 1 else ""))
    if skipped:
        _log.warning("%s: skipped %s: %s", folder, counted(skipped.total(), "file(s)"), in_words(skipped))
    if nested:
        _log.warning("%s: %d of %d images lie in folders below those of their classes", folder, nested, len(paths))
    return paths, counts


def images_below(folder: str, skipped: Counter[str]) -> list[str]:
    """The image files in a folder and those below it, folder after folder, each sorted. Counts the others."""
    found: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        place, above = waiting.pop()
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in above:
            skipped["link(s) to a folder around them"] += 1
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                if _is_folder(entry) and not entry.name.startswith("."):
                    waiting.append((entry.path, above | {(status.st_dev, status.st_ino)}))
                elif reason := _reason_to_skip(entry):
                    skipped[reason] += 1
                elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                    found.append(entry.path)
    return sorted(found, key=os.path.split)


def _reason_to_skip(entry: os.DirEntry[str]) -> str:
    """Why an entry that is no folder is no image; "" of an image, and of hidden files that nobody takes for one."""
    image = entry.name.lower().endswith(EXTENSIONS)
    if entry.name.startswith("."):
        return "hidden" if image and not entry.name.startswith("._") else ""  # ._NAME: macOS, beside each NAME
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "dangling link(s)"
    if not (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()):
        return "neither file nor folder"
    return "" if image else f"not named like an image ({os.path.splitext(entry.name)[1].lower() or 'no ending'})"


def _has_image(folder: str) -> bool:
    try:
        return any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))
    except PermissionError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def in_words(counts: Counter[str]) -> str:
    shown = ", ".join(counted(count, reason) for reason, count in counts.most_common(6))
    return shown + (", ..." if len(counts) > 6 else "")


def _warn_of_strays(folder: Path, read: set[str], kind: str) -> None:
    """Warns of images, links and folders in `folder` that are in none of the folders that are read."""
    strays: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in read or entry.name.startswith("."):
                hidden = entry.name.startswith(".") and _is_folder(entry) and _has_image(entry.path)
                strays["hidden folder(s) of images"] += hidden
            elif _is_folder(entry):
                strays["folder(s)"] += entry.name != "__MACOSX"
            elif not os.path.exists(entry.path):
                strays["dangling link(s)"] += 1
            elif entry.name.lower().endswith(EXTENSIONS):
                strays["image(s)"] += 1
    if strays := +strays:
        _log.warning("%s: not read, as in no %s folder: %s", folder, kind, in_words(strays))
