"""Statistics over seeds against scipy's and naive numbers, and the table and CSV that show them."""

import csv
import io
import statistics

import numpy as np
import pytest
from scipy import stats

from diffult.longtail.comparison import baseline, best_rows, compare, student_interval, table, to_csv


def row(
    name: str, top1: list[float], synthetic: bool = False, validation: list[float] | None = None, dose: float = 1.0
) -> dict:
    """Many and few lie around top-1 and no class is medium; two classes."""
    seeds = [{"top1": t, "many": t + 5, "medium": None, "few": t - 5, "by_class": [t, None]} for t in top1]
    about = {"name": name, "method": name, "title": name.title(), "synthetic": synthetic, "steps": 8, "seconds": 1.0}
    about["filled"] = (60, dose)
    return about | {"seeds": seeds, "validation": validation}


RNG = np.random.default_rng(0)
CE, DIFFULT, DUPLICATES = (RNG.uniform(60, 90, 5).tolist() for _ in range(3))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_that_of_a_paired_t_test(n):
    a, b = RNG.normal(80, 3, n), RNG.normal(78, 3, n)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert student_interval((a - b).tolist()) == pytest.approx(list(expected))
    assert student_interval([1.0]) is None


def test_means_deviations_and_differences_are_naive_ones():
    best = [max(CE) + 1] * 5
    rows = compare([row("ce", best), row("duplicates", DUPLICATES), row("diffult", DIFFULT, synthetic=True)])
    ours = rows[2]
    assert ours["mean"]["few"] == pytest.approx(statistics.mean(DIFFULT) - 5)
    assert ours["std"]["many"] == pytest.approx(statistics.stdev(DIFFULT))
    assert ours["mean"]["medium"] is None and ours["std"]["medium"] is None
    assert ours["mean"]["by_class"] == [pytest.approx(statistics.mean(DIFFULT)), None]
    for key, other in (("paired_duplicates", DUPLICATES), ("paired", best)):
        differences = [a - b for a, b in zip(DIFFULT, other, strict=True)]
        assert ours[key]["difference"] == pytest.approx(statistics.mean(differences))
        assert ours[key]["interval"] == student_interval(differences)
    assert rows[0]["paired"] is None and rows[1]["paired_duplicates"] is None


def test_the_control_has_as_many_images_and_is_not_shown_twice():
    rows = [row("ce", [90.0, 91.0]), row("duplicates", [80.0, 81.0]), row("duplicates", [70.0, 71.0], dose=0.5)]
    ours = [row("diffult", [85.0, 86.0], True, dose=dose) for dose in (1.0, 0.5, 2.0)]
    one, half, twice = compare([*rows, *ours])[3:]
    assert [r["paired_duplicates"] and r["paired_duplicates"]["difference"] for r in (one, half, twice)] == [
        5,
        15,
        None,
    ]
    (first, *_) = compare([rows[1], ours[0]])[1:]
    assert first["paired"]["against"] == "duplicates" and first["paired_duplicates"] is None


def test_the_rival_is_chosen_on_the_validation_images():
    """On the test images the other would win: chosen there, it would be ahead by luck too."""
    rows = [row("ce", [90.0, 91.0], validation=[70.0, 71.0]), row("focal", [80.0, 81.0], validation=[75.0, 76.0])]
    rows.append(row("diffult", [85.0, 86.0], True, [99.0, 99.0]))
    assert baseline(rows)["name"] == "focal" == compare(rows)[2]["paired"]["against"]
    assert baseline([{**r, "validation": None} for r in rows])["name"] == "ce"
    assert compare(rows[2:])[0]["paired"] is None


def test_the_table_rounds_once_and_leaves_out_what_one_seed_cannot_show():
    comparison = {"rows": compare([row("ce", [48.251]), row("diffult", [48.349], synthetic=True)])}
    assert table(comparison).splitlines() == [
        "| | top-1 | many | medium | few | top-1, gain over Ce |",
        "| --- | --- | --- | --- | --- | --- |",
        "| Ce | 48.3 | 53.3 | – | 43.3 | |",
        "| Diffult | 48.3 | 53.3 | – | 43.3 | +0.1 |",
    ]
    comparison = {"rows": compare([row("ce", [50.0, 52.0]), row("diffult", [51.0, 55.0], synthetic=True)])}
    low, high = stats.ttest_rel([51, 55], [50, 52]).confidence_interval()
    line = f"| Diffult | 53.0 ± 2.8 | 58.0 ± 2.8 | – | 48.0 ± 2.8 | +2.0 ({low:+.1f} to {high:+.1f}) |"
    assert table(comparison, best_rows(comparison, 1)).splitlines()[2:] == [line]


def test_the_csv_has_a_line_a_method_and_seed():
    comparison = {"rows": compare([row("ce", [50.0, 52.0]), row("diffult", [51.0, 55.0], synthetic=True)])}
    lines = list(csv.DictReader(io.StringIO(to_csv(comparison | {"seeds": [0, 1], "classes": ["cat, grey", "dog"]}))))
    assert [(line["name"], line["seed"], line["top1"]) for line in lines] == [
        ("ce", "0", "50.0"), ("ce", "1", "52.0"), ("diffult", "0", "51.0"), ("diffult", "1", "55.0"),
    ]  # fmt: skip
    assert lines[3]["synthetic"] == "True" and lines[3]["medium"] == lines[3]["dog"] == "" and lines[3]["cat, grey"]
