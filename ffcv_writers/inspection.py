"""What a set holds, and whether all of it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .image_set import open_set


def describe(paths: Sequence[Path]) -> dict[str, Any]:
    """Counts, sizes and storage of the files as one set.

    Raises:
        ValueError: see `open_set`.
    """
    image_set = open_set(paths, mixed_sizes=True)
    present, counts = np.unique(image_set.labels, return_counts=True)
    smallest, largest = image_set.sizes.min(0).tolist(), image_set.sizes.max(0).tolist()
    return {
        "files": len(image_set.paths),
        "megabytes": round(sum(path.stat().st_size for path in image_set.paths) / 1e6, 1),
        "images": len(image_set),
        "real": int((~image_set.synthetic).sum()),
        "synthetic": int(image_set.synthetic.sum()),
        "classes": len(present),
        "labels": f"{present[0]} to {present[-1]}",
        "images a class": f"{counts.min()} to {counts.max()}",
        "height": f"{smallest[0]} to {largest[0]}",
        "width": f"{smallest[1]} to {largest[1]}",
        "channels": image_set.channels,
        "storage": f"{int((~image_set.encoded).sum())} raw, {int(image_set.encoded.sum())} jpg",
    }


def verify(paths: Sequence[Path], *, classes: int | None = None, workers: int = 1) -> list[str]:
    """Decodes every sample and checks labels and names; what is wrong, a line each.

    Args:
        classes: labels must be 0..classes - 1 and none without a sample; None takes the largest label + 1.

    Raises:
        ValueError: see `open_set`.
    """
    image_set = open_set(paths, mixed_sizes=True)

    def check(sample: int) -> str | None:
        try:
            image_set.image(sample)
        except Exception as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers) as pool:
        wrong = [line for line in pool.map(check, range(len(image_set))) if line]
    limit = int(image_set.labels.max()) + 1 if classes is None else classes
    outside = np.flatnonzero((image_set.labels < 0) | (image_set.labels >= limit)).tolist()
    wrong += [f"{image_set.name(n)} has the label {image_set.labels[n]}, not 0 to {limit - 1}" for n in outside]
    empty = np.setdiff1d(np.arange(limit), image_set.labels)
    if empty.size:
        wrong.append(f"{empty.size} classes have no sample, {empty[0]} the first")
    names = np.stack([image_set.synthetic, image_set.synthetic * image_set.labels, image_set.index])
    _, first, times = np.unique(names, axis=1, return_index=True, return_counts=True)
    twice = first[times > 1]
    if twice.size:  # a real sample is named by its index, a synthetic one by its class and index
        wrong.append(f"{twice.size} names are given twice, that of {image_set.name(int(twice[0]))} the first")
    return wrong
