"""The python archives of CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as a source."""

from __future__ import annotations

from pathlib import Path

from diffult.data.image_set import Source, array_source
from diffult.errors import UserError
from ffcv_writers.cifar import read_cifar
from ffcv_writers.errors import SourceError


def load_cifar(name: str, path: Path) -> Source:
    """CIFAR-10 or CIFAR-100 with its fine labels, images in the order of the archive, 32x32 RGB.

    Args:
        name: "cifar10" or "cifar100".
        path: the archive's folder, its .tar.gz, or a folder that holds either.

    Raises:
        UserError: a file is missing or is not what such an archive holds, see `read_cifar`.
    """
    try:
        archive = read_cifar(name, path)
    except SourceError as error:
        raise UserError(str(error)) from None
    return array_source(archive.train, archive.test, archive.classes, str(archive.place))
