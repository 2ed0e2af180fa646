"""Images that are in a set twice, or in two splits: found by what `write` gives of each, counted and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def duplicate_lines(
    digests: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], name: Callable[[str, int], str]
) -> list[str]:
    """What is stored more than once, a line for each split and each two of them; [] if nothing is.

    Args:
        digests: by split, (N,) as `write` returns them.
        labels: by split, (N,) integers.
        name: of a split's image by its position, in words.
    """
    lines = []
    splits = [split for split in ("train", "val", "test") if split in digests]
    for position, split in enumerate(splits):
        mine, classes = digests[split], labels[split]
        _, first, place = np.unique(mine, return_index=True, return_inverse=True)
        before = first[place]  # of each image the first that is the same
        again = np.flatnonzero(before != np.arange(len(mine)))
        if again.size:
            one, other = name(split, int(again[0])), name(split, int(before[again[0]]))
            lines.append(
                f"{split}: {again.size} of {len(mine)} images repeat others of it, such as {one} that is {other}"
                + _of_another_class(classes[again] != classes[before[again]])
            )
        for rival in splits[:position]:
            values, where = np.unique(digests[rival], return_index=True)
            found = np.minimum(np.searchsorted(values, mine), len(values) - 1)
            shared = np.flatnonzero(values[found] == mine)
            if shared.size:
                theirs = where[found[shared]]
                one, other = name(split, int(shared[0])), name(rival, int(theirs[0]))
                lines.append(
                    f"{split}: {shared.size} of {len(mine)} images are in {rival} too, such as {one} that is {other}"
                    + _of_another_class(classes[shared] != labels[rival][theirs])
                    + "; what is measured on them is too good: remove them from one"
                )
    return lines


def _of_another_class(differs: np.ndarray) -> str:
    return f"; {differs.sum()} of them with another label" if differs.any() else ""
