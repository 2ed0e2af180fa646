"""The loss at fixed noise against a loop in float64."""

import math

import numpy as np
import pytest
import torch

from diffult.config import load_preset
from diffult.diffusion.held_out import FixedNoiseLoss, fixed_items
from diffult.diffusion.schedule import Schedule
from diffult.engine.distributed import ALONE, World
from ffcv_writers import Loader, open_set, write
from kernels.random import reference_normal

LABELS = np.array([0, 1, 0, 2, 0, 1, 0, 0, 0])  # 6, 2 and 1 images
T = 50


def test_items_cover_time_evenly_in_each_class_and_over_all():
    rows, t = fixed_items(LABELS, np.arange(3), 4, T)
    assert LABELS[rows].tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert rows[:4].tolist() == [0, 2, 6, 7]  # spread over the images of the class: its 1st, 2nd, 4th and 5th
    assert rows[4:8].tolist() == [1, 5, 1, 5] and set(rows[8:]) == {3}
    for part in t.reshape(3, 4):
        assert [int(x // (T / 4)) for x in part] == [0, 1, 2, 3]
    assert len(set(t.tolist())) == 12 and t.min() >= 0 and t.max() < T


@pytest.mark.parametrize("present", [[0, 2], [0, 1], [1]])
def test_of_a_set_that_lacks_classes_the_others_are_asked_as_of_one_with_all(present):
    present = np.array(present)
    few = LABELS[np.isin(LABELS, present)]
    (rows, t), (all_rows, all_t) = (fixed_items(labels, present, 4, T) for labels in (few, LABELS))
    assert few[rows].tolist() == LABELS[all_rows].tolist() == np.repeat(present, 4).tolist()
    assert t.tolist() == all_t.tolist() and len(set(t.tolist())) == 4 * len(present)


def model(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Stands for the UNet."""
    return 0.5 * x + (t.view(-1, 1, 1, 1) / T) * x.flip(2) - 0.1 * labels.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("prediction", "min_snr"), [("v", 0.0), ("epsilon", 2.0)])
def test_the_loss_is_that_of_a_loop_in_float64(tmp_path, prediction, min_snr):
    images = np.random.default_rng(0).integers(0, 256, (len(LABELS), 4, 4, 1), dtype=np.uint8)
    write(tmp_path / "x.beton", list(images), labels=LABELS, synthetic=0 * LABELS, index=np.arange(len(LABELS)))
    loader = Loader(open_set([tmp_path / "x.beton"]), 5)
    settings = [f"diffusion.prediction={prediction}", f"diffusion.min_snr={min_snr}", f"diffusion.timesteps={T}"]
    config = load_preset("digits-lt", settings).diffusion
    schedule = Schedule("cosine", T)

    def measured(world: World = ALONE) -> tuple[float, int]:
        return FixedNoiseLoss(loader, np.arange(3), 4, config, schedule, 7, torch.float32, world)(model)

    by_class = np.zeros(3)
    for item, (row, t) in enumerate(zip(*fixed_items(LABELS, np.arange(3), 4, T), strict=True)):
        place = torch.tensor([item])
        eps = reference_normal(7, place >> 32, place, 0, (1, 4, 4))[0].numpy().astype(np.float64)
        x0 = images[row].transpose(2, 0, 1) / 127.5 - 1
        abar = float(schedule.alphas_cumprod[t])
        a, s = math.sqrt(abar), math.sqrt(1 - abar)
        x_t = a * x0 + s * eps
        out = 0.5 * x_t + t / T * x_t[:, ::-1] - 0.1 * LABELS[row]
        target = eps if prediction == "epsilon" else a * eps - s * x0
        weight = min(abar / (1 - abar), min_snr) / (abar / (1 - abar)) if min_snr else 1.0
        by_class[LABELS[row]] += weight * ((out - target) ** 2).mean() / 4
    total, count = measured()
    assert count == 12 and total / count == pytest.approx(by_class.mean(), rel=1e-5)  # classes of 6, 2 and 1: alike
    assert measured() == (total, count)

    parts = [measured(World(rank, 5)) for rank in range(5)]
    assert [n for _, n in parts] == [3, 3, 2, 2, 2]
    assert sum(part for part, _ in parts) == pytest.approx(total, rel=1e-6)
