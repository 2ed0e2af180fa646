"""The figures of the reports, each an <svg> element with a text that says what is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from diffult.reporting.pictures import MAX_CLASSES, evenly
from diffult.reporting.svg import COLOURS, SERIES, draw
from diffult.reporting.text import listed, number, shortened, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"
_MOST_DOTS = 100  # classes; of more, means of groups of classes are drawn
_BINS = 20


def class_histogram(
    real: np.ndarray, synthetic: np.ndarray, groups: Mapping[str, np.ndarray], classes: Sequence[str]
) -> Markup:
    """The real images of each class, largest class first, and on them the synthetic ones.

    Args:
        real, synthetic: int64 [num_classes], images of each class.
        groups: class numbers by name, as from `class_groups`; an empty group is left out.
        classes: names by label.
    """
    order = np.argsort(-real, kind="stable")
    gap = 0.1 if len(order) <= 100 else 0.0
    places = np.arange(len(order))
    edges = np.stack([places - 0.5 + gap, places + 0.5 - gap], axis=1).ravel()

    def outline(heights: np.ndarray) -> np.ndarray:
        """The height over each bar and 0 over the gap behind it: one shape, however many classes."""
        return np.stack([heights, np.zeros_like(heights)], axis=1).ravel()[:-1]

    below, above = outline(real[order]), outline((real + synthetic)[order])

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        axes.stairs(below, edges, fill=True, color=COLOURS["real"], label="real")
        axes.stairs(above, edges, baseline=below, fill=True, color=COLOURS["synthetic"], label="synthetic")
        axes.set(xlim=(-0.6, len(order) - 0.4), ylim=(0, 1.08 * float(above.max())), ylabel="images")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.08), ncols=2, borderaxespad=0)
        if len(order) <= 12:
            _count_images(axes, real[order], synthetic[order])
        _mark_groups(axes, order, groups)
        _name_classes(axes, [classes[c] for c in order])

    alt = (
        f"Bars: images of each of {len(order)} classes. Before: {real.max()} in the largest class to {real.min()} in "
        f"the smallest. After, with synthetic ones: {(real + synthetic).max()} to {(real + synthetic).min()}."
    )
    return draw("histogram", alt, plot)


def _count_images(axes: Axes, real: np.ndarray, synthetic: np.ndarray) -> None:
    """Counts over each bar, such as 10+490: the tail's real images are too few to see."""
    for place, (before, added) in enumerate(zip(real, synthetic, strict=True)):
        text = f"{before}+{added}" if added else f"{before}"
        at = (place, before + added)
        axes.annotate(text, at, (0, 2), textcoords="offset points", ha="center", color=COLOURS["quiet"], size=7.5)


def _mark_groups(axes: Axes, order: np.ndarray, groups: Mapping[str, np.ndarray]) -> None:
    """The name of each group over its classes, and a line before the next group."""
    for name, members in groups.items():
        places = np.flatnonzero(np.isin(order, members))
        if len(places) == 0:
            continue
        at = (places.mean(), 1.02)
        axes.annotate(name, at, xycoords=("data", "axes fraction"), ha="center", color=COLOURS["quiet"])
        if places[-1] < len(order) - 1:
            axes.axvline(places[-1] + 0.5, color=COLOURS["quiet"], linewidth=0.8, linestyle=(0, (4, 4)))


def _name_classes(axes: Axes, names: list[str]) -> None:
    if len(names) > MAX_CLASSES:
        axes.set_xlabel(f"{len(names)} classes, most real images first")
        axes.set_xticks([])
        return
    names = [shortened(name) for name in names]
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.tick_params(axis="x", length=0)
    if max(map(len, names)) * len(names) > 100:
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")


def distances(ratio: np.ndarray, labels: np.ndarray, counts: np.ndarray, classes: Sequence[str]) -> Markup:
    """Distances of all candidates to the centre of their class, by class: median, middle half, middle 90 %.

    Args:
        ratio: float [N], distance over the class's radius.
        labels: int64 [N].
        counts: int64 [num_classes], real images.
    """
    drawn = np.unique(labels)
    shown = evenly(drawn[np.argsort(-counts[drawn], kind="stable")], MAX_CLASSES)
    spread = np.array([np.percentile(ratio[labels == c], (5, 25, 50, 75, 95)) for c in shown])

    def plot(figure: Figure) -> None:
        axes, places = figure.subplots(), np.arange(len(shown))
        for height, text in ((1, "radius: ID up to here"), (2, "2 radii: AID up to here")):
            axes.axhline(height, color=COLOURS["quiet"], linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(text, (0.005, height), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          color=COLOURS["quiet"], size=8)  # fmt: skip
        axes.vlines(places, spread[:, 0], spread[:, 4], color=COLOURS["synthetic"], linewidth=1.2)
        axes.vlines(places, spread[:, 1], spread[:, 3], color=COLOURS["synthetic"], linewidth=6, alpha=0.6)
        axes.plot(places, spread[:, 2], "o", color=COLOURS["ink"], markersize=4)
        axes.set(xlim=(-0.6, len(shown) - 0.4), ylim=(0, max(2.3, 1.05 * spread.max())), ylabel="distance / radius")
        _name_classes(axes, [classes[c] for c in shown])

    far = [classes[c] for c, middle in zip(shown, spread[:, 2], strict=True) if middle > 1]
    alt = (
        f"Distance of the candidates to the centre of their class, in radii, for {len(shown)} classes: medians from "
        f"{spread[:, 2].min():.2f} to {spread[:, 2].max():.2f}. "
        + (f"The median lies beyond the radius in {listed(far)}." if far else "Every median lies within the radius.")
    )
    return draw("distances", alt, plot)


def accuracy_by_class(
    methods: Mapping[str, Sequence[float | None]], counts: Sequence[int] | np.ndarray, name: str = "by-class"
) -> Markup:
    """Accuracy of each class against its real training images; of more than 100 classes, means of 20 groups of them.

    Args:
        methods: title -> percent by class, None without test images; up to 8.
        counts: int64 [num_classes].
    """
    sizes = np.asarray(counts)
    values = {title: np.array([np.nan if v is None else v for v in row]) for title, row in methods.items()}
    groups = np.array_split(np.argsort(sizes, kind="stable"), _BINS if len(sizes) > _MOST_DOTS else len(sizes))

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        where = np.array([sizes[group].mean() for group in groups])
        for place, (title, row) in enumerate(values.items()):
            heights = np.array(
                [np.nanmean(row[group]) if np.isfinite(row[group]).any() else np.nan for group in groups]
            )
            axes.plot(where, heights, _MARKERS[place % len(_MARKERS)] + "-", color=COLOURS[f"series{place % SERIES}"],
                      linewidth=1, markersize=4.5, label=title)  # fmt: skip
        axes.set(xscale="log", ylabel="accuracy, %", xlabel="real training images of the class")
        ticks = np.unique([where[np.abs(np.log(where / at)).argmin()] for at in np.geomspace(where[0], where[-1], 6)])
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y")
        _legend(axes, len(values))

    tail, head = groups[0], groups[-1]
    ends = (f"{title} {number(_mean(row[tail]), 0)} to {number(_mean(row[head]), 0)}" for title, row in values.items())
    alt = f"Accuracy against class size, percent in the smallest and in the largest class: {'; '.join(ends)}."
    return draw(name, alt, plot, height=3.6)


def _mean(values: np.ndarray) -> float | None:
    """Of the numbers among them; None without one."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=min(entries, 3), borderaxespad=0)


def confusion(name: str, title: str, share: np.ndarray, classes: Sequence[str]) -> Markup:
    """A confusion matrix, a row for each true class.

    Args:
        share: float [n, n], percent of the row's test images that were taken for the column's class.
        classes: n names, in the order of the rows.
    """
    size = len(classes)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        pixels = np.zeros((size, size, 4))
        pixels[..., :3] = np.array([0, 114, 178]) / 255  # clear to blue: the page's ground shows through
        pixels[..., 3] = 0.7 * share / 100
        axes.imshow(pixels, interpolation="none")
        names = [shortened(c, 12) for c in classes]
        axes.set_xticks(range(size), names, parse_math=False, rotation=90 if size * max(map(len, names)) > 40 else 0)
        axes.set_yticks(range(size), names, parse_math=False)
        axes.tick_params(length=0, labelsize=9 if size <= 20 else 7)
        axes.set(xlabel="predicted", ylabel="true class", title=title)
        for row, column in np.argwhere(share >= 0.5) if size <= 12 else ():
            axes.annotate(f"{share[row, column]:.0f}", (column, row), ha="center", va="center", size=8)

    right = share.diagonal()
    alt = f"Confusion matrix of {title}, {size} classes: {right.min():.0f} to {right.max():.0f} percent right by class."
    if worst := confusions(share, classes, 3):
        alt += " Most frequent errors: " + "; ".join(f"{a} taken for {b}, {p:.0f} percent" for a, b, p in worst) + "."
    return draw(name, alt, plot, height=min(8.0, 2.6 + 0.2 * size))


def confusions(share: np.ndarray, classes: Sequence[str], count: int) -> list[tuple[str, str, float]]:
    """The most frequent errors: true class, predicted class, percent of the true class."""
    wrong = np.where(np.eye(len(share), dtype=bool), 0, share)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:count]
    places = (np.unravel_index(place, wrong.shape) for place in worst)
    return [(classes[row], classes[column], float(wrong[row, column])) for row, column in places if wrong[row, column]]


def curves(name: str, trainings: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Loss and speed over the steps.

    Args:
        trainings: title -> lines of a metrics file, {"step", "loss", "images_per_s"}.
    """

    def plot(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for place, (title, lines) in enumerate(trainings.items()):
            style = {"color": COLOURS[f"series{place % SERIES}"], "linestyle": ("-", "--", ":")[place // SERIES % 3]}
            for axes, value in zip(panels, ("loss", "images_per_s"), strict=True):
                known = [line for line in lines if value in line]
                steps, values = ([line[key] for line in known] for key in ("step", value))
                axes.plot(steps, values, linewidth=1.3, label=title, **style)
        for axes, words in zip(panels, ("loss", "images a second"), strict=True):
            axes.set(xlabel="step", title=words)
            axes.grid(axis="y")
        panels[1].set_ylim(bottom=0)
        losses = [line["loss"] for lines in trainings.values() for line in lines]
        if 0 < 20 * min(losses) < max(losses):
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_formatter("{x:g}")
        if len(trainings) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=3)

    ends = "; ".join(f"{title} {lines[0]['loss']:.3g} to {lines[-1]['loss']:.3g}" for title, lines in trainings.items())
    height = 2.7 + 0.2 * (len(trainings) // 3 if len(trainings) > 1 else 0)
    return draw(name, f"Loss and speed over the steps. Loss, first to last reading: {ends}.", plot, height)


def comparison_dots(rows: Sequence[Mapping[str, Any]], against: str | None) -> Markup:
    """Top-1 of each method, a dot a seed and the mean with its deviation; beside it the paired difference and interval.

    Args:
        rows: of comparison.json.
        against: title of the method that differences are to; None leaves them out.
    """
    differences = [row for row in rows if row["paired"]]

    def plot(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True) if against else [figure.subplots()]
        for place, row in enumerate(rows):
            colour = COLOURS["synthetic" if row["synthetic"] else "real"]
            tops = [seed["top1"] for seed in row["seeds"]]
            panels[0].plot(tops, [place] * len(tops), "o", color=colour, alpha=0.45, markersize=4)
            panels[0].errorbar(row["mean"]["top1"], place, xerr=row["std"]["top1"] or 0, fmt="D",
                               color=colour, markersize=5, capsize=3)  # fmt: skip
            if against and row["paired"]:
                paired = row["paired"]["difference"]
                low, high = row["paired"]["interval"] or (paired, paired)
                panels[1].errorbar(paired, place, xerr=[[max(paired - low, 0)], [max(high - paired, 0)]], fmt="D",
                                   color=colour, markersize=5, capsize=3)  # fmt: skip
        panels[0].set_yticks(range(len(rows)), [shortened(row["title"], 34) for row in rows])
        panels[0].set(xlabel="top-1, %", ylim=(len(rows) - 0.4, -0.6))
        if against:
            panels[1].axvline(0, color=COLOURS["quiet"], linewidth=1)
            panels[1].set_xlabel(f"points against {shortened(against, 30)}")
        for axes in panels:
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)

    means = "; ".join(
        f"{row['title']} {number(row['mean']['top1'])} deviation {number(row['std']['top1'])}" for row in rows
    )
    alt = f"Top-1 by method, mean and deviation over seeds: {means}."
    if against and differences:
        gaps = (f"{row['title']} {signed(row['paired']['difference'])}" for row in differences)
        alt += f" Differences to {against}: {'; '.join(gaps)}."
    return draw("dots", alt, plot, height=1.1 + 0.3 * len(rows))
