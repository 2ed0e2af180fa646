"""A classifier's augmentation against torchvision's own transforms with the same parameters."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from kernels.augment import augment, center_crop, denormalise, normalise
from kernels.random import uniform


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


def test_resized_crop_stays_inside_and_keeps_area_and_aspect():
    """On a ramp a bilinear crop is a ramp: its ends tell the window."""
    size, batch = 64, 300
    ramp = torch.arange(size, dtype=torch.float32)
    columns = ramp.expand(size, size)
    x = torch.stack([columns, columns.T, torch.zeros(size, size)], dim=2).to(torch.uint8).expand(batch, -1, -1, -1)
    out = (augment(x, 2, torch.arange(batch), size=16, resized_crop=True) + 1) * 127.5
    inner = slice(4, 12)  # away from the mirrored border
    width = (out[:, 0, 8, inner].diff(dim=1).mean(1) * 16 / size).clamp(max=1)
    height = (out[:, 1, inner, 8].diff(dim=1).mean(1) * 16 / size).clamp(max=1)
    area, aspect = width * height, width / height
    assert area.min() > 0.07 and area.max() < 1.01
    assert aspect.min() > 0.72 and aspect.max() < 1.4
    assert area.std() > 0.15
    assert out.min() >= -1e-3 and out[:, :2].max() <= 63.001


@pytest.mark.parametrize("settings", [{"pad": 2}, {"flip": True}, {"resized_crop": True}, {"jitter": 0.3}])
def test_a_sample_depends_on_its_position_alone(settings):
    x, positions = images(), torch.arange(100, 116)
    whole = augment(x, 3, positions, size=12, **settings)
    alone = torch.cat([augment(x[i : i + 1], 3, positions[i : i + 1], size=12, **settings) for i in range(16)])
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=1e-5)
    assert not torch.equal(whole, augment(x, 4, positions, size=12, **settings))
