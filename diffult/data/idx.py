"""The IDX format of the MNIST family (MNIST, Fashion-MNIST, KMNIST) as a source."""

from __future__ import annotations

from pathlib import Path

from diffult.data.config import FASHION_MNIST_PATH
from diffult.data.image_set import Source, array_source
from diffult.errors import UserError
from ffcv_writers.errors import SourceError
from ffcv_writers.idx import read_idx_split


def load_idx(folder: Path) -> Source:
    """The splits in `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`, classes named by their number.

    Raises:
        UserError: a file is missing or is not such a file, or images and labels do not fit together.
    """
    if not folder.is_dir():
        hint = ": apt-get install dataset-fashion-mnist" if str(folder) == FASHION_MNIST_PATH else ""
        raise UserError(f"data.path {folder} is not a folder{hint}")
    try:
        train, test = (read_idx_split(folder, split) for split in ("train", "t10k"))
    except SourceError as error:
        raise UserError(str(error)) from None
    classes = tuple(str(label) for label in range(int(train[1].max(initial=0)) + 1))
    return array_source(train, test, classes, str(folder))
