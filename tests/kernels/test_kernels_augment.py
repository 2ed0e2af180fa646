"""A classifier's augmentation against torchvision's own transforms with the same parameters, and in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from torch.nn import functional as F

from kernels import augment as module
from kernels.augment import augment, center_crop, denormalise, mixup, normalise, reference_augment
from kernels.random import uniform

tv = pytest.importorskip("torchvision.transforms.v2.functional")


def images(batch=16, size=12, channels=3):
    return torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8)


def numbers(seed, positions):
    return uniform(seed, positions >> 32, positions, 0, 10)


def test_normalise_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    y = normalise(x)
    assert y.shape == (1, 1, 16, 16) and y.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(y.flatten(), x.flatten().double() / 127.5 - 1, atol=1e-6)
    assert torch.equal(denormalise(y), x)
    assert denormalise(torch.tensor([[[[-3.0, 7.0]]]])).flatten().tolist() == [0, 255]


def test_nothing_on_is_the_identity_or_the_middle():
    x = images()
    assert torch.equal(augment(x, 0, torch.arange(16), size=12), normalise(x))
    assert torch.equal(augment(x, 0, torch.arange(16), size=8), tv.center_crop(normalise(x), [8, 8]))
    assert torch.equal(center_crop(normalise(x), 8), tv.center_crop(normalise(x), [8, 8]))


def test_padded_crops_are_whole_shifts_with_black_and_cover_all():
    x, pad = images(batch=600, size=6), 2
    out = augment(x, 5, torch.arange(600), size=6, pad=pad)
    padded = F.pad(normalise(x), (pad,) * 4, value=-1.0)
    seen = set()
    for i in range(600):
        matches = [
            (r, c)
            for r in range(2 * pad + 1)
            for c in range(2 * pad + 1)
            if torch.equal(padded[i, :, r : r + 6, c : c + 6], out[i])
        ]
        assert matches
        seen |= set(matches)
    assert len(seen) == 25  # every offset occurs


def test_about_half_is_mirrored():
    x = images(batch=400)
    out, plain = augment(x, 1, torch.arange(400), size=12, flip=True), normalise(x)
    mirrored = [torch.equal(out[i], plain[i].flip(2)) for i in range(400)]
    assert all(m or torch.equal(out[i], plain[i]) for i, m in enumerate(mirrored))
    assert 150 < sum(mirrored) < 250


def test_jitter_is_torchvisions():
    x, strength = images(), 0.4
    out = augment(x, 9, torch.arange(16), size=12, jitter=strength)
    factors = 1 + strength * (2 * numbers(9, torch.arange(16))[:, 7:10] - 1)
    for i in range(16):
        expected = (normalise(x[i : i + 1]) + 1) / 2
        expected = tv.adjust_brightness(expected, float(factors[i, 0]))
        expected = tv.adjust_contrast(expected, float(factors[i, 1]))
        expected = tv.adjust_saturation(expected, float(factors[i, 2]))
        torch.testing.assert_close(
            out[i], expected[0] * 2 - 1, atol=2e-3, rtol=0
        )  # torchvision rounds its luma weights


@pytest.mark.parametrize("settings", [{"pad": 2}, {"flip": True}, {"jitter": 0.3}])
def test_a_sample_depends_on_its_position_alone(settings):
    x, positions = images(), torch.arange(100, 116)
    whole = augment(x, 3, positions, size=12, **settings)
    alone = torch.cat([augment(x[i : i + 1], 3, positions[i : i + 1], size=12, **settings) for i in range(16)])
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=1e-5)
    assert not torch.equal(whole, augment(x, 4, positions, size=12, **settings))


def exact(x, seed, positions, size, pad, flip):
    """Pad, crop, mirror and normalise one image after the other, in float64."""
    out = np.empty((len(x), x.shape[3], size, size))
    top, left = (x.shape[1] - size) // 2, (x.shape[2] - size) // 2
    for i, u in enumerate(numbers(seed, positions).double().tolist()):
        window = x[i, top : top + size, left : left + size].double().numpy() / 127.5 - 1
        window = np.pad(window, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1.0)
        row, column = (math.ceil(number * (2 * pad + 1)) - 1 for number in u[4:6])
        window = window[row : row + size, column : column + size]
        out[i] = (window[:, ::-1] if flip and u[6] <= 0.5 else window).transpose(2, 0, 1)
    return torch.from_numpy(out)


def poisoned_empty(*args, **options):
    return torch.full_like(torch.empty(*args, **options), math.nan)


@pytest.fixture
def poisoned(monkeypatch):
    """What the module allocates is filled with NaN: what it does not write shows."""
    monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "empty": poisoned_empty}))


def relative_error(got, want):
    """By norm; that of `want` counts as at least that of a tenth everywhere, as a lone pixel may be next to 0."""
    return float((got.double().cpu() - want).norm()) / max(float(want.norm()), 0.1 * want.numel() ** 0.5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 2, 3, 4]),
    share=st.floats(0.1, 1),
    pad=st.sampled_from([0, 1, 4, 50]),
    flip=st.booleans(),
    seed=st.sampled_from([0, 1, 16, 2**32 + 5, 2**63 + 1, 2**64 - 1]),
    first=st.sampled_from([0, 77, 2**31 - 1, 2**32 - 1, 2**40]),
)
def test_triton_against_float64_at_any_shape(
    triton_kernels, poisoned, batch, height, width, channels, share, pad, flip, seed, first
):
    size = max(1, int(share * min(height, width)))
    x = torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8)
    positions = torch.arange(first, first + batch)
    want = exact(x, seed, positions, size, pad, flip)
    settings_ = {"size": size, "pad": pad, "flip": flip}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        out = augment(x.to(triton_kernels), seed, positions.to(triton_kernels), **settings_, dtype=dtype)
        plain = reference_augment(x, seed, positions, **settings_, dtype=dtype)
        assert out.dtype == plain.dtype == dtype and out.shape == plain.shape == want.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert plain.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(plain, want) < limit and relative_error(out, want) < limit
        if dtype == torch.float16 or out.is_cuda:  # Triton's interpreter cuts bfloat16's bits off, rounding nothing
            assert relative_error(out, want) < 1.1 * relative_error(plain, want) + 1e-5
        assert float(out.abs().max()) <= 1
        assert torch.equal(out.cpu() == -1, want == -1)  # black is black, to the bit
        if dtype == torch.float32:
            torch.testing.assert_close(out.cpu(), plain, rtol=0, atol=2**-22)


def test_triton_at_real_shapes(triton_kernels, poisoned):
    for batch, side, size, pad in ((5, 32, 32, 4), (2, 96, 80, 0)):
        x, positions = images(batch, side), torch.arange(batch)
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            out = augment(
                x.to(triton_kernels), 3, positions.to(triton_kernels), size=size, pad=pad, flip=True, dtype=dtype
            )
            assert relative_error(out, exact(x, 3, positions, size, pad, True)) < limit


def test_triton_kernel_serves_unless_an_operation_is_torchs(triton_kernels, monkeypatch):
    """One pass where it can be; resized crops and jitter take the reference, with the same random numbers."""
    served = []
    kernel = module._augment
    monkeypatch.setattr(module, "_augment", lambda *args: served.append(args) or kernel(*args))
    x, positions = images(4).to(triton_kernels), torch.arange(4, device=triton_kernels)
    for options, kernels_own in (
        ({}, True),
        ({"pad": 2, "flip": True}, True),
        ({"jitter": 0.3}, False),
        ({"jitter": 0.3, "pad": 1}, False),
    ):
        served.clear()
        out = augment(x, 0, positions, size=12, **options)
        assert bool(served) == kernels_own
        torch.testing.assert_close(out, reference_augment(x, 0, positions, size=12, **options), rtol=0, atol=2**-22)


def test_triton_takes_strided_images_and_gives_the_same_bits_twice(triton_kernels):
    x = images(6, 15).to(triton_kernels)
    positions = torch.arange(12, device=triton_kernels)[::2]
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not planes.is_contiguous() and not positions.is_contiguous()
    first, *others = (
        augment(y, 1, where, size=13, pad=3, flip=True)
        for y, where in ((x, positions.contiguous()), (x, positions.contiguous()), (planes, positions))
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_is_sound_and_compiles_whole(triton_kernels, dtype):
    x, positions = images(3, 9).to(triton_kernels), torch.arange(3, device=triton_kernels)
    torch.library.opcheck(module._augment, (x, positions, 5, 7, 2, True, dtype))

    def pipeline(x, positions):
        return augment(x, 5, positions, size=7, pad=2, flip=True, dtype=dtype) * 2

    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")(x, positions)
    assert torch.equal(compiled, pipeline(x, positions))
    assert compiled.stride() == pipeline(x, positions).stride()


@pytest.mark.parametrize("settings_", [{"pad": 2}, {"jitter": 0.3}])
def test_reference_rounds_to_other_types_once(settings_):
    x, positions = images(), torch.arange(16)
    full = augment(x, 3, positions, size=12, **settings_)
    half = augment(x, 3, positions, size=12, dtype=torch.bfloat16, **settings_)
    assert torch.equal(half, full.bfloat16()) and half.is_contiguous(memory_format=torch.channels_last)


def test_what_does_not_fit_is_refused():
    x, positions = images(2), torch.arange(2)
    for bad, where, seed, size, message in (
        (x.float(), positions, 0, 12, r"uint8 images \[B, H, W, C\], got torch.float32"),
        (x[0], positions, 0, 12, r"got torch.uint8 \[12, 12, 3\]"),
        (x, positions[:1], 0, 12, r"positions must be int64 \[2\]"),
        (x, positions.int(), 0, 12, r"positions must be int64"),
        (x, positions, 0, 13, r"cannot take 13 x 13 out of images \[12, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            augment(bad, seed, where, size=size)
    with pytest.raises(ValueError, match="seed"):
        augment(x, 2**64, positions, size=12)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 4.0])
def test_mixup_shares_are_beta_and_images_are_mixed_so(alpha):
    positions = torch.arange(20_000) + 2**40
    images = torch.randn(20_000, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    mixed, share = mixup(images, 5, positions, alpha)
    assert share.dtype == torch.float32 and ((share >= 0) & (share <= 1)).all()
    at = np.linspace(1e-4, 1 - 1e-4, 2001)  # what lies nearer to 0 or 1 rounds to them: no test of one number each
    below = np.searchsorted(np.sort(share.double().numpy()), at, side="right") / 20_000
    assert abs(below - beta(alpha, alpha).cdf(at)).max() < 1.95 / np.sqrt(20_000)  # Kolmogorov-Smirnov, p = 0.001
    x, s = images.double().numpy(), share.double().numpy()[:, None, None, None]
    np.testing.assert_allclose(mixed.numpy(), s * x + (1 - s) * np.roll(x, 1, axis=0), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.02, 1.0])
def test_mixup_shares_are_the_polar_formula_in_float64(alpha):
    """Student's t of 2 alpha degrees of freedom by Bailey's formula, and from it the share."""
    positions = torch.arange(500)
    u, v = uniform(9, positions * 0, positions, 1, 2).double().numpy().T
    freedom = 2 * alpha
    with np.errstate(over="ignore"):
        t = np.sqrt(freedom * (u ** (-2 / freedom) - 1)) * np.cos(2 * np.pi * v)
    expected = (1 + t / np.sqrt(freedom + t**2)) / 2
    finite = np.isfinite(t) & (abs(t) < 1e150)
    assert finite.mean() > 0.3
    share = mixup(torch.zeros(500, 1, 1, 1), 9, positions, alpha)[1].numpy()
    np.testing.assert_allclose(share[finite], expected[finite], atol=2e-5)


def test_mixup_is_keyed_by_position_and_keeps_type_and_layout():
    positions = torch.tensor([7, 3, 2**33 + 3, 11])
    share = mixup(torch.zeros(4, 1, 1, 1), 0, positions, 0.4)[1]
    assert torch.equal(mixup(torch.zeros(2, 1, 1, 1), 0, positions[1:3], 0.4)[1], share[1:3])
    assert len(set(share.tolist())) == 4
    assert not torch.equal(mixup(torch.zeros(4, 1, 1, 1), 1, positions, 0.4)[1], share)
    images = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    mixed = mixup(images, 0, positions, 0.4)[0]
    assert mixed.dtype == torch.bfloat16 and mixed.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="alpha > 0, got 0"):
        mixup(images, 0, positions, 0)
    with pytest.raises(ValueError, match=r"positions must be int64 \[4\]"):
        mixup(images, 0, positions.int(), 0.4)
