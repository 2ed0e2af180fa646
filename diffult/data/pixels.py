"""What is stored of an image file, and what of that a network sees: the same whether it is packed first or not."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from diffult.data.config import DataConfig
from ffcv_writers import CenterCrop
from ffcv_writers.decoding import centre_square, limit_shorter_side, resized_crop
from ffcv_writers.encoding import Transform, encode
from ffcv_writers.jpeg import decode_jpeg


def file_transform(config: DataConfig) -> Transform:
    """What is stored of a decoded image file, see `ffcv_writers.write`."""
    if config.storage == "raw":
        return partial(square, size=config.image_size, channels=config.channels)
    return partial(limit_shorter_side, size=config.max_short_side)


def as_packed(config: DataConfig, content: bytes, crop: CenterCrop | None) -> np.ndarray:
    """The pixels that a loader with this crop gives of an image file once it is packed, uint8 (H, W, C), without
    packing it.

    Raises:
        ValueError: the content does not decode.
    """
    stored = encode(content, config.storage, file_transform(config))
    pixels = decode_jpeg(stored.data) if stored.jpg else stored.data.reshape(stored.shape)
    if crop is None:
        return pixels
    (box,) = crop.boxes(np.array([pixels.shape[:2]]), np.zeros(1, np.int64))
    return resized_crop(pixels, box, (crop.size, crop.size))


def square(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """What is stored raw of an image file: uint8 (H, W, 3) as (size, size, channels), see `centre_square`; one channel
    is the luma of ITU-R 601."""
    if channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return centre_square(image, size)
