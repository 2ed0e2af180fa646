"""Restart markers for JPEG files, without loss: `ffcv_writers.jpeg.part` then decodes parts of them.

A scan is read code by code and written again. The codes of coefficients stay as they are, except each block's first,
of frequency zero: it is stored as its difference from the block before and, after a restart, from zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np

from .part import DHT, DRI, EOI, LENGTHS, NAME, RST0, Layout, layout

_SPACING = 64  # pixels between restarts: 2 to 3 % more bytes; a crop decodes 32 pixels too many at each side
_SMALL = 128 * 128  # pixels: smaller images decode as fast as a part is cut out
# T.81, tables K.3 and K.4, as they stand in a file: the number of codes of each length, then what they mean. They have
# a code for each size of a difference; a table made for one file has codes for those that occur there.
_DIFFERENCES = tuple(
    bytes(lengths).ljust(16, b"\0") + bytes(range(12)) for lengths in ([0, 1, 5, *6 * [1]], [0, 3, *9 * [1]])
)

_Tables = dict[tuple[int, int], bytes]  # by class, 0 for differences and 1 for the rest, and number


def with_restarts(content: np.ndarray) -> np.ndarray:
    """A JPEG file, uint8 (n,), with restarts at the same columns in each row of blocks, some 64 pixels apart where that
    divides the row, else only where rows end.

    Returns:
        A file with the same coefficients, pixels and metadata, uint8 (m,). `content` itself for small images and where
        it cannot be done: a progressive file, several scans, damage, data behind the image.
    """
    found = layout(content)
    if found is None or found.height * found.width <= _SMALL:
        return content
    try:
        tables, chosen = _tables(content, found), _chosen(content, found)
        first, rest = (_lookup(tuple(tables[kind, pair[kind]] for pair in chosen)) for kind in (0, 1))
    except (LookupError, ValueError):  # a table that is not there, or none
        return content
    codes = np.stack([_codes(_DIFFERENCES[pair[0] > 0]) for pair in chosen])
    blocks = np.repeat(np.arange(len(chosen)), [h * v for _, h, v in found.components])
    scan = np.append(content[found.scan :], np.full(2, 0xFF, np.uint8))  # a marker that ends any scan
    count, interval = found.rows * found.columns, _interval(found)
    if count * len(blocks) > 4 * len(scan):  # a block takes at least two bits: no damaged size asks for gigabytes
        return content
    out = np.empty(2 * (len(scan) + 3 * count * (len(blocks) + 1)), np.uint8)  # twice, as a zero follows each 0xFF
    lengths = np.empty(count // interval, np.int64)
    if not _recode(scan, out, lengths, blocks, first, rest, codes, count, found.interval, interval):
        return content
    if lengths.max() >= 1 << 16 or len(lengths) >= 1 << 14:  # they must fit into a segment of the header
        return content
    header = _header(content, found, tables, interval, lengths)
    return np.concatenate([np.frombuffer(header, np.uint8), out[: (lengths + 2).sum()]])


def _interval(found: Layout) -> int:
    """MCUs from restart to restart: the divisor of a row nearest in ratio to the spacing, no less than half of it."""
    divisors = [n for n in range(1, found.columns) if found.columns % n == 0 and 2 * n * found.unit[1] >= _SPACING]
    return min([*divisors, found.columns], key=lambda n: abs(math.log(n * found.unit[1] / _SPACING)))


def _tables(content: np.ndarray, found: Layout) -> _Tables:
    """The Huffman tables as they stand in the file."""
    tables: _Tables = {}
    for marker, begin, end in found.segments:
        at = begin + 4
        while marker == DHT and at < end:
            size = 16 + int(content[at + 1 : at + 17].sum())
            kind, number = divmod(int(content[at]), 16)
            if kind > 1 or number > 3 or size > 16 + 256:
                raise ValueError("no Huffman table")
            tables[kind, number] = content[at + 1 : at + 1 + size].tobytes()
            at += 1 + size
    return tables


def _chosen(content: np.ndarray, found: Layout) -> list[tuple[int, int]]:
    """Of each component, the numbers of its two tables."""
    _, begin, end = found.segments[-1]
    names, pairs = content[begin + 5 : end - 3].reshape(-1, 2).T.tolist()
    if names != [name for name, _, _ in found.components] or len(set(names)) < len(names):
        raise ValueError("other components than the frame's")
    return [divmod(pair, 16) for pair in pairs]


def _header(content: np.ndarray, found: Layout, tables: _Tables, interval: int, lengths: np.ndarray) -> bytes:
    codes = [
        bytes([kind << 4 | number]) + (table if kind else _DIFFERENCES[number > 0])
        for (kind, number), table in tables.items()
    ]
    *kept, scan = (content[begin:end].tobytes() for marker, begin, end in found.segments if marker not in (DHT, DRI))
    kept = [data for data in kept if data[1] != LENGTHS or not data[4:].startswith(NAME)]
    lengths_segment = _segment(LENGTHS, NAME + lengths.astype(">u2").tobytes())
    tables_segment = _segment(DHT, b"".join(codes))
    return b"".join([*kept, lengths_segment, tables_segment, _segment(DRI, interval.to_bytes(2, "big")), scan])


def _segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + (2 + len(data)).to_bytes(2, "big") + data


def _assigned(table: bytes) -> list[tuple[int, int, int]]:
    """Code, length and meaning, in a table's order (T.81, annex C).

    Raises:
        LookupError: no Huffman table.
    """
    assigned, code, at = [], 0, 16
    for length, count in enumerate(table[:16], 1):
        for _ in range(count):
            assigned.append((code, length, table[at]))
            code, at = code + 1, at + 1
        if code > 1 << length:
            raise LookupError("too many codes of one length")
        code <<= 1
    return assigned


@lru_cache(16)
def _lookup(tables: tuple[bytes, ...]) -> np.ndarray:
    """uint16 (tables, 65536): length << 8 | meaning of the code that 16 bits begin with, 0 for none."""
    found = np.zeros((len(tables), 1 << 16), np.uint16)
    for row, table in zip(found, tables, strict=True):
        for code, length, meaning in _assigned(table):
            row[code << (16 - length) : (code + 1) << (16 - length)] = length << 8 | meaning
    return found


@lru_cache(2)
def _codes(table: bytes) -> np.ndarray:
    """int64 (12, 2): code and length of each size of a difference."""
    return np.array([(code, length) for code, length, _ in sorted(_assigned(table), key=lambda row: row[2])])


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder is writable: compiled anew in each process
        return numba.njit(nogil=True)(function)


@_compiled
def _filled(scan, at, bits, count):  # type: ignore[no-untyped-def]
    """Reads bits until there are more than 40 or a marker comes. Returns the position, the bits and their number."""
    while count <= 40:
        byte = np.int64(scan[at])
        if byte == 0xFF:
            if scan[at + 1] != 0:
                break
            at += 1
        at, bits, count = at + 1, (bits << 8 | byte) & 0xFFFFFFFFFFFF, count + 8
    return at, bits, count


@_compiled
def _put(out, size, bits, count, value, length):  # type: ignore[no-untyped-def]
    """Adds bits and writes whole bytes. Returns the number of bytes so far, the bits left and their number."""
    bits, count = bits << length | value, count + length
    while count >= 8:
        count -= 8
        out[size] = (bits >> count) & 0xFF
        size += 1
        if out[size - 1] == 0xFF:
            out[size] = 0
            size += 1
    return size, bits & ((1 << count) - 1), count


@_compiled
def _code(table, bits, count):  # type: ignore[no-untyped-def]
    """Length and meaning of the first code; length 0 for none."""
    next16 = bits >> (count - 16) if count >= 16 else bits << (16 - count)
    found = np.int64(table[next16 & 0xFFFF])
    length = found >> 8
    return (length if length <= count else 0), found & 0xFF


@_compiled
def _recode(scan, out, lengths, blocks, first, rest, codes, mcus, old, new):  # type: ignore[no-untyped-def]
    """A scan with restarts every `old` MCUs to one with them every `new`. Returns whether it is undamaged.

    Args:
        scan: uint8, ends with a marker.
        out: uint8, gets the new scan, its end marker included. lengths: int64, gets the bytes between markers.
        blocks: int64, the component of each block of an MCU.
        first, rest: uint16 (components, 65536), `_lookup` of the tables that the scan was coded with.
        codes: int64 (components, 12, 2), `_codes` of those that differences are to be coded with.
    """
    at, bits, count = 0, 0, 0
    size, waiting, held = 0, 0, 0  # bytes written; bits to be written, and how many
    begun, done = 0, 0  # where the segment begins that is being written, and how many there are before it
    read, written = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
    for mcu in range(mcus):
        if old and mcu and mcu % old == 0:
            at, bits, count = _filled(scan, at, bits, count)
            if count >= 8 or scan[at + 1] != RST0 + (mcu // old - 1) % 8:
                return False
            at, bits, count = at + 2, 0, 0
            read[:] = 0
        if mcu and mcu % new == 0:
            size, waiting, held = _put(out, size, waiting, held, (1 << (-held % 8)) - 1, -held % 8)
            out[size], out[size + 1] = 0xFF, RST0 + done % 8
            lengths[done] = size - begun
            size, begun, done = size + 2, size + 2, done + 1
            written[:] = 0
        for c in blocks:
            at, bits, count = _filled(scan, at, bits, count)
            length, extra = _code(first[c], bits, count)
            if length == 0 or extra > 11 or length + extra > count:
                return False
            count -= length + extra
            value = (bits >> count) & ((1 << extra) - 1)
            read[c] += value if extra == 0 or value >> (extra - 1) else value - (1 << extra) + 1
            difference = read[c] - written[c]
            written[c] = read[c]
            extra = 0
            while abs(difference) >> extra:
                extra += 1
            if extra > 11:
                return False
            size, waiting, held = _put(out, size, waiting, held, codes[c, extra, 0], codes[c, extra, 1])
            value = difference if difference >= 0 else difference + (1 << extra) - 1
            size, waiting, held = _put(out, size, waiting, held, value, extra)
            place = 1
            while place < 64:
                at, bits, count = _filled(scan, at, bits, count)
                length, run = _code(rest[c], bits, count)
                if length == 0 or length + (run & 15) > count or (run & 15 == 0 and run != 0 and run != 0xF0):
                    return False
                length += run & 15
                count -= length
                size, waiting, held = _put(out, size, waiting, held, (bits >> count) & ((1 << length) - 1), length)
                if run == 0:  # the block ends
                    break
                place += (run >> 4) + 1
            if place > 64:
                return False
    at, bits, count = _filled(scan, at, bits, count)
    if count >= 8 or scan[at + 1] != EOI or at + 4 != len(scan):
        return False
    size, waiting, held = _put(out, size, waiting, held, (1 << (-held % 8)) - 1, -held % 8)
    out[size], out[size + 1] = 0xFF, EOI
    lengths[done] = size - begun
    return True
