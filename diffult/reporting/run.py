"""The report of a run as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from diffult.longtail.comparison import CONTROL
from diffult.longtail.filter import FILTERS, Verdict
from diffult.longtail.methods import find_method
from diffult.longtail.metrics import class_groups
from diffult.longtail.quota import quotas_to
from diffult.reporting import figures
from diffult.reporting.accuracy import (
    BASE,
    accuracy_rows,
    confusion_share,
    few_test_images,
    leaders,
    ranked,
    summary,
)
from diffult.reporting.content import RunContent
from diffult.reporting.page import render_page
from diffult.reporting.pictures import MAX_CLASSES, evenly
from diffult.reporting.samples import copy_rows, copy_warning, gallery, generation_rows, verdict_shares
from diffult.reporting.text import duration

_CURVES = "Loss, and images a second, at each reading."
_CHECKS = (
    "The averaged weights at each check. Loss at fixed noise, each class counted alike: a gap that grows is "
    "memorisation. Of some samples the share of copies, and how many held-out images a linear head trained on them "
    "gets right."
)
LONG_TABLE = 40  # more rows than this are folded


def render(content: RunContent) -> str:
    """The report, one page that needs nothing beside it."""
    config, metrics, packed = content.config, content.metrics, content.packed
    counts, generation = packed.counts, metrics["generation"]
    quotas = quotas_to(config.generate.balance_to, counts, config.generate.dose)
    groups = class_groups(counts, config.groups.many, config.groups.few)
    synthetic = np.bincount(content.samples.labels, minlength=len(counts))
    copies = copy_rows(content) if "copies" in metrics else []
    return render_page(
        "run.html.j2",
        config=config,
        metrics=metrics,
        machine=content.machine,
        counts=counts,
        groups=config.groups,
        group_sizes={name: len(members) for name, members in groups.items()},
        synthetic=int(synthetic.sum()),
        summary=summary(content),
        warning=copy_warning(copies),
        small=_small(content, groups),
        accuracy=accuracy_rows(metrics, content.methods),
        validation=accuracy_rows(metrics.get("validation", {}), content.methods),
        histogram=figures.class_histogram(counts, synthetic, groups, packed.classes),
        by_size=_by_size(content),
        confusions=_confusions(content),
        distances=_distances(content),
        gallery=gallery(content, quotas),
        judged="labels" in content.candidates,
        neighbours="nearest" in content.copies,
        generation=generation,
        filtered=Verdict.OOD not in FILTERS[config.generate.filter].keeps,
        checks_label=FILTERS[config.generate.filter].checks_label,
        shares=verdict_shares(generation),
        by_class=generation_rows(generation["by_class"], packed.classes, counts, quotas),
        copies=copies,
        curves=_curves(content),
        long_table=LONG_TABLE,
        timings=timing_rows(metrics["seconds"]),
        total=duration(sum(metrics["seconds"].values())),
    )


def _small(content: RunContent, groups: Mapping[str, np.ndarray]) -> str | None:
    if "labels" not in content.predictions:
        return None
    tests = np.bincount(content.predictions["labels"], minlength=len(content.packed.counts))
    return few_test_images(tests, groups)


def timing_rows(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """{"stage", "seconds", "share"} for each stage, the share in percent of the whole."""
    total = sum(seconds.values()) or 1.0
    return [{"stage": stage, "seconds": spent, "share": 100 * spent / total} for stage, spent in seconds.items()]


def _by_size(content: RunContent) -> Markup | None:
    """Of cross-entropy, the leaders and the duplicates."""
    chosen = [name for name in dict.fromkeys((BASE, *leaders(content), CONTROL)) if name in content.methods]
    rows = {
        find_method(name).title: row for name in chosen if (row := content.metrics[name].get("by_class")) is not None
    }
    return figures.accuracy_by_class(rows, content.packed.counts) if rows else None


def _confusions(content: RunContent) -> list[dict[str, Any]]:
    """Of the first method of `ranked`, and of cross-entropy: the figure and the most frequent errors."""
    names = dict.fromkeys((*ranked(content.metrics, content.methods)[:1], BASE))
    order = evenly(np.argsort(-content.packed.counts, kind="stable"), MAX_CLASSES)
    classes, pictures = [content.packed.classes[c] for c in order], []
    for number, name in enumerate(names):
        if {name, "labels"} <= content.predictions.keys():
            share, title = confusion_share(content, name, order), find_method(name).title
            picture = figures.confusion(f"confusion-{number}", title, share, classes)
            pictures.append({"title": title, "picture": picture, "errors": figures.confusions(share, classes, 10)})
    return pictures


def _distances(content: RunContent) -> Markup | None:
    table, radii = content.candidates, content.radii
    if not len(table.get("labels", ())) or len(radii) != len(content.packed.counts):
        return None
    labels = table["labels"].astype(np.int64)
    return figures.distances(table["distance"] / radii[labels], labels, content.packed.counts, content.packed.classes)


def _curves(content: RunContent) -> list[dict[str, Any]]:
    """A figure for each network; the classifiers share one. Another for the diffusion model's checks, if any."""
    trainings = content.trainings
    groups = {stage: {stage: trainings[stage]} for stage in ("extractor", "diffusion") if stage in trainings}
    groups["classifier"] = {find_method(name).title: trainings[name] for name in content.methods if name in trainings}
    pictures = []
    for stage, group in groups.items():
        if group:
            picture = figures.curves(f"curves-{stage}", group)
            pictures.append({"title": stage, "picture": picture, "caption": _CURVES})
        if stage == "diffusion" and any("held_out_loss" in line for line in group[stage]):
            picture = figures.checks("checks", group[stage])
            pictures.append({"title": "diffusion, checks", "picture": picture, "caption": _CHECKS})
    return pictures
