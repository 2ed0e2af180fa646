"""The figures, read back as SVG."""

from __future__ import annotations

import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from report_pages import CLASSES, COUNTS, example_comparison

from diffult.longtail.metrics import class_groups
from diffult.reporting import figures
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


def texts(svg: str) -> set[str]:
    return {element.text or "" for element in ElementTree.fromstring(svg).findall(".//{*}text")}


def label(svg: str) -> str:
    return ElementTree.fromstring(svg).attrib["aria-label"]


def test_distances_are_in_radii_and_their_medians_are_said() -> None:
    ratio = np.array([0.2, 0.4, 0.6, 1.0, 1.5, 1.1])
    svg = figures.distances(ratio, np.array([0, 0, 0, 2, 2, 2]), COUNTS, CLASSES)
    assert {"cat", "tail"} <= texts(svg) and CLASSES[1] not in texts(svg)  # which drew nothing
    assert "for 2 classes: medians from 0.40 to 1.10. The median lies beyond the radius in tail." in label(svg)


def test_accuracy_by_class_names_both_ends() -> None:
    svg = figures.accuracy_by_class({"A": [50.0, 90.0, 10.0], "B": [None, 80.0, None]}, COUNTS)
    assert {"A", "B", "3", "12", "40"} <= texts(svg)
    assert label(svg).endswith("A 10 to 90; B – to 80.")


def test_a_legend_of_long_titles_stays_on_the_page() -> None:
    titles = [f"{name} + logit adjustment + mixup + MiSLAS's head" for name in ("CE", "Synthetic share", "A", "B")]
    svg = figures.accuracy_by_class({title: [50.0, 90.0, 10.0] for title in titles}, COUNTS)
    entries = [e for e in ElementTree.fromstring(svg).findall(".//{*}text") if e.text in titles]
    assert [e.text for e in entries] == titles
    ends = [float(e.get("x", "nan")) + 0.5 * 9 * len(e.text or "") for e in entries]  # half an em a character
    assert max(ends) < 72 * 8.6


def test_accuracy_of_many_classes_is_drawn_as_means_of_groups() -> None:
    counts = np.arange(200, 0, -1)
    svg = figures.accuracy_by_class({"A": (counts / 2).tolist()}, counts)
    assert svg.count("<use") < 80 and label(svg).endswith("A 3 to 98.")  # means of 10 classes: 2.75 and 97.75


def test_a_confusion_matrix_shows_its_shares_and_errors() -> None:
    share = np.array([[90.0, 10.0, 0.0], [0.0, 100.0, 0.0], [30.0, 0.0, 70.0]])
    svg = figures.confusion("c", "A", share, CLASSES)
    assert {"90", "10", "30", "100", "70"} <= texts(svg) and "0" not in texts(svg)
    assert label(svg).endswith(f"tail predicted as cat, 30 percent; cat predicted as {CLASSES[1]}, 10 percent.")
    assert figures.confusions(np.eye(2) * 100, ("a", "b"), 3) == []


def labels(panels: str) -> list[str]:
    drawn = ElementTree.fromstring(f"<div>{panels}</div>").findall(".//{*}svg")
    return [svg.attrib["aria-label"] for svg in drawn]


def test_checks_show_losses_and_percent() -> None:
    check = {"held_out_loss": 0.25, "train_loss": 0.24, "cas": 80.0}
    found = [
        {"step": 50, "loss": 1.0},
        {"step": 60} | check,
        {"step": 90} | check | {"held_out_loss": 0.2, "cas": 91.0},
    ]
    losses, percent = ElementTree.fromstring(figures.checks("checks", found))
    assert "held-out images 0.25 to 0.2; training images 0.24 to 0.24" in losses.attrib["aria-label"]
    assert "right on held-out images (linear head) 80 to 91" in percent.attrib["aria-label"]
    shown = ElementTree.tostring(percent, encoding="unicode")
    assert "copies" not in shown  # not known
    known = [line | {"copies": 5.0} for line in found]
    assert "copies 5 to 5" in figures.checks("checks", known)


def test_curves_of_several_trainings_share_a_figure() -> None:
    lines = [{"step": 50, "loss": 2.0, "images_per_s": 10.0}, {"step": 100, "loss": 0.05, "images_per_s": 12.0}]
    panels = figures.curves("curves", {"A": lines, "B": [{"step": 50, "loss": -1.0}]})
    assert {"loss", "images a second"} <= texts(f"<div>{panels}</div>")
    loss, speed = labels(panels)
    assert loss.endswith("A 2 to 0.05; B -1 to -1.") and speed.endswith("A 10 to 12.")
    legend = re.findall(r'<i style="border-top: 2px (\w+) var\(--(\w+)\)"></i> (\w)', panels)
    assert legend == [("solid", "series0", "A"), ("solid", "series1", "B")]
    assert "legend" not in figures.curves("curves", {"A": lines})


@pytest.mark.parametrize("seeds", [1, 2])
def test_dots_of_a_comparison(seeds: int) -> None:
    rows = example_comparison(seeds=seeds)["rows"]
    panels = figures.comparison_dots(rows, "Logit adjustment")
    assert {"Cross-entropy", "DiffuLT", "points against Logit adjustment"} <= texts(panels)
    assert labels(panels)[1:] == ["Differences to Logit adjustment: DiffuLT +2.0."]
    assert "points against" not in " ".join(texts(figures.comparison_dots(rows, None)))
