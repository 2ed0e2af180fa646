"""Kept samples in the formats of other tools: each is a function and a line of FORMATS.

A format writes the samples into a folder and returns the new file or folder; an existing file is replaced.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from diffult.runs.files import atomic_write
from ffcv_writers import ImageSet

Format = Callable[[ImageSet, tuple[str, ...], Path], Path]


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(content, "PNG")
    return content.getvalue()


def _pngs(samples: ImageSet) -> Iterator[tuple[int, int, bytes]]:
    """(label, index, PNG file) of every sample."""
    for i, (label, index) in enumerate(zip(samples.labels.tolist(), samples.index.tolist(), strict=True)):
        yield label, index, _png(samples.image(i))


def _imagefolder(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """CLASS/INDEX.png, as torchvision's ImageFolder reads it."""
    root = folder / "images"
    for label, index, content in _pngs(samples):
        file = root / classes[label] / f"{index:06d}.png"
        with atomic_write(file) as temporary:
            temporary.write_bytes(content)
    return root


def _npz(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """images uint8 [N, H, W, C], labels and indices int64 [N], classes. All images are in memory at once."""
    file = folder / "samples.npz"
    with atomic_write(file) as temporary, temporary.open("wb") as out:
        images = samples.take(np.arange(len(samples)))
        np.savez(out, images=images, labels=samples.labels, indices=samples.index, classes=np.array(classes))
    return file


def _zip(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """PNGs and dataset.json with their labels, as EDM's and StyleGAN's training read it (Karras et al. 2022)."""
    file = folder / "samples.zip"
    names = []
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out:
        for number, (label, _, content) in enumerate(_pngs(samples)):
            name = f"{number // 1000:05d}/img{number:08d}.png"
            out.writestr(name, content)
            names.append([name, label])
        out.writestr("dataset.json", json.dumps({"labels": names}))
    return file


def _wds(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """KEY.png and KEY.cls in a tar, as WebDataset reads it."""
    file = folder / "samples.tar"
    with atomic_write(file) as temporary, tarfile.open(temporary, "w") as out:
        for label, index, content in _pngs(samples):
            for ending, data in (("png", content), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{label:05d}_{index:06d}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return file


def _beton(samples: ImageSet, classes: tuple[str, ...], folder: Path) -> Path:
    """The kept samples as they are: fields image, label, synthetic (1) and index."""
    return samples.paths[0]


FORMATS: dict[str, Format] = {
    "imagefolder": _imagefolder,
    "npz": _npz,
    "zip": _zip,
    "wds": _wds,
    "beton": _beton,
}
