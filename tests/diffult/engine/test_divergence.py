"""A training that explodes or collapses is found out, one with hard batches is not."""

import math

import numpy as np
import pytest
import torch

from diffult.engine.divergence import DivergenceError, DivergenceMonitor
from diffult.engine.loop import LoopConfig, LRBackoff, train_loop
from diffult.errors import UserError
from diffult.runs.files import load_state, save_state


def read(losses, collapsed=2.0, first=1.0):
    """The number of the reading that is refused; None if none is."""
    monitor = DivergenceMonitor("ddpm", collapsed, first)
    for number, loss in enumerate(losses):
        try:
            monitor.read({"ddpm": loss, "other": 1e3}, number)
        except DivergenceError:
            return number
    return None


def test_a_collapse_is_found_at_its_fifth_reading_and_hard_batches_are_none():
    """The losses are those of a network of CIFAR10-LT."""
    falling = [1.0, 0.26, 0.19, 0.17, 0.17, 0.169, 0.151]
    stuck = [0.58, 0.61, 0.569, 0.594, 0.584, 0.627]
    assert read([*falling, *stuck]) == 11
    assert read([*falling, *stuck[:4], 0.17, *stuck[:4]]) is None
    assert read([*falling, *stuck], collapsed=math.inf) is None
    assert read([*falling, 10.1], collapsed=math.inf) == 7
    assert read([0.9, math.nan]) == 1


def test_batches_of_32_may_vary():
    """Means of exponentially distributed losses, as those of timesteps are about, at ten thousand readings."""
    losses = np.random.default_rng(0).exponential(0.2, (10_000, 32)).mean(1)
    assert read(losses.tolist()) is None


def collapsing(path, at, every, lr_backoff=None, steps=1200):
    """Trains with readings at steps 50, 100, ...; the loss collapses after step `at`, whatever the rate."""

    def step(i, batch):
        return {"loss": torch.tensor(1.0 if i == 0 else 0.2 if i < at else 0.9)}

    config = LoopConfig("training", steps, path, every, (0,), "hash", collapsed=2.0)
    train_loop(config, lambda start: iter(range(start, steps)), step, {}, lr_backoff)


def test_the_checkpoint_is_that_from_before_the_collapse(tmp_path):
    with pytest.raises(UserError, match=r"diverged by step 550 \(loss 0.9, was below 0.2\); lower the learning"):
        collapsing(tmp_path / "state.pt", 340, 50)
    assert load_state(tmp_path / "state.pt")["step"] == 300


@pytest.mark.parametrize(("after", "goes_back"), [(40, False), (240, False), (340, False), (240, True)])
def test_a_training_that_goes_on_from_a_checkpoint_finds_the_same_collapse(tmp_path, after, goes_back):
    """So many steps after it, which may be fewer than a monitor needs to see how far the loss had come."""
    found = -(-(500 + after) // 50) * 50 + (200 if after % 50 else 250)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"diverged by step {found} \(loss 0.9, was below 0.2\)"):
            collapsing(tmp_path / "state.pt", 500 + after, 500, LRBackoff() if goes_back else None)
        assert load_state(tmp_path / "state.pt")["step"] == 500


def test_a_checkpoint_without_what_the_monitor_knew_is_gone_on_from(tmp_path):
    with pytest.raises(UserError, match="diverged"):
        collapsing(tmp_path / "state.pt", 340, 300)
    state = load_state(tmp_path / "state.pt")
    assert state.pop("divergence") == {"reached": pytest.approx(0.2), "recent": [pytest.approx(0.2)] * 5}
    save_state(tmp_path / "state.pt", state)
    with pytest.raises(UserError, match="diverged by step 850"):
        collapsing(tmp_path / "state.pt", 640, 300)
