"""JPEG files: decoded by the TurboJPEG that ffcv links, else by Pillow to the same bits, and cut for crops."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..decoding import decode_rgb
from ..errors import CMYKError
from .part import part

__all__ = ["decode_jpeg", "decoder_name", "part", "with_restarts"]
_log = logging.getLogger(__name__)


def decode_jpeg(content: np.ndarray, *, reuse_buffer: bool = False) -> np.ndarray:
    """A JPEG file's content, contiguous uint8 (n,), as RGB, uint8 (H, W, 3).

    Args:
        reuse_buffer: the pixels are valid until this thread decodes the next image so.

    Raises:
        CMYKError: the colours are CMYK.
        ValueError: no JPEG, damaged, cut short, or of more than `decoding.MAX_PIXELS`.
    """
    return _decoder()[1](content, reuse_buffer=reuse_buffer)


def decoder_name() -> str:
    """What decodes JPEGs on this machine, and why."""
    return _decoder()[0]


@functools.cache
def _decoder() -> tuple[str, Callable[..., np.ndarray]]:
    try:
        from . import turbojpeg
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        _log.warning("Pillow decodes JPEGs: ffcv's TurboJPEG is not there (%s)", error)
        return f"Pillow ({error})", _decode_by_pillow
    return "TurboJPEG of ffcv", turbojpeg.decode_jpeg


def _decode_by_pillow(content: np.ndarray, *, reuse_buffer: bool = False) -> np.ndarray:
    file = content.tobytes()
    try:
        with Image.open(io.BytesIO(file)) as image:
            if image.mode == "CMYK":
                raise CMYKError("its colours are CMYK")
    except (OSError, Image.DecompressionBombError):
        pass  # decode_rgb gives the reason
    return decode_rgb(file)


def with_restarts(content: np.ndarray) -> np.ndarray:
    """See `ffcv_writers.jpeg.restarts`; without numba, which comes with ffcv, the file as it is."""
    return _restarts()(content)


@functools.cache
def _restarts() -> Callable[[np.ndarray], Any]:
    try:
        from .restarts import with_restarts
    except ImportError as error:
        _log.warning("JPEGs are stored without restart markers, so crops decode whole images: %s", error)
        return lambda content: content
    return with_restarts
