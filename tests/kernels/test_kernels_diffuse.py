"""The forward process in one pass against float64, written sample by sample."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffult.diffusion.schedule import Schedule
from kernels import diffuse as module
from kernels.augment import normalise
from kernels.diffuse import diffuse, reference_diffuse
from kernels.random import reference_normal, signed

SEED = 2**64 - 77
# Inputs are random anew at each call, so a failing shape cannot be shrunk, and trying to would take minutes.
BY_SHAPE = settings(deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(st.integers(1, 4), *[st.integers(1, 6)] * 3) | st.sampled_from(  # (B, C, H, W)
    [(2, 3, 16, 16), (3, 1, 28, 28), (1, 4, 37, 11), (1, 1, 1, 1)]
)


def make(shape, kind, device="cpu"):
    """Images of one of three kinds, positions on both sides of 2**32, coefficients, flips."""
    batch, channels, height, width = shape
    if kind == "uint8":
        images = torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8)
    else:
        images = torch.rand(shape) * 2 - 1
        if kind == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
    positions = 2**32 - 2 + torch.arange(batch)
    flips = torch.arange(batch) % 2 == torch.randint(0, 2, ())
    return [value.to(device) for value in (images, positions, torch.randn(batch, 4), flips)]


def exact(images, positions, coefficients, flips):
    """x_t, target and noise in float64 on the CPU."""
    images, positions = images.cpu(), positions.cpu()
    x0 = images.double()
    if images.dtype == torch.uint8:
        x0 = x0.permute(0, 3, 1, 2) / 127.5 - 1
    high, low = (torch.tensor(name) for name in zip(*(divmod(p, 2**32) for p in positions.tolist()), strict=True))
    eps = reference_normal(signed(SEED), high, low, 0, tuple(x0.shape[1:])).double()
    x_t, target = torch.empty_like(x0), torch.empty_like(x0)
    for i, (a, s, k_0, k_e) in enumerate(coefficients.tolist()):
        image = torch.flip(x0[i], dims=[2]) if flips is not None and flips[i] else x0[i]
        x_t[i], target[i] = a * image + s * eps[i], k_0 * image + k_e * eps[i]
    return x_t, target, eps


def assert_close(got, expected, dtype, unit=1):
    """float32 to 1e-6 by norm, each element of a half type to half a `unit` of its last place."""
    for ours, theirs, kind in zip(got, expected, (dtype, torch.float32, torch.float32), strict=True):
        assert ours.dtype == kind and ours.shape == theirs.shape
        assert ours.is_contiguous(memory_format=torch.channels_last)
        difference = ours.cpu().double() - theirs
        if kind == torch.float32:  # with room for a sum that cancels in a single element
            assert float(difference.norm()) <= 1e-6 * float(theirs.norm()) + 2e-6
        else:
            assert (difference.abs() <= unit * torch.finfo(kind).eps / 2 * theirs.abs() + 3e-6).all()


def unit(dtype, device):
    """Triton's interpreter cuts bfloat16's last bits off where the compiler rounds."""
    return 2 if dtype == torch.bfloat16 and device.type == "cpu" else 1


def poison(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@settings(BY_SHAPE, max_examples=20)
@given(
    shape=SHAPES,
    kind=st.sampled_from(["uint8", "channels_last", "contiguous"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    flipped=st.booleans(),
)
def test_equals_float64(triton_kernels, monkeypatch, shape, kind, dtype, flipped):
    images, positions, coefficients, flips = make(shape, kind, triton_kernels)
    flips = flips if flipped else None
    expected = exact(images, positions, coefficients, flips)
    assert_close(reference_diffuse(images, SEED, positions, coefficients, flips, dtype, True), expected, dtype)
    with monkeypatch.context() as patch:
        poison(patch)
        got = diffuse(images, SEED, positions, coefficients, flips, dtype, with_eps=True)
        without = diffuse(images, SEED, positions, coefficients, flips, dtype)
    assert_close(got, expected, dtype, unit(dtype, triton_kernels))
    assert torch.equal(without[0], got[0]) and torch.equal(without[1], got[1]) and without[2] is None


def test_uint8_images_mean_what_normalise_says(triton_kernels):
    """At a = 1 and s = 0 the 256 grey levels come out, within a rounding."""
    images = torch.arange(256, dtype=torch.uint8, device=triton_kernels).view(1, 16, 16, 1)
    row = torch.tensor([[1.0, 0.0, 1.0, 0.0]], device=triton_kernels)
    x_t, target, _ = diffuse(images, 0, torch.zeros(1, dtype=torch.int64, device=triton_kernels), row)
    torch.testing.assert_close(x_t, normalise(images), rtol=0, atol=2e-7)
    assert torch.equal(x_t, target)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_images_are_taken(triton_kernels, half):
    images, positions, coefficients, flips = make((2, 3, 5, 4), "channels_last", triton_kernels)
    got = diffuse(images.to(half), SEED, positions, coefficients, flips, with_eps=True)
    assert_close(got, exact(images.to(half), positions, coefficients, flips), torch.float32)


@pytest.mark.parametrize("kind", ["uint8", "channels_last"])
def test_a_sample_depends_on_its_position_alone(triton_kernels, kind):
    images, positions, coefficients, flips = make((4, 3, 6, 5), kind, triton_kernels)
    whole = diffuse(images, SEED, positions, coefficients, flips, with_eps=True)
    for i in range(4):
        alone = diffuse(*(images[i:i + 1], SEED, positions[i:i + 1], coefficients[i:i + 1], flips[i:i + 1]),
                        with_eps=True)  # fmt: skip
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))
    noise = whole[2].flatten(1)
    assert not any(torch.equal(noise[i], noise[j]) for i, j in itertools.combinations(range(4), 2))  # across 2**32


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_coefficients_of_the_schedule(triton_kernels, prediction):
    schedule = Schedule("cosine", 1000, triton_kernels)
    images, positions, _, _ = make((5, 3, 4, 4), "channels_last", triton_kernels)
    t = torch.tensor([0, 1, 500, 998, 999], device=triton_kernels)
    coefficients = schedule.diffuse_coefficients(prediction, t)
    assert coefficients.shape == (5, 4) and coefficients.dtype == torch.float32
    x_t, target, eps = diffuse(images, SEED, positions, coefficients, with_eps=True)
    abar = schedule.alphas_cumprod[t.cpu()].view(-1, 1, 1, 1)
    a, s, x0, eps = abar.sqrt(), (1 - abar).sqrt(), images.cpu().double(), eps.cpu().double()
    torch.testing.assert_close(x_t.cpu().double(), a * x0 + s * eps, rtol=1e-5, atol=1e-6)
    expected = {"epsilon": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
    torch.testing.assert_close(target.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "with_eps"), [("uint8", False), ("channels_last", True), ("contiguous", False)])
def test_is_an_operator(triton_kernels, kind, with_eps):
    images, positions, coefficients, flips = make((3, 3, 5, 4), kind, triton_kernels)
    arguments = (images, 7, positions, coefficients, flips, torch.bfloat16, with_eps)
    torch.library.opcheck(torch.ops.diffult.diffuse.default, arguments)

    def step(*arguments):
        return diffuse(*arguments, torch.bfloat16, with_eps=with_eps)[:2]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = (images, SEED, positions, coefficients, flips)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), step(*arguments), strict=True))


def test_two_runs_give_the_same_bits(triton_kernels):
    images, positions, coefficients, flips = make((3, 3, 9, 9), "uint8", triton_kernels)
    first, second = (diffuse(images, 5, positions, coefficients, flips, with_eps=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "images must be uint8"),
        ({0: torch.zeros(2, 3, 4)}, "images must be uint8"),
        ({1: torch.zeros(2, dtype=torch.int32)}, "positions must be int64"),
        ({2: torch.zeros(3, 4)}, r"coefficients must be float32 \[2, 4\]"),
        ({3: torch.zeros(2)}, r"flips must be bool \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = make((2, 3, 4, 4), "channels_last")
    for place, value in change.items():
        values[place] = value
    images, positions, coefficients, flips = values
    with pytest.raises(ValueError, match=message):
        diffuse(images, 0, positions, coefficients, flips)
