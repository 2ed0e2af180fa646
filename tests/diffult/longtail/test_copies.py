"""Nearest training images against loops in numpy, and what is called a copy."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from diffult.longtail.copies import (
    MIN_HELD_OUT,
    class_scales,
    copy_shares,
    copy_thresholds,
    measure_copies,
    nearest,
    rows_at_a_time,
)  # fmt: skip
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import build_classifier
from ffcv_writers import CenterCrop, Loader, open_set, write

SIZE = 8


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    """Of random weights, for 6 of the 8 pixels."""
    torch.manual_seed(0)
    network = build_classifier("convnet", 3, 3, 6).eval()
    return Extractor(network, 6, ClassStatistics(torch.zeros(3, 1), torch.ones(3)), torch.zeros(3))


def draw(count: int, seed: int) -> np.ndarray:
    """Smooth random images, uint8 [count, SIZE, SIZE, 3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=(count, 2, 2, 3)).repeat(SIZE // 2, 1).repeat(SIZE // 2, 2)
    return np.clip(128 + 50 * coarse + 10 * generator.normal(size=coarse.shape), 0, 255).astype(np.uint8)


def loader(path: Path, images: np.ndarray, labels: np.ndarray, batch_size: int = 512) -> Loader:
    write(path, list(images), labels=labels, synthetic=np.zeros_like(labels), index=np.arange(len(labels)))
    return Loader(open_set([path]), batch_size)


def features(extractor: Extractor, image: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return extractor.network.features(x[:, :, 1:7, 1:7])[0].numpy()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("itself", [False, True])
def test_nearest_is_what_loops_over_all_pairs_find(extractor, tmp_path, mirrored, itself):
    real, real_labels = draw(13, 0), np.array([0, 1, 0, 2, 1, 0, 1, 1, 0, 0, 1, 0, 1])
    train = loader(tmp_path / "train.beton", real, real_labels, batch_size=2)
    images, labels = (real, real_labels) if itself else (draw(11, 1), np.arange(11) % 3)
    asked = train if itself else loader(tmp_path / "images.beton", images, labels, batch_size=3)
    rows = np.array([9, 0, 4, 3, 1, 2])
    found = nearest("test", asked, train, extractor, torch.float32, mirrored, rows)
    for place, n in enumerate(rows):
        best = (np.inf, -1), np.inf
        for r in range(len(real)):
            if real_labels[r] != labels[n] or (itself and r == n):
                continue
            for image in [images[n], images[n][:, ::-1]] if mirrored else [images[n]]:
                rms = np.sqrt(np.mean((image / 255 - real[r] / 255) ** 2))
                distance = np.linalg.norm(features(extractor, image) - features(extractor, real[r]))
                best = min(best[0], (rms, r)), min(best[1], distance)
        assert int(found.row[place]) == best[0][1]
        assert float(found.pixels[place]) == pytest.approx(best[0][0], abs=1e-6)
        assert float(found.features[place]) == pytest.approx(best[1], abs=1e-5)


def test_distance_of_a_copy_is_exactly_zero(extractor, tmp_path):
    """Although distances of close images lose digits where they are computed as products."""
    real, labels = draw(60, 0), np.zeros(60, np.int64)
    train, copies = (loader(tmp_path / f"{name}.beton", real, labels) for name in ("train", "copies"))
    found = nearest("test", copies, train, extractor, torch.float32, mirrored=True)
    assert found.pixels.tolist() == [0.0] * 60
    assert found.row.tolist() == list(range(60))


@pytest.mark.parametrize("mirrored", [False, True])
def test_planted_copies_are_found_and_new_images_are_not(extractor, tmp_path, mirrored):
    """Class 2 has three training images and no held-out one."""
    sizes, held_out_sizes, new_sizes = [60, 20, 3], [200, 200, 0], [300, 300, 300]
    labels, held_out_labels, new_labels = (np.repeat([0, 1, 2], n) for n in (sizes, held_out_sizes, new_sizes))
    real, held_out, new = draw(sum(sizes), 0), draw(sum(held_out_sizes), 1), draw(sum(new_sizes), 2)
    noise = np.random.default_rng(3).normal(size=(2, 3, SIZE, SIZE, 3))
    exact = np.flatnonzero(new_labels == 0)[:3], np.flatnonzero(new_labels == 2)[:3]
    mirror = np.flatnonzero(new_labels == 2)[3:6]
    new[exact[0]], new[exact[1]] = (
        np.clip(x + 4 * n, 0, 255) for x, n in zip((real[5:8], real[-3:]), noise, strict=True)
    )
    new[mirror] = real[-3:, :, ::-1]
    found = measure_copies(
        loader(tmp_path / "train.beton", real, labels),
        loader(tmp_path / "new.beton", new, new_labels),
        loader(tmp_path / "held_out.beton", held_out, held_out_labels),
        extractor, torch.float32, mirrored,
    )  # fmt: skip
    copy = found["copy"].numpy()
    assert copy[np.concatenate(exact)].all()
    assert found["nearest"][exact[1]].tolist() == [80, 81, 82]
    assert (copy[mirror].sum() == 3) == mirrored
    assert found["held_out_pixels"].shape == found["held_out_features"].shape == (400,)
    planted = np.isin(np.arange(900), np.concatenate([*exact, mirror]))
    shares = [copy[~planted & (new_labels == c)].mean() for c in range(3)]
    assert 0.01 < shares[0] < 0.1 and 0.01 < shares[1] < 0.1
    assert shares[2] < 0.25, "a scale of three distances is rough"


def test_images_larger_than_samples_are_cropped_to_them(extractor, tmp_path):
    large, labels = draw(6, 0).repeat(3, 1).repeat(3, 2), np.array([0, 0, 1, 1, 2, 2])
    path = tmp_path / "large.beton"
    write(path, list(large), labels=labels, synthetic=np.zeros_like(labels), index=np.arange(6))
    train = Loader(open_set([path]), 4, crop=CenterCrop(SIZE))
    samples = loader(tmp_path / "samples.beton", draw(6, 0), labels)
    found = nearest("test", samples, train, extractor, torch.float32, mirrored=False)
    assert found.row.tolist() == list(range(6)) and float(found.pixels.max()) < 0.05  # resized smoothly


def test_scales_are_medians_and_a_pair_takes_that_of_the_others():
    distances = np.array([1.0, 2.0, 9.0, np.inf, 4.0, 4.0, 6.0, 6.0, 8.0])
    labels = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3])
    assert class_scales(distances, labels, 4).tolist() == [2.0, 4.0, 4.0, 6.0]


def test_thresholds_are_those_that_another_image_falls_below_one_time_in_twenty():
    generator = np.random.default_rng(0)
    scales = np.array([1.0, 3.0, 5.0])
    below = np.zeros(3)
    for _ in range(4000):
        labels = np.repeat([0, 1], MIN_HELD_OUT)
        threshold = copy_thresholds(generator.random(len(labels)) * scales[labels], labels, scales)
        below += threshold / scales  # of a uniform distance
    assert below / 4000 == pytest.approx([0.05] * 3, abs=0.003)
    distances, labels = np.arange(1.0, 60.0), np.zeros(59, np.int64)
    assert copy_thresholds(distances, labels, scales).tolist() == pytest.approx([3.0, 9.0, 15.0])  # 5 % of 60
    assert np.isnan(copy_thresholds(distances[: MIN_HELD_OUT - 1], labels[: MIN_HELD_OUT - 1], scales)).all()


def test_shares_by_class_and_the_warning(caplog):
    copies = {
        "labels": torch.tensor([0] * 4 + [1] * 5 + [2] * 5),
        "copy": torch.tensor([True] * 4 + [True, True, True, False, False] + [True, True, False, False, False]),
        "threshold": torch.ones(4),
    }
    shares = copy_shares(copies, ["a", "b", "c", "d"])
    assert shares["share"] == pytest.approx(100 * 9 / 14)
    assert shares["by_class"] == {"a": 100.0, "b": 60.0, "c": 40.0, "d": None}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 of 4 classes are copies of training images: b (3 of 5); train the diffusion" in record.getMessage()


def test_without_held_out_images_there_are_distances_and_no_share(extractor, tmp_path):
    labels = np.array([0, 0, 0, 1, 2, 2])
    train, samples = (loader(tmp_path / f"{seed}.beton", draw(6, seed), labels) for seed in (0, 1))
    found = measure_copies(train, samples, None, extractor, torch.float32, mirrored=False)
    assert found["pixels"].isfinite().all() and len(found["held_out_pixels"]) == 0
    assert copy_shares(found, ["a", "b", "c"]) == {
        "share": None,
        "by_class": {"a": None, "b": None, "c": None},
        "expected": 5.0,
    }
    nothing = measure_copies(train, None, samples, extractor, torch.float32, mirrored=False)
    assert nothing["nearest"].dtype == nothing["labels"].dtype == torch.int64 and len(nothing["copy"]) == 0


def test_batches_hold_64_mib_of_float32_at_the_most():
    assert rows_at_a_time(256, 3) * 256 * 256 * 3 * 4 <= 64 * 2**20 < (rows_at_a_time(256, 3) + 1) * 256 * 256 * 3 * 4
    assert rows_at_a_time(8, 1) == 1024 and rows_at_a_time(10**5, 3) == 1
