"""Losses of the classifier: DiffuLT's weighted cross-entropy, and logit adjustment, its honest cheap rival."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which samples weigh differently: in DiffuLT a synthetic one omega and a real one 1.

    The paper leaves the normalisation open; this is the weighted mean, sum(w l) / sum(w), as torch's own weighted
    cross-entropy, so that omega does not change the size of the step.

    Args:
        logits: float [B, num_classes].
        labels: int64 [B].
        weight: float [B], none negative. A batch without any weight has loss 0.
    """
    per_sample = F.cross_entropy(logits.float(), labels, reduction="none")
    return (weight * per_sample).sum() / weight.sum().clamp(min=1e-12)


def log_prior(effective_counts: torch.Tensor) -> torch.Tensor:
    """log pi_c for logit adjustment, float32 [num_classes]: added to the logits in training alone, so that the
    classifier learns what the class frequency does not already say (Menon et al. 2021, eq. 10, tau = 1).

    Args:
        effective_counts: float [num_classes], the weight of each class in the training set: its real images plus omega
            times its synthetic ones.
    """
    return torch.log(effective_counts / effective_counts.sum()).float()
