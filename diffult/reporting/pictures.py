"""Pictures of samples: a strip of them, and a grid with a row for each class."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_CLASSES = 40  # rows of a grid, names on an axis
TILE = 64  # pixels: the longer side of an image in a picture, at most
_GAP = 2
_LABEL_WIDTH = 160


class Samples(Protocol):
    """Labelled images, such as an `ffcv_writers.ImageSet`: labels int64 [N], image(i) uint8 (H, W, C)."""

    labels: np.ndarray

    def image(self, i: int, /) -> np.ndarray: ...


@dataclass
class ArraySamples:
    """Samples in memory: images uint8 [N, H, W, C], labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def image(self, i: int, /) -> np.ndarray:
        return self.images[i]


NO_SAMPLES = ArraySamples(np.empty((0, 1, 1, 1), np.uint8), np.empty(0, np.int64))


def evenly(items: np.ndarray, limit: int) -> np.ndarray:
    """Up to `limit` evenly spaced items, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(len(items), limit))
    return items[places.round().astype(np.int64)]


def first_images(samples: Samples, label: int, count: int) -> list[np.ndarray]:
    """The first `count` images of a class in the order of the set."""
    return [samples.image(int(i)) for i in np.flatnonzero(samples.labels == label)[:count]]


def image_strip(images: Sequence[np.ndarray]) -> Image.Image:
    """Images side by side on white, as an RGB picture; at least one, uint8 (H, W, C), C = 1 or 3, all of one shape.

    Images below 64 pixels are enlarged by a whole factor, every pixel a sharp square; larger ones are reduced to 64
    with antialiasing.
    """
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    strip = Image.new("RGB", (len(tiles) * (width + _GAP) - _GAP, height), "white")
    for place, tile in enumerate(tiles):
        strip.paste(tile, (place * (width + _GAP), 0))
    return strip


def image_column(images: Sequence[np.ndarray]) -> Image.Image:
    """As `image_strip`, one above the other."""
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    column = Image.new("RGB", (width, len(tiles) * (height + _GAP) - _GAP), "white")
    for place, tile in enumerate(tiles):
        column.paste(tile, (0, place * (height + _GAP)))
    return column


def _tile(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")
    longer = max(picture.size)
    width, height = (
        side * (TILE // longer) if longer <= TILE else round(side * TILE / longer) for side in picture.size
    )
    filter_ = Image.Resampling.NEAREST if longer <= TILE else Image.Resampling.LANCZOS
    return picture.resize((width, height), filter_)


def data_uri(picture: Image.Image) -> str:
    """The picture as a PNG inside its address."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sample_grid(samples: Samples, classes: tuple[str, ...], path: Path, per_class: int = 10) -> None:
    """Writes a PNG, whatever the suffix of `path`, with a row for each class that has samples: its name, then its
    first `per_class` samples. Of more than 40 classes 40 evenly spaced ones are shown.

    Args:
        samples: labels in 0..len(classes)-1.
        classes: names by label.
    """
    font = ImageFont.load_default(14)
    shown = evenly(np.unique(samples.labels), MAX_CLASSES)
    rows = [(classes[c], image_strip(first_images(samples, c, per_class))) for c in shown]
    rows = rows or [("no samples", Image.new("RGB", (TILE, TILE), "white"))]
    texts = [_fitted(name, font) for name, _ in rows]
    left = round(max(font.getlength(text) for text in texts)) + 16
    height = rows[0][1].height
    size = left + max(strip.width for _, strip in rows), len(rows) * (height + _GAP) - _GAP
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for row, (text, (_, strip)) in enumerate(zip(texts, rows, strict=True)):
        top = row * (height + _GAP)
        draw.text((left - 8, top + height // 2), text, "black", font, anchor="rm")
        grid.paste(strip, (left, top))
    grid.save(path, format="PNG")


def _fitted(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The name on one line, cut to the label column."""
    text = fitted = " ".join(name.split())
    while font.getlength(fitted) > _LABEL_WIDTH:
        text = text[:-1].rstrip()
        fitted = text + "…"
    return fitted
