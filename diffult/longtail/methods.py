"""The ways to train the final classifier that a run compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["ce", "resample", "logit_adjust", "diffult", "diffult+resample", "diffult+logit_adjust"]


@dataclass(frozen=True)
class Recipe:
    """What sets a method apart; network, steps, rate and augmentation are the same for all."""

    title: str
    synthetic: bool = False  # trains on real and synthetic images, otherwise on real ones alone
    resampled: bool = False  # classes are drawn more evenly than their numbers of images are
    logit_adjusted: bool = False


RECIPES: dict[Method, Recipe] = {
    "ce": Recipe("Cross-entropy"),
    "resample": Recipe("Re-sampling", resampled=True),
    "logit_adjust": Recipe("Logit adjustment", logit_adjusted=True),
    "diffult": Recipe("DiffuLT", synthetic=True),
    "diffult+resample": Recipe("DiffuLT + re-sampling", synthetic=True, resampled=True),
    "diffult+logit_adjust": Recipe("DiffuLT + logit adjustment", synthetic=True, logit_adjusted=True),
}
