"""The part of a JPEG file that a crop shows, as a file of its own, so that nothing else is decoded.

Restart markers (ITU-T T.81, B.2.1) cut a scan into independent segments. `restarts` puts them at the same columns in
each row of blocks, and the segments' lengths into the header. The segments that a box touches are then the scan of a
smaller image: with a header of its size they are a file whose pixels are those of the whole image, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SOI, EOI, SOS, DRI, DHT, RST0 = 0xD8, 0xD9, 0xDA, 0xDD, 0xC4, 0xD0
_SEQUENTIAL = (0xC0, 0xC1)  # SOF0, SOF1: Huffman coded
_OTHER_FRAMES = {*range(0xC0, 0xD0)} - {*_SEQUENTIAL, DHT}
_DQT, _JFIF, _ADOBE = 0xDB, 0xE0, 0xEE  # the last two say how colours are stored
LENGTHS, NAME = 0xEA, b"SEGMENTS\0"  # the segment APP10 of our files: this, then bytes a segment of the scan, uint16
_WORTHWHILE = 0.9  # of all segments; more are decoded with the rest


@dataclass(frozen=True, slots=True)
class Layout:
    """A file of one scan: its header and its grid of MCUs, the units in which it is coded."""

    segments: list[tuple[int, int, int]]  # marker, first byte and end of each in the header, from SOI to SOS
    components: list[tuple[int, int, int]]  # identifier, horizontal and vertical factor of each, 1 or 3
    height: int
    width: int
    unit: tuple[int, int]  # height and width of an MCU in pixels
    rows: int  # of MCUs
    columns: int
    interval: int  # MCUs from restart to restart, 0 without
    scan: int  # where the coded bytes begin


def layout(content: np.ndarray) -> Layout | None:
    """Of a JPEG file, uint8 (n,); None unless it is sequential, Huffman coded, of 8 bits and in one scan."""
    try:
        return _layout(content.data)
    except IndexError:  # cut short
        return None


def _layout(head: memoryview) -> Layout | None:
    if (head[0], head[1]) != (0xFF, SOI):
        return None
    segments, frame, interval, end = [(SOI, 0, 2)], 0, 0, 2
    while segments[-1][0] != SOS:
        begin = end
        if head[begin] != 0xFF or head[begin + 1] == 0xFF:  # these may fill the space before a marker, but do not
            return None
        marker, end = head[begin + 1], begin + 2 + _word(head, begin + 2)
        segments.append((marker, begin, end))
        if marker in _OTHER_FRAMES or (marker in _SEQUENTIAL and frame):
            return None
        if marker in _SEQUENTIAL:
            frame = begin + 4
        elif marker == DRI:
            interval = _word(head, begin + 4)
    count = head[begin + 4]
    if not frame or head[frame] != 8 or count not in (1, 3) or head[frame + 5] != count:
        return None
    specified = range(frame + 6, frame + 6 + 3 * count, 3)
    components = [(head[at], head[at + 1] >> 4, head[at + 1] & 15) for at in specified]
    if count == 1:
        components = [(components[0][0], 1, 1)]  # T.81, A.2.2: alone, it lies block by block
    unit = 8 * max(v for _, _, v in components), 8 * max(h for _, h, _ in components)
    height, width = _word(head, frame + 1), _word(head, frame + 3)
    if not (height and width and all(h and v for _, h, v in components)):
        return None
    return Layout(segments, components, height, width, unit, -(-height // unit[0]), -(-width // unit[1]), interval, end)


def _word(head: memoryview, at: int) -> int:
    return head[at] << 8 | head[at + 1]


def part(content: np.ndarray, size: tuple[int, int], box: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The part of a JPEG file, uint8 (n,), that a box touches.

    Args:
        size: height and width that its image should have.
        box: int64 top, left, height and width, in pixels of the image.

    Returns:
        A JPEG file, uint8 (m,), and the box in its image. None where the whole is to be decoded: `with_restarts` did
        not write it, it is of another size or damaged, or almost all of it is wanted.
    """
    whole = layout(content)
    if whole is None or (whole.height, whole.width) != size or (bounds := _segments(content, whole)) is None:
        return None
    begins, ends = bounds
    step = whole.unit[0], whole.unit[1] * whole.interval
    # Colours of half the resolution are interpolated between neighbours, so these must be there too.
    margin = np.array(whole.unit) // 4
    corner, stop = box[:2], box[:2] + box[2:]
    row, column = (np.maximum(corner - margin, 0) // step).tolist()
    last_row, last_column = np.minimum(-(-(stop + margin) // step), begins.shape).tolist()
    chosen = (last_row - row) * (last_column - column)
    if chosen > _WORTHWHILE * begins.size:
        return None
    begins, ends = (bound[row:last_row, column:last_column] for bound in bounds)
    height = min(last_row * step[0], whole.height) - row * step[0]
    width = min(last_column * step[1], whole.width) - column * step[1]
    header = _header(content, whole, height, width)
    at = len(header)
    marks = at + np.cumsum(ends - begins + 2) - 2  # behind each segment stands a marker
    file = np.empty(marks[-1] + 2, np.uint8)
    file[:at] = np.frombuffer(header, np.uint8)
    for begin, end in zip(begins[:, 0].tolist(), ends[:, -1].tolist(), strict=True):
        file[at : at + end - begin] = content[begin:end]
        at += end - begin + 2
    file[marks] = 0xFF
    file[marks + 1] = RST0 + np.arange(chosen) % 8
    file[-1] = EOI
    return file, np.concatenate([corner - (row * step[0], column * step[1]), box[2:]])


def _segments(content: np.ndarray, whole: Layout) -> tuple[np.ndarray, np.ndarray] | None:
    """Where each segment of the scan begins and ends, int64, by row and column; None if they are unknown."""
    stated = [content[begin + 4 : end].tobytes() for marker, begin, end in whole.segments if marker == LENGTHS]
    stated = [data for data in stated if data.startswith(NAME) and len(data) % 2 == len(NAME) % 2]
    if not stated or not whole.interval or whole.columns % whole.interval:
        return None
    lengths = np.frombuffer(stated[-1], ">u2", offset=len(NAME)).astype(np.int64)
    grid = whole.rows, whole.columns // whole.interval
    ends = whole.scan + np.cumsum(lengths + 2) - 2
    if len(lengths) != grid[0] * grid[1] or ends[-1] + 2 != len(content):
        return None
    return (ends - lengths).reshape(grid), ends.reshape(grid)


def _header(content: np.ndarray, whole: Layout, height: int, width: int) -> bytes:
    """What a decoder needs of the header, for another size."""
    kept = (SOI, _JFIF, _ADOBE, _DQT, DHT, DRI, SOS, *_SEQUENTIAL)
    pieces = [(marker, content[begin:end].tobytes()) for marker, begin, end in whole.segments if marker in kept]
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return b"".join(data[:5] + size + data[9:] if marker in _SEQUENTIAL else data for marker, data in pieces)
