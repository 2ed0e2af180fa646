"""The IDX format of the MNIST family (MNIST, Fashion-MNIST, KMNIST): big-endian header, then uint8 values."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from .errors import SourceError

_UINT8 = 0x08  # the type code in the third byte of the header


def read_idx_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 1) and labels uint8 (N,) of FOLDER/{split}-{images-idx3,labels-idx1}-ubyte[.gz].

    Args:
        split: "train" or "t10k".

    Raises:
        SourceError: a file is missing or is not such a file.
    """
    images = read_idx(_find(folder, f"{split}-images-idx3-ubyte"), 3)[..., None]
    return images, read_idx(_find(folder, f"{split}-labels-idx1-ubyte"), 1)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise SourceError(f"no {name}.gz or {name} in {folder}")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of uint8 values with `ndim` dimensions, gzip-compressed if its name ends with .gz.

    Header (http://yann.lecun.com/exdb/mnist): two zero bytes, the type code, the number of dimensions, then
    each dimension as a big-endian uint32.

    Raises:
        SourceError: the file cannot be read, is not uint8 IDX of that many dimensions, or has another length
            than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"cannot read {path}: {error}; fetch it again") from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, _UINT8, ndim)):
        raise SourceError(f"{path} is not an IDX file of uint8 with {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    size, expected = len(content) - start, math.prod(shape)
    if size != expected:
        raise SourceError(f"{path} should hold {expected} values by its header, not {size}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # bytes are read-only
