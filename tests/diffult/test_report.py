"""The pictures and the report: read back as PNG, SVG and HTML, not as text."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from diffult.plots import ArraySamples, class_histogram, evenly, image_strip, sample_grid
from PIL import Image

from diffult.cli import duration
from diffult.config import Config, load_preset
from diffult.errors import UserError
from diffult.longtail.metrics import class_groups
from diffult.longtail.quota import quotas_to
from diffult.pack import pack
from diffult.report import accuracy_rows, command, generation_rows, render, timing_rows, write_report
from diffult.runs.files import write_json
from diffult.runs.run_dir import RunDir
from ffcv_writers import write

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
    def train(self) -> Images:
        return self


def image_set(counts: np.ndarray, classes: tuple[str, ...], size: int = 8, channels: int = 1, seed: int = 0) -> Images:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), size, size, channels), dtype=np.uint8)
    return Images(images, labels, classes)


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """RGB, each pixel a square of factor x factor."""
    return np.kron(np.broadcast_to(image, (*image.shape[:2], 3)), np.ones((factor, factor, 1), np.uint8))


@pytest.mark.parametrize(("size", "channels", "factor"), [(8, 1, 8), (28, 1, 2), (32, 3, 2), (64, 3, 1)])
def test_grid_shows_each_sample_pixel_by_pixel(tmp_path: Path, size: int, channels: int, factor: int) -> None:
    samples = image_set(np.array([3, 0, 2]), ("a", "b", "c"), size, channels)
    sample_grid(samples, samples.classes, tmp_path / "grid.tmp", per_class=2)
    grid = np.asarray(Image.open(tmp_path / "grid.tmp"))
    tile = size * factor
    assert Image.open(tmp_path / "grid.tmp").format == "PNG"
    assert grid.shape[0] == 2 * tile + 2  # two rows: the class without a sample has none
    left = grid.shape[1] - (2 * tile + 2)
    for row, first in enumerate((0, 3)):
        for column in range(2):
            top, x = row * (tile + 2), left + column * (tile + 2)
            expected = enlarged(samples.image(first + column), factor)
            np.testing.assert_array_equal(grid[top : top + tile, x : x + tile], expected)
    assert (grid[:tile, :left] < 128).any()  # the name of the class is written there


def test_large_images_are_reduced() -> None:
    flat = np.full((256, 256, 3), (10, 200, 30), np.uint8)
    strip = image_strip([flat, flat, flat])
    assert strip.size == (3 * 64 + 2 * 2, 64)
    assert strip.getpixel((100, 30)) == (10, 200, 30)


def test_grid_of_many_classes_shows_an_even_choice(tmp_path: Path) -> None:
    samples = image_set(np.full(100, 1), tuple(f"class {i}" for i in range(100)))
    sample_grid(samples, samples.classes, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] == 40 * 66 - 2
    for row, label in ((0, 0), (39, 99)):
        tile = grid[row * 66 : row * 66 + 64, -64:]
        np.testing.assert_array_equal(tile, enlarged(samples.image(label), 8))


def test_even_choice() -> None:
    assert evenly(np.arange(9), 3).tolist() == [0, 4, 8]
    assert evenly(np.array([5, 7]), 40).tolist() == [5, 7]
    assert evenly(np.array([], np.int64), 40).tolist() == []


def test_grid_without_samples_says_so(tmp_path: Path) -> None:
    sample_grid(image_set(np.array([0]), ("a",)), ("a",), tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid < 128).any() and grid.shape[0] == 64


def test_long_names_do_not_push_the_samples_away(tmp_path: Path) -> None:
    samples = image_set(np.array([1]), ("a very\nlong name " * 20,))
    sample_grid(samples, samples.classes, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width <= 160 + 16 + 64


def corners(svg: bytes, colour: str) -> list[set[float]]:
    """At the left edge of each bar of one colour the heights of its corners, the highest of all being 1."""
    paths = ElementTree.fromstring(svg).findall(".//{*}path")
    outline = next(p.get("d", "") for p in paths if f"fill: {colour}" in p.get("style", ""))
    points = np.array([pair.split()[:2] for pair in re.split("[ML]", outline)[1:]], dtype=float)
    heights = (points[:, 1].max() - points[:, 1]) / np.ptp(points[:, 1])
    return [set(heights[points[:, 0] == x].round(3).tolist()) for x in np.unique(points[:, 0])[::2]]


def test_histogram_has_a_bar_for_each_class_and_its_groups() -> None:
    synthetic = np.array([28, 0, 37])
    svg = class_histogram(COUNTS, synthetic, class_groups(COUNTS, 100, 10), CLASSES)
    texts = [element.text for element in ElementTree.fromstring(svg).findall(".//{*}text")]
    assert {"12+28", "40", "3+37", "medium", "few", "real", "synthetic", *CLASSES} <= set(texts)
    assert "many" not in texts  # no class has more than 100
    assert corners(svg, "#0072b2") == [{0, 1}, {0, 12 / 40}, {0, 3 / 40}]  # most real images first
    assert corners(svg, "#e69f00") == [{1}, {0, 12 / 40, 1}, {0, 3 / 40, 1}]  # from the real ones upwards
    assert svg == class_histogram(COUNTS, synthetic, class_groups(COUNTS, 100, 10), CLASSES)


def test_histogram_of_a_thousand_classes_and_of_odd_names() -> None:
    many = np.arange(1000, 0, -1)
    svg = class_histogram(many, np.zeros_like(many), {}, tuple(map(str, range(1000))))
    drawn = [max(heights) for heights in corners(svg, "#0072b2")]  # of every other bar: these share their edges
    np.testing.assert_allclose(drawn, np.append(many[::2], 2) / 1000, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = class_histogram(np.array([2, 1]), np.array([0, 1]), {}, ("$x^$", "犬"))
    assert {"$x^$", "犬"} <= {element.text for element in ElementTree.fromstring(svg).findall(".//{*}text")}


class Page(HTMLParser):
    """What a reader gets: text, the cells of each table, images; and what the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.bold: list[str] = []
        self.references: list[str] = []
        self._class = ""
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
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

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._class == "best":
            self.bold.append(data)
        if self._in_cell and data.strip():
            row = self.tables[-1][-1]
            row[-1] += ("|" if row[-1] else "") + data.strip()

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
        "diffult": dict(zip(names, (75.26, 88.0, 70.0, 51.26), strict=True)),
        "ce": dict(zip(names, (70.04, 91.0, 70.0, 48.14), strict=True)),
        "validation": {"ce": dict.fromkeys(names, 61.5), "diffult": dict.fromkeys(names, 62.5)},
        "generation": totals | {"images_per_s": 71.4, "nfe": 20, "by_class": by_class},
        "seconds": {"extractor": 10.0, "diffusion": 75.0, "generate": 15.0},
    }


@pytest.fixture
def config() -> Config:
    return load_preset("digits-lt", ["generate.balance_to=40", "generate.guidance=1.5", "groups.many=30"])


@pytest.fixture
def samples() -> Images:
    return image_set(np.array([28, 0, 20]), CLASSES, seed=1)


def test_report_shows_the_figures(config: Config, samples: Images) -> None:
    page = Page(render(config, example_metrics(config), image_set(COUNTS, CLASSES), samples, "CPU of mine, torch 9"))
    assert page.row("Cross-entropy") == ["Cross-entropy", "70.0", "91.0", "70.0", "48.1"]
    assert page.row("DiffuLT") == ["DiffuLT", "75.3|+5.3", "88.0|−3.0", "70.0|+0.0", "51.3|+3.2"]
    assert page.bold[:5] == ["91.0", "70.0", "75.3", "70.0", "51.3"]  # the tie is bold twice
    _, validation, _, generation, time = page.tables
    assert validation[1] == ["Cross-entropy", "61.5", "61.5", "61.5", "61.5"]
    assert generation[1][:8] == ["cat", "12", "28", "35", "28", "20.0", "60.0", "20.0"]
    assert generation[2][:8] == ["tail", "3", "37", "80", "20 (short)", "10.0", "15.0", "75.0"]
    assert generation[3][:8] == ["all", "15", "65", "115", "48", "13.0", "28.7", "58.3"]
    assert page.row("diffusion")[:3] == ["diffusion", "1 min 15 s", "75 %"]
    assert time[-1][:2] == ["all", "1 min 40 s"]
    machine, speed = (
        "CPU of mine, torch 9",
        "guidance 1.5: 20 network evaluations a sample, 71.4 samples a second",
    )
    for words in ("0123456789ab", machine, speed, "balance_to = 40"):
        assert words in page.text


def test_report_needs_nothing_beside_it(config: Config, samples: Images) -> None:
    html = render(config, example_metrics(config), image_set(COUNTS, CLASSES), samples, "m")
    page = Page(html)
    assert page.references and all(reference.startswith("data:image/") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert "://" not in html and "url(" not in html and "@import" not in html


def test_class_names_are_escaped(config: Config, samples: Images) -> None:
    page = Page(render(config, example_metrics(config), image_set(COUNTS, CLASSES), samples, "m"))
    assert "b" not in page.tags
    assert page.tables[2][1][0] == '<b>"R&D"</b>|40 real, 0 generated'
    assert any(image["alt"] == 'real images of class <b>"R&D"</b>' for image in page.images)


def test_gallery_sets_samples_beside_real_images(config: Config, samples: Images) -> None:
    real = image_set(COUNTS, CLASSES)
    page = Page(render(config, example_metrics(config), real, samples, "m"))
    assert [row[0].split("|")[0] for row in page.tables[2][1:]] == [CLASSES[1], "cat", "tail"]  # head first
    assert page.tables[2][1][2] == "none needed"
    shown = {image["alt"]: image for image in page.images}
    tail = picture(shown["real images of class tail"])
    assert tail.shape == (64, 3 * 66 - 2, 3)
    np.testing.assert_array_equal(tail[:, :64], enlarged(real.image(52), 8))  # after 12 + 40 others
    generated = picture(shown["generated images of class tail"])
    assert generated.shape == (64, 6 * 66 - 2, 3)
    np.testing.assert_array_equal(generated[:, 66:130], enlarged(samples.image(29), 8))


def test_report_without_samples_and_validation(config: Config) -> None:
    metrics = example_metrics(config)
    del metrics["validation"]
    metrics["generation"] = dict.fromkeys(("drawn", "accepted", "id", "aid", "ood"), 0)
    metrics["generation"] |= {"images_per_s": None, "nfe": 20, "by_class": {}}
    config = config.model_copy(update={"generate": config.generate.model_copy(update={"balance_to": 3})})
    nothing = image_set(np.zeros(3, int), CLASSES)
    page = Page(render(config, metrics, image_set(COUNTS, CLASSES), nothing, "m"))
    assert len(page.tables) == 3  # accuracy, gallery, time
    assert "validation" not in page.text.split("Configuration")[0]
    assert "No sample was drawn: no class has fewer than 3 real images." in page.text


@pytest.mark.parametrize(
    ("filter", "words"), [("none", "No sample was"), ("distance", "Samples out of distribution were")]
)
def test_the_report_says_whether_samples_were_dropped(samples: Images, filter: str, words: str) -> None:
    config = load_preset("digits-lt", [f"generate.filter={filter}"])
    page = Page(render(config, example_metrics(config), image_set(COUNTS, CLASSES), samples, "m"))
    assert f"{words} dropped." in page.text


def test_a_group_without_test_images_is_a_dash() -> None:
    row = {"top1": 50.0, "many": None, "medium": None, "few": 50.0}
    rows = accuracy_rows({"diffult": row | {"top1": 49.96}, "ce": row})
    assert [r["title"] for r in rows] == ["Cross-entropy", "DiffuLT"]
    assert rows[1]["cells"][1] == {"value": None, "best": False, "delta": None}
    assert rows[1]["cells"][0] == {"value": 50.0, "best": True, "delta": 0.0}


def test_classes_that_drew_nothing_have_no_row() -> None:
    tally = {"drawn": 4, "accepted": 2, "id": 1, "aid": 1, "ood": 2}
    rows = generation_rows({"b": tally}, ("a", "b"), np.array([9, 2]), np.array([0, 2]))
    assert rows == [
        {"name": "b", "real": 2, "needed": 2, "drawn": 4, "accepted": 2, "id": 25.0, "aid": 25.0, "ood": 50.0}
    ]


def test_times() -> None:
    assert timing_rows({"a": 3.0, "b": 1.0})[0] == {"stage": "a", "seconds": 3.0, "share": 75.0}
    assert timing_rows({"a": 0.0})[0]["share"] == 0.0
    texts = [duration(seconds) for seconds in (0.04, 59.94, 59.96, 3599.4, 3599.6, 86400)]
    assert texts == ["0.0 s", "59.9 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "24 h 00 min"]


@pytest.fixture
def finished_run(tmp_path: Path) -> RunDir:
    """A run whose tail was filled up to five images with flat grey ones."""
    run = RunDir.open(tmp_path / "run", "digits-lt", ["generate.balance_to=5"])
    pack(run)
    quotas = quotas_to(5, run.packed().counts)
    labels = np.repeat(np.arange(10), quotas)
    indices = np.concatenate([np.arange(quota) for quota in quotas])
    with run.stage("generate"):
        images = np.full((len(labels), 8, 8, 1), 77, np.uint8)
        file = run.folder("generate") / "synthetic.beton"
        write(file, images, labels=labels, synthetic=np.ones_like(labels), index=indices)
    return run


def test_write_report_reads_a_run_directory(finished_run: RunDir) -> None:
    metrics = example_metrics(finished_run.config)
    metrics["generation"]["by_class"] = {"9": metrics["generation"]["by_class"]["tail"]}
    write_json(finished_run.path / "metrics.json", metrics | {"hash": finished_run.hash("evaluate")})
    path = write_report(finished_run)
    assert path == finished_run.path / "report.html"
    page = Page(path.read_text())
    assert page.row("DiffuLT")[1] == "75.3|+5.3"
    shown = {image["alt"]: image for image in page.images}
    assert (picture(shown["generated images of class 9"])[:, :64] == 77).all()
    first = finished_run.packed().train
    expected = enlarged(first.image(int(np.flatnonzero(first.labels == 0)[0])), 8)
    np.testing.assert_array_equal(picture(shown["real images of class 0"])[:, :64], expected)


def test_the_report_of_a_run_that_cannot_be_written_to_goes_elsewhere(tiny_run: RunDir, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_run.path.rglob("*")}
    command(tiny_run.path, tmp_path / "out.html")
    assert Page((tmp_path / "out.html").read_text(encoding="utf-8")).row("DiffuLT")
    assert {file: file.stat().st_mtime_ns for file in tiny_run.path.rglob("*")} == before


@pytest.mark.parametrize("metrics", [None, {"hash": "another"}])
def test_a_run_that_is_not_evaluated_is_refused(finished_run: RunDir, metrics: dict[str, Any] | None) -> None:
    if metrics is not None:
        write_json(finished_run.path / "metrics.json", metrics)
    with pytest.raises(UserError, match=r"no metrics of the present settings; run python -m diffult\.evaluate --run"):
        write_report(finished_run)
