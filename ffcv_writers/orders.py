"""In which order samples are drawn: a function of (seed, epoch), so that training resumes at any step.

An epoch holds as many draws as the set has samples. The endless stream of draws is epoch 0, epoch 1, ... end
to end; batches are cut from the stream, hence always full, and a run that stopped after s steps of B goes on
at draw s B.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

OrderKind = Literal["natural", "class_balanced"]
_CHUNK = 4096  # batches whose order is laid out at a time: a long training would fill memory with it


def epoch_order(kind: OrderKind, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The draws of one epoch.

    Args:
        kind: "natural", every sample once; or "class_balanced", every class that occurs equally often, give
            or take one (which classes get one more is drawn), and within a class every sample equally often,
            give or take one.
        labels: (N,) integers, N > 0: the class of each sample.
        seed, epoch: not negative.

    Returns:
        (N,) int64 sample numbers.

    Raises:
        ValueError: an unknown kind, labels of another shape, or a negative seed or epoch.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"labels must be one integer a sample and not empty, got shape {labels.shape}")
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got seed {seed} and epoch {epoch}")
    generator = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    if kind == "natural":
        return generator.permutation(labels.size)
    if kind == "class_balanced":
        return _class_balanced(labels, generator)
    raise ValueError(f"unknown order {kind!r}: choose one of {', '.join(get_args(OrderKind))}")


def stream_order(kind: OrderKind, labels: np.ndarray, seed: int, start: int, count: int) -> np.ndarray:
    """Draws `start` to `start + count` of the endless stream, without making those before.

    Only the epochs it touches are made, at O(N) each: ask for many batches at once, not for one.

    Args:
        kind, labels, seed: as in `epoch_order`.
        start, count: not negative.

    Returns:
        (count,) int64 sample numbers.

    Raises:
        ValueError: as in `epoch_order`; a negative start or count.
    """
    if start < 0 or count < 0:
        raise ValueError(f"start and count must not be negative, got {start} and {count}")
    length = len(labels)
    if count == 0 or length == 0:
        return epoch_order(kind, labels, seed, 0)[:0]
    first, last = start // length, (start + count - 1) // length
    epochs = [epoch_order(kind, labels, seed, epoch) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[start - first * length :][:count]


def stream_chunks(
    kind: OrderKind, labels: np.ndarray, seed: int, batch_size: int, start: int, steps: int
) -> Iterator[np.ndarray]:
    """The draws of batches `start` to `steps` of the endless stream, some thousands of whole batches at a time.

    Args:
        kind, labels, seed: as in `epoch_order`.
        batch_size: draws a batch; a batch may span two epochs.

    Yields:
        (k batch_size,) int64 sample numbers.
    """
    for first in range(start, steps, _CHUNK):
        count = min(_CHUNK, steps - first)
        yield stream_order(kind, labels, seed, first * batch_size, count * batch_size)


def _class_balanced(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    classes, sizes = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    draws = np.full(classes.size, labels.size // classes.size)
    draws[generator.permutation(classes.size)[: labels.size % classes.size]] += 1
    # np.resize repeats its input from the start: the shuffle below makes the repetition's order immaterial.
    order = [np.resize(generator.permutation(m), d) for m, d in zip(members, draws, strict=True)]
    return generator.permutation(np.concatenate(order)).astype(np.int64, copy=False)
