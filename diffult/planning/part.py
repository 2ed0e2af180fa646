"""The part of a run's images that a rehearsal packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffult.config import Config
from diffult.data.packing import Packed, open_data, origin, pack_images
from diffult.data.splits import choose_splits
from diffult.planning.cost import Amounts
from diffult.planning.failures import missing_files, small_classes
from diffult.planning.rehearsal import Part, Rehearsed
from diffult.planning.stopwatch import timed
from diffult.planning.timing import free_host_memory
from diffult.reporting.text import size
from ffcv_writers.readers import Source

_LEAST = 3  # images of a class and split, where it has them: they give a radius


def pack_part(config: Config, folder: Path, seconds: float, into: Rehearsed) -> tuple[Amounts, dict[str, Any]]:
    """Packs some images of each class, as many as the seconds allow, to `folder`, and enters what all would take.

    Returns:
        The numbers of all images, and the record of `pack_images` on the part.

    Raises:
        UserError: see `open_data` and `pack_images`.
    """
    data = config.data
    record: dict[str, Any] = {}

    def choose() -> tuple[Source, dict[str, np.ndarray]]:
        source = open_data(data)
        return source, choose_splits(data, source)

    (source, numbers), opening = timed(choose)
    labels = {split: origin(source, split).labels[chosen] for split, chosen in numbers.items()}
    counts = {split: np.bincount(of, minlength=len(source.classes)) for split, of in labels.items()}
    total, few = sum(map(len, numbers.values())), sum(int(np.minimum(c, _LEAST).sum()) for c in counts.values())
    missing, failures = missing_files(source, numbers)
    into.failures += failures

    def pack(share: float) -> tuple[int, float]:
        part = {split: _part(numbers[split], labels[split], share, missing[split]) for split in numbers}
        packed, took = timed(lambda: pack_images(data, source, folder, part))
        record.update({key: packed[key] for key in ("fingerprint", "held_out")})
        return sum(map(len, part.values())), took

    first, took = pack(few / total)
    each = [took / first]
    if (share := min(1.0, first * (seconds - took) / took / total)) > 1.5 * first / total:
        packed, longer = pack(share)
        each = [longer / packed, max(longer - took, 0.0) / max(packed - first, 1)]
        first = packed
    into.add_start(opening)
    into.parts.append(Part("images", tuple(each), share=1.0))
    into.disk = sum(file.stat().st_size for file in folder.glob("*.beton")) / first * total
    into.notes.append(f"{first:,} of {total:,} images packed")
    if into.disk > (free := free_host_memory()):
        into.notes.append(
            f"{size(into.disk)} do not fit into the {size(free)} of memory that are free: epochs read them from the "
            "disk, which the rehearsal of a part does not show"
        )
    held_out = [counts[split] for split in ("val", "test") if split in counts]
    validation = counts.get("val", np.zeros_like(counts["train"]))
    into.notes += small_classes(counts["train"], validation, source.classes, config)
    return Amounts(counts["train"], counts["test"], int(np.sum(held_out)), total, 0.0), record


def _part(numbers: np.ndarray, labels: np.ndarray, share: float, missing: np.ndarray) -> np.ndarray:
    """This share of each class, evenly over it and at least _LEAST; the numbers ascend as before."""
    kept = []
    for label in np.unique(labels):
        rows = np.flatnonzero((labels == label) & ~missing)
        count = min(len(rows), max(_LEAST, round(share * len(rows))))
        kept.append(rows[np.arange(count) * len(rows) // max(count, 1)])
    return numbers[np.sort(np.concatenate(kept))]


def amounts_of(packed: Packed) -> Amounts:
    """Of images that are packed."""
    test, val = len(packed.test), len(packed.val or ())
    tests = np.bincount(packed.test.labels, minlength=len(packed.classes))
    return Amounts(packed.counts, tests, test + val, len(packed.train) + test + val, 0.0)
