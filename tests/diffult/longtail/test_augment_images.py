"""Policies, Cutout and CutMix of training images, against each image by itself in numpy or torchvision."""

import builtins
import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffult.config import load_preset
from diffult.errors import UserError
from diffult.longtail.augment import Policy, cutmix, cutout
from kernels.random import philox4x32, uniform

SEED = 2**40 + 3
POSITIONS = torch.arange(2**33 - 20, 2**33 + 20)


def pictures(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8)


def rectangle(centre: np.ndarray, sides: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The authors' code: from centre - side // 2 to centre + side // 2, clipped to the image, for even sides."""
    inside = np.zeros(size, bool)
    place = [math.ceil(float(u) * length) - 1 for u, length in zip(centre, size, strict=True)]
    (top, bottom), (left, right) = (
        (np.clip(at - side // 2, 0, length), np.clip(at + side // 2, 0, length))
        for at, side, length in zip(place, sides, size, strict=True)
    )
    inside[top:bottom, left:right] = True
    return inside


def numbers(step: int, count: int) -> np.ndarray:
    return uniform(SEED, POSITIONS >> 32, POSITIONS, step, count).numpy()


def test_cutout_blackens_a_square_that_may_leave_the_image():
    x = torch.rand(40, 3, 10, 14).contiguous(memory_format=torch.channels_last)
    out = cutout(x, SEED, POSITIONS, 6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    areas = set()
    for image, before, centre in zip(out.numpy(), x.numpy(), numbers(3, 2), strict=True):
        inside = rectangle(centre, (6, 6), (10, 14))
        np.testing.assert_array_equal(image, np.where(inside, -1, before))
        areas.add(int(inside.sum()))
    assert 36 in areas and min(areas) < 30
    for square in cutout(x, SEED, POSITIONS, 3)[:, 0] == -1:
        assert square.any(0).sum() <= 3 and square.any(1).sum() <= 3
    assert (cutout(x, SEED, POSITIONS, 3)[:, 0] == -1).sum((1, 2)).max() == 9


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_pastes_the_partner_and_shares_labels_by_area(alpha):
    x, partners = torch.rand(2, 40, 3, 12, 16).unbind()
    mixed, share = cutmix(x, partners, SEED, POSITIONS, alpha)
    for i, (u, v, *centre) in enumerate(numbers(2, 4).astype(np.float64)):
        w, c = u ** (1 / alpha), math.cos(2 * math.pi * v)
        lam = (1 + c * math.sqrt((1 - w) / (w + (1 - w) * c**2))) / 2
        sides = tuple(2 * (int(side * math.sqrt(1 - lam)) // 2) for side in (12, 16))
        inside = rectangle(np.array(centre, np.float32), sides, (12, 16))
        np.testing.assert_array_equal(mixed[i], np.where(inside, partners[i], x[i]))
        assert float(share[i]) == pytest.approx(1 - inside.mean(), abs=1e-6)
    assert 0 < float(share.min()) < 0.6 and mixed.dtype == x.dtype and share.dtype == torch.float32


def test_cutmix_draws_its_share_from_the_beta_distribution():
    """On a large image whose rectangle seldom leaves it: only those that fit are looked at, by their own sides."""
    positions = torch.arange(3000)
    black, white = torch.zeros(3000, 1, 64, 64), torch.ones(3000, 1, 64, 64)
    mixed, _ = cutmix(black, white, 7, positions, 0.5)
    rows, columns = (mixed[:, 0].amax(axis) for axis in (2, 1))
    whole = (rows[:, 0] == 0) & (rows[:, -1] == 0) & (columns[:, 0] == 0) & (columns[:, -1] == 0)
    small = 1 - (rows[whole].sum(1) / 64).double() ** 2
    fits = stats.beta(0.5, 0.5)
    # A side s fits with probability about ((64 - s) / 64)^2; so weighted, the share of those below 1/4 of the area:
    weight = 1 / (1 - torch.sqrt(1 - small)) ** 2
    seen = float(weight[small > 0.75].sum()) / 3000
    assert seen == pytest.approx(1 - fits.cdf(0.75), abs=0.06)


def test_a_batch_cut_otherwise_gives_the_same_images():
    x, partners, bytes_ = torch.rand(40, 3, 8, 8), torch.rand(40, 3, 8, 8), pictures(40, 8, 8)
    policy = Policy("randaugment", 8, SEED)

    def every(rows: slice) -> list[torch.Tensor]:
        p = POSITIONS[rows]
        mixed = cutmix(x[rows], partners[rows], SEED, p, 1.0)
        return [cutout(x[rows], SEED, p, 4), *mixed, policy(bytes_[rows], p.numpy())]

    whole, parts = every(slice(0, 40)), [every(slice(at, at + 8)) for at in range(0, 40, 8)]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("randaugment", 32, 3), ("autoaugment", 32, 3), ("autoaugment", 72, 3), ("randaugment", 8, 1),
     ("autoaugment", 28, 1)],
)  # fmt: skip
def test_a_policy_is_torchvisions_on_each_image(name, size, channels):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    learned = v2.AutoAugmentPolicy.CIFAR10 if size <= 64 else v2.AutoAugmentPolicy.IMAGENET
    theirs = v2.RandAugment() if name == "randaugment" else v2.AutoAugment(learned)
    x = pictures(40, size, size, channels)
    before, generator = x.clone(), torch.get_rng_state()
    out = Policy(name, size, SEED)(x, POSITIONS.numpy())
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), generator)
    assert out.dtype == torch.uint8 and out.shape == x.shape and out.is_contiguous()
    mask, zero = 2**32 - 1, torch.tensor(0)
    words = philox4x32((zero, zero + 4, POSITIONS & mask, POSITIONS >> 32), (SEED & mask, SEED >> 32))[0]
    assert len(set(words.tolist())) == 40
    for image, image_before, word in zip(out, x, words.tolist(), strict=True):
        torch.manual_seed(word)
        assert torch.equal(image, theirs(image_before.permute(2, 0, 1)).permute(1, 2, 0))
    assert not torch.equal(out, x)


def test_a_policy_without_torchvision_is_refused(monkeypatch):
    known = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("torchvision"):
            raise ImportError("no module")
        return known(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'augment.policy = "autoaugment" needs torchvision.*install it, or set'):
        Policy("autoaugment", 32, 0)


def test_bad_input_is_refused():
    x, positions = torch.rand(2, 1, 4, 4), torch.arange(2)
    with pytest.raises(ValueError, match="alpha > 0"):
        cutmix(x, x, 0, positions, 0.0)
    for call in (lambda p: cutmix(x, x, 0, p, 1.0), lambda p: cutout(x, 0, p, 2)):
        with pytest.raises(ValueError, match="positions"):
            call(positions.int())
    with pytest.raises(UserError, match=r"mixup = 0.2 and cutmix = 1.0: set one of them to 0"):
        load_preset("digits-lt", ["classifier.mixup=0.2", "classifier.cutmix=1.0"])
    with pytest.raises(UserError, match=r"augment\.policy"):
        load_preset("digits-lt", ["classifier.augment.policy=randaug"])
