"""Image files to pixels with Pillow, whatever their kind, and images to other sizes."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

MAX_PIXELS = 178_956_970  # of an image; at more, Pillow takes a file for an attack
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # which Pillow gives at half as many


def decode_rgb(content: bytes) -> np.ndarray:
    """An image file's content as RGB, uint8 (H, W, 3), its orientation tag not applied, transparency dropped.

    The file's name does not matter; grey, CMYK, 16-bit and palette images are converted.

    Raises:
        ValueError: not an image, cut short, or with pixels of unknown range; one line.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            check_size(image.height, image.width)
            image.load()
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
                deep = np.asarray(image)
                if deep.size and not 0 <= deep.min() <= deep.max() < 2**16:
                    raise ValueError("its grey values do not fit 16 bits")
                return np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, whose range is unknown")
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("not an image in a known format" if content else "the file is empty") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than the {MAX_PIXELS:,} pixels that an image may have") from None
    except Exception as error:  # whatever a decoder raises on arbitrary bytes
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def check_size(height: int, width: int) -> None:
    """Raises ValueError where an image has no pixels, or more than MAX_PIXELS."""
    if min(height, width) < 1:
        raise ValueError(f"it is {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise ValueError(f"it is {height} x {width} pixels, more than the {MAX_PIXELS:,} that an image may have")


def limit_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """The image itself, or, if its shorter side has more than `size` pixels, scaled to that (bicubic, antialiased)."""
    return image if min(image.shape[:2]) <= size else _to_shorter_side(image, size)


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, C) scaled until its shorter side is `size` (bicubic, antialiased), then the middle, (size, size, C).

    Bit for bit torchvision's `resize` and `center_crop` of a Pillow image.
    """
    if min(image.shape[:2]) != size:
        image = _to_shorter_side(image, size)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _to_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    shorter = min(image.shape[:2])
    height, width = (side * size // shorter for side in image.shape[:2])
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).reshape(height, width, -1)


def resized_crop(image: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A part of an image at another size, as torchvision's `resized_crop` (bilinear, antialiased) to two levels of 255.

    Args:
        image: uint8 (H, W, C), C 1 or 3.
        box: top, left, height and width of the part, within the image.
        size: height and width of the result.

    Returns:
        uint8 (*size, C).
    """
    top, left, height, width = box.tolist()
    part = image[top : top + height, left : left + width]
    if (height, width) == size:
        return part
    batch = torch.from_numpy(np.array(part))[None].permute(0, 3, 1, 2)  # in this order: channels-last to torch
    return F.interpolate(batch, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
