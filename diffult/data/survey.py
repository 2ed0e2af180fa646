"""What a set of images is like, before a run of it is planned: classes, counts, sizes, colour."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffult.data.packing import check_labels, sample_name
from diffult.errors import UserError
from ffcv_writers import SourceError
from ffcv_writers.decoding import centre_square, decode_rgb
from ffcv_writers.errors import UnknownFormatError
from ffcv_writers.readers import Split, guess_format, open_source

# Files that are opened, for their size and colour; files that are decoded, for the time that takes; seconds for each.
_HEADERS, _DECODED, _SECONDS = 300, 32, 2.0
_GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")  # Pillow's modes that have no colours
_COLOURFUL = 3.0  # levels of 255 between a pixel's channels, on average: grey saved as colour JPEG has below 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """A set of images, looked at but not decoded as a whole.

    Attributes:
        place: the settings of section `data` that name it: source, path, lists.
        classes: the classes' names, by label.
        counts: int64 [C], images of each class in the training split, nothing taken out yet.
        val, test: images in these splits; None where the source has no such split.
        sides: int64 [n, 2], height and width in pixels of some training images; of all alike where they are arrays.
        arrays: whether they are arrays, which cannot be scaled, and not files.
        colour: whether any of those looked at has colours.
        seconds_per_image: to read, decode and scale one, on one core.
    """

    place: dict[str, str]
    classes: tuple[str, ...]
    counts: np.ndarray
    val: int | None
    test: int | None
    sides: np.ndarray
    arrays: bool
    colour: bool
    seconds_per_image: float


def locate(path: Path) -> dict[str, str]:
    """The settings of section `data` for the images at `path`, their kind guessed from its name and what lies there.

    A folder is one of class folders, or of train, val and test with class folders, of .tar or of IDX files, or CIFAR's.
    A file is .npz, .tar, CIFAR's archive, or a list; beside a list called train in its name, those called test and val
    are taken too, and its paths are relative to its folder.

    Raises:
        UserError: nothing is there, or a file of no known kind.
    """
    path = path.expanduser().absolute()
    try:
        source = guess_format(path)
    except UnknownFormatError:
        raise UserError(
            f"--data {path}: neither a folder of images nor a .npz, a .tar or a list (.txt); a file of another ending "
            "can be renamed"
        ) from None
    except SourceError as error:
        raise UserError(f"--data {error}") from None
    if source != "list":
        return {"source": source, "path": str(path)}
    lists = {"train_list": path}
    if "train" in path.name:
        lists |= {f"{split}_list": path.with_name(path.name.replace("train", split)) for split in ("val", "test")}
    return {"source": "list", "path": str(path.parent)} | {k: str(file) for k, file in lists.items() if file.is_file()}


def take_survey(path: Path) -> Survey:
    """Opens the source at `path` and looks at some hundred of its images, in a few seconds at the most.

    Raises:
        UserError: no images of known layout, labels that do not fit, one class alone, or arrays that are not square.
    """
    place = locate(path)
    try:
        options = dict(place)
        source = open_source(options.pop("source"), options.pop("path"), **options)
        check_labels(source, str(path))
    except ValueError as error:
        raise UserError(f"{error}{_hint(path)}") from error
    if len(source.classes) < 2:
        raise UserError(
            f"{path}: holds one class alone, {source.classes[0]!r}; a classifier needs two or more{_hint(path)}"
        )
    train = source.splits["train"]
    counts = np.bincount(train.labels, minlength=len(source.classes))
    arrays = isinstance(train.samples, np.ndarray)
    sides, colour, seconds = _of_arrays(train.samples, path) if arrays else _of_files(train, path)
    sizes = {name: len(split.labels) for name, split in source.splits.items()}
    return Survey(
        place, source.classes, counts, sizes.get("val"), sizes.get("test"), sides, arrays, colour, seconds
    )  # fmt: skip


def _hint(path: Path) -> str:
    """To try the list that lies in a folder, "" where there is none."""
    lists = [file for file in path.expanduser().glob("*.txt") if "train" in file.name] if path.is_dir() else []
    return f"; should {lists[0].name} list the images, give --data {lists[0]}" if lists else ""


def _of_arrays(images: Any, path: Path) -> tuple[np.ndarray, bool, float]:
    _, height, width, channels = images.shape
    if height != width or channels not in (1, 3):
        raise UserError(f"{path}: images of {height}x{width} pixels and {channels} channels; need squares of 1 or 3")
    return np.array([[height, width]]), channels == 3, 1e-5


def _of_files(split: Split, path: Path) -> tuple[np.ndarray, bool, float]:
    """Sides, colour and seconds of images of many classes, common and rare."""
    sides, suspects, failures = [], [], []
    begun = time.perf_counter()
    for number in _spread(split.labels, _HEADERS).tolist():
        try:
            with Image.open(io.BytesIO(_content(split, number))) as image:
                sides.append((image.height, image.width))
                if image.mode not in _GREY:
                    suspects.append(number)
        except Exception as error:  # whatever arbitrary bytes lead to: packing names each file
            unknown = isinstance(error, UnidentifiedImageError)  # whose message names a buffer
            reason = "not an image in a known format" if unknown else " ".join(str(error).split())
            failures.append((number, f"{sample_name(split.samples, number)}: {reason}"))
        if time.perf_counter() - begun > _SECONDS:
            break
    if not sides:
        raise UserError(f"{path}: none of the {len(failures)} images looked at can be read ({min(failures)[1]})")
    if failures:
        count, seen, first = len(failures), len(failures) + len(sides), min(failures)[1]
        _log.warning("%s: %d of the %d images looked at cannot be read, such as %s", path, count, seen, first)
    return np.array(sides), _any_colour(split, suspects), _seconds(split)


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """So many numbers of samples, fewer only of a smaller set: half spread over the images, half over the classes, in
    random order."""
    order = np.argsort(labels, kind="stable")
    firsts = order[np.searchsorted(labels[order], np.unique(labels))]
    evenly = [np.linspace(0, len(part) - 1, count // 2).astype(int) for part in (order, firsts)]
    return np.random.default_rng(0).permutation(np.union1d(order[evenly[0]], firsts[evenly[1]]))


def _any_colour(split: Split, numbers: list[int]) -> bool:
    """Whether one of these images has colours; JPEGs are decoded at an eighth of their size."""
    begun = time.perf_counter()
    for number in numbers:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(_content(split, number))) as image:
            image.draft("RGB", (64, 64))
            small = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BOX))
            if float(np.ptp(small, axis=2).mean()) > _COLOURFUL:
                return True
        if time.perf_counter() - begun > _SECONDS:
            break
    return False


def _seconds(split: Split) -> float:
    """To read, decode and scale an image."""
    begun, decoded = time.perf_counter(), 0
    for number in np.random.default_rng(0).permutation(len(split.labels))[:_DECODED].tolist():
        with contextlib.suppress(ValueError):
            pixels = decode_rgb(_content(split, number))
            centre_square(pixels, min(64, *pixels.shape[:2]))
            decoded += 1
        if time.perf_counter() - begun > _SECONDS:
            break
    return (time.perf_counter() - begun) / max(decoded, 1)


def _content(split: Split, number: int) -> bytes:
    content = split.samples[number]
    assert isinstance(content, bytes)
    return content
