"""How often each class is in the batches of the diffusion training."""

import numpy as np
import pytest

from diffult.diffusion.trainer import build_trainer
from diffult.engine.distributed import ALONE
from diffult.engine.loop import LRBackoff


@pytest.mark.parametrize(("batches", "power"), [("natural", 1.0), ("square_root", 0.5), ("class_balanced", 0.0)])
def test_classes_are_drawn_as_often_as_the_setting_says(fresh, monkeypatch, batches, power):
    """And L_CBDM draws its other labels by the same shares."""
    shares = []

    class Loss:
        def __init__(self, model, config, schedule, share, *rest):
            shares.append(share)

    monkeypatch.setattr("diffult.diffusion.trainer.DiffusionLoss", Loss)
    packed, settings = fresh.packed(), fresh.config.diffusion.model_copy(update={"batches": batches, "steps": 250})
    config = fresh.config.model_copy(update={"diffusion": settings})
    trainer = build_trainer(config, packed, None, ALONE, LRBackoff())
    drawn = np.concatenate([batch.labels.cpu().numpy() for batch in trainer.batches(0)])
    expected = packed.counts**power / (packed.counts**power).sum()
    np.testing.assert_allclose(shares[0].cpu(), expected, rtol=1e-6)
    # Whole epochs are exact but for a draw each; 2000 draws are ten epochs.
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), expected, atol=0.006)
