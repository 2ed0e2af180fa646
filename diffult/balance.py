"""Stage 4: real and synthetic images as .beton files, side by side, so that the real part is written once.

Writes betons/{real,synthetic,val,test}.beton (.npz where ffcv is missing).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from diffult.cli import RunOption, main
from diffult.config import DataConfig
from diffult.data import Data, load_data
from diffult.parts import part_path
from diffult.run_dir import RunDir
from diffult.synthetic import run_samples
from ffcv_writers import write


class Readable(Protocol):
    labels: np.ndarray

    def __len__(self) -> int: ...
    def read(self, i: int) -> np.ndarray: ...


def stored_config(run: RunDir) -> DataConfig:
    """The data at the size at which the classifier's images are stored."""
    size = run.config.classifier.stored_size or run.config.data.image_size
    return run.config.data.model_copy(update={"image_size": size})


def balance(run: RunDir, data: Data) -> None:
    """Writes the four parts. `data` is at the diffusion model's size; where images are stored at another, it is read
    again and samples are scaled (bicubic)."""
    with run.stage("betons") as note:
        if note is None:
            return
        config = stored_config(run)
        stored = data if config == run.config.data else load_data(config)
        samples = run_samples(run, data.train.counts())
        parts: dict[str, tuple[Readable, np.ndarray, int]] = {
            "real": (stored.train, np.arange(len(stored.train)), 0),
            "synthetic": (_Scaled(samples, config.image_size), samples.indices, 1),
            "test": (stored.test, np.arange(len(stored.test)), 0),
        }
        if stored.val is not None:
            parts["val"] = (stored.val, np.arange(len(stored.val)), 0)
        for name, (images, index, synthetic) in parts.items():
            note[name] = len(images)
            if len(images):
                _write_part(part_path(run, name), images, index, synthetic)


def _write_part(path: Path, images: Readable, index: np.ndarray, synthetic: int) -> None:
    if not path.exists():  # written whole or not at all
        flags = np.full(len(images), synthetic, dtype=np.int64)
        write(path, images.read, labels=images.labels, synthetic=flags, index=index)


class _Scaled:
    """Samples scaled to the stored size."""

    def __init__(self, samples: Readable, size: int) -> None:
        self.labels, self._samples, self._size = samples.labels, samples, size

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> np.ndarray:
        image = self._samples.read(i)
        if image.shape[0] == self._size:
            return image
        scaled = Image.fromarray(image.squeeze()).resize((self._size, self._size), Image.Resampling.BICUBIC)
        return np.asarray(scaled).reshape(self._size, self._size, image.shape[2])


def command(run: RunOption) -> None:
    """Write real and synthetic images as .beton files for the classifier. Needs the generation stage."""
    run_dir = RunDir.open(run)
    balance(run_dir, load_data(run_dir.config.data))


if __name__ == "__main__":
    main(command)
