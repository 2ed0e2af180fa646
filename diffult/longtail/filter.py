"""Here a sample is judged: in distribution, approximately in distribution, or out of distribution."""

from __future__ import annotations

from enum import IntEnum

import torch

from diffult.longtail.statistics import ClassStatistics


class Verdict(IntEnum):
    """ID: d <= d_f. AID: d_f < d <= 2 d_f. OOD: beyond (DiffuLT). ID and AID are kept, OOD is dropped.

    Where the label is checked too, a sample that the extractor takes for another class is OOD at any distance.
    """

    ID = 0
    AID = 1
    OOD = 2


def judge(
    features: torch.Tensor,
    labels: torch.Tensor,
    statistics: ClassStatistics,
    predicted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each sample to the centre of the class it was drawn for, and what follows from it.

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
