"""Where images to be written come from: each format as samples with labels, read when they are asked for."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .cifar import guess_cifar, read_cifar
from .errors import SourceError
from .files import EXTENSIONS, class_folders, read_folder, read_list
from .idx import read_idx_split
from .writing import Samples

Format = Literal["folder", "list", "idx", "cifar", "npz", "tar", "shards"]


@dataclass(frozen=True)
class Source:
    """N samples with (N,) int64 labels and index, the sample's name: its number, or what the source calls it."""

    samples: Samples
    labels: np.ndarray
    index: np.ndarray


def open_source(
    path: Path,
    *,
    format: Format | None = None,
    split: str = "train",
    root: Path | None = None,
    class_index: Path | None = None,
) -> Source:
    """Images of one split, of a format that is guessed from what lies at `path` unless it is given.

    Args:
        path: "folder": PATH/CLASS/FILE, or PATH/SPLIT/CLASS/FILE; labels are the sorted folders' numbers.
            "list": a text file, a line `relative/path label` for each image. "idx": the folder of the MNIST family.
            "cifar": the python archive of CIFAR-10 or -100 or its folder. "npz": arrays images and labels, or
            SPLIT_images and SPLIT_labels. "tar": a WebDataset archive or a folder of them, uncompressed, members
            KEY.jpg (or another image) and KEY.cls. "shards": samples of `diffult.generate`, those of the kept set.
        split: "train", "val" or "test", where a source has several; for idx and CIFAR "val" does not exist.
        root: where a list's paths start from; None takes the list's folder.
        class_index: labels of class folders by name, see `read_class_index`.

    Raises:
        SourceError: a file is missing, damaged or of another format.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    chosen = format or _guess(path)
    readers: dict[str, Callable[[], Source]] = {
        "folder": lambda: _folder(path, split, class_index),
        "list": lambda: _list(path, root),
        "idx": lambda: _arrays(*read_idx_split(path, _pick(path, split, {"train": "train", "test": "t10k"})), path),
        "cifar": lambda: _cifar(path, split),
        "npz": lambda: _npz(path, split),
        "tar": lambda: _tar(path),
        "shards": lambda: _shards(path),
    }
    if chosen not in readers:
        raise SourceError(f"unknown format {chosen!r}: choose one of {', '.join(get_args(Format))}")
    return readers[chosen]()


def _guess(path: Path) -> str:
    if guess_cifar(path):
        return "cifar"
    if path.is_file():
        endings = {".npz": "npz", ".tar": "tar", ".txt": "list", ".lst": "list"}
        if path.suffix not in endings:
            raise SourceError(f"{path}: what is it? give --format, one of {', '.join(get_args(Format))}")
        return endings[path.suffix]
    for name, pattern in (("shards", "shard-*.safetensors"), ("idx", "*-idx3-ubyte*"), ("tar", "*.tar")):
        if next(path.glob(pattern), None):
            return name
    return "folder"


def _pick(path: Path, split: str, splits: dict[str, Any]) -> Any:
    if split not in splits:
        raise SourceError(f"{path} has the splits {' and '.join(splits)}, not {split!r}")
    return splits[split]


def _arrays(images: np.ndarray, labels: np.ndarray, path: Path) -> Source:
    labels = labels.reshape(len(labels), -1)[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise SourceError(
            f"{path}: need uint8 images (N, H, W, C) and N labels, got {images.dtype} {images.shape} and {labels.shape}"
        )
    return Source(images, labels.astype(np.int64), np.arange(len(labels)))


class _Contents:
    """Encoded images, each read when it is asked for."""

    def __init__(self, names: list[str], read: Callable[[int], bytes]) -> None:
        self._names, self._read = names, read

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int, /) -> bytes:
        return self._read(number)

    def name(self, number: int) -> str:
        return self._names[number]


def _files(paths: list[str], names: list[str], labels: np.ndarray) -> Source:
    def read(number: int) -> bytes:
        with open(paths[number], "rb", buffering=0) as file:
            return file.read()

    return Source(_Contents(names, read), labels, np.arange(len(paths)))


def _folder(path: Path, split: str, class_index: Path | None) -> Source:
    if not path.is_dir():
        raise SourceError(f"{path} is not a folder")
    folder = path / split if (path / split).is_dir() else path
    classes = class_folders(folder)
    if not classes:
        raise SourceError(f"{folder} has no class folders: an image folder needs CLASS/FILE or SPLIT/CLASS/FILE")
    paths, labels = read_folder(folder, classes)
    if class_index is not None:
        known = read_class_index(class_index)
        unknown = [name for name in classes if name not in known]
        if unknown:
            raise SourceError(f"{class_index} has no class {unknown[0]}, which {folder} has")
        labels = np.array([known[name] for name in classes])[labels]
    return _files(paths, paths, labels)


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
    if not pairs or len(dict(pairs)) != len(pairs):
        raise SourceError(f"{path} is not a class index: it has no class, or one twice")
    return dict(pairs)


def _list(path: Path, root: Path | None) -> Source:
    names, labels, lines = read_list(str(path))
    start = path.parent if root is None else root
    told = [f"{os.path.join(start, name)}, {path.name}:{line}" for name, line in zip(names, lines, strict=True)]
    return _files([os.path.join(start, name) for name in names], told, labels)


def _cifar(path: Path, split: str) -> Source:
    archive = read_cifar(guess_cifar(path) or "cifar10", path)
    images, labels = _pick(path, split, {"train": archive.train, "test": archive.test})
    return _arrays(images, labels, path)


def _npz(path: Path, split: str) -> Source:
    try:
        with np.load(path, allow_pickle=False) as file:
            for images, labels in (("images", "labels"), (f"{split}_images", f"{split}_labels"), ("image", "label")):
                if images in file and labels in file:
                    return _arrays(file[images], file[labels], path)
            names = ", ".join(file.files)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    raise SourceError(f"{path} has no arrays images and labels, nor {split}_images and {split}_labels, but {names}")


def _tar(path: Path) -> Source:
    """A key is a member's path up to the first dot of its name, as WebDataset has it."""
    names: list[str] = []
    places: list[tuple[int, int, int]] = []  # archive, offset, size
    labels: list[int] = []
    archives = [path] if path.is_file() else sorted(path.glob("*.tar"))
    for number, archive in enumerate(archives):
        images: dict[str, tuple[str, int, int, int]] = {}
        classes: dict[str, int] = {}
        try:
            with tarfile.open(archive, "r:") as members:
                for member in members:
                    folder, name = os.path.split(member.name)
                    key, ending = os.path.join(folder, name.partition(".")[0]), name.partition(".")[2].lower()
                    if member.isfile() and f".{ending}" in EXTENSIONS:
                        images[key] = f"{archive}: {member.name}", number, member.offset_data, member.size
                    elif member.isfile() and ending == "cls":
                        stream = members.extractfile(member)
                        classes[key] = int(stream.read()) if stream else -1
                members.fileobj.seek(members.offset)
                if any(members.fileobj.read(512)):  # tarfile takes a broken header for the end
                    raise ValueError(f"damaged at byte {members.offset}")
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise SourceError(f"cannot read {archive}: {error}; it must be an uncompressed .tar") from error
        odd = sorted(images.keys() ^ classes.keys())
        if odd:
            raise SourceError(f"{archive}: {odd[0]} needs an image and a .cls file, but has only one of them")
        for key, (name, *place) in images.items():
            names.append(name)
            places.append((place[0], place[1], place[2]))
            labels.append(classes[key])
    if not names:
        raise SourceError(f"{path} holds no images")

    def read(sample: int) -> bytes:
        number, offset, size = places[sample]
        with archives[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return Source(_Contents(names, read), np.array(labels), np.arange(len(names)))


class _Rows:
    """Images as rows of arrays."""

    def __init__(self, rows: list[tuple[np.ndarray, int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int, /) -> np.ndarray:
        images, row = self._rows[number]
        return images[row]


def _shards(path: Path) -> Source:
    """The kept set: of each class the lowest indices that passed, up to the quota; in the order of the shards."""
    shards = [_safetensors(file) for file in sorted(path.glob("shard-*.safetensors"))]
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        quotas = np.array(manifest["quotas"], np.int64)
        named = [(s["labels"][s["passed"]], s["indices"][s["passed"]], s["images"]) for s in shards]
        drawn = [np.concatenate([s[key] for s in shards]) for key in ("labels", "indices")]
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{path} is not a folder of generated samples: {error!r}") from error
    labels, indices = (np.concatenate([part[i] for part in named]) for i in (0, 1))
    rows = [(images, row) for _, _, images in named for row in range(len(images))]
    keep = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(indices[mine], kind="stable")[:quota]]
        keep[mine] = True
        judged = np.unique(drawn[1][drawn[0] == label])
        if len(mine) and not np.array_equal(judged[: indices[mine[-1]] + 1], np.arange(indices[mine[-1]] + 1)):
            raise SourceError(f"{path}: samples of class {label} are missing, run the generation again")
    chosen = np.flatnonzero(keep)
    return Source(_Rows([rows[i] for i in chosen]), labels[chosen], indices[chosen])


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped, not read."""
    kinds = {"I64": np.int64, "F32": np.float32, "U8": np.uint8, "BOOL": np.bool_}
    try:
        content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        length = int(content[:8].view("<u8")[0])
        entries = json.loads(content[8 : 8 + length].tobytes())
        return {
            name: content[8 + length :][slice(*entry["data_offsets"])]
            .view(kinds[entry["dtype"]])
            .reshape(entry["shape"])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is damaged: {error!r}") from error
