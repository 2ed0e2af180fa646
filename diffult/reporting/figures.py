"""The figures of the reports, each an <svg> element with a text that says what is seen."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from diffult.reporting.pictures import MAX_CLASSES, evenly
from diffult.reporting.svg import COLOURS, PANEL, SERIES, WIDE, draw, side_by_side
from diffult.reporting.text import listed, number, shortened, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"
_MOST_DOTS = 100  # classes; of more, means of groups of classes are drawn
_BINS = 20
_LEGEND_WIDTH = 110  # characters that a legend has room for side by side


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
        _legend(axes, values)

    tail, head = groups[0], groups[-1]
    ends = (f"{title} {number(_mean(row[tail]), 0)} to {number(_mean(row[head]), 0)}" for title, row in values.items())
    alt = f"Accuracy against class size, percent in the smallest and in the largest class: {'; '.join(ends)}."
    return draw(name, alt, plot, height=3.6)


def _mean(values: np.ndarray) -> float | None:
    """Of the numbers among them; None without one."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _legend(axes: Axes, titles: Iterable[str]) -> None:
    """Over the axes, in as many columns as the longest title leaves room for."""
    widest = max(map(len, titles))
    columns = max(1, min(3, _LEGEND_WIDTH // (widest + 6)))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns, borderaxespad=0)


def confusion(name: str, title: str, share: np.ndarray, classes: Sequence[str]) -> Markup:
    """A confusion matrix, a row for each true class.

    Args:
        share: float [n, n], percent of the row's test images that were predicted as the column's class.
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
        alt += (
            " Most frequent errors: " + "; ".join(f"{a} predicted as {b}, {p:.0f} percent" for a, b, p in worst) + "."
        )
    return draw(name, alt, plot, min(8.0, 2.6 + 0.2 * size), PANEL if size <= 12 else WIDE)


def confusions(share: np.ndarray, classes: Sequence[str], count: int) -> list[tuple[str, str, float]]:
    """The most frequent errors: true class, predicted class, percent of the true class."""
    wrong = np.where(np.eye(len(share), dtype=bool), 0, share)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:count]
    places = (np.unravel_index(place, wrong.shape) for place in worst)
    return [(classes[row], classes[column], float(wrong[row, column])) for row, column in places if wrong[row, column]]


def curves(name: str, trainings: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Loss and speed over the steps, in two panels, and a legend of several trainings.

    Args:
        trainings: title -> lines of a metrics file, {"step", "loss", "images_per_s"}.
    """
    styles = {
        title: (f"series{place % SERIES}", ("solid", "dashed", "dotted")[place // SERIES % 3])
        for place, title in enumerate(trainings)
    }

    def panel(value: str, words: str, alt: str) -> Markup:
        def plot(figure: Figure) -> None:
            axes = figure.subplots()
            for title, lines in trainings.items():
                known = [line for line in lines if value in line]
                steps, values = ([line[key] for line in known] for key in ("step", value))
                colour, dashes = styles[title]
                axes.plot(steps, values, linewidth=1.3, color=COLOURS[colour], linestyle=dashes)
            axes.set(xlabel="step", title=words)
            axes.grid(axis="y")
            everything = [line[value] for lines in trainings.values() for line in lines if value in line]
            if value != "loss":
                axes.set_ylim(bottom=0)
            elif 0 < 20 * min(everything) < max(everything):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")

        return draw(f"{name}-{value}", alt, plot, 2.7, PANEL)

    def ends(value: str, digits: str) -> str:
        known = {title: [line[value] for line in lines if value in line] for title, lines in trainings.items()}
        return "; ".join(f"{t} {v[0]:{digits}} to {v[-1]:{digits}}" for t, v in known.items() if v)

    panels = side_by_side(
        panel("loss", "loss", f"Loss over the steps, first to last reading: {ends('loss', '.3g')}."),
        panel(
            "images_per_s", "images a second", f"Speed over the steps, images a second: {ends('images_per_s', '.0f')}."
        ),
    )
    entry = Markup('<li><i style="border-top: 2px {} var(--{})"></i> {}</li>')
    entries = Markup().join(entry.format(dashes, colour, title) for title, (colour, dashes) in styles.items())
    return panels + Markup('<ul class="legend">{}</ul>').format(entries) if len(trainings) > 1 else panels


def checks(name: str, lines: Sequence[Mapping[str, Any]]) -> Markup:
    """What the checks of a diffusion training found, in two panels: losses, and percent.

    Args:
        lines: of a metrics file; those of a check have {"step", "held_out_loss", "train_loss", "cas"} and mostly
            "copies".
    """

    def panel(words: str, values: Mapping[str, str]) -> Markup:
        known = {key: [line for line in lines if key in line] for key in values}
        known = {key: found for key, found in known.items() if found}

        def plot(figure: Figure) -> None:
            axes = figure.subplots()
            for place, (key, found) in enumerate(known.items()):
                steps, heights = ([line[column] for line in found] for column in ("step", key))
                axes.plot(steps, heights, ".-", color=COLOURS[f"series{place}"], linewidth=1.3, label=values[key])
            axes.set(xlabel="step", title=words)
            axes.grid(axis="y")
            axes.legend()

        ends = "; ".join(f"{values[key]} {found[0][key]:.3g} to {found[-1][key]:.3g}" for key, found in known.items())
        return draw(
            f"{name}-{words.split()[0]}", f"{words} over the steps, first to last check: {ends}.", plot, 2.7, PANEL
        )

    return side_by_side(
        panel("loss at fixed noise", {"held_out_loss": "held-out images", "train_loss": "training images"}),
        panel("percent", {"cas": "right on held-out images (linear head)", "copies": "copies"}),
    )


def comparison_dots(rows: Sequence[Mapping[str, Any]], against: str | None) -> Markup:
    """Top-1 of each method, a dot a seed and the mean with its deviation; beside it the paired difference and interval.

    Args:
        rows: of comparison.json.
        against: title of the method that differences are to; None leaves them out.
    """

    def tops(axes: Axes, place: int, row: Mapping[str, Any]) -> None:
        colour, values = COLOURS["synthetic" if row["synthetic"] else "real"], [seed["top1"] for seed in row["seeds"]]
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=4)
        axes.errorbar(row["mean"]["top1"], place, xerr=row["std"]["top1"] or 0, fmt="D",
                      color=colour, markersize=5, capsize=3)  # fmt: skip

    def gains(axes: Axes, place: int, row: Mapping[str, Any]) -> None:
        gain = row["paired"]["difference"]
        low, high = row["paired"]["interval"] or (gain, gain)
        axes.errorbar(gain, place, xerr=[[max(gain - low, 0)], [max(high - gain, 0)]], fmt="D",
                      color=COLOURS["synthetic"], markersize=5, capsize=3)  # fmt: skip

    means = "; ".join(
        f"{row['title']} {number(row['mean']['top1'])} deviation {number(row['std']['top1'])}" for row in rows
    )
    alt = f"Top-1 by method, mean and deviation over seeds: {means}."
    panels = [_row_panel("dots", alt, rows, tops, "top-1, %")]
    if against and (paired := [row for row in rows if row["paired"]]):
        words = "; ".join(f"{row['title']} {signed(row['paired']['difference'])}" for row in paired)
        label = textwrap.fill(f"points against {against}", 34)
        panels.append(_row_panel("gains", f"Differences to {against}: {words}.", paired, gains, label, zero=True))
    return side_by_side(*panels)


def _row_panel(
    name: str,
    alt: str,
    rows: Sequence[Mapping[str, Any]],
    mark: Callable[[Axes, int, Mapping[str, Any]], None],
    label: str,
    zero: bool = False,
) -> Markup:
    """A line a method, its title to the left, what `mark` draws on it; `zero` marks where there is no difference."""
    titles = ["\n".join(textwrap.wrap(row["title"], 24, max_lines=3, placeholder="…")) for row in rows]

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            mark(axes, place, row)
        axes.set_yticks(range(len(rows)), titles, parse_math=False)
        axes.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        if zero:
            axes.axvline(0, color=COLOURS["quiet"], linewidth=1)

    lines = max(title.count("\n") for title in titles) + 1
    return draw(name, alt, plot, 0.8 + (0.14 + 0.16 * lines) * len(rows), PANEL)
