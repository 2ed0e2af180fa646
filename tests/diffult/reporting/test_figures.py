"""The figures, read back as SVG."""

from __future__ import annotations

import re
import warnings
from xml.etree import ElementTree

import numpy as np
from report_pages import CLASSES, COUNTS

from diffult.longtail.metrics import class_groups
from diffult.reporting.figures import class_histogram


def corners(svg: str, colour: str) -> list[set[float]]:
    """At the left edge of each bar of one colour the heights of its corners, the highest of all being 1."""
    paths = ElementTree.fromstring(svg).findall(".//{*}path")
    outline = next(p.get("d", "") for p in paths if f"fill: var(--{colour})" in p.get("style", ""))
    points = np.array([pair.split()[:2] for pair in re.split("[ML]", outline)[1:]], dtype=float)
    heights = (points[:, 1].max() - points[:, 1]) / np.ptp(points[:, 1])
    return [set(heights[points[:, 0] == x].round(3).tolist()) for x in np.unique(points[:, 0])[::2]]


def test_histogram_has_a_bar_for_each_class_and_its_groups() -> None:
    synthetic = np.array([28, 0, 37])
    svg = class_histogram(COUNTS, synthetic, class_groups(COUNTS, 100, 10), CLASSES)
    texts = [element.text for element in ElementTree.fromstring(svg).findall(".//{*}text")]
    assert {"12+28", "40", "3+37", "medium", "few", "real", "synthetic", *CLASSES} <= set(texts)
    assert "many" not in texts  # no class has more than 100
    assert corners(svg, "real") == [{0, 1}, {0, 12 / 40}, {0, 3 / 40}]  # most real images first
    assert corners(svg, "synthetic") == [{1}, {0, 12 / 40, 1}, {0, 3 / 40, 1}]  # from the real ones upwards
    assert svg == class_histogram(COUNTS, synthetic, class_groups(COUNTS, 100, 10), CLASSES)


def test_histogram_of_a_thousand_classes_and_of_odd_names() -> None:
    many = np.arange(1000, 0, -1)
    svg = class_histogram(many, np.zeros_like(many), {}, tuple(map(str, range(1000))))
    drawn = [max(heights) for heights in corners(svg, "real")]  # of every other bar: these share their edges
    np.testing.assert_allclose(drawn, np.append(many[::2], 2) / 1000, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = class_histogram(np.array([2, 1]), np.array([0, 1]), {}, ("$x^$", "犬"))
    assert {"$x^$", "犬"} <= {element.text for element in ElementTree.fromstring(svg).findall(".//{*}text")}
