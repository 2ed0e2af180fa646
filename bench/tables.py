"""Results files as Markdown: every table of the README and of docs/benchmarks.md is made here."""

from __future__ import annotations

from typing import Any

from bench.race import best_rival, our_best, ratios

Content = dict[str, Any]
_SHARES = (("tflop_per_s", "TFLOP/s", "share_of_compute"), ("gb_per_s", "GB/s", "share_of_copy"))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def number(value: float) -> str:
    """Three digits, thousands apart: 1,230, 45.6, 0.0789."""
    return f"{value:,.0f}" if value >= 1000 else f"{float(f'{value:.3g}'):g}"


def machine_line(content: Content) -> str:
    """What a table was measured on, and by which command."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    note = f" {content['note']}." if content["note"] else ""
    return (
        f"{content['machine']['device']}, {content['threads']} threads, {content['date']}; {versions}. "
        f"`{content['command']}`, {content['seconds']:.0f} s.{note}"
    )


def suite_table(content: Content) -> str:
    """One line a race: ours, the best rival, and the ratio of the medians' rounds with its spread."""
    lines = []
    for row in content["rows"]:
        contestants = row["contestants"]
        mine = contestants[our_best(contestants)]
        share = ""
        for rate, unit, part in _SHARES:
            if rate in mine:
                share = f"{number(mine[rate])} {unit} ({mine[part]:.0%})"
        rival = best_rival(contestants)
        told = ratio_with_spread(ratios(contestants, rival, our_best(contestants))) if rival else ""
        lines.append([row["race"], number(mine["images_per_s"]), share, rival or "", told])
    return _table(["", "images/s", "share of ceiling", "best rival", "ours to rival"], lines)


def rivals_table(content: Content) -> str:
    """One line a contestant: images/s, seconds of the first call, and how many times as fast ours is."""
    lines = []
    for row in content["rows"]:
        contestants = row["contestants"]
        mine = our_best(contestants)
        for name, entry in contestants.items():
            told = "" if name == mine else ratio_with_spread(ratios(contestants, name, mine))
            lines.append([row["race"], name, number(entry["images_per_s"]), number(entry["first_s"]), told])
    return _table(["race", "contestant", "images/s", "first call, s", "ours to it"], lines)


def ratio_with_spread(values: list[float]) -> str:
    """Median with the lowest and highest round: 1.05 x (0.98 to 1.10)."""
    middle = (
        sorted(values)[len(values) // 2] if len(values) % 2 else sum(sorted(values)[len(values) // 2 - 1 :][:2]) / 2
    )
    return f"{middle:.2f} x ({min(values):.2f} to {max(values):.2f})"


def ceilings_table(content: Content) -> str:
    """The machine's measured ceilings."""
    ceilings = content["ceilings"]
    kinds = {
        "matrix product, float32": number(ceilings["product_float32"] / 1e12) + " TFLOP/s",
        f"matrix product, {ceilings['dtype']}": number(ceilings["product"] / 1e12) + " TFLOP/s",
        f"3x3 convolution, {ceilings['dtype']}": number(ceilings["convolution"] / 1e12) + " TFLOP/s",
        "copy, read and written": number(ceilings["copy"] / 1e9) + " GB/s",
    }
    return _table(["ceiling", "measured"], [[name, value] for name, value in kinds.items()])


def cost_table(content: Content) -> str:
    """Predicted hours and money of the large presets."""
    lines = [
        [row["preset"], str(row["cards"]), *(number(row[f"{stage}_h"]) for stage in
         ("extractor", "diffusion", "generate", "classifier")), number(row["hours"]), number(row["money"])]
        for row in content["predicted"]
    ]  # fmt: skip
    header = ["preset", "cards", "extractor, h", "diffusion, h", "drawing, h", "classifiers, h", "all, h", "money"]
    return _table(header, lines)


def check_table(content: Content) -> str:
    """Stages predicted beside those measured, a line for each preset and stage."""
    lines = []
    kinds = dict.fromkeys((row["preset"], row["stage"]) for row in content["checked"])
    for preset, stage in kinds:
        rows = [row for row in content["checked"] if (row["preset"], row["stage"]) == (preset, stage)]
        measured, predicted, ratio = ([row[key] for row in rows] for key in ("measured_s", "predicted_s", "ratio"))
        spans = [f"{number(min(v))} to {number(max(v))}" for v in (measured, predicted, ratio)]
        lines.append([preset, stage, str(len(rows)), *spans])
    return _table(["preset", "stage", "runs", "measured, s", "predicted, s", "predicted / measured"], lines)


def growth_table(content: Content) -> str:
    """Images/s and peak memory as the number of images grows."""
    lines = [
        [work, f"{row['images']:,}", number(row["images"] / row["seconds"]), number(row["peak_mb"])]
        for work, rows in content["rows"].items()
        for row in rows
    ]
    return _table(["work", "images", "images/s", "peak memory, MB"], lines)
