"""Methods compared over several seeds: means, deviations, and differences seed by seed with their intervals.

A row is one method, measured at every seed: {"name", "method", "title", "synthetic", "filled", "steps", "seconds",
"seeds"}, where "filled" is (N_t, dose), "seeds" holds {"top1", "many", "medium", "few", "by_class"} in percent for each
seed, and "validation" the top-1 on the validation images, None without such.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from diffult.longtail.metrics import COLUMNS

CONFIDENCE = 0.95
CONTROL = "duplicates"  # the method that copies real images: what synthetic ones must beat


def student_interval(differences: Sequence[float]) -> list[float] | None:
    """[low, high]: the mean of paired differences lies in it with 95 % confidence, by Student's t of n - 1 degrees of
    freedom; None for a single one."""
    n = len(differences)
    if n < 2:
        return None
    half = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.std(differences, ddof=1) / np.sqrt(n)
    return [float(np.mean(differences) - half), float(np.mean(differences) + half)]


def mean_and_deviation(seeds: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and sample standard deviation over seeds of every column and class; None where a seed has no value, and for
    the deviation of a single seed. Nothing is rounded: a figure is rounded once, where it is shown."""

    def over(values: Sequence[float | None]) -> tuple[float | None, float | None]:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None, None
        return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None

    pairs: dict[str, Any] = {column: over([seed[column] for seed in seeds]) for column in COLUMNS}
    mean, deviation = ({column: pair[i] for column, pair in pairs.items()} for i in (0, 1))
    classes = [over(values) for values in zip(*(seed["by_class"] for seed in seeds), strict=True)]
    return mean | {"by_class": [m for m, _ in classes]}, deviation | {"by_class": [s for _, s in classes]}


def paired(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The difference in top-1 to another row, in points, seed by seed: its mean and interval."""
    differences = [a["top1"] - b["top1"] for a, b in zip(row["seeds"], other["seeds"], strict=True)]
    return {
        "against": other["name"],
        "difference": float(np.mean(differences)),
        "interval": student_interval(differences),
    }


def baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The best row without synthetic images, None if there is none: by mean top-1 on the validation images, so that it
    is not chosen on what it is measured on, or on the test images where there are no others."""

    def top1(row: Mapping[str, Any]) -> float:
        return float(np.mean(row["validation"] or [seed["top1"] for seed in row["seeds"]]))

    return max((row for row in rows if not row["synthetic"]), key=top1, default=None)


def compare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with "mean" and "std", and with the mean of "validation" in its place; those with synthetic images with
    "paired", their difference to the `baseline`, and "paired_duplicates", to as many duplicates; None where these are
    not there or are the baseline, and in other rows."""
    best = baseline(rows)
    controls = {tuple(row["filled"]): row for row in rows if row["method"] == CONTROL and row is not best}
    compared = []
    for row in rows:
        mean, deviation = mean_and_deviation(row["seeds"])
        control = controls.get(tuple(row["filled"])) if row["synthetic"] else None
        compared.append({
            **row,
            "validation": float(np.mean(row["validation"])) if row["validation"] else None,
            "mean": mean,
            "std": deviation,
            "paired": paired(row, best) if row["synthetic"] and best else None,
            "paired_duplicates": paired(row, control) if control else None,
        })  # fmt: skip
    return compared


def table(comparison: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Markdown: a line a row, mean ± deviation in percent and differences in points with their 95 % intervals.

    Args:
        comparison: the content of comparison.json.
        rows: those to show; default: all.
    """
    shown = comparison["rows"] if rows is None else rows
    pairs = [key for key in ("paired", "paired_duplicates") if any(row[key] for row in shown)]
    titles = {row["name"]: row["title"] for row in comparison["rows"]}
    against = [next(titles[row[key]["against"]] for row in shown if row[key]) for key in pairs]
    interval = " (95 % interval)" if any(row[key] and row[key]["interval"] for row in shown for key in pairs) else ""
    header = ["", "top-1", "many", "medium", "few", *(f"top-1, gain over {title}{interval}" for title in against)]
    lines = [header, ["---"] * len(header)]
    for row in shown:
        figures = [_figure(row["mean"][column], row["std"][column]) for column in COLUMNS]
        lines.append([row["title"], *figures, *(_difference(row[key]) for key in pairs)])
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def score(row: Mapping[str, Any]) -> float:
    """Of a compared row: the mean top-1 on the validation images, on the test images where there are no others."""
    return row["mean"]["top1"] if row["validation"] is None else row["validation"]


def best_rows(comparison: Mapping[str, Any], number: int, always: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows that are best on the validation images, where there are such, and those named in `always`; the highest
    mean top-1 on the test images first."""

    best = sorted(comparison["rows"], key=score, reverse=True)
    chosen = best[:number] + [row for row in best[number:] if row["name"] in always]
    return sorted(chosen, key=lambda row: -row["mean"]["top1"])


def _figure(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _difference(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return ""
    interval = " ({:+.1f} to {:+.1f})".format(*pair["interval"]) if pair["interval"] else ""
    return f"{pair['difference']:+.1f}{interval}"


def to_csv(comparison: Mapping[str, Any]) -> str:
    """A line a row and seed, accuracies in percent, empty where there is none; a column a class at the end."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "synthetic", "seed", *COLUMNS, *comparison["classes"]])
    for row in comparison["rows"]:
        for seed, values in zip(comparison["seeds"], row["seeds"], strict=True):
            figures = [values[column] for column in COLUMNS]
            writer.writerow([row["name"], row["synthetic"], seed, *figures, *values["by_class"]])
    return out.getvalue()
