"""Which samples are kept: each mode of `generate.filter` is a line of FILTERS.

Every candidate gets a verdict from its distance d to the centre of its class in the extractor's features, and the
class's radius d_f (DiffuLT):

    ID: d <= d_f        AID, approximately in distribution: d_f < d <= 2 d_f        OOD: beyond

A filter keeps some of the verdicts. If it also checks the label, a sample that the extractor assigns to another class
is OOD at any distance.
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
    ID = 0
    AID = 1
    OOD = 2


@dataclass(frozen=True)
class Filter:
    """The verdicts that a filter keeps, and whether `Extractor.classify` must give the sample's own class."""

    keeps: tuple[Verdict, ...]
    checks_label: bool = False

    def judge(
        self, extractor: Extractor, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances float32 [B] and verdicts uint8 [B] of samples, float [B, C, H, W] in [-1, 1], of the classes
        `labels`, int64 [B]."""
        features = extractor.features(images)
        predicted = extractor.classify(features) if self.checks_label else None
        return judge(features, labels, extractor.statistics, predicted)

    def accepts(self, verdict: np.ndarray) -> np.ndarray:
        """Whether each candidate is accepted, bool [B], from its `Verdict` value, uint8 [B]."""
        return np.isin(verdict, self.keeps)


FILTERS = {
    "none": Filter(keeps=(Verdict.ID, Verdict.AID, Verdict.OOD)),
    "distance": Filter(keeps=(Verdict.ID, Verdict.AID)),  # DiffuLT's
    "distance+label": Filter(keeps=(Verdict.ID, Verdict.AID), checks_label=True),
    # One verdict alone, for ablations.
    "id": Filter(keeps=(Verdict.ID,)),
    "aid": Filter(keeps=(Verdict.AID,)),
    "ood": Filter(keeps=(Verdict.OOD,)),
}


def judge(
    features: torch.Tensor,
    labels: torch.Tensor,
    statistics: ClassStatistics,
    predicted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each sample to the centre of its class, float32 [B], and its `Verdict` value, uint8 [B].

    Args:
        features: float [B, F], the extractor's features of the samples.
        labels: int64 [B], their classes.
        statistics: of the real images.
        predicted: int64 [B], the extractor's class of each sample; None leaves the label unchecked.
    """
    distance = torch.linalg.vector_norm(features.float() - statistics.centres[labels], dim=1)
    radius = statistics.radii[labels]
    verdict = (distance > radius).to(torch.uint8) + (distance > 2 * radius).to(torch.uint8)
    if predicted is not None:
        verdict = torch.where(predicted == labels, verdict, int(Verdict.OOD))
    return distance, verdict
