"""Whether ffcv is there, asked once and told once."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def have_ffcv() -> bool:
    """Whether ffcv can be imported. The first time that it cannot, a warning says so and why."""
    try:
        from . import beton  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        logger.warning("ffcv is not there (%s): image sets are .npz files, loaded into memory whole", error)
        return False
    return True


def suffix() -> str:
    """The ending of the image sets to write on this machine: ".beton" with ffcv, ".npz" without."""
    return ".beton" if have_ffcv() else ".npz"
