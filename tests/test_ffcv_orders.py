"""The order of draws: exact counts, and a stream that can be entered anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffcv_writers import OrderKind, epoch_order, stream_order

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)
KINDS = st.sampled_from(["natural", "class_balanced"])


@given(KINDS, LABELS, st.integers(0, 2**70), st.integers(0, 200), st.integers(0, 150))
@settings(max_examples=100, deadline=None)
def test_a_stream_is_its_epochs_end_to_end(
    kind: OrderKind, labels: np.ndarray, seed: int, start: int, count: int
) -> None:
    epochs = range((start + count) // len(labels) + 1)
    whole = np.concatenate([epoch_order(kind, labels, seed, epoch) for epoch in epochs])
    part = stream_order(kind, labels, seed, start, count)
    assert part.dtype == np.int64
    np.testing.assert_array_equal(part, whole[start : start + count])


@given(labels=LABELS, seed=st.integers(0, 1000), epoch=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_orders_draw_as_often_as_they_say(labels: np.ndarray, seed: int, epoch: int) -> None:
    natural = epoch_order("natural", labels, seed, epoch)
    np.testing.assert_array_equal(np.sort(natural), np.arange(len(labels)))
    balanced = epoch_order("class_balanced", labels, seed, epoch)
    assert len(balanced) == len(labels)
    present = np.unique(labels)
    draws = np.bincount(labels[balanced], minlength=5)[present]
    assert draws.max() - draws.min() <= 1
    for label in present:
        each = np.bincount(balanced, minlength=len(labels))[labels == label]
        assert each.max() - each.min() <= 1


def test_orders_differ_by_seed_and_epoch_and_are_spread() -> None:
    labels = np.repeat(np.arange(10), [1000, 600, 360, 215, 129, 77, 46, 28, 17, 10])
    for kind in ("natural", "class_balanced"):
        names = ((0, 0), (0, 1), (1, 0), (0, 0))
        orders = [tuple(epoch_order(kind, labels, seed, epoch)) for seed, epoch in names]
        assert len(set(orders)) == 3 and orders[0] == orders[3]
    # Classes are mixed: of 2482 draws, 248 should follow one of their own class, with a deviation of 15.
    drawn = labels[epoch_order("class_balanced", labels, 0, 0)]
    assert abs((drawn[1:] == drawn[:-1]).sum() - 248) < 75


def test_orders_refuse() -> None:
    with pytest.raises(ValueError, match="unknown order"):
        epoch_order("random", np.zeros(3, int), 0, 0)
    with pytest.raises(ValueError, match="not empty"):
        stream_order("natural", np.zeros(0, int), 0, 0, 5)
    with pytest.raises(ValueError, match="negative"):
        epoch_order("natural", np.zeros(3, int), -1, 0)
    with pytest.raises(ValueError, match="negative"):
        stream_order("natural", np.zeros(3, int), 0, -1, 0)
