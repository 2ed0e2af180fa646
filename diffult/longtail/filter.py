"""Here a sample is accepted or dropped: each mode of `generate.filter` is a line of FILTERS.

Every candidate gets a verdict from its distance d to the centre of the class it was drawn for, in the extractor's
features, and the class's radius d_f (DiffuLT):

    ID: d <= d_f        AID, approximately in distribution: d_f < d <= 2 d_f        OOD: beyond

A filter says which verdicts it keeps. Where it also checks the label, a sample that the extractor takes for another
class is OOD at any distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffult.longtail.statistics import ClassStatistics

if TYPE_CHECKING:
    from diffult.longtail.extractor import Extractor


class Verdict(IntEnum):
    """See above."""

    ID = 0
    AID = 1
    OOD = 2


@dataclass(frozen=True)
class Filter:
    """What a filter keeps.

    Attributes:
        keeps: the verdicts of accepted samples.
        checks_label: whether the extractor's class, its logits adjusted for class frequency, must be the sample's.
    """

    keeps: tuple[Verdict, ...]
    checks_label: bool = False

    def judge(
        self, extractor: Extractor, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances float32 [B] and verdicts uint8 [B] of samples, float [B, C, H, W] in [-1, 1], drawn for the classes
        `labels`, int64 [B]."""
        features = extractor.features(images)
        predicted = extractor.classify(features) if self.checks_label else None
        return judge(features, labels, extractor.statistics, predicted)

    def accepts(self, verdict: np.ndarray) -> np.ndarray:
        """Which candidates are accepted, bool [B], from `Verdict` values, uint8 [B]."""
        return np.isin(verdict, self.keeps)


FILTERS = {
    "none": Filter(keeps=(Verdict.ID, Verdict.AID, Verdict.OOD)),
    "distance": Filter(keeps=(Verdict.ID, Verdict.AID)),  # DiffuLT's
    "distance+label": Filter(keeps=(Verdict.ID, Verdict.AID), checks_label=True),
}


def judge(
    features: torch.Tensor,
    labels: torch.Tensor,
    statistics: ClassStatistics,
    predicted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each sample to the centre of the class it was drawn for, and the verdict that follows.

    Args:
        features: float [B, F], the extractor's features of the samples.
        labels: int64 [B], the class each sample was drawn for.
        statistics: centres and radii of the real images.
        predicted: int64 [B], the class that the extractor sees in each sample; None leaves the label unchecked.

    Returns:
        distance float32 [B] and verdict uint8 [B], the values of `Verdict`.
    """
    distance = torch.linalg.vector_norm(features.float() - statistics.centres[labels], dim=1)
    radius = statistics.radii[labels]
    verdict = (distance > radius).to(torch.uint8) + (distance > 2 * radius).to(torch.uint8)
    if predicted is not None:
        verdict = torch.where(predicted == labels, verdict, int(Verdict.OOD))
    return distance, verdict
