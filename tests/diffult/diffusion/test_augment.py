"""The augmentation against torch.flip, torch.rot90, shifts and scipy's geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch

from diffult.diffusion.augment import LABEL_DIM, _inverse, affine, augment, draw_labels, warp


def _images(batch: int = 3, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 2, size, size, generator=generator) * 2 - 1
    return images.contiguous(memory_format=torch.channels_last)


def _label(**entries: float) -> torch.Tensor:
    names = ["flip_x", "flip_y", "zoom", "cosine", "sine", "u", "v", "shift_x", "shift_y"]
    label = torch.zeros(1, LABEL_DIM)
    for name, value in entries.items():
        label[0, names.index(name)] = value
    return label


def _apply(images: torch.Tensor, **entries: float) -> torch.Tensor:
    return warp(images, affine(_label(**entries)).expand(len(images), 2, 3))


def test_the_inverse_is_the_librarys():
    matrices = affine(torch.randn(50, LABEL_DIM).double())[:, :, :2]
    assert torch.allclose(_inverse(matrices), torch.linalg.inv(matrices), rtol=1e-10)


def _smooth(size: int = 24) -> torch.Tensor:
    """A smooth image, on which interpolation of the third order is nearly exact."""
    x = torch.linspace(-1, 1, size)
    image = 0.5 * torch.sin(3 * x[None, :] + 1) * torch.cos(2 * x[:, None]) + 0.3 * x[None, :] * x[:, None] ** 2
    return image[None, None]


def test_probability_zero_is_the_identity() -> None:
    images = _images()
    moved, labels = augment(images, 0.0, torch.rand(3, 8), torch.randn(3, 4))
    assert torch.equal(moved, images)
    assert torch.equal(labels, torch.zeros(3, 9))


def test_zero_label_is_the_identity_map() -> None:
    torch.testing.assert_close(affine(torch.zeros(2, 9)), torch.eye(3)[:2].expand(2, 2, 3), rtol=0, atol=0)


def test_flips() -> None:
    images = _images()
    torch.testing.assert_close(_apply(images, flip_x=1), images.flip(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(_apply(images, flip_y=1), images.flip(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns(quarters: int) -> None:
    images, angle = _images(), quarters * math.pi / 2
    # from x (right) towards y (down) is clockwise on the screen, torch.rot90 over (2, 3) turns the other way
    want = torch.rot90(images, -quarters, (2, 3))
    got = _apply(images, cosine=math.cos(angle) - 1, sine=math.sin(angle))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_translation_moves_right_and_down() -> None:
    images = _images(size=16)  # one unit is 16 / 8 = 2 pixels
    got = _apply(images, shift_x=1.5, shift_y=-0.5)
    want = images.roll((3, -1), dims=(3, 2))
    torch.testing.assert_close(got[:, :, :-1, 3:], want[:, :, :-1, 3:], rtol=0, atol=1e-5)


def test_border_is_mirrored() -> None:
    images = _images(size=16)
    got = _apply(images, shift_x=1.0)
    torch.testing.assert_close(got[:, :, :, :2], images[:, :, :, [1, 0]], rtol=0, atol=1e-5)


def test_zoom_and_stretch_matrices_against_expm() -> None:
    torch.testing.assert_close(affine(_label(zoom=5))[0, :, :2], 2 * torch.eye(2))
    u, v = 1.3, -0.7
    want = scipy.linalg.expm(0.2 * math.log(2) * np.array([[u, v], [v, -u]]))
    np.testing.assert_allclose(affine(_label(u=u, v=v))[0, :, :2].numpy(), want, rtol=1e-6)
    # along x: 2^0.2 in x, 2^-0.2 in y
    np.testing.assert_allclose(affine(_label(u=1))[0, :, :2].numpy(), np.diag([2**0.2, 2**-0.2]), rtol=1e-6)


def test_composite_against_scipy() -> None:
    image, angle = _smooth(), 0.4
    label = _label(flip_x=1, zoom=0.8, cosine=math.cos(angle) - 1, sine=math.sin(angle), u=0.5, v=0.9, shift_x=0.3)
    got = warp(image, affine(label))[0, 0].numpy()

    stretch = scipy.linalg.expm(0.2 * math.log(2) * np.array([[0.5, 0.9], [0.9, -0.5]]))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = stretch @ turn @ (2 ** (0.2 * 0.8) * np.diag([-1.0, 1.0]))
    swap = np.array([[0, 1], [1, 0]])  # scipy's coordinates are (row, column)
    inverse = swap @ np.linalg.inv(forward) @ swap
    centre, shift = np.full(2, 11.5), np.array([0.0, 0.3 * 24 / 8])
    want = scipy.ndimage.affine_transform(
        image[0, 0].numpy().astype(np.float64),
        inverse,
        centre - inverse @ (centre + shift),
        order=3,
        mode="reflect",
    )
    np.testing.assert_allclose(got[4:-4, 4:-4], want[4:-4, 4:-4], atol=0.01)


def test_label_statistics() -> None:
    torch.manual_seed(0)
    n, p = 40_000, 0.12
    labels = draw_labels(p, True, torch.rand(n, 8), torch.randn(n, 4))
    flip_x, flip_y, zoom, cosine, sine, u, v, shift_x, shift_y = labels.unbind(1)
    applied = torch.stack([flip_x, flip_y, zoom, sine, u, shift_x]).ne(0).float()
    assert (applied.mean(1) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.corrcoef(applied).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)
    for values in (zoom, torch.hypot(u, v), shift_x, shift_y):
        assert abs(values[values != 0].square().mean().item() - 1) < 0.12
    torch.testing.assert_close((cosine + 1).square() + sine.square(), torch.ones(n), rtol=0, atol=1e-5)
    assert torch.equal(shift_x != 0, shift_y != 0)


def test_without_flips_images_stay_upright() -> None:
    labels = draw_labels(1.0, False, torch.rand(4000, 8), torch.randn(4000, 4))
    assert not labels[:, :2].any()
    assert labels[:, 3].min() >= math.cos(math.pi / 6) - 1 - 1e-6
    assert labels[:, 4].abs().max() > 0.45
    assert draw_labels(1.0, True, torch.rand(4000, 8), torch.randn(4000, 4))[:, 3].min() < -1.9


def test_untouched_images_are_bit_for_bit_and_others_follow_their_label() -> None:
    torch.manual_seed(3)
    images = _images(batch=64)
    moved, labels = augment(images, 0.12, torch.rand(64, 8), torch.randn(64, 4))
    touched = labels.ne(0).any(1)
    assert 0 < touched.sum() < 64
    assert torch.equal(moved[~touched], images[~touched])
    torch.testing.assert_close(moved[touched], warp(images, affine(labels))[touched])
    assert (moved[touched] - images[touched]).abs().amax((1, 2, 3)).min() > 0.01
    assert moved.abs().max() <= 1
    assert moved.is_contiguous(memory_format=torch.channels_last)
