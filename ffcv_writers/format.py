"""The .beton format of ffcv 1.0.2: header, field descriptors, a row of metadata per sample, pages, allocation table.

Fields: image (RGB: RGBImageField, each image raw or JPEG and of any size; grey: NDArrayField, raw and of one shape),
label, synthetic, index. ffcv itself reads and writes the same files but is not imported: its writer and its loader hang
after an error, and its loader skips JPEGs that do not decode and takes no seed for its crops.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, int, int]

VERSION = 2
FIELDS = ("image", "label", "synthetic", "index")
_INT_FIELD, _RGB_FIELD, _ARRAY_FIELD = 1, 2, 4
JPG, RAW = 0, 1  # modes of an image in a RGBImageField

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")],
    align=True,
)
DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_RGB_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
_SEAL = np.dtype([("mark", "S8"), ("crc32", "<u4")])  # in the arguments of the field index, which has none
_MARK = b"tables\0\1"
_UINT8 = json.dumps(np.dtype(np.uint8).descr).encode()


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as it lies in a file.

    Attributes:
        data: uint8 (n,), a JPEG file's content or raw pixels.
        shape: height, width, channels.
        defect: what is wrong with the JPEG it was decoded from, although its pixels are there.
        digest: 64 bits, of what is to be written.
    """

    data: np.ndarray
    shape: Shape
    jpg: bool
    defect: str = ""
    digest: int = 0


def metadata_type(shape: Shape | None) -> np.dtype:
    """The row of a sample in a file of arrays of this shape; None: of RGB images."""
    image = _RGB_IMAGE if shape is None else np.dtype("<u8")
    return np.dtype([("image", image), *((name, "<i8") for name in FIELDS[1:])], align=True)


def descriptors(shape: Shape | None) -> np.ndarray:
    """The field descriptors of a file of arrays of this shape; None: of RGB images."""
    fields = np.zeros(len(FIELDS), DESCRIPTOR)
    for field, name in zip(fields, FIELDS, strict=True):
        field["type_id"] = _INT_FIELD
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    fields[0]["type_id"] = _RGB_FIELD
    if shape is not None:
        arguments = np.zeros(1, _ARRAY_ARGUMENTS)
        arguments["shape"][0, :3], arguments["type_length"] = shape, len(_UINT8)
        content = np.frombuffer(arguments.tobytes() + _UINT8, np.uint8)
        fields[0]["type_id"] = _ARRAY_FIELD
        fields[0]["arguments"][: len(content)] = content
    return fields


def sealed(header: np.ndarray, fields: np.ndarray, metadata: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The descriptors with a checksum of all four tables, so that no damage changes a label unseen. ffcv ignores it."""
    fields = fields.copy()
    fields[-1]["arguments"][:] = 0
    crc32 = 0
    for part in (header, fields, metadata, table):
        crc32 = zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data, crc32)
    seal = np.array([(_MARK, crc32)], _SEAL)
    fields[-1]["arguments"][: _SEAL.itemsize] = seal.view(np.uint8)
    return fields


def check_seal(header: np.ndarray, fields: np.ndarray, metadata: np.ndarray, table: np.ndarray) -> None:
    """Raises ValueError where a checksum is there, as in all files of ours, and is of other tables."""
    if fields[-1]["arguments"].any() and fields.tobytes() != sealed(header, fields, metadata, table).tobytes():
        raise ValueError("its tables are not those of its checksum")


def field_names(fields: np.ndarray) -> list[str]:
    """The fields' names."""
    return [bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace") for field in fields]


def array_shape(fields: np.ndarray) -> Shape | None:
    """What `descriptors` was given.

    Raises:
        ValueError: other fields than ours.
    """
    kinds = fields["type_id"].tolist()
    if kinds[0] not in (_RGB_FIELD, _ARRAY_FIELD) or kinds[1:] != [_INT_FIELD] * 3:
        raise ValueError(f"its fields are of types {kinds}")
    if kinds[0] == _RGB_FIELD:
        return None
    arguments = fields[0]["arguments"].tobytes()
    shape, length = np.frombuffer(arguments, _ARRAY_ARGUMENTS, 1)[0]
    text = arguments[_ARRAY_ARGUMENTS.itemsize :][: int(length)]
    if text != _UINT8 or not shape[:3].all() or shape[3:].any():
        raise ValueError(f"its images are arrays of type {text!r} and shape {shape[shape > 0].tolist()}")
    height, width, channels = shape[:3].tolist()
    return height, width, channels
