"""Images to .beton files, in ffcv's format and without its processes. Importing this module needs ffcv.

Threads encode, the calling thread packs: an error is an exception, and there is nothing to leave behind. Memory does
not grow with the set but for its tables, some 0.2 KB an image.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from .beton import Stored, open_file
from .decoding import decode_rgb, shrink
from .format import ALLOCATION, ARRAY_FIELD, FIELDS, HEADER, JPG, RAW, RGB_FIELD, VERSION, descriptors, metadata_type
from .image_set import Shape
from .restarts import with_restarts
from .turbojpeg import FourColours, decode_jpeg

Storage = Literal["raw", "jpg", "smart"]
SMART_BYTES = 1 << 16  # "smart" keeps images of up to so many bytes raw: 147 x 147 RGB
_PAGE, _LARGEST_PAGE = 1 << 23, 1 << 26  # bytes: ffcv's default, and where the size of images is not known before


def encode(sample: np.ndarray | bytes, storage: Storage, quality: int, max_side: int) -> Stored:
    """What to store of an image.

    The content of a JPEG file that decodes without a complaint and need not be shrunk keeps its coefficients. JPEGs get
    restarts, so that a crop decodes in the time of its part.

    Args:
        sample: uint8 (H, W, C), or the content of an image file.

    Raises:
        ValueError: the content does not decode.
    """
    content: np.ndarray | None = None  # to be stored, without loss
    defect = ""
    if isinstance(sample, np.ndarray):
        pixels = sample
    elif sample.startswith(b"\xff\xd8"):
        content = np.frombuffer(sample, np.uint8)
        try:
            pixels = decode_jpeg(content)
        except ValueError as error:
            pixels, content = decode_rgb(sample), None  # which raises if too little of it is there
            defect = "" if isinstance(error, FourColours) else str(error)
    else:
        pixels = decode_rgb(sample)
    if max(pixels.shape) > max_side:
        pixels, content = shrink(pixels, max_side), None
    height, width = pixels.shape[:2]
    if storage == "raw" or (storage == "smart" and pixels.nbytes <= SMART_BYTES):
        return Stored(np.ascontiguousarray(pixels).reshape(-1), height, width, False, defect)
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        content = np.frombuffer(buffer.getbuffer(), np.uint8)
    return Stored(with_restarts(content), height, width, True, defect)


def write_beton(
    path: Path,
    images: Iterable[Stored],
    columns: dict[str, np.ndarray],
    array_shape: Shape | None,
) -> None:
    """Writes images, stored as they are given, and the (n,) int64 columns label, synthetic and index.

    Args:
        array_shape: of all images, which then are raw (NDArrayField); None for RGB images of any size, raw or JPEG.

    Raises:
        ValueError: an image that does not fit into a page; a disk that took less than it was given.
    """
    if array_shape is None:
        page, field = _LARGEST_PAGE, RGB_FIELD
    else:
        page, field = max(_PAGE, 1 << (int(np.prod(array_shape)) - 1).bit_length()), ARRAY_FIELD
    count = len(columns["label"])
    fields = descriptors(array_shape)
    metadata, table = np.zeros(count, metadata_type(field)), np.zeros(count, ALLOCATION)
    for name in FIELDS[1:]:
        metadata[name] = columns[name]
    table["sample_id"] = np.arange(count)
    with path.open("wb") as file:
        place = file.seek(HEADER.itemsize + fields.nbytes + metadata.nbytes)
        for number, image in enumerate(images):
            size = len(image.data)
            if size > page:
                raise ValueError(f"{path}: sample {number} takes {size} bytes, more than a page of {page}: shrink it")
            if place // page != (place + size - 1) // page:
                place = file.seek((place // page + 1) * page)  # no image lies across pages
            file.write(image.data.data)
            table[number] = number, place, size
            metadata["image"][number] = (
                place if field == ARRAY_FIELD else (JPG if image.jpg else RAW, image.width, image.height, place)
            )
            place += size
        file.write(table.data)
        file.seek(0)
        header = np.array((VERSION, len(FIELDS), page, count, place), HEADER)
        for part in (header, fields, metadata):
            file.write(part.data)
    open_file(path)  # a disk that took less shows
