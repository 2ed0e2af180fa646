"""WebDataset archives: uncompressed .tar files with members KEY.jpg (or another image) and KEY.cls."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import SourceError, counted
from .labels import parse_label
from .source import EXTENSIONS, SPLITS, Contents, Place, Source, Split, file_sizes, numbered

_log = logging.getLogger(__name__)
_LONGEST_LABEL = 64  # bytes of a .cls that are read


def read(place: Place) -> Source:
    """One archive, or a folder of them: SPLIT*.tar or SPLIT/*.tar, or any names without splits. With a warning,
    archives elsewhere in the folder are passed over."""
    path = place.path
    if path.is_dir():
        found = {split: sorted([*path.glob(f"{split}*.tar"), *path.glob(f"{split}/*.tar")]) for split in SPLITS}
        archives = {split: files for split, files in found.items() if files} or {"train": sorted(path.glob("*.tar"))}
        unread = {*path.rglob("*.tar")} - {file for files in archives.values() for file in files}
        if unread and any(archives.values()):
            _log.warning(
                "%s: not read, as of no split: %s, such as %s", path, counted(len(unread), "archive(s)"), min(unread)
            )
    else:
        archives = {"train": [path]}
    if not any(archives.values()):
        raise SourceError(f"{path} holds no .tar")

    def content() -> tuple[dict[str, Split], tuple[str, ...]]:
        splits = {split: _split(path, files) for split, files in archives.items()}
        return splits, numbered(splits)

    return Source(file_sizes(path.parent, [file for files in archives.values() for file in files]), content)


def _split(path: Path, archives: list[Path]) -> Split:
    rows = [(number, *row) for number, archive in enumerate(archives) for row in _members(archive)]
    if not rows:
        raise SourceError(f"{path} holds no images")

    def read_member(sample: int) -> bytes:
        number, _, offset, size, _ = rows[sample]
        with archives[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return Split(
        Contents(len(rows), read_member, lambda sample: rows[sample][1]), np.array([row[4] for row in rows], np.int64)
    )


def _members(archive: Path) -> list[tuple[str, int, int, int]]:
    """Name, offset, size and label of each image. A key is a path up to the first dot of its name, as WebDataset
    has it."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    dotted = 0
    try:
        for name, offset, size, content in _files(archive):
            folder, file = os.path.split(name)
            stem, _, ending = file.partition(".")
            key, ending = os.path.join(folder, stem), ending.lower()
            image, label = f".{ending}" in EXTENSIONS, ending == "cls"
            dotted += bool(stem) and not image and ending.endswith(EXTENSIONS)
            if (image and key in images) or (label and key in labels):
                raise SourceError(f"{key} has two {'images' if image else '.cls files'}, {name} the second")
            if image:
                images[key] = f"{archive}: {name}", offset, size
            elif label:
                try:
                    labels[key] = parse_label(content.decode("latin1").strip())
                except SourceError as error:
                    raise SourceError(f"{name}: {error}") from error
    except PermissionError:
        raise
    except SourceError as error:
        raise SourceError(f"{archive}: {error}") from error
    except Exception as error:  # whatever arbitrary bytes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot read {archive}: {reason}; it must be an uncompressed .tar") from error
    odd = sorted(images.keys() ^ labels.keys())
    if odd:
        more = f"; {len(odd) - 1} more like it" if len(odd) > 1 else ""
        raise SourceError(f"{archive}: {odd[0]} needs an image and a .cls file, but has only one of them{more}")
    if dotted:
        _log.warning("%s: skipped %s with more than one dot in the name", archive, counted(dotted, "image(s)"))
    return [(*image, labels[key]) for key, image in images.items()]


def _files(archive: Path) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, offset and size of each file, and of a .cls the content; a link is the file that it leads to.

    Raises:
        SourceError: the archive is damaged, or a file is not in it as it is.
    """
    places: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str]] = []
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as members:
        end, size = -1, os.fstat(file.fileno()).st_size
        for member in members:
            stop = member.offset_data + (member.size if member.isreg() else 0)
            if not end < member.offset <= member.offset_data <= stop <= size:
                raise SourceError(f"{member.name}: damaged at byte {member.offset}")
            end = member.offset
            if member.issparse():
                raise SourceError(f"{member.name} is stored with holes: pack the archive again without --sparse")
            if member.islnk() or member.issym():
                target = os.path.join(os.path.dirname(member.name), member.linkname)
                links.append((member.name, member.linkname if member.islnk() else os.path.normpath(target)))
            elif member.isfile():
                place = places[os.path.normpath(member.name)] = member.offset_data, member.size
                yield member.name, *place, _label(file, member.name, *place)
        file.seek(members.offset)  # what tarfile takes for the end: a broken header, or that of the file, too
        mark = file.read(512)
        if any(mark) or not mark:
            raise ValueError(f"damaged at byte {members.offset}" if mark else "cut short: its end mark is not there")
        while rest := file.read(1 << 20):
            if any(rest):
                raise ValueError("more lies behind its end mark, as where archives are joined byte by byte")
        for name, target in links:
            if linked := places.get(os.path.normpath(target)):
                yield name, *linked, _label(file, name, *linked)


def _label(file: BinaryIO, name: str, offset: int, size: int) -> bytes:
    """The content of a .cls, or more of it than a label has; of other files nothing."""
    if not name.lower().endswith(".cls"):
        return b""
    before = file.tell()
    file.seek(offset)
    content = file.read(min(size, _LONGEST_LABEL))
    file.seek(before)
    return content + b"..." * (size > _LONGEST_LABEL)
