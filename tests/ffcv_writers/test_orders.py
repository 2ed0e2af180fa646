"""The order of draws: exact counts, a stream that can be entered anywhere, and shared without duplicates."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ffcv_writers import (
    ClassBalanced,
    Loader,
    Natural,
    Order,
    Ratio,
    Weighted,
    open_set,
    write,
)
from ffcv_writers.readers import open_source

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)


def ratio(labels: np.ndarray) -> Ratio:
    synthetic = np.arange(len(labels)) % 3 == 2
    return Ratio(synthetic, 2, 1 if synthetic.any() else 0)


MAKERS: list[Callable[[np.ndarray], Order]] = [
    lambda labels: Natural(len(labels)),
    ClassBalanced,
    lambda labels: Weighted(labels + 0.5),
    ratio,
]


def counts_of(draws: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(draws, minlength=size)


@given(st.sampled_from(MAKERS), LABELS, st.integers(0, 2**70), st.integers(0, 200), st.integers(0, 150))
@settings(max_examples=50, deadline=None)
def test_a_stream_is_its_epochs_end_to_end(
    make: Callable[[np.ndarray], Order], labels: np.ndarray, seed: int, start: int, count: int
) -> None:
    order = make(labels)
    epochs = range((start + count) // order.length + 1)
    whole = np.concatenate([order.epoch(seed, epoch) for epoch in epochs])
    part = order.stream(seed, start, count)
    assert part.dtype == np.int64
    np.testing.assert_array_equal(part, whole[start : start + count])


@given(st.sampled_from(MAKERS), LABELS, st.integers(0, 1000), st.integers(1, 4), st.integers(0, 9), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_ranks_share_the_stream_and_enter_it_anywhere(
    make: Callable[[np.ndarray], Order], labels: np.ndarray, seed: int, world: int, start: int, count: int
) -> None:
    """All ranks' batches, laid side by side step by step, are the stream, each draw once and in its place."""
    order = make(labels)
    size = 2 * order.group
    ranks = [list(order.steps(seed, size, start, start + count, rank=rank, world=world)) for rank in range(world)]
    samples, positions = (
        np.stack([np.concatenate([draws[i] for draws in rank]).reshape(count, size) for rank in ranks], 1).ravel()
        for i in (0, 1)
    )
    np.testing.assert_array_equal(positions, start * world * size + np.arange(count * world * size))
    np.testing.assert_array_equal(samples, order.stream(seed, positions[0], len(positions)))


@given(labels=LABELS, seed=st.integers(0, 1000), epoch=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_orders_draw_as_often_as_they_say(labels: np.ndarray, seed: int, epoch: int) -> None:
    size = len(labels)
    np.testing.assert_array_equal(np.sort(Natural(size).epoch(seed, epoch)), np.arange(size))
    balanced = ClassBalanced(labels).epoch(seed, epoch)
    assert len(balanced) == size
    present = np.unique(labels)
    draws = counts_of(labels[balanced], 5)[present]
    assert draws.max() - draws.min() <= 1
    for label in present:
        each = counts_of(balanced, size)[labels == label]
        assert each.max() - each.min() <= 1
    weights = np.where(labels == labels[0], labels + 1.5, labels * 0.3)  # some are zero
    weighted = Weighted(weights).epoch(seed, epoch)
    assert len(weighted) == size
    assert (abs(counts_of(weighted, size) - weights / weights.sum() * size) < 1 + 1e-9).all()


@pytest.mark.parametrize(("real", "generated"), [(3, 1), (1, 3), (5, 0), (16, 48)])
def test_each_batch_has_its_ratio_and_each_kind_its_own_epochs(real: int, generated: int) -> None:
    synthetic = np.random.default_rng(0).permutation(np.repeat([False, True], [100, 37]))
    order = Ratio(synthetic, real, generated)
    batches = order.stream(5, 0, 37 * 100 * order.group).reshape(-1, order.group)
    np.testing.assert_array_equal(synthetic[batches].sum(1), generated)
    for kind, share in ((False, real), (True, generated)):
        numbers, drawn = np.flatnonzero(synthetic == kind), batches[synthetic[batches] == kind]
        assert (counts_of(drawn, 137)[numbers] == 37 * 100 * share / len(numbers)).all()
        for end in range(1, 300, 7):  # no sample comes again before all others of its kind have come
            so_far = counts_of(drawn[: end * share], 137)[numbers]
            assert np.ptp(so_far) <= 1
    if generated:  # the synthetic ones stand anywhere in the batch
        assert chisquare(synthetic[batches].sum(0)).pvalue > 1e-4
    assert order.length == -(-100 // real) * order.group


def test_draws_are_spread_by_chance() -> None:
    """Chi-square: of the weighted draws against the weights; of which class gets one more, over epochs; of who draws
    which neighbour."""
    generator = np.random.default_rng(0)
    weights = generator.uniform(0.1, 3, 50)
    weighted = Weighted(weights)
    drawn = counts_of(weighted.stream(1, 0, 50 * 400), 50)
    expected = weights / weights.sum() * 50 * 400
    assert abs(drawn - expected).max() < 5 * np.sqrt(400 / 4)  # each epoch rounds by chance: deviation <= 1/2
    balanced = ClassBalanced(np.arange(7) % 3)  # 7 draws for 3 classes
    more = [counts_of(balanced.epoch(0, e) % 3, 3) for e in range(600)]
    assert chisquare((np.stack(more) == 3).sum(0)).pvalue > 1e-4
    first = counts_of(np.array([Natural(20).epoch(3, epoch)[0] for epoch in range(2000)]), 20)
    assert chisquare(first).pvalue > 1e-4


def test_orders_differ_by_seed_and_epoch_and_are_spread() -> None:
    labels = np.repeat(np.arange(10), [1000, 600, 360, 215, 129, 77, 46, 28, 17, 10])
    for make in MAKERS:
        names = ((0, 0), (0, 1), (1, 0), (0, 0))
        orders = [tuple(make(labels).epoch(seed, epoch)) for seed, epoch in names]
        assert len(set(orders)) == 3 and orders[0] == orders[3]
    # Classes are mixed: of 2482 draws, 248 should follow one of their own class, with a deviation of 15.
    drawn = labels[ClassBalanced(labels).epoch(0, 0)]
    assert abs((drawn[1:] == drawn[:-1]).sum() - 248) < 75


def imagenet_lt_counts() -> np.ndarray:
    """1000 class sizes from 1280 down to 5, 115,846 in all, as ImageNet-LT has them (Liu et al. 2019). Its list gives
    each class's own size; these fall off exponentially and faster at first, with the same sum and ends."""
    place = np.arange(1000) / 999
    low, high = 0.1, 3.0
    while high - low > 1e-12:
        power = (low + high) / 2
        counts = np.rint(1280 * (5 / 1280) ** place**power).astype(int)
        low, high = (power, high) if counts.sum() < 115_846 else (low, power)
    counts[500] += 115_846 - counts.sum()
    return counts


def test_imagenet_lt_at_its_size() -> None:
    """115,846 samples: exact balance, no more memory than a few numbers a draw, and an epoch in well under a second."""
    counts = imagenet_lt_counts()
    assert counts.sum() == 115_846 and (counts[0], counts[-1]) == (1280, 5) and (np.diff(counts) <= 0).sum() > 990
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1000), counts))
    synthetic = np.arange(2 * len(labels)) >= len(labels)
    for order in (
        Natural(len(labels)),
        ClassBalanced(labels),
        Weighted(1 / counts[labels]),
        Ratio(synthetic, 192, 64),
    ):
        tracemalloc.start()
        start = time.process_time()
        draws = next(order.steps(0, 256, 3, 453))  # an epoch, from its middle on
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(draws.samples) == 450 * 256
        assert seconds < 2 and peak < 30e6
        epoch = order.epoch(0, 1)
        if isinstance(order, Ratio):
            batches = epoch.reshape(-1, 256)
            assert (synthetic[batches].sum(1) == 64).all() and len(batches) == -(-115_846 // 192)
        elif isinstance(order, Natural):
            np.testing.assert_array_equal(np.sort(epoch), np.arange(115_846))
        else:  # 115.846 draws of each class
            drawn = counts_of(labels[epoch], 1000)
            # of the weighted draws, those of all classes of one size are exact together
            assert abs(drawn - 115.846).max() < (1 if isinstance(order, ClassBalanced) else 20)
            assert abs(drawn.mean() - 115.846) < 1e-9 and chisquare(drawn).pvalue > 0.99  # far evener than chance


def test_long_streams_are_laid_out_in_parts() -> None:
    order = ClassBalanced(np.arange(50) % 7)
    parts = list(order.steps(4, 8, 2, 9000))
    np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), order.stream(4, 16, 8 * 8998))
    assert len(parts) > 1


def test_orders_refuse() -> None:
    for make in (ClassBalanced, Weighted):
        with pytest.raises(ValueError, match="not empty"):
            make(np.zeros(0, int))
    with pytest.raises(ValueError, match="needs samples"):
        Natural(0)
    with pytest.raises(ValueError, match="negative"):
        Natural(3).epoch(-1, 0)
    with pytest.raises(ValueError, match="negative"):
        Natural(3).stream(0, -1, 0)
    for weights in ([1.0, -1], [0.0, 0], [np.nan, 1], [np.inf, 1]):
        with pytest.raises(ValueError, match="weights must be finite"):
            Weighted(np.array(weights))
    with pytest.raises(ValueError, match="2 synthetic samples, the set has none"):
        Ratio(np.zeros(3, bool), 2, 2)
    with pytest.raises(ValueError, match="needs real >= 1"):
        Ratio(np.zeros(3, bool), 0, 2)
    with pytest.raises(ValueError, match="multiple of 3, got 4"):
        next(Ratio(np.arange(3) > 1, 2, 1).steps(0, 4, 0, 1))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        next(Natural(3).steps(0, 4, 0, 1, rank=2, world=2))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_imagenet_lt_from_list_to_batches_at_its_size(tmp_path: Path) -> None:
    """115,846 lines, so many images in a file, every one of them drawn: in memory some hundred bytes each."""
    counts = imagenet_lt_counts()
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(1000), counts))
    lines = (f"train/n{label:08}/n{label:08}_{number}.JPEG {label}\n" for number, label in enumerate(labels))
    (tmp_path / "ImageNet_LT_train.txt").write_text("".join(lines))
    tracemalloc.start()
    source = open_source("list", tmp_path, train_list=tmp_path / "ImageNet_LT_train.txt").splits["train"]
    listed, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(source.labels, labels)
    np.testing.assert_array_equal(np.bincount(source.labels), counts)
    assert source.samples.name(115_845).endswith(f"n{labels[-1]:08}_115845.JPEG, ImageNet_LT_train.txt:115846")
    assert listed < 450 * 115_846  # two strings: the path, and how messages call it

    class Made:
        def __len__(self) -> int:
            return 115_846

        def __getitem__(self, number: int, /) -> np.ndarray:
            return np.full((2, 2, 1), number % 251, np.uint8)

    names = np.arange(115_846)
    write(tmp_path / "set.beton", Made(), labels=labels, synthetic=0 * names, index=names)
    tracemalloc.start()
    image_set = open_set([tmp_path / "set.beton"])
    opened, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 100 * 115_846
    np.testing.assert_array_equal(image_set.labels, labels)
    loader, order = Loader(image_set, 512, resident=True), ClassBalanced(image_set.labels)
    drawn = np.zeros(1000, int)
    for batch in loader.batches(order.epoch(3, 7)):
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.sample % 251)
        drawn += np.bincount(batch.labels.numpy(), minlength=1000)
    assert sorted(set(drawn)) == [115, 116] and (drawn == 116).sum() == 846
