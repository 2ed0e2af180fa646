"""A stand-in for ImageNet-LT: as many images with the same class profile, made from a few hundred photographs.

    python -m bench.standin --source imagenet-sample-400.tar --out STANDIN

Each image is a random crop of one photograph, scaled, mirrored and tinted by numbers keyed by its split, class and
index, so all files differ and a second run only makes what is missing. Classes beyond the number of photographs see
them with their channels swapped. STANDIN holds ImageNet_LT_{train,val,test}.txt and the paths that these list.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from diffult.cli import main
from diffult.engine.progress import progress_bar
from diffult.runs.files import write_text

CLASSES, IMAGES, LARGEST, SMALLEST = 1000, 115_846, 1280, 5
# Of the classes in falling order, the first with fewer than 100 images and the first with 20 or fewer, in the list of
# Liu et al. (2019) as MiSLAS counts it (config/imagenet, head_class_idx and med_class_idx).
_MEDIUM, _FEW = 390, 835
_HELD_OUT = {"val": 1, "test": 2}  # images of each class
_SPLITS = ("train", *_HELD_OUT)
_CHANNELS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
_KEPT = 400  # pixels of a photograph's shorter side in memory
_QUALITY = 80

_photographs: list[Image.Image] = []  # of this process and, forked from it, the workers


def class_counts() -> np.ndarray:
    """Training images of each class, int64 [1000], falling: a power law from 1280 to 100 whose offset makes the sum
    115,846, then geometric to 20 and to 5. The list's ends, sum and groups are published, its counts are not."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        offset = (low * high) ** 0.5
        low, high = (offset, high) if _profile(offset).sum() < IMAGES else (low, offset)
    counts = np.rint(_profile(low)).astype(np.int64)
    counts[1 : 1 + abs(IMAGES - counts.sum())] += np.sign(IMAGES - counts.sum())  # what rounding left
    return counts


def _profile(offset: float) -> np.ndarray:
    rank = np.arange(CLASSES)
    ends, sizes = [_MEDIUM - 0.5, _FEW - 0.5, CLASSES - 1], [99.5, 20.5, SMALLEST]
    power = np.log(LARGEST / sizes[0]) / np.log1p(ends[0] / offset)
    head = LARGEST * (1 + rank[:_MEDIUM] / offset) ** -power
    rest = np.exp(np.interp(rank[_MEDIUM:], ends, np.log(sizes)))
    return np.concatenate([head, rest])


def _read_photographs(source: Path) -> list[Image.Image]:
    """RGB, at most _KEPT pixels on the shorter side, in order of their names."""
    photographs = []
    with tarfile.open(source) as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name):
            content = archive.extractfile(member)
            assert content is not None  # a file
            image = Image.open(io.BytesIO(content.read()))
            image.draft("RGB", (_KEPT, _KEPT))
            scale = min(1.0, _KEPT / min(image.size))
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            photographs.append(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    return photographs


def _image(split: str, label: int, index: int, side: int) -> bytes:
    """A JPEG of 4:3 or 3:4 with `side` pixels on the shorter side."""
    numbers = np.random.default_rng((_SPLITS.index(split), label, index))
    photograph = _photographs[label % len(_photographs)]
    long = round(4 * side / 3)
    width, height = (long, side) if numbers.random() < 0.7 else (side, long)
    scale = min(photograph.width / width, photograph.height / height) * numbers.uniform(0.5, 1)
    left = numbers.uniform(0, photograph.width - scale * width)
    top = numbers.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = photograph.resize((width, height), Image.Resampling.BILINEAR, box)
    if numbers.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    table = np.clip(np.arange(256) * numbers.uniform(0.7, 1.3, (3, 1)), 0, 255)
    channels = [image.getchannel(c) for c in _CHANNELS[label // len(_photographs) % 3]]
    image = Image.merge("RGB", channels).point(table.astype(np.uint8).ravel().tolist())
    content = io.BytesIO()
    image.save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()


def _write_class(task: tuple[Path, str, int, int, int]) -> int:
    """Makes the images of a class that are missing; returns how many there are."""
    out, split, label, count, side = task
    folder = out / _folder(split, label)
    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    for index in range(count):
        if f"{index:04}.jpg" not in there:
            part = folder / f".{index:04}.part"  # no fsync: a second run makes what a power cut took
            part.write_bytes(_image(split, label, index, side))
            part.rename(folder / f"{index:04}.jpg")
    return count


def _folder(split: str, label: int) -> str:
    return f"{split}/c{label:04}"


def command(
    source: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Tar of photographs.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the set, outside the repository.")],
    side: Annotated[int, typer.Option(min=16, max=_KEPT, help="Pixels of the shorter side.")] = 256,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Of each class's images, two at least.")] = 1.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Make an image set with ImageNet-LT's class profile from a tar of photographs; resumable."""
    train = np.maximum(np.rint(share * class_counts()).astype(int), 2)
    counts = {"train": train} | {split: np.full(CLASSES, n) for split, n in _HELD_OUT.items()}
    for split, numbers in counts.items():
        lines = (f"{_folder(split, c)}/{i:04}.jpg {c}\n" for c, n in enumerate(numbers) for i in range(n))
        write_text(out / f"ImageNet_LT_{split}.txt", "".join(lines))
    _photographs.extend(_read_photographs(source))
    tasks = [(out, split, c, int(n), side) for split, numbers in counts.items() for c, n in enumerate(numbers)]
    begun, total = time.perf_counter(), sum(task[3] for task in tasks)
    fork = multiprocessing.get_context("fork")  # the photographs are in memory once
    with fork.Pool(workers) as pool, progress_bar(total=total, unit="img", desc="stand-in") as bar:
        for made in pool.imap_unordered(_write_class, tasks):
            bar.update(made)
    print(f"{out}: {total} images, {train.sum()} of them for training, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(command)
