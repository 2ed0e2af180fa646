"""WebDataset archives: uncompressed .tar files with members KEY.jpg (or another image) and KEY.cls."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .source import EXTENSIONS, SPLITS, Contents, Place, Source, Split, file_sizes, numbered


def read(place: Place) -> Source:
    """One archive, or a folder of them: SPLIT*.tar or SPLIT/*.tar, or any names without splits."""
    path = place.path
    if path.is_dir():
        found = {split: sorted([*path.glob(f"{split}*.tar"), *path.glob(f"{split}/*.tar")]) for split in SPLITS}
        archives = {split: files for split, files in found.items() if files} or {"train": sorted(path.glob("*.tar"))}
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
    try:
        with tarfile.open(archive, "r:") as members:
            for member in members:
                folder, name = os.path.split(member.name)
                key, ending = os.path.join(folder, name.partition(".")[0]), name.partition(".")[2].lower()
                if member.isfile() and f".{ending}" in EXTENSIONS:
                    images[key] = f"{archive}: {member.name}", member.offset_data, member.size
                elif member.isfile() and ending == "cls":
                    stream = members.extractfile(member)
                    labels[key] = int(stream.read()) if stream else -1
            members.fileobj.seek(members.offset)
            if any(members.fileobj.read(512)):  # tarfile takes a broken header for the end
                raise ValueError(f"damaged at byte {members.offset}")
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise SourceError(f"cannot read {archive}: {error}; it must be an uncompressed .tar") from error
    odd = sorted(images.keys() ^ labels.keys())
    if odd:
        raise SourceError(f"{archive}: {odd[0]} needs an image and a .cls file, but has only one of them")
    return [(*image, labels[key]) for key, image in images.items()]
