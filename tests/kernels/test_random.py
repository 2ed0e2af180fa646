"""Philox and the normal numbers made from it, in PyTorch and in Triton."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels import random
from kernels.random import halves, normal, philox4x32, philox4x32_block, reference_normal, signed, uniform

ONES = 0xFFFFFFFF
KNOWN = [  # Random123's kat_vectors, philox4x32 10: counter, key, result
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@triton.jit(do_not_specialize=["low", "high"])
def words_kernel(out, name, first, low, high, BLOCKS: tl.constexpr):
    """The words of BLOCKS blocks from `first` on, int64 [4, BLOCKS]; name: int64 (step, index, label)."""
    lanes = tl.arange(0, BLOCKS)
    blocks = tl.load(first).to(tl.uint32) + lanes.to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_block(low, high, tl.load(name + 2), tl.load(name + 1), tl.load(name), blocks)
    tl.store(out + lanes, w0.to(tl.int64))
    tl.store(out + BLOCKS + lanes, w1.to(tl.int64))
    tl.store(out + 2 * BLOCKS + lanes, w2.to(tl.int64))
    tl.store(out + 3 * BLOCKS + lanes, w3.to(tl.int64))


def triton_words(counter, key, blocks, device):
    out = torch.full((4, blocks), -1, dtype=torch.int64, device=device)
    name, first = torch.tensor(counter[1:], device=device), torch.tensor([counter[0]], device=device)
    words_kernel[(1,)](out, name, first, *halves(key[1] << 32 | key[0]), BLOCKS=blocks)
    return out.cpu()


def naive_normal(seed, label, index, step, shape):
    """Element by element in (H, W, C) order, Box-Muller in float64 on the words; float64 (C, H, W)."""
    channels, height, width = shape
    blocks = torch.arange(-(-channels * height * width // 4))
    names = [torch.tensor([value % 2**32]) for value in (step, index, label)]
    words = torch.stack(philox4x32((blocks, *names), (seed % 2**32, seed >> 32)), dim=1).numpy()
    out = np.full(shape, np.nan)
    for h in range(height):
        for w in range(width):
            for c in range(channels):
                e = (h * width + w) * channels + c
                first = e % 4 // 2 * 2  # of its pair
                u1, u2 = (words[e // 4, first : first + 2] + 0.5) / 2**32
                turn = np.sin if e % 2 else np.cos
                out[c, h, w] = np.sqrt(-2 * np.log(u1)) * turn(2 * np.pi * u2)
    return torch.from_numpy(out)


def poison(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(random.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers_in_triton(triton_kernels, counter, key, expected):
    words = triton_words(counter, key, 1, triton_kernels).flatten()
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_the_words_in_triton_are_those_in_pytorch(triton_kernels):
    """Random counters and keys, the block running over 2**32."""
    *counter, first, second = (int(word) for word in np.random.default_rng(0).integers(0, 2**32, 6))
    key = [first, second]
    counter[0] = ONES - 100
    blocks = (counter[0] + torch.arange(256)) % 2**32
    expected = torch.stack(philox4x32((blocks, *(torch.tensor([c]) for c in counter[1:])), tuple(key)))
    assert torch.equal(triton_words(counter, key, 256, triton_kernels), expected)


def test_philox_equals_naive_big_integers():
    rng = np.random.default_rng(0)
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


# Inputs are random anew at each call, so a failing shape cannot be shrunk, and trying to would take minutes.
BY_SHAPE = settings(deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(*[st.integers(1, 5)] * 3) | st.sampled_from([(3, 16, 16), (1, 28, 28), (4, 37, 1), (1, 1, 1)])


@settings(BY_SHAPE, max_examples=12)
@given(
    shape=SHAPES,
    seed=st.integers(0, 2**64 - 1) | st.sampled_from([1, 16, 2**31, 2**32 - 1, 2**32, 2**63]),
    names=st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 2**63 - 1), st.integers(0, 2**31)),
                   min_size=1, max_size=3),
)  # fmt: skip
def test_normals_are_float64_box_muller_in_memory_order(triton_kernels, monkeypatch, shape, seed, names):
    labels, indices, steps = torch.tensor(names, device=triton_kernels).unbind(1)  # of stride 3
    expected = torch.stack([naive_normal(seed, *name, shape) for name in names])
    with monkeypatch.context() as patch:
        poison(patch)
        ours = normal(seed, labels, indices, steps, shape)
    for got in (ours, reference_normal(signed(seed), labels, indices, steps, shape)):
        assert got.shape == (len(names), *shape) and got.dtype == torch.float32
        assert got.is_contiguous(memory_format=torch.channels_last)
        difference = got.cpu().double() - expected
        # Each of u1 and u2 is rounded to 24 bits: next to u1 = 1 the radius loses most, sqrt(2 * 2**-25)
        assert difference.abs().max() < 3e-4
        assert difference.norm() < 1e-6 * expected.norm() + 1e-5


def test_many_triton_normals_are_close_and_end_well(triton_kernels):
    """All quarter turns, and the tails: no NaN, no infinity, float32 rounding against float64."""
    labels, indices = (torch.full((16,), 0, device=triton_kernels), torch.arange(16, device=triton_kernels))
    got = normal(99, labels, indices, 0, (4, 32, 32)).permute(0, 2, 3, 1).reshape(16, -1, 2, 2).cpu().double()
    words = philox4x32((torch.arange(1024)[None], torch.zeros(1, 1).long(), torch.arange(16)[:, None],
                        torch.zeros(1, 1).long()), (99, 0))  # fmt: skip
    u = torch.stack(words, dim=2).double().add(0.5).mul(2.0**-32).view(16, 1024, 2, 2)
    radius, angle = torch.sqrt(-2 * torch.log(u[..., 0])), 2 * torch.pi * u[..., 1]
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    assert float((got - expected).norm() / expected.norm()) < 3e-7
    assert float((got - expected).abs().max()) < 3e-4
    assert {int(q) for q in (4 * u[..., 1]).round().unique()} == {0, 1, 2, 3, 4}


def test_steps_may_differ_within_a_batch(triton_kernels):
    labels, indices = (torch.tensor([5, 5, 2], device=triton_kernels) for _ in range(2))
    whole = normal(1, labels, indices, torch.tensor([0, 9, 3], device=triton_kernels), (3, 4, 5))
    for row, step in enumerate([0, 9, 3]):
        assert torch.equal(
            whole[row : row + 1], normal(1, labels[row : row + 1], indices[row : row + 1], step, (3, 4, 5))
        )
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(uniform(1, labels, indices, torch.tensor([4, 4, 4], device=triton_kernels), 5),
                       uniform(1, labels, indices, 4, 5))  # fmt: skip


def test_normal_is_an_operator(triton_kernels):
    labels, indices, steps = (torch.randint(0, 99, (3,), device=triton_kernels) for _ in range(3))
    torch.library.opcheck(torch.ops.diffult.normal.default, (7, labels, indices, steps, 3, 5, 2))
    compiled = torch.compile(lambda *names: normal(2**63 + 5, *names, (3, 5, 2)) + 1, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    assert torch.equal(compiled(labels, indices, steps), normal(2**63 + 5, labels, indices, steps, (3, 5, 2)) + 1)
    assert torch.equal(compiled(labels, indices, 4), normal(2**63 + 5, labels, indices, 4, (3, 5, 2)) + 1)


def test_names_of_another_kind_are_refused():
    names = torch.arange(3)
    with pytest.raises(ValueError, match="seed"):
        normal(-1, names, names, 0, (1, 2, 2))
    with pytest.raises(ValueError, match="indices must be int64"):
        normal(0, names, names.float(), 0, (1, 2, 2))
    with pytest.raises(ValueError, match="steps must be int64"):
        normal(0, names, names, names[:2], (1, 2, 2))
