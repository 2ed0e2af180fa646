"""Kept samples in the formats of other tools: each is a function and a line of FORMATS.

A format writes the samples of a finished generation run into its folder and returns the new file or folder, which is
whole or absent; what an earlier export left there is replaced. `label` is the class's number in the run, also where
classes have no sample, and classes.json has the names by label.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffult.errors import UserError, one_of
from diffult.generation.shards import open_kept
from diffult.longtail.filter import Verdict
from diffult.reporting.text import readable
from diffult.runs.files import atomic_write, load_tensors, lock_folder, write_json
from ffcv_writers import ImageSet

log = logging.getLogger(__name__)
Format = Callable[[ImageSet, tuple[str, ...], Path], Path]
_SHARD, _ROW_GROUP = 10_000, 100  # samples in a file of several, and in the part of a Parquet file read at a time
_PART, _LARGE = 2**24, 2**32  # bytes of pixels written at a time, and of an array that few machines hold with ease
_SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}


def parse_formats(given: Sequence[str]) -> list[str]:
    """Formats of FORMATS, in each text one or several between commas, in this order and each once.

    Raises:
        UserError: there is no such format, or what writes it is not installed.
    """
    names = list(dict.fromkeys(name.strip() for text in given for name in text.split(",")))
    for name in names:
        try:
            one_of(FORMATS, name)
        except ValueError as error:
            raise UserError(f"--export: {error}") from None
        if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UserError("--export parquet is written by pyarrow, which is not installed: pip install pyarrow")
    return names


def export(name: str, folder: Path, classes: tuple[str, ...]) -> Path | None:
    """Writes the kept samples of the finished generation run in `folder` there, in a format of FORMATS, and
    classes.json. Returns the new file or folder; None if no sample was kept.

    Raises:
        UserError: a file of the run is damaged, or another process writes to the folder.
    """
    samples = open_kept(folder)
    if samples is None:
        return None
    with lock_folder(folder):
        path = FORMATS[name](samples, classes, folder)
        write_json(folder / "classes.json", {"classes": class_texts(classes)})
    return path


def class_texts(classes: tuple[str, ...]) -> list[str]:
    """The names as valid Unicode, see `readable`, and all different: to names that are equal, the label is added."""
    texts = list(map(readable, classes))
    times = Counter(texts)
    return [text if times[text] == 1 else f"{text} ({label})" for label, text in enumerate(texts)]


def class_folders(classes: tuple[str, ...]) -> list[str]:
    """A folder's name for each class. They sort as the labels do, because readers number folders in the order of their
    names: the classes' own names where those sort so, else with the label before them, padded with zeros."""
    if list(classes) == sorted(set(classes)) and all(map(_is_plain, classes)):
        return list(classes)
    width = len(str(len(classes) - 1))
    numbers = [f"{label:0{width}d}" for label in range(len(classes))]
    return [
        number if name == str(label) or not _is_plain(name) else f"{number}_{name}"
        for label, (number, name) in enumerate(zip(numbers, classes, strict=True))
    ]


def _is_plain(name: str) -> bool:
    """Whether every system takes it as a folder's name, and no reader for the name of a split."""
    valid = name.isprintable() and len(name) < 60 and not re.search(r'^[. ]|[<>:"/\\|?*]|[. ]$|^$', name)
    return valid and not _SPLITS & set(re.split(r"[\W\d_]+", name.lower()))


def _verdicts(samples: ImageSet, folder: Path) -> list[str]:
    """`id` or `aid` (or `ood`, where the filter keeps it) of each sample."""
    table = {name: tensor.numpy() for name, tensor in load_tensors(folder / "candidates.safetensors")[0].items()}
    size = max(int(table["indices"].max()), int(samples.index.max())) + 1
    known, wanted = table["labels"] * size + table["indices"], samples.labels * size + samples.index
    row = np.searchsorted(known, wanted)  # the table is in the order (class, index)
    if (known[np.minimum(row, len(known) - 1)] != wanted).any():
        raise UserError(f"{folder}: synthetic.beton and candidates.safetensors are of different runs; draw them again")
    return [Verdict(verdict).name.lower() for verdict in table["verdict"][row].tolist()]


def _rows(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """PNG file, and label, class, index and verdict of every sample."""
    texts, verdicts = class_texts(classes), _verdicts(samples, folder)
    columns = zip(samples.labels.tolist(), samples.index.tolist(), verdicts, strict=True)
    for i, (label, index, verdict) in enumerate(tqdm(columns, "export", len(samples), unit="img", disable=None)):
        yield (
            _png(samples.image(i)),
            {"label": label, "class": texts[label], "index": index, "verdict": verdict},
        )


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()  # at 256 pixels level 2 takes a third of the time of Pillow's 6 and 6 % more bytes
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(content, "PNG", compress_level=2)
    return content.getvalue()


@contextmanager
def _whole_folder(path: Path, mark: str) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well. Replaces an earlier one, known by its file
    `mark`; raises UserError if something else is there."""
    if path.exists() and any(path.iterdir()) and not (path / mark).is_file():
        raise UserError(f"{path}: is not an earlier export (no {mark}) and would be lost; choose another --out")
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _imagefolder(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """CLASS/INDEX.png, as torchvision's ImageFolder reads it, and metadata.jsonl, as Hugging Face's. A class without a
    sample has an empty folder, which ImageFolder takes with allow_empty=True."""
    names = class_folders(classes)
    with (
        _whole_folder(folder / "images", "metadata.jsonl") as root,
        (root / "metadata.jsonl").open("w", encoding="utf-8") as metadata,
    ):
        for name in names:
            (root / name).mkdir()
        for content, row in _rows(samples, classes, folder):
            file = f"{names[row['label']]}/{row['index']:06d}.png"
            (root / file).write_bytes(content)
            metadata.write(json.dumps({"file_name": file} | row, ensure_ascii=False) + "\n")
    return folder / "images"


def _npz(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """images uint8 [N, H, W, C], labels and indices int64 [N], verdicts [N] and classes as text. Written in parts, but
    numpy reads the images all at once."""
    file, size = folder / "samples.npz", math.prod(samples.image_shape)
    if len(samples) * size > _LARGE:
        log.warning(
            "%s: whoever loads it needs %.0f GB of memory; wds and parquet are read in parts",
            file, len(samples) * size / 1e9,
        )  # fmt: skip
    columns = {
        "labels": samples.labels, "indices": samples.index, "verdicts": np.array(_verdicts(samples, folder)),
        "classes": np.array(class_texts(classes)),
    }  # fmt: skip
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w") as out:
        with out.open("images.npy", "w", force_zip64=True) as array:  # part by part: there may be more than memory
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), *samples.image_shape)}
            np.lib.format.write_array_header_1_0(array, header)
            step = max(1, _PART // size)
            for start in range(0, len(samples), step):
                array.write(samples.take(np.arange(start, min(start + step, len(samples)))).reshape(-1).data)
        for name, column in columns.items():
            with out.open(f"{name}.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array(array, column, allow_pickle=False)
    return file


def _zip(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """PNGs and dataset.json with their labels, as EDM's and StyleGAN's training read it (Karras et al. 2022)."""
    file, labels = folder / "samples.zip", []
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out:
        for number, (content, row) in enumerate(_rows(samples, classes, folder)):
            name = f"{number // 1000:05d}/img{number:08d}.png"
            out.writestr(name, content)
            labels.append([name, row["label"]])
        out.writestr("dataset.json", json.dumps({"labels": labels, "classes": class_texts(classes)}))
    return file


def _wds(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """samples-NUMBER.tar of 10,000 samples each, as WebDataset reads them: KEY.png, KEY.cls with the label and KEY.json
    with class and verdict too."""
    rows = _rows(samples, classes, folder)
    with _whole_folder(folder / "webdataset", "samples-000000.tar") as root:
        for number in range(-(-len(samples) // _SHARD)):
            with tarfile.open(root / f"samples-{number:06d}.tar", "w") as out:
                for content, row in islice(rows, _SHARD):
                    key = f"{row['label']:05d}_{row['index']:06d}"
                    parts = {"png": content, "cls": str(row["label"]).encode(), "json": json.dumps(row).encode()}
                    for ending, data in parts.items():
                        info = tarfile.TarInfo(f"{key}.{ending}")
                        info.size = len(data)
                        out.addfile(info, io.BytesIO(data))
    return folder / "webdataset"


def _parquet(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """A column each of image (struct of the PNG's bytes and a name), label, class, index and verdict, with the types of
    Hugging Face's datasets: Image, and ClassLabel with the names. One file of at most 10,000 samples, or a folder of
    such files."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    text, number = pyarrow.string(), pyarrow.int64()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    fields = {"image": image, "label": number, "class": text, "index": number, "verdict": text}
    features: dict[str, Any] = {
        name: {"dtype": str(type), "_type": "Value"} for name, type in fields.items() if type is not image
    }
    features |= {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": class_texts(classes)}}
    metadata = {"huggingface": json.dumps({"info": {"features": {name: features[name] for name in fields}}})}
    schema = pyarrow.schema(list(fields.items()), metadata)
    rows = _rows(samples, classes, folder)

    def write(file: Path, count: int) -> None:
        with ParquetWriter(file, schema) as out:
            for begin in range(0, count, _ROW_GROUP):
                group = [
                    row | {"image": {"bytes": content, "path": f"{row['label']:05d}_{row['index']:06d}.png"}}
                    for content, row in islice(rows, min(_ROW_GROUP, count - begin))
                ]
                out.write_table(pyarrow.Table.from_pylist(group, schema))

    if len(samples) <= _SHARD:
        with atomic_write(folder / "samples.parquet") as temporary:
            write(temporary, len(samples))
        return folder / "samples.parquet"
    with _whole_folder(folder / "parquet", "samples-000000.parquet") as root:
        for number, begin in enumerate(range(0, len(samples), _SHARD)):
            write(root / f"samples-{number:06d}.parquet", min(_SHARD, len(samples) - begin))
    return folder / "parquet"


def _beton(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """The kept samples as they are, one file or the folder of several: fields image, label, synthetic (1) and index."""
    return samples.paths[0] if len(samples.paths) == 1 else folder


FORMATS: dict[str, Format] = {
    "imagefolder": _imagefolder,
    "npz": _npz,
    "zip": _zip,
    "wds": _wds,
    "parquet": _parquet,
    "beton": _beton,
}
