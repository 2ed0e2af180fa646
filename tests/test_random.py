"""Philox and the normal numbers made from it."""

import numpy as np
import pytest
import torch
from scipy import stats

from kernels.random import normal, philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_philox_equals_naive_big_integers():
    rng = np.random.default_rng()
    counters = rng.integers(0, 2**32, size=(50, 4))
    key = tuple(int(k) for k in rng.integers(0, 2**32, size=2))
    words = torch.stack(philox4x32(tuple(torch.from_numpy(counters).unbind(1)), key), dim=1)
    for counter, got in zip(counters.tolist(), words.tolist(), strict=True):
        c, k = counter, list(key)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
            k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
        assert c == got


def test_a_million_normals_are_normal():
    labels, indices = torch.arange(1000) % 10, torch.arange(1000)
    values = normal(1234567890123, labels, indices, 3, (10, 10, 10)).flatten().double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 4e-3
    assert abs(values.std() - 1) < 3e-3
    assert abs(stats.skew(values)) < 0.01
    assert abs(stats.kurtosis(values)) < 0.02


def test_noise_depends_on_the_name_alone():
    labels, indices = torch.tensor([3, 1, 3, 7]), torch.tensor([0, 5, 2, 10**9])
    whole = normal(7, labels, indices, 4, (1, 5, 3))
    for row in range(4):
        alone = normal(7, labels[row : row + 1], indices[row : row + 1], 4, (1, 5, 3))
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("changed", [{"seed": 8}, {"seed": 7 + 2**32}, {"label": 2}, {"index": 4}, {"step": 1}])
def test_each_part_of_the_name_gives_other_noise(changed):
    def draw(seed=7, label=1, index=3, step=0):
        return normal(seed, torch.tensor([label]), torch.tensor([index]), step, (1, 32, 32)).flatten().numpy()

    correlation = np.corrcoef(draw(), draw(**changed))[0, 1]
    assert abs(correlation) < 0.12  # four deviations of 1024 independent pairs


def test_uniform_covers_the_half_open_interval():
    u = uniform(0, torch.zeros(1000, dtype=torch.int64), torch.arange(1000), 0, 7)
    assert u.shape == (1000, 7)
    assert u.min() > 0 and u.max() <= 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
