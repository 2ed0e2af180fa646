"""What is stored of an image."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from .decoding import decode_rgb
from .errors import CMYKError
from .format import Stored
from .jpeg import decode_jpeg, with_restarts

Storage = Literal["raw", "jpg"]
Transform = Callable[[np.ndarray], np.ndarray]


def encode(sample: np.ndarray | bytes, storage: Storage, transform: Transform | None) -> Stored:
    """What to store of an image, see `ffcv_writers.write`.

    A JPEG file that decodes without a complaint and is not transformed keeps its coefficients.

    Args:
        sample: uint8 (H, W, C), or the content of an image file.

    Raises:
        ValueError: the content does not decode.
    """
    content: np.ndarray | None = None  # to be stored, without loss
    defect = ""
    if isinstance(sample, np.ndarray):
        pixels = sample
    elif sample.startswith(b"\xff\xd8"):
        content = np.frombuffer(sample, np.uint8)
        try:
            pixels = decode_jpeg(content)
        except ValueError as error:
            pixels, content = decode_rgb(sample), None  # which raises if too little of it is there
            defect = "" if isinstance(error, CMYKError) else str(error)
    else:
        pixels = decode_rgb(sample)
    if transform is not None:
        before, pixels = pixels, transform(pixels)
        content = content if pixels is before else None
    height, width, channels = pixels.shape
    if storage == "raw":
        return Stored(np.ascontiguousarray(pixels).reshape(-1), (height, width, channels), False, defect)
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        content = np.frombuffer(buffer.getbuffer(), np.uint8)
    return Stored(with_restarts(content), (height, width, channels), True, defect)
