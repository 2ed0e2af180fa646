"""A run's images, decoded once into train.beton, val.beton and test.beton; then the source is not needed any more."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffult.data.config import FASHION_MNIST_PATH, DataConfig
from diffult.data.pixels import file_transform
from diffult.data.splits import choose_splits
from diffult.engine.progress import progress_bar
from diffult.errors import UserError
from diffult.runs.files import read_json, write_json
from ffcv_writers import ImageSet, SampleError, Samples, SourceError, available_cores, open_set, write
from ffcv_writers.duplicates import duplicate_lines
from ffcv_writers.errors import counted
from ffcv_writers.readers import Source, Split, open_source, survey_differences

_log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
_RECORD = "packed.json"


@dataclass(frozen=True)
class Packed:
    """A run's packed images.

    Attributes:
        classes: the classes' names, by label.
        counts: int64 (C,), training images of each class.
        train, val, test: the images; `val` is None if there are none.
        fingerprint: of the training file's content.
        survey: of the source, see `ffcv_writers.readers.Source`.
    """

    classes: tuple[str, ...]
    counts: np.ndarray
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    fingerprint: str
    survey: dict[str, Any]


class _Chosen:
    """The samples of these numbers."""

    def __init__(self, samples: Samples, numbers: np.ndarray) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int, /) -> np.ndarray | bytes:
        return self._samples[int(self._numbers[number])]

    def name(self, number: int) -> str:
        return sample_name(self._samples, int(self._numbers[number]))


def sample_name(samples: Samples, number: int) -> str:
    """What messages call it."""
    return samples.name(number) if hasattr(samples, "name") else f"image {number} of the source"


def open_data(config: DataConfig) -> Source:
    """The configured source, checked as far as possible without decoding.

    Raises:
        UserError: a path is missing, a file is not of its format, a label is out of range, a class is empty, or the
            images have another size or other channels than configured.
    """
    try:
        source = _open(config)
        _check(config, source)
    except OSError as error:
        raise UserError(f"data.path: cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return source


def pack_images(
    config: DataConfig, source: Source, folder: Path, numbers: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Writes the splits of a run to FOLDER/{train,val,test}.beton on all cores; on an error none of them is left.

    The samples' `index` is their number in the source's split.

    Args:
        numbers: of the samples of each split, int64; None: as `choose_splits` chooses them.

    Returns:
        What it writes to packed.json: "classes", "counts" of images per split and class, the source's "survey", and a
        "fingerprint" of the training file's content, and those of the "held_out" splits.

    Raises:
        UserError: a file does not decode (it is named), or a class has too few images.
    """
    try:
        return _write(config, source, choose_splits(config, source) if numbers is None else numbers, folder)
    except SampleError as error:
        unread = isinstance(error.__cause__, OSError)
        mend = "see that it is there and may be read" if unread else "repair or remove the file"
        raise UserError(f"{error}; {mend}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _write(config: DataConfig, source: Source, numbers: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    files = {split: folder / f"{split}.beton" for split in SPLITS}
    for path in (folder / _RECORD, *files.values()):
        path.unlink(missing_ok=True)
    try:
        counts: dict[str, list[int]] = {}
        digests: dict[str, str] = {}
        labels: dict[str, np.ndarray] = {}
        stored: dict[str, np.ndarray] = {}
        for split, chosen in numbers.items():
            stored[split] = _write_split(config, source, split, chosen, files[split])
            labels[split] = origin(source, split).labels[chosen]
            counts[split] = np.bincount(labels[split], minlength=len(source.classes)).tolist()
            with files[split].open("rb") as file:
                digests[split] = hashlib.file_digest(file, "sha256").hexdigest()
        _warn_of_duplicates(source, numbers, labels, stored)
        record: dict[str, Any] = {"classes": list(source.classes), "counts": counts, "survey": source.survey}
        record |= {"fingerprint": digests.pop("train"), "held_out": digests}
        write_json(folder / _RECORD, record)
    except BaseException:
        for path in files.values():
            path.unlink(missing_ok=True)
        raise
    return record


def origin(source: Source, split: str) -> Split:
    """The source's split that a run's is taken from."""
    return source.splits[split if split in source.splits else "train"]


def _warn_of_duplicates(
    source: Source, numbers: dict[str, np.ndarray], labels: dict[str, np.ndarray], stored: dict[str, np.ndarray]
) -> None:
    def name(split: str, position: int) -> str:
        return sample_name(origin(source, split).samples, int(numbers[split][position]))

    for line in duplicate_lines(stored, labels, name):
        _log.warning("%s", line)


def _write_split(config: DataConfig, source: Source, split: str, numbers: np.ndarray, path: Path) -> np.ndarray:
    """Writes one split; returns a digest of each image."""
    given = origin(source, split)
    transform = None if isinstance(given.samples, np.ndarray) else file_transform(config)
    with progress_bar(total=len(numbers), unit="img", desc=f"pack {split}") as bar:
        return write(
            path,
            _Chosen(given.samples, numbers),
            labels=given.labels[numbers],
            synthetic=np.zeros(len(numbers), bool),
            index=numbers,
            storage=config.storage,
            transform=transform,
            workers=available_cores(),
            progress=bar.update,
        )


def _path(config: DataConfig) -> Path:
    return Path(config.path or (FASHION_MNIST_PATH if config.source == "idx" else "")).expanduser()


def _lists(config: DataConfig) -> dict[str, Path]:
    lists = {"train_list": config.train_list, "val_list": config.val_list, "test_list": config.test_list}
    return {name: Path(file).expanduser() for name, file in lists.items() if file and config.source == "list"}


def _open(config: DataConfig) -> Source:
    path = _path(config)
    if not path.exists():
        hint = "; give --set data.path=PATH (the preset's file says where the images come from)"
        if str(path) == FASHION_MNIST_PATH:
            hint = ": apt-get install dataset-fashion-mnist"
        raise UserError(f"data.path {path} does not exist{hint}")
    return open_source(config.source, path, **_lists(config))


def _check(config: DataConfig, source: Source) -> None:
    where = config.path or config.source
    check_labels(source, where)
    if "test" not in source.splits and not config.test_share:
        raise UserError(
            f"{where} has no test split: a run needs train and test images; data.test_share=0.2 takes a fifth of the "
            "training images for it"
        )
    for split in source.splits.values():
        if isinstance(split.samples, np.ndarray):
            _, height, width, channels = split.samples.shape
            size = config.image_size
            if (height, width) != (size, size):
                raise UserError(f"{config.source} images are {height}x{width}, but data.image_size is {size}")
            if channels != config.channels:
                raise UserError(
                    f"{config.source} images have {counted(channels, 'channel(s)')}, not data.channels = "
                    f"{config.channels}"
                )


def check_labels(source: Source, where: str) -> None:
    """Raises UserError unless each split has images of every class and of no other. `where`: the source, in words."""
    classes = source.classes
    for name in dict.fromkeys(("train", *source.splits)):
        if name not in source.splits:
            raise UserError(f"{where} has no {name} split: a run needs train and test images")
        samples, labels = source.splits[name].samples, source.splits[name].labels
        outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
        if outside.size:
            wrong = int(outside[0])
            raise UserError(
                f"{name} split, {sample_name(samples, wrong)}: label {labels[wrong]} is not in 0..{len(classes) - 1}, "
                "the labels of the training images"
            )
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if empty.size:
            raise UserError(
                f"{where}: class {classes[empty[0]]} has no image in the {name} split"
                + (f", nor have {empty.size - 1} others" if empty.size > 1 else "")
                + (f": labels must start at 0, these at {labels.min()}" if name == "train" and labels.min() else "")
            )


def read_packed(folder: Path) -> Packed:
    """What `pack_images` wrote; raises UserError if it is missing or damaged."""
    try:
        record = read_json(folder / _RECORD)
        sets = {split: open_set([folder / f"{split}.beton"], mixed_sizes=True) for split in record["counts"]}
        classes = tuple(record["classes"])
        for split, image_set in sets.items():
            if np.bincount(image_set.labels, minlength=len(classes)).tolist() != record["counts"][split]:
                raise ValueError(f"{split}.beton is of another set")
        counts = np.array(record["counts"]["train"], np.int64)
        return Packed(
            classes, counts, sets["train"], sets.get("val"), sets["test"], record["fingerprint"], record["survey"]
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        raise _damaged(folder, error) from error
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder}: the packed images are damaged ({error}); delete the folder and run "
        f"python -m diffult.pack --run {folder.parent}"
    )


def source_differences(config: DataConfig, packed: Packed) -> list[str]:
    """Changes of the source since it was packed, a line each; none if the source is gone."""
    if not all(place.exists() for place in (_path(config), *_lists(config).values())):
        return []
    try:
        return survey_differences(packed.survey, _open(config).survey)
    except SourceError as error:
        return [str(error)]
