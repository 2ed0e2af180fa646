"""Pictures of a set: a row of samples for each class, and the class histogram before and after balancing."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CLASSES = 40  # rows of a grid, names on an axis
TILE = 64  # pixels: the longer side of an image in a picture, at most
_GAP = 2
_LABEL_WIDTH = 160
_QUIET = "#555555"
_REAL, _SYNTHETIC = "#0072b2", "#e69f00"  # Okabe & Ito's, safe for colour-blind readers


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


def _tile(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")
    longer = max(picture.size)
    width, height = (
        side * (TILE // longer) if longer <= TILE else round(side * TILE / longer) for side in picture.size
    )
    filter_ = Image.Resampling.NEAREST if longer <= TILE else Image.Resampling.LANCZOS
    return picture.resize((width, height), filter_)


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


def class_histogram(
    real: np.ndarray, synthetic: np.ndarray, groups: dict[str, np.ndarray], classes: tuple[str, ...]
) -> bytes:
    """The class histogram as SVG: the real images of each class, largest class first, and on them the synthetic ones.
    The same counts give the same file.

    Args:
        real, synthetic: int64 [num_classes], images of each class.
        groups: class numbers by name, as from `class_groups`; an empty group is left out.
        classes: names by label.
    """
    import matplotlib as mpl  # slow to import, and a grid does not need it
    from matplotlib.figure import Figure

    order = np.argsort(-real, kind="stable")
    gap = 0.1 if len(order) <= 100 else 0.0
    places = np.arange(len(order))
    edges = np.stack([places - 0.5 + gap, places + 0.5 - gap], axis=1).ravel()

    def outline(heights: np.ndarray) -> np.ndarray:
        """The height over each bar and 0 over the gap behind it: one shape, however many classes."""
        return np.stack([heights, np.zeros_like(heights)], axis=1).ravel()[:-1]

    below, above = outline(real[order]), outline((real + synthetic)[order])
    style: dict[Any, Any] = {"svg.hashsalt": "diffult", "svg.fonttype": "none"}
    style |= {"font.size": 9, "axes.edgecolor": "#888888"}
    with mpl.rc_context(style):
        figure = Figure((9.6, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.stairs(below, edges, fill=True, color=_REAL, label="real")
        axes.stairs(above, edges, baseline=below, fill=True, color=_SYNTHETIC, label="synthetic")
        axes.set(xlim=(-0.6, len(order) - 0.4), ylim=(0, 1.08 * float(above.max())), ylabel="images")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.08), ncols=2, frameon=False, borderaxespad=0)
        if len(order) <= 12:
            _count_images(axes, real[order], synthetic[order])
        _mark_groups(axes, order, groups)
        _name_classes(axes, [classes[c] for c in order])
        return _as_svg(figure)


def _count_images(axes: Axes, real: np.ndarray, synthetic: np.ndarray) -> None:
    """Counts over each bar, such as 10+490: the tail's real images are too few to see."""
    for place, (before, added) in enumerate(zip(real, synthetic, strict=True)):
        text = f"{before}+{added}" if added else f"{before}"
        at = (place, before + added)
        axes.annotate(text, at, (0, 2), textcoords="offset points", ha="center", color=_QUIET, size=7.5)


def _mark_groups(axes: Axes, order: np.ndarray, groups: dict[str, np.ndarray]) -> None:
    """The name of each group over its classes, and a line before the next group."""
    for name, members in groups.items():
        places = np.flatnonzero(np.isin(order, members))
        if len(places) == 0:
            continue
        at = (places.mean(), 1.02)
        axes.annotate(name, at, xycoords=("data", "axes fraction"), ha="center", color=_QUIET)
        if places[-1] < len(order) - 1:
            axes.axvline(places[-1] + 0.5, color="#bbbbbb", linewidth=0.8, linestyle=(0, (4, 4)))


def _name_classes(axes: Axes, names: list[str]) -> None:
    if len(names) > MAX_CLASSES:
        axes.set_xlabel(f"{len(names)} classes, most real images first")
        axes.set_xticks([])
        return
    names = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.tick_params(axis="x", length=0)
    if max(map(len, names)) * len(names) > 120:
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")


def _as_svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Text stays text in the file, so the reader's fonts draw what matplotlib's lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
