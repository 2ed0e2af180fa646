"""The IDX format of the MNIST family (MNIST, Fashion-MNIST, KMNIST): big-endian header, then uint8 values."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .source import Place, Source, Split, array_split, file_sizes, numbered

PATTERNS = ("*-idx3-ubyte*", "*.idx3-ubyte*")  # of the names of images
_UINT8 = 0x08  # the type code in the third byte of the header


def read(place: Place) -> Source:
    """The splits in {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], classes named by their number. Names may have a
    dot before idx."""
    folder = place.path
    files: dict[str, list[Path]] = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        found = [_find(folder, name) for name in names]
        if split == "train" or any(found):
            missing = [name for name, path in zip(names, found, strict=True) if path is None]
            if missing:
                raise SourceError(f"no {missing[0]}.gz or {missing[0]} in {folder}")
            files[split] = [path for path in found if path is not None]

    def content() -> tuple[dict[str, Split], tuple[str, ...]]:
        splits = {s: array_split(_read(images, 3), _read(labels, 1), images) for s, (images, labels) in files.items()}
        return splits, numbered(splits)

    return Source(file_sizes(folder, [path for pair in files.values() for path in pair]), content)


def _find(folder: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")
    return next((folder / n for n in (f"{name}.gz", name, f"{dotted}.gz", dotted) if (folder / n).is_file()), None)


def _read(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of uint8 values with `ndim` dimensions, gzip-compressed or not, whatever its name ends with.

    Header (http://yann.lecun.com/exdb/mnist): two zero bytes, the type code, the number of dimensions, then
    each dimension as a big-endian uint32.
    """
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"cannot read {path}: {error}; fetch it again") from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, _UINT8, ndim)):
        raise SourceError(f"{path} is not an IDX file of uint8 with {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    size, expected = len(content) - start, math.prod(shape)
    if size != expected:
        raise SourceError(f"{path} should hold {expected} values by its header, not {size}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
