"""What the report of a run says about its samples: the gallery, the candidates by class, and copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffult.longtail.copies import mostly_copies
from diffult.longtail.filter import Verdict
from diffult.reporting.content import RunContent
from diffult.reporting.pictures import MAX_CLASSES, data_uri, evenly, first_images, image_column, image_strip
from diffult.reporting.text import listed

_PER_CLASS = 6  # real images of a class, and as many samples beside them


def generation_rows(
    by_class: Mapping[str, Mapping[str, int]], classes: tuple[str, ...], counts: np.ndarray, quotas: np.ndarray
) -> list[dict[str, Any]]:
    """The tally of each class that drew candidates, its verdicts in percent, the class with most real images first.

    Args:
        by_class: class name -> {"drawn", "accepted", "id", "aid", "ood"}.
        counts, quotas: int64 [num_classes], real images and samples needed.
    """
    return [
        {"name": classes[c], "real": counts[c], "needed": quotas[c]} | dict(tally) | verdict_shares(tally)
        for c in np.argsort(-counts, kind="stable")
        if (tally := by_class.get(classes[c])) is not None
    ]


def verdict_shares(tally: Mapping[str, int]) -> dict[str, float]:
    """Verdicts in percent of the candidates."""
    return {verdict: 100.0 * tally[verdict] / max(tally["drawn"], 1) for verdict in ("id", "aid", "ood")}


def gallery(content: RunContent, quotas: np.ndarray) -> list[dict[str, Any]]:
    """The first real images and samples of each class, the class with most real images first; an even choice of more
    than 40 classes."""
    packed, labels = content.packed, content.samples.labels
    judged = _judged(content)
    return [
        {
            "name": packed.classes[c],
            "real": _strip(content, c),
            "real_count": packed.counts[c],
            "generated": [_sample(content, int(i), judged) for i in np.flatnonzero(labels == c)[:_PER_CLASS]],
            "generated_count": int((labels == c).sum()),
            "needed": quotas[c],
        }
        for c in evenly(np.argsort(-packed.counts, kind="stable"), MAX_CLASSES)
    ]


def _strip(content: RunContent, label: int) -> dict[str, Any]:
    shown = first_images(content.packed.train, label, _PER_CLASS)
    strip = image_strip(shown)
    alt = f"{len(shown)} real images of class {content.packed.classes[label]}"
    return {"src": data_uri(strip), "width": strip.width, "height": strip.height, "alt": alt}


def _judged(content: RunContent) -> dict[tuple[int, int], tuple[float, Verdict]]:
    """Distance and verdict of every candidate, by class and index."""
    table = content.candidates
    if not {"labels", "indices", "distance", "verdict"} <= table.keys():
        return {}
    columns = (table[name].tolist() for name in ("labels", "indices", "distance", "verdict"))
    return {
        (int(c), int(i)): (distance, Verdict(int(verdict))) for c, i, distance, verdict in zip(*columns, strict=True)
    }


def _sample(content: RunContent, place: int, judged: Mapping[tuple[int, int], tuple[float, Verdict]]) -> dict[str, Any]:
    """A kept sample above its nearest real training image, with what was found of it, "caption"."""
    label, classes = int(content.samples.labels[place]), content.packed.classes
    images, alt, caption = [content.samples.image(place)], f"generated {classes[label]}", ""
    index = getattr(content.samples, "index", None)
    found = judged.get((label, int(index[place]))) if index is not None else None
    if found is not None:
        distance, verdict = found
        known = label < len(content.radii)
        caption = f"{verdict.name} {distance / content.radii[label] if known else distance:.2f}"
    nearest = int(content.copies["nearest"][place]) if "nearest" in content.copies else -1
    if nearest >= 0:
        images.append(content.packed.train.image(nearest))
        alt += ", beneath it the nearest real training image"
    if "copy" in content.copies and content.copies["copy"][place]:
        caption += " copy"
    picture = image_column(images)
    return {
        "src": data_uri(picture),
        "width": picture.width,
        "height": picture.height,
        "alt": alt,
        "caption": caption.strip(),
    }


def copy_rows(content: RunContent) -> list[dict[str, Any]]:
    """{"name", "real", "share", "mostly", "pixels", "features", "held_out_pixels", "held_out_features"} for each class
    with samples: percent of copies, and median distances to the nearest real training image; None where not known."""
    by_class, packed, copies = content.metrics["copies"]["by_class"], content.packed, content.copies
    kept = np.bincount(content.samples.labels, minlength=len(packed.counts))
    held_out = copies.get("held_out_labels", np.empty(0))
    rows = []
    for c in np.argsort(-packed.counts, kind="stable"):
        share = by_class.get(packed.classes[c])
        if kept[c]:
            medians = {name: _median(copies, name, content.samples.labels == c) for name in ("pixels", "features")}
            medians |= {name: _median(copies, name, held_out == c) for name in ("held_out_pixels", "held_out_features")}
            mostly = mostly_copies(share, int(kept[c]))
            rows.append(
                {"name": packed.classes[c], "real": packed.counts[c], "share": share, "mostly": mostly} | medians
            )
    return rows


def _median(copies: Mapping[str, np.ndarray], name: str, mask: np.ndarray) -> float | None:
    chosen = copies[name][mask] if name in copies else np.empty(0)
    return float(np.median(chosen)) if len(chosen) else None


def copy_warning(rows: list[dict[str, Any]]) -> str | None:
    """Names the classes that are mostly copies."""
    names = [row["name"] for row in rows if row["mostly"]]
    if not names:
        return None
    what = "one class" if len(names) == 1 else f"{len(names)} classes"
    return f"More than half of the samples are copies of real training images in {what}: {listed(names)}."
