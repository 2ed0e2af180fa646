"""A training that explodes or collapses is found out, one with hard batches is not."""

import math

import numpy as np
import pytest
import torch

from diffult.engine.divergence import DivergenceError, DivergenceMonitor
from diffult.engine.loop import LoopConfig, train_loop
from diffult.errors import UserError
from diffult.runs.files import load_state


def read(losses, collapsed=2.0, first=1.0):
    """The number of the reading that is refused; None if none is."""
    monitor = DivergenceMonitor("ddpm", first, collapsed)
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


def test_the_checkpoint_is_that_from_before_the_collapse(tmp_path):
    """Readings at steps 50, 100, ...; the loss collapses after step 340, and each is a checkpoint."""

    def step(i, batch):
        return {"loss": torch.tensor(1.0 if i == 0 else 0.2 if i < 340 else 0.9)}

    config = LoopConfig("training", 1000, tmp_path / "state.pt", 50, (0,), "hash", collapsed=2.0)
    with pytest.raises(UserError, match=r"diverged by step 550 \(loss 0.9, was below 0.2\); lower the learning"):
        train_loop(config, lambda start: iter(range(start, 1000)), step, {})
    assert load_state(tmp_path / "state.pt")["step"] == 300
