"""Labels out of files: integers from 0, checked one by one before any cast."""

from __future__ import annotations

import numpy as np

from ..errors import SourceError

LARGEST = 999_999  # a table of a row a class still fits in memory


def parse_label(text: str) -> int:
    """A label that is written in ASCII digits alone.

    Raises:
        SourceError: it is anything else, or larger than LARGEST.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(LARGEST))):
        raise SourceError(f"the label is not an integer from 0 to {LARGEST} but {text[:40]!r}")
    return int(text)


def as_labels(values: np.ndarray, where: object) -> np.ndarray:
    """Labels as int64 (N,), from (N,) or (N, 1) integers, booleans, or floating-point numbers that are whole.

    Raises:
        SourceError: another type or shape, or a label that is not an integer from 0 to LARGEST; its row is named.
    """
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        example = f", such as {values.reshape(-1)[0]!r:.60}" if values.size else ""
        raise SourceError(
            f"{where}: need a label an image, an integer from 0, not {values.dtype} of shape {values.shape}{example}"
        )
    if values.dtype.kind == "b":
        values = values.view(np.uint8)
    with np.errstate(over="ignore"):  # LARGEST is infinite in 16 bits
        wrong = np.flatnonzero(~((values >= 0) & (values <= LARGEST) & (values == np.floor(values))))
    if wrong.size:
        more = f" (row {wrong[0]} is the first of {wrong.size})" if wrong.size > 1 else ""
        raise SourceError(
            f"{where}: the label of row {wrong[0]} is {values[wrong[0]]}, not an integer from 0 to {LARGEST}{more}"
        )
    return values.astype(np.int64)
