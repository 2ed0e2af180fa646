"""The report of a comparison over seeds as HTML, from the content of comparison.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from diffult.longtail.comparison import CONTROL, score
from diffult.longtail.metrics import COLUMNS, class_groups
from diffult.reporting import figures
from diffult.reporting.accuracy import ADDED, BASE, REPEATED, few_test_images, not_measured, scored, verdict
from diffult.reporting.page import render_page
from diffult.reporting.text import duration, listed, number, signed

LONG_TABLE = 40  # more classes than this are folded
_FILLED = ("generate.balance_to=", "generate.dose=")  # the settings that duplicates must share
Row = Mapping[str, Any]


def render(comparison: Mapping[str, Any]) -> str:
    """The report, one page that needs nothing beside it.

    Args:
        comparison: "preset", "command", "machine" {"device", "torch", ...}, "budget" {"steps", "batch_size"}, "seeds",
            "classes", "counts" and, where known, "test_counts" of each class, "groups" {"many", "few"}, "split" and
            "rows", as `diffult.compare` writes them.
    """
    rows = sorted(comparison["rows"], key=lambda row: -score(row))
    against = next((row["paired"]["against"] for row in rows if row["paired"]), None)
    titles = {row["name"]: row["title"] for row in rows}
    versions = dict(comparison["machine"])
    device = versions.pop("device")
    return render_page(
        "comparison.html.j2",
        comparison=comparison,
        groups=comparison["groups"],
        sizes=np.array(comparison["counts"]),
        machine=", ".join([device, *(f"{name} {version}" for name, version in versions.items())]),
        seeds=listed([str(seed) for seed in comparison["seeds"]]),
        summary=summary(rows),
        against=titles.get(against),
        control=any(row["paired_duplicates"] for row in rows),
        validation=any(row["validation"] is not None for row in rows),
        small=_small(comparison),
        table=[table_row(row, against) for row in rows],
        dots=figures.comparison_dots(rows, titles.get(against)),
        by_size=_by_size(rows, against, comparison["counts"]),
        by_class=_class_rows(rows, comparison["classes"], comparison["counts"]),
        long_table=LONG_TABLE,
    )


def mean_text(row: Row, column: str) -> str:
    """Mean ± deviation in percent; a dash without test images, the mean alone of one seed."""
    mean, deviation = row["mean"][column], row["std"][column]
    return number(mean) + ("" if mean is None or deviation is None else f" ± {number(deviation)}")


def pair_text(pair: Mapping[str, Any] | None) -> str:
    """A paired difference in points, with its interval where there is one; a dash without a difference."""
    return " ".join(filter(None, _pair(pair)))


def _pair(pair: Mapping[str, Any] | None) -> tuple[str, str]:
    """The difference, and the interval in brackets."""
    if not pair:
        return "–", ""
    low, high = pair["interval"] or (None, None)
    return signed(pair["difference"]), "" if low is None else f"({signed(low)} to {signed(high)})"


def table_row(row: Row, baseline: str | None) -> dict[str, Any]:
    """What the table shows of a row; `baseline` is the name of the row that "paired" is against."""
    return {
        "name": row["name"],
        "title": row["title"],
        "synthetic": row["synthetic"],
        "validation": number(row["validation"]),
        "cells": [mean_text(row, column) for column in COLUMNS],
        "paired": ("baseline", "") if row["name"] == baseline else _pair(row["paired"]),
        "paired_duplicates": _pair(row["paired_duplicates"]),
        "steps": row["steps"],
        "time": "–" if row["seconds"] is None else duration(row["seconds"]),
    }


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """{"question", "answer"}: what a user asks first."""
    order = sorted(rows, key=lambda row: -score(row))
    where = "test" if order[0]["validation"] is None else "validation"
    answer = f"Highest on the {where} images{scored(order[0]['validation'])}: {_named(order[0])} on the test images."
    if len(order) > 1:
        gains = [a["top1"] - b["top1"] for a, b in zip(order[0]["seeds"], order[1]["seeds"], strict=True)]
        answer += f" Next, {_named(order[1])}. Difference, seed by seed: {', '.join(map(signed, gains))} points."
    questions = [{"question": "Which method wins?", "answer": answer}]
    synthetic = next((row for row in order if row["synthetic"]), None)
    if synthetic is None:
        return questions
    by_name = {row["name"]: row for row in rows}
    filled = [part for part in synthetic["name"].split("@") if part.startswith(_FILLED)]
    control = "@".join((CONTROL, *filled))
    for question, pair in ((ADDED, synthetic["paired"]), (REPEATED, _repeated(synthetic, by_name))):
        missing = not_measured(question, control, "--methods")
        answer = _gain(synthetic, pair, by_name[pair["against"]]) if pair else missing
        questions.append({"question": question, "answer": answer})
    return questions


def _repeated(row: Row, by_name: Mapping[str, Row]) -> Mapping[str, Any] | None:
    """The paired difference to as many duplicates, also where these are the best method without synthetic images."""
    other = by_name[row["paired"]["against"]] if row["paired"] else None
    best = other is not None and other["method"] == CONTROL and other["filled"] == row["filled"]
    return row["paired"] if best else row["paired_duplicates"]


def _named(row: Row) -> str:
    return f"{row['title']}, {mean_text(row, 'top1')}\N{NO-BREAK SPACE}%"


def _gain(row: Row, pair: Mapping[str, Any], other: Row) -> str:
    """The paired difference in words."""
    interval = pair["interval"] or (np.nan, np.nan)
    words = verdict(*interval) or "No interval: one seed"
    return f"{words}. {_named(row)}, against {_named(other)}: {pair_text(pair)} points."


def _small(comparison: Mapping[str, Any]) -> str | None:
    known, groups = comparison.get("test_counts"), comparison["groups"]
    if known is None:
        return None
    return few_test_images(np.array(known), class_groups(np.array(comparison["counts"]), groups["many"], groups["few"]))


def _by_size(rows: Sequence[Row], against: str | None, counts: Sequence[int]) -> Markup | None:
    """Of cross-entropy, the best method without synthetic images, the first with them and the duplicates; None where
    no accuracy by class was measured."""
    synthetic = max((row for row in rows if row["synthetic"]), key=score, default=rows[0])
    chosen = dict.fromkeys((BASE, against or rows[0]["name"], synthetic["name"], CONTROL))
    by_name = {row["name"]: row for row in rows}
    values = {by_name[name]["title"]: by_name[name]["mean"]["by_class"] for name in chosen if name in by_name}
    known = {title: row for title, row in values.items() if any(value is not None for value in row)}
    return figures.accuracy_by_class(known, counts) if known else None


def _class_rows(rows: Sequence[Row], classes: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """The mean accuracy of every method on each class, the class with most real images first."""
    return [
        {"name": classes[c], "real": counts[c], "values": [row["mean"]["by_class"][c] for row in rows]}
        for c in np.argsort(-np.array(counts), kind="stable")
    ]
