"""What the report of a run says about accuracy: tables, differences with their intervals, and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffult.longtail.comparison import CONTROL
from diffult.longtail.methods import find_method
from diffult.longtail.metrics import COLUMNS
from diffult.reporting.content import RunContent
from diffult.reporting.text import counted, number, signed

BASE = "ce"  # differences in the table are to it
ADDED = "Do synthetic images add anything to the best method without them?"
REPEATED = "Do they beat simply repeating real images?"
_SMALL = 50  # test images; of fewer, one is worth more than 2 points


def accuracy_rows(accuracies: Mapping[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    """A row {"name", "title", "synthetic", "cells"} for each method.

    A cell is {"value", "best", "delta"}: the accuracy, whether it is the highest of a column whose values differ, and
    the difference to cross-entropy in points. All follow from the rounded accuracies that are shown, so that they add
    up.

    Args:
        accuracies: method -> {"top1", "many", "medium", "few"} in percent, None without test images.
        methods: those to show, in this order.
    """
    shown = {
        method: {column: _rounded(accuracies[method][column]) for column in COLUMNS}
        for method in methods
        if method in accuracies
    }

    def cell(method: str, column: str) -> dict[str, Any]:
        value, base = shown[method][column], shown.get(BASE, {}).get(column)
        known = [there for row in shown.values() if (there := row[column]) is not None]
        delta = None if method == BASE or value is None or base is None else value - base
        return {"value": value, "best": len(set(known)) > 1 and value == max(known), "delta": delta}

    return [
        {
            "name": m,
            "title": find_method(m).title,
            "synthetic": find_method(m).synthetic,
            "cells": [cell(m, column) for column in COLUMNS],
        }
        for m in shown
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


class Difference(NamedTuple):
    """In points, with its 95 % interval over test images; (nan, nan) if it is not known."""

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{signed(self.points)} points"
        return f"{signed(self.points)} points (95 % interval {signed(self.low)} to {signed(self.high)})"


def difference(content: RunContent, a: str, b: str) -> Difference:
    """How much more of the test set `a` has right than `b`. The interval is the paired one, of the mean over test
    images of (a right) - (b right), by the normal approximation."""
    points = content.metrics[a]["top1"] - content.metrics[b]["top1"]
    known = content.predictions
    if not {a, b, "labels"} <= known.keys():
        return Difference(points, np.nan, np.nan)
    right = [(known[name] == known["labels"]).astype(float) for name in (a, b)]
    gain = right[0] - right[1]
    half = 196.0 * gain.std() / max(len(gain), 1) ** 0.5
    return Difference(points, points - half, points + half)


def ranked(metrics: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    """Methods from the highest top-1 on the validation images down, where there are any; else on the test images.
    metrics: the content of metrics.json."""
    scores = metrics.get("validation", metrics)
    return sorted(methods, key=lambda name: -(scores[name]["top1"] if name in scores else 0.0))


def leaders(content: RunContent) -> tuple[str | None, str | None]:
    """The first of `ranked` without synthetic images, and the first with them."""
    plain = [name for name in content.methods if not find_method(name).synthetic]
    synthetic = [name for name in content.methods if find_method(name).synthetic]
    return next(iter(ranked(content.metrics, plain)), None), next(iter(ranked(content.metrics, synthetic)), None)


def verdict(low: float, high: float) -> str | None:
    """What the interval of a gain allows to say; None without one."""
    if np.isnan(low):
        return None
    if low > 0:
        return "Yes: the interval lies above 0"
    return "No: the interval lies below 0" if high < 0 else "Inconclusive: the interval includes 0"


def summary(content: RunContent) -> list[dict[str, str]]:
    """{"question", "answer"}: what a user asks first."""
    order = ranked(content.metrics, content.methods)
    top = max(content.methods, key=lambda name: content.metrics[name]["top1"])
    where = "test"
    if "validation" in content.metrics:
        where = f"{content.metrics.get('validation_images', '')} validation".lstrip()  # old runs do not have the number
    score = content.metrics.get("validation", {}).get(order[0])
    answer = f"Highest on the {where} images{scored(score and score['top1'])}: "
    answer += f"{_named(content, order[0])} on the test images."
    if top != order[0]:
        answer += f" Highest on the test images: {_named(content, top)}."
    if len(order) > 1:
        gap = difference(content, order[0], order[1])
        answer += f" Next, {_named(content, order[1])}: {gap}."
        answer += " The interval includes 0." if gap.low <= 0 <= gap.high else ""
    questions = [{"question": "Which method wins?", "answer": answer}]
    plain, synthetic = leaders(content)
    if synthetic is None:
        return questions
    for question, other in (
        (ADDED, plain),
        (REPEATED, CONTROL if CONTROL in content.methods else None),
    ):
        answer = not_measured(question, CONTROL, "classifier.methods")
        questions.append({"question": question, "answer": _gain(content, synthetic, other) if other else answer})
    return questions


def _named(content: RunContent, name: str) -> str:
    return f"{find_method(name).title}, {number(content.metrics[name]['top1'])}\N{NO-BREAK SPACE}%"


def scored(percent: float | None) -> str:
    return "" if percent is None else f" ({number(percent)}\N{NO-BREAK SPACE}%)"


def not_measured(question: str, control: str, option: str) -> str:
    """The answer to ADDED or REPEATED where the method to compare with, in the latter `control`, is not there."""
    missing = repr(control) if question == REPEATED else f"a method without synthetic images, such as {BASE!r},"
    return f"Not measured: add {missing} to {option}."


def few_test_images(test_counts: np.ndarray, groups: Mapping[str, np.ndarray]) -> str | None:
    """Names the columns of so few test images that one moves them by more than 2 points; None without such a column.

    Args:
        test_counts: int64 [num_classes], test images of each class.
        groups: class numbers by name, as from `class_groups`.
    """
    sizes = {"top-1": int(test_counts.sum())} | {name: int(test_counts[c].sum()) for name, c in groups.items()}
    small = [
        f"{name}: {counted(size, 'test image', 'test images')}, of {100 / size:.1f} points each"
        for name, size in sizes.items()
        if 0 < size < _SMALL
    ]
    return f"{'; '.join(small)}. Differences of a few test images may well be chance." if small else None


def _gain(content: RunContent, name: str, other: str) -> str:
    gap = difference(content, name, other)
    words = verdict(gap.low, gap.high) or "No interval: evaluate/predictions.safetensors is not there"
    return f"{words}. {_named(content, name)}, against {_named(content, other)}: {gap}."


def confusion_share(content: RunContent, method: str, classes: np.ndarray) -> np.ndarray:
    """Percent of the test images of each of these classes that were predicted as each of them, float64 [n, n]."""
    size = len(content.packed.classes)
    labels, predicted = content.predictions["labels"], content.predictions[method]
    table = np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size).astype(float)
    share = 100.0 * table / np.maximum(table.sum(1, keepdims=True), 1)
    return share[np.ix_(classes, classes)]
