"""Images as files that text files list, a line `relative/path label` each (the format of ImageNet-LT)."""

from __future__ import annotations

import codecs
import io
import os
import re
from array import array
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .labels import parse_label
from .source import EXTENSIONS, SPLITS, Place, Source, Split, file_source, image_files, numbered

LIST_FORMAT = (
    "A list has a line 'path label' for each image: the path from the list's root, or absolute; then spaces, a tab or "
    "a comma; then the class, a number from 0, or in every line a name: these are numbered as they sort in the "
    "training list. Paths may hold spaces or be in quotes, as may names after a comma; a first line such as "
    "'path,label', empty lines and lines that begin with # are passed over; the text is UTF-8, or UTF-16 with its mark."
)
_LABEL = re.compile(r"[\s,;]([^\s,;]+)$")
_MORE_COLUMNS = re.compile(rf"({'|'.join(map(re.escape, EXTENSIONS))})[\"']?[\s,;]", re.IGNORECASE)
_SPACED_NAME = re.compile(
    rf"(.*(?:{'|'.join(map(re.escape, EXTENSIONS))})[\"']?)"
    r"(?:[\s,;]+(\"[^\"]+\"|'[^']+')|\s*[,;\t]\s*([^\s,;\"]+(?: [^\s,;\"]+)*))",
    re.IGNORECASE,
)
_TITLES = {"path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_id", "img", "id", "name"}
_MARKS = {  # the longer ones first: the mark of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read(place: Place) -> Source:
    """Classes are named as in the training list, or by their numbers. Paths may hold spaces; a file is opened only when
    its image is read."""
    if not place.lists:
        raise SourceError("a source of lists needs a train list")
    if not place.path.is_dir():
        raise SourceError(f"{place.path} is not a folder")
    paths, splits, classes = {}, {}, _Classes()
    for split in (split for split in SPLITS if split in place.lists):  # the training list first: it has all names
        file = place.lists[split]
        paths[split], labels, lines = _read_list(file, place.path, classes)

        def name(i: int, file: Path = file, paths: list[str] = paths[split], lines: array = lines) -> str:
            return f"{paths[i]}, {file.name}:{lines[i]}"

        splits[split] = Split(image_files(paths[split], name), labels)
    return file_source(place.path, paths, splits, classes.names or numbered(splits))


class _Classes:
    """Numbers for the labels of several lists: all are numbers, or all are names that the first list has.

    Attributes:
        names: sorted, as torchvision sorts folders; () while the first list is read, and where labels are numbers.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._numbers: dict[str, int] = {}
        self._named: bool | None = None  # as the first label is

    def number(self, label: str, path: str) -> int:
        """The number of a label; of a name in the first list, how many others came before it.

        Raises:
            SourceError: neither a number nor the name of an image's class, the other of the two, or no name of the
                first list.
        """
        if self._named is False or not (_is_name(label) and _is_image(path)):
            number = parse_label(label)
            if self._named:
                other = next(iter(self._numbers))
                raise SourceError(f"the label is the number {number}, others are names, as {other[:40]!r}")
            self._named = False
            return number
        if self.names and label not in self._numbers:
            raise SourceError(f"the training list has no class {label[:40]!r}")
        self._named = True
        return self._numbers.setdefault(label, len(self._numbers))

    def labels(self, numbers: array) -> np.ndarray:
        """Labels int64 (N,) of a list that has been read to its end."""
        labels = np.array(numbers, dtype=np.int64)
        if not self._named or self.names:
            return labels
        self.names = tuple(sorted(self._numbers))
        ranks = {name: rank for rank, name in enumerate(self.names)}
        labels = np.array([ranks[name] for name in self._numbers])[labels]
        self._numbers = ranks
        return labels


def _is_name(label: str) -> bool:
    """Whether it may be a class's name: no path of an image, and no number of any kind, such as nan or 1e3."""

    def is_number(word: str) -> bool:
        try:
            float(word)
        except ValueError:
            return False
        return True

    return not label.lower().endswith(EXTENSIONS) and not all(map(is_number, label.split()))


def _is_image(path: str) -> bool:
    """Whether it looks like one or is there: the titles of columns do not."""
    return path.rstrip("\"'").lower().endswith(EXTENSIONS) or os.path.isfile(path)


def _read_list(path: Path, root: Path, classes: _Classes) -> tuple[list[str], np.ndarray, array]:
    """Paths, labels int64 (N,) and line numbers of a list, see LIST_FORMAT.

    Raises:
        SourceError: lines of another form; the first is quoted, all are counted.
    """
    paths, labels, lines = [], array("q"), array("q")
    first, wrong, wrong_lines = True, "", 0
    for number, line in enumerate(io.StringIO(_text(path), newline=None), start=1):
        if not (line := line.strip()):
            continue
        is_first, first = first, False
        try:
            name, label = _columns(line)
            name = os.fsdecode(name.encode(errors="surrogateescape"))  # the bytes of the list, whatever the locale
            if is_first and not label.isdecimal() and name.strip("\"'").lower() in _TITLES:
                continue
            file = os.path.join(root, _existing(name, root))
            if line[0] == "#" and not os.path.lexists(file):
                continue
            labels.append(classes.number(label, file))
        except SourceError as error:
            if line[0] == "#":
                continue
            wrong, wrong_lines = wrong or f"{path}:{number}: {error}", wrong_lines + 1
            continue
        paths.append(file)
        lines.append(number)
    if wrong:
        raise SourceError(wrong + (f"; {wrong_lines} lines are wrong" if wrong_lines > 1 else ""))
    if not paths:
        raise SourceError(f"the list {path} has no lines: it needs 'relative/path label' for each image")
    return paths, classes.labels(labels), lines


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read the list {path}: {error.strerror}") from error
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        # surrogateescape: a file name need not be UTF-8, and goes back to the system as the bytes it was
        text = content.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not the {encoding} that it begins as ({error.reason}): save it as UTF-8") from error
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise SourceError(f"{path}:{number}: zero bytes, as in UTF-16 without its mark: save it as UTF-8")
    return text


def _columns(line: str) -> tuple[str, str]:
    """The path and the label of a line without white space around it."""
    found = _LABEL.search(line)
    if found is None or not (name := line[: found.start()].rstrip(" \t,;")):
        raise SourceError(f"a line must be 'relative/path label', not {line[:200]!r}")
    if _MORE_COLUMNS.search(name) and not name.strip("\"'").lower().endswith(EXTENSIONS):
        if (spaced := _SPACED_NAME.fullmatch(line)) and _is_name(label := _unquoted(spaced[2] or spaced[3])):
            return spaced[1], label
        raise SourceError(f"a line must be 'relative/path label', not of more columns: {line[:200]!r}")
    return name, _unquoted(found[1])


def _unquoted(label: str) -> str:
    return label[1:-1] if label[0] in "\"'" and label[-1] == label[0] else label


def _existing(name: str, root: Path) -> str:
    """A path as it is written; where nothing is there, without quotes and with the slashes of this system."""
    if (name[0] not in "\"'" and "\\" not in name) or os.path.lexists(os.path.join(root, name)):
        return name
    if len(name) > 1 and name[0] in "\"'" and name[-1] == name[0]:
        name = name[1:-1].replace(name[0] * 2, name[0])
    return name if os.path.lexists(os.path.join(root, name)) else name.replace("\\", "/")
