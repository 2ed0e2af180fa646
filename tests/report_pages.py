"""A small run and a small comparison to report on, and a page read back as its reader gets it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from diffult.config import Config
from diffult.longtail.methods import find_method
from diffult.reporting.content import RunContent
from diffult.reporting.pictures import ArraySamples

CLASSES = ("cat", '<b>"R&D"</b>', "tail")
COUNTS = np.array([12, 40, 3])


@dataclass
class Images(ArraySamples):
    """Also what the report asks of a packed set."""

    classes: tuple[str, ...]

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.classes))

    @property
    def index(self) -> np.ndarray:
        """The number of each image among those of its class; labels are sorted."""
        return np.arange(len(self.labels)) - np.searchsorted(self.labels, self.labels)

    @property
    def train(self) -> Images:
        return self


def image_set(counts: np.ndarray, classes: tuple[str, ...], size: int = 8, channels: int = 1, seed: int = 0) -> Images:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), size, size, channels), dtype=np.uint8)
    return Images(images, labels, classes)


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """RGB, each pixel a square of factor x factor."""
    return np.kron(np.broadcast_to(image, (*image.shape[:2], 3)), np.ones((factor, factor, 1), np.uint8))


class Page(HTMLParser):
    """What a reader gets: text, the cells of each table, images; and what the page refers to."""

    _texts: ClassVar = {
        "h2": "headings",
        "h3": "headings",
        "figcaption": "captions",
        "dt": "terms",
        "dd": "definitions",
    }

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.bold: list[str] = []
        self.references: list[str] = []
        self.figures: list[str] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self._class = ""
        self._in_cell = False
        self._into: list[str] | None = None  # the list whose last text what is read belongs to
        self.terms: list[str] = []
        self.definitions: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if tag == "svg":
            self.figures.append(values.get("aria-label") or "")
        if tag in self._texts:
            self._into = getattr(self, self._texts[tag])
            self._into.append("")
        self._class = values.get("class") or ""
        self.references += [values[key] or "" for key in ("src", "href", "data", "srcset", "action") if key in values]
        if tag == "img":
            self.images.append(values)
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._class = ""
        self._in_cell = self._in_cell and tag not in ("th", "td")
        if tag in self._texts:
            self._into = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into is not None:
            self._into[-1] += data
        if self._class == "best":
            self.bold.append(data)
        if self._in_cell and data.strip():
            row = self.tables[-1][-1]
            row[-1] += ("|" if row[-1] else "") + data.strip()

    @property
    def answers(self) -> dict[str, str]:
        """The answer to each question of the summary, and other facts by name."""
        return dict(zip(self.terms, self.definitions, strict=True))

    def row(self, title: str) -> list[str]:
        """The first row of any table that starts with this title."""
        return next(row for table in self.tables for row in table if row and row[0].split("|")[0] == title)


def picture(image: dict[str, str | None]) -> np.ndarray:
    content = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def example_metrics(config: Config) -> dict[str, Any]:
    names = ("top1", "many", "medium", "few")
    tallies = {"cat": (35, 28, 7, 21, 7), "tail": (80, 20, 8, 12, 60)}
    keys = ("drawn", "accepted", "id", "aid", "ood")
    by_class = {name: dict(zip(keys, row, strict=True)) for name, row in tallies.items()}
    totals = {"drawn": 115, "accepted": 48, "id": 15, "aid": 33, "ood": 67}
    return {
        "name": config.name,
        "hash": "0123456789ab",
        "seed": 7,
        "ce": dict(zip(names, (70.04, 91.0, 70.0, 48.14), strict=True)),
        "diffult": dict(zip(names, (75.26, 88.0, 70.0, 51.26), strict=True)),
        "validation_images": 26,
        "validation": {"ce": dict.fromkeys(names, 61.5), "diffult": dict.fromkeys(names, 62.5)},
        "generation": totals | {"images_per_s": 71.4, "nfe": 20, "by_class": by_class},
        "seconds": {"extractor": 10.0, "diffusion": 75.0, "generate": 15.0},
    }


def example_content(config: Config, classes: tuple[str, ...] = CLASSES) -> RunContent:
    """A run with everything that a report can show: three methods, copies of every first sample of a class, half of
    the last class's."""
    counts = np.resize(COUNTS, len(classes))
    real = image_set(counts, classes)
    samples = image_set(np.resize((28, 0, 20), len(classes)), classes, seed=1)
    generator = np.random.default_rng(2)
    labels = np.repeat(np.arange(len(classes)), 10)
    metrics = example_metrics(config)
    right = {"ce": 6, "duplicates": 7, "diffult": 9}  # of ten test images of a class
    predictions = {"labels": labels} | {
        name: np.where(np.arange(len(labels)) % 10 < hits, labels, (labels + 1) % len(classes))
        for name, hits in right.items()
    }
    for name, hits in right.items():
        values = dict.fromkeys(("top1", "many", "medium", "few"), 10.0 * hits)
        metrics[name] = values | {"by_class": [10.0 * hits] * len(classes)}
        metrics["validation"][name] = values
    kept = len(samples.labels)
    copies = {
        "nearest": np.array([np.flatnonzero(real.labels == c)[0] for c in samples.labels]),
        "pixels": generator.random(kept, np.float32),
        "features": generator.random(kept, np.float32),
        "copy": samples.index == 0,
        "held_out_labels": labels,
        "held_out_pixels": generator.random(len(labels), np.float32),
        "held_out_features": generator.random(len(labels), np.float32),
    }
    metrics["copies"] = {"share": 25.0, "by_class": dict.fromkeys(classes, 3.6) | {classes[-1]: 55.0}, "expected": 5.0}
    candidates = {
        "labels": samples.labels,
        "indices": samples.index,
        "distance": np.where(samples.index % 2, 3.0, 1.5).astype(np.float32),
        "verdict": (samples.index % 2).astype(np.uint8),
    }
    lines = [{"step": step, "images_per_s": 100.0, "loss": 1.0 / step} for step in (50, 100, 150)]
    return RunContent(
        config, metrics, real, samples, "CPU of mine, torch 9", candidates, np.full(len(classes), 2.0, np.float32),
        copies, predictions, dict.fromkeys(("extractor", "diffusion", *right), lines),
    )  # fmt: skip


def example_comparison(classes: tuple[str, ...] = CLASSES, seeds: int = 2) -> dict[str, Any]:
    """Four methods; DiffuLT is 1 and 3 points above logit adjustment and 5 and 5 above the duplicates."""
    top1 = {"ce": (70.0, 71.0), "logit_adjust": (80.0, 79.0), "duplicates": (76.0, 77.0), "diffult": (81.0, 82.0)}
    rows = []
    for name, values in top1.items():
        each = [dict.fromkeys(("top1", "many", "medium", "few"), v) | {"by_class": [v] * len(classes)} for v in values]
        columns = {key: float(np.mean(values[:seeds])) for key in ("top1", "many", "medium", "few")}
        rows.append({
            "name": name, "method": name, "title": find_method(name).title, "synthetic": name == "diffult",
            "filled": [40, 1.0], "steps": 600,
            "seconds": 65.0 if name == "diffult" else None, "seeds": each[:seeds],
            "mean": columns | {"by_class": [columns["top1"]] * len(classes)},
            "std": dict.fromkeys(columns, 0.7 if seeds > 1 else None), "validation": None, "paired": None,
            "paired_duplicates": None,
        })  # fmt: skip
    many = seeds > 1
    pairs = {"paired": ("logit_adjust", 2.0, [-10.7, 14.7]), "paired_duplicates": ("duplicates", 5.0, [4.5, 5.5])}
    for key, (against, gain, interval) in pairs.items():
        rows[-1][key] = {"against": against, "difference": gain, "interval": interval if many else None}
    return {
        "preset": "digits-lt", "command": "python -m diffult.compare --preset digits-lt --seeds 2",
        "machine": {"device": "a CPU", "torch": "9", "python": "4"},
        "budget": {"steps": 600, "batch_size": 64}, "seeds": list(range(seeds)), "classes": list(classes),
        "counts": np.resize(COUNTS, len(classes)).tolist(), "test_counts": [60] * len(classes),
        "groups": {"many": 30, "few": 10}, "split": "test",
        "rows": rows,
    }  # fmt: skip
