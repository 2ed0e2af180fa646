"""Stage 4: real images as .beton files: writes betons/{real,val,test}.beton."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image

from diffult.cli import RunOption, main
from diffult.config import DataConfig
from diffult.data import Data, load_data
from diffult.parts import part_path
from diffult.runs.run_dir import RunDir
from ffcv_writers import write


class Readable(Protocol):
    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray: ...


def stored_config(run: RunDir) -> DataConfig:
    """The data at the size at which the classifier's images are stored."""
    size = run.config.classifier.stored_size or run.config.data.image_size
    return run.config.data.model_copy(update={"image_size": size})


def balance(run: RunDir, data: Data) -> None:
    """Writes the three parts. `data` is at the diffusion model's size; where images are stored at another, it is read
    again."""
    with run.stage("betons") as note:
        if note is None:
            return
        config = stored_config(run)
        stored = data if config == run.config.data else load_data(config)
        _write_part(run, note, "real", stored.train, stored.train.labels, config.image_size)
        _write_part(run, note, "test", stored.test, stored.test.labels, config.image_size)
        if stored.val is not None:
            _write_part(run, note, "val", stored.val, stored.val.labels, config.image_size)


def _write_part(run: RunDir, note: dict[str, Any], name: str, images: Readable, labels: np.ndarray, size: int) -> None:
    note[name] = len(images)
    path = part_path(run, name)
    if path.exists() or len(images) == 0:  # a part is written whole or not at all
        return
    write(
        path,
        _Scaled(images, size),
        labels=labels,
        synthetic=np.zeros(len(images), bool),
        index=np.arange(len(images)),
    )


class _Scaled:
    """Images at the stored size, bicubic where they have another."""

    def __init__(self, images: Readable, size: int) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int, /) -> np.ndarray:
        image = self._images.read(i)
        if image.shape[0] == self._size:
            return image
        scaled = Image.fromarray(image.squeeze()).resize((self._size, self._size), Image.Resampling.BICUBIC)
        return np.asarray(scaled).reshape(self._size, self._size, image.shape[2])


def command(run: RunOption) -> None:
    """Write real images as .beton files for the classifier."""
    run_dir = RunDir.open(run)
    balance(run_dir, load_data(run_dir.config.data))


if __name__ == "__main__":
    main(command)
