"""Which classes a user means: one rule for every option and file that names some."""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffult.errors import UserError, listed, nearest, shown
from ffcv_writers.readers.folder import as_utf8

_DIGITS = "0123456789"
_COMMENT = re.compile(r"\s#.*")
_TITLE = re.compile(r"\W{0,3}(class|label|name)\w{0,9}\W{1,9}(count|number|samples|images|n)\W{0,3}", re.IGNORECASE)
MOST_SAMPLES = 10**9  # of a class


class ClassNames:
    """The classes of a set, found by name; or by number, the label, where no class is named by a number."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self._labels = {name: c for c, name in enumerate(classes)}
        # An accent may be a character of its own, and the eye does not tell.
        self._composed = {_composed(name): c for c, name in reversed([*enumerate(classes)])}
        self._number = next((name for name in classes if _is_number(name)), None)
        self._hashes = tuple(name for name in classes if name.startswith("#"))

    def label(self, name: str) -> int:
        """Raises ValueError if there is no such class."""
        if name in self._labels:
            return self._labels[name]
        if _composed(name) in self._composed:
            return self._composed[_composed(name)]
        if not _is_number(name):
            known = nearest(name[:200], self.classes) or f"; the classes are {listed(self.classes)}"
            raise ValueError(f"no class {shown(name)}{known}")
        if self._number is not None:
            raise ValueError(f"no class {name[:20]}; numbers are the names of classes here, such as {self._number}")
        if len(name) > 12 or int(name) >= len(self.classes):
            raise ValueError(f"no class {name[:20]}, the set has 0 to {len(self.classes) - 1}")
        return int(name)

    def labels(self, text: str) -> list[int]:
        """`cat,3,7-9` as sorted labels: names, numbers and ranges of numbers. A name with a comma stands in double
        quotes. Raises ValueError if it is not of this form, or there is no such class."""
        if text in self._labels:
            return [self._labels[text]]
        try:
            parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
        except csv.Error as error:
            raise ValueError(f"{error} in {shown(text)}") from None
        if not parts or not all(part.strip() for part in parts):
            raise ValueError(f"expected names, numbers and ranges such as cat,3,7-9, got {shown(text)}")
        return sorted({c for part in parts for c in self._part(part if part in self._labels else part.strip())})

    def _part(self, part: str) -> list[int]:
        low, _, high = (end.strip() for end in part.partition("-"))
        if part in self._labels or not (_is_number(low) and _is_number(high)):
            return [self.label(part)]
        first, last = self.label(low), self.label(high)
        if int(low) > int(high):
            raise ValueError(f"expected a range from the lower number to the higher, got {shown(part)}")
        if self._number is None:
            return list(range(first, last + 1))
        numbers = {c: int(name) for c, name in enumerate(self.classes) if _is_number(name)}
        return [c for c, number in numbers.items() if int(low) <= number <= int(high)]

    def counts(self, text: str) -> np.ndarray:
        """Lines of a class and a count, a space, tab, comma or semicolon between them, as int64 [num_classes]; 0 for a
        class that is not there. What follows # is a comment, unless a class is named so; a line `class,count` is a
        title.

        Raises:
            ValueError: a line, with its number, of another form, of no class or of one named before; or no line.
        """
        counts: dict[int, int] = {}
        for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
            try:
                found = self._counted(line.strip())
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if found and found[0] in counts:
                raise ValueError(f"line {number}: class {shown(self.classes[found[0]])} is named twice")
            counts |= [found] if found else []
        if not counts:
            raise ValueError("names no class; give lines such as '3 500'")
        return np.array([counts.get(c, 0) for c in range(len(self.classes))], dtype=np.int64)

    def _counted(self, line: str) -> tuple[int, int] | None:
        """Label and count; None where the line has none."""
        if not line or (line.startswith("#") and not line.startswith(self._hashes)):
            return None
        if _TITLE.fullmatch(line):
            return None
        readings = [*_readings(line), *_readings(_COMMENT.sub("", line))]
        name, count = next((one for one in readings if one[0] in self._labels), readings[-1] if readings else ("", ""))
        if not name or (len(count) > 1 and count[0] == "0"):  # 1,000 is not class 1
            raise ValueError(f"expected a class and a count, such as '3 500', got {shown(line)}")
        if len(count) > 10 or int(count) > MOST_SAMPLES:
            raise ValueError(f"{count[:20]} samples of a class are too many")
        if name not in self._labels and len(name) > 1 and name[0] == name[-1] == '"':
            name = name[1:-1].replace('""', '"')
        return self.label(name), int(count)


def parse_classes(text: str, names: ClassNames) -> list[int]:
    """`cat,3,7-9` as sorted labels. Raises UserError if it is not of this form, or there is no such class."""
    try:
        return names.labels(as_utf8(text))
    except ValueError as error:
        raise UserError(f"--classes: {error}") from None


def read_counts(file: Path, names: ClassNames) -> np.ndarray:
    """Lines of a class and a count, int64 [num_classes]; 0 for a class that is not there.

    Raises:
        UserError: a line of another form, an unknown class, or one named twice.
    """
    content = file.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        # surrogateescape: the name of a class need not be UTF-8, and is found by the bytes that it is
        text = content.decode("utf-16") if marked else content.decode("utf-8-sig", "surrogateescape")
        return names.counts(text)
    except ValueError as error:
        raise UserError(f"--counts {file}: {error}") from None


def _readings(line: str) -> list[tuple[str, str]]:
    """The class, which may itself end in a comma, and the digits after it."""
    head = line.rstrip(_DIGITS)
    name, count = head.rstrip(), line[len(head) :]
    shorter = name[:-1].rstrip() if name.endswith((",", ";")) else name
    return [(name, count), (shorter, count)] if count and shorter != head else []


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
