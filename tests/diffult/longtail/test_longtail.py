"""Class statistics, the filter, the quota ledger and metrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffult.longtail.filter import FILTERS, Verdict, judge
from diffult.longtail.metrics import accuracies, class_accuracies, class_groups
from diffult.longtail.quota import Quota, quotas_to
from diffult.longtail.statistics import ClassStatistics, class_statistics


def test_centres_and_radii_are_naive_means_and_largest_distances():
    features = torch.randn(40, 5, dtype=torch.float64)
    labels = torch.arange(40) % 4
    statistics = class_statistics(features, labels, 4)
    for c in range(4):
        rows = features[labels == c].tolist()
        np.testing.assert_allclose(statistics.centres[c], np.mean(rows, axis=0), rtol=1e-5, atol=1e-6)
        largest = max(math.dist(a, b) for a in rows for b in rows)
        assert float(statistics.radii[c]) == pytest.approx(largest, rel=1e-4)


def test_classes_with_one_or_two_images_borrow_the_median_radius():
    features = torch.tensor([[0.0], [1.0], [4.0], [0.0], [3.0], [6.0], [9.0], [10.0], [16.0], [5.0], [7.0], [8.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 4])
    statistics = class_statistics(features, labels, 5)
    assert statistics.radii.tolist() == pytest.approx([4.0, 6.0, 7.0, 6.0, 6.0])
    assert statistics.centres.flatten().tolist() == pytest.approx([5 / 3, 3.0, 35 / 3, 5.0, 7.5])


def test_statistics_refuse_an_empty_class_and_a_set_without_radius():
    with pytest.raises(ValueError, match="no image of class 1"):
        class_statistics(torch.zeros(3, 2), torch.tensor([0, 0, 2]), 3)
    with pytest.raises(ValueError, match="no class has 3 images"):
        class_statistics(torch.zeros(2, 2), torch.tensor([0, 1]), 2)


def test_judge_at_the_borders():
    statistics = ClassStatistics(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([2.0, 1.0]))
    features = torch.tensor([[0.0, 2.0], [0.0, 2.1], [0.0, 4.0], [0.0, 4.1], [11.5, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    distance, verdict = judge(features, labels, statistics)
    assert verdict.tolist() == [Verdict.ID, Verdict.AID, Verdict.AID, Verdict.OOD, Verdict.AID, Verdict.OOD]
    assert distance.tolist() == pytest.approx([2.0, 2.1, 4.0, 4.1, 1.5, 10.0])


def test_a_sample_taken_for_another_class_is_out_at_any_distance():
    statistics = ClassStatistics(torch.zeros(2, 1), torch.ones(2))
    _, verdict = judge(torch.zeros(2, 1), torch.tensor([0, 1]), statistics, predicted=torch.tensor([1, 1]))
    assert verdict.tolist() == [Verdict.OOD, Verdict.ID]


def verdict_of(c: int, i: int) -> int:
    """A fixed fate for each sample; class 2 hardly ever passes."""
    roll = np.random.default_rng([c, i]).random()
    return int(roll > 0.3) + int(roll > (0.97 if c != 2 else 0.02)) if c != 2 else 2 * int(roll > 0.02)


def run_ledger(quota: Quota, size: int, stop_after: int | None = None) -> int:
    batches = 0
    while stop_after is None or batches < stop_after:
        labels, indices = quota.next_batch(size)
        if len(labels) == 0:
            break
        assert len(labels) <= size
        verdicts = [verdict_of(c, i) for c, i in zip(labels.tolist(), indices.tolist(), strict=True)]
        quota.record(labels, indices, np.array(verdicts, dtype=np.uint8))
        batches += 1
    return batches


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 70), stop=st.integers(0, 6))
def test_the_kept_set_is_the_lowest_passing_indices_whatever_the_batches(size, stop):
    quotas, max_draws = np.array([0, 13, 5, 40]), 4.0
    quota = Quota(quotas, max_draws)
    run_ledger(quota, size, stop_after=stop)
    resumed = Quota(quotas, max_draws)  # as after a kill: only the verdicts survive
    for c, verdicts in enumerate(quota._verdicts):
        for i, v in reversed(list(enumerate(verdicts))):  # in any order
            resumed.record(np.array([c]), np.array([i]), np.array([v], dtype=np.uint8))
    run_ledger(resumed, size + 3)
    for c, wanted in enumerate(quotas):
        limit = math.ceil(wanted * max_draws)
        passing = [i for i in range(limit) if verdict_of(c, i) != Verdict.OOD]
        assert resumed.kept(c).tolist() == passing[:wanted]
        end = passing[wanted - 1] + 1 if wanted and len(passing) >= wanted else limit
        fates = [verdict_of(c, i) for i in range(end)]
        expected = {"drawn": end, "accepted": min(wanted, len(passing))}
        expected |= {v.name.lower(): fates.count(v) for v in Verdict}
        assert resumed.tally(c) == expected


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_wave_does_not_change_the_kept_set(lost):
    """Any batch may be gone; its indices are drawn again although later ones would fill the quota."""
    fate = np.random.default_rng(7).random(400) < 0.4

    def go(quota, batches=None):
        while len(indices := quota.next_batch(16)[1]):
            verdict = np.where(fate[indices], Verdict.ID, Verdict.OOD).astype(np.uint8)
            quota.record(np.zeros_like(indices), indices, verdict)
            if batches is not None:
                batches.append((indices, verdict))
        return quota

    batches: list = []
    whole = go(Quota(np.array([20]), 10.0), batches)
    assert len(batches) >= 4
    resumed = Quota(np.array([20]), 10.0)
    for number, (indices, verdict) in enumerate(batches):
        if number != lost:
            resumed.record(np.zeros_like(indices), indices, verdict)
    go(resumed)
    assert resumed.kept(0).tolist() == whole.kept(0).tolist() == np.flatnonzero(fate)[:20].tolist()
    assert resumed.tally(0) == whole.tally(0)


def test_a_hopeless_class_ends_at_its_limit():
    quota = Quota(np.array([10]), max_draws=3.0)
    while len(batch := quota.next_batch(8)[1]):
        quota.record(np.zeros_like(batch), batch, np.full(len(batch), Verdict.OOD, dtype=np.uint8))
    assert quota.tally(0) == {"drawn": 30, "accepted": 0, "id": 0, "aid": 0, "ood": 30}


def test_without_the_filter_everything_passes():
    quota = Quota(np.array([5]), max_draws=1.0, filter=FILTERS["none"])
    labels, indices = quota.next_batch(8)
    quota.record(labels, indices, np.full(len(labels), Verdict.OOD, dtype=np.uint8))
    assert quota.kept(0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("verdict", Verdict)
def test_one_verdict_alone(verdict):
    quota = Quota(np.array([0, 4, 3]), max_draws=20.0, filter=FILTERS[verdict.name.lower()])
    run_ledger(quota, 8)
    for c, wanted in enumerate(quota.quotas):
        assert quota.kept(c).tolist() == [i for i in range(20 * wanted) if verdict_of(c, i) == verdict][:wanted]


def test_the_kept_set_of_a_smaller_dose_is_the_beginning_of_that_of_a_larger_one():
    counts, kept = np.array([60, 43, 7, 3]), {}
    for dose in (0.5, 1.0, 1.5, 2.0):
        quotas = quotas_to(60, counts, dose)
        assert quotas.tolist() == [round(dose * lacking) for lacking in (0, 17, 53, 57)]
        quota = Quota(quotas, max_draws=1.6)  # too few draws for class 2, whatever the dose
        run_ledger(quota, 16)
        kept[dose] = [quota.kept(c).tolist() for c in range(4)]
    for smaller, larger in itertools.pairwise(kept.values()):
        assert all(b[: len(a)] == a and len(b) >= len(a) for a, b in zip(smaller, larger, strict=True))
    assert [len(k) for k in kept[2.0]][:2] == [0, 34] and len(kept[2.0][2]) < 106


def test_groups_and_accuracies():
    counts = np.array([101, 100, 20, 19])
    groups = class_groups(counts, many=100, few=20)
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [0],
        "medium": [1, 2],
        "few": [3],
    }
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    predictions = np.array([0, 1, 1, 1, 2, 0, 3, 3])
    assert accuracies(predictions, labels, groups) == {
        "top1": 75.0,
        "many": 50.0,
        "medium": 75.0,
        "few": 100.0,
    }
    assert accuracies(predictions, labels, {"many": np.array([], dtype=int)})["many"] is None
    assert class_accuracies(predictions, labels, 5) == [50.0, 100.0, 50.0, 100.0, None]
