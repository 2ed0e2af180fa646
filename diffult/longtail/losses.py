"""Losses of the classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F


class WeightedSum(NamedTuple):
    """Scalars: the sum of the samples' weighted losses, and the sum of their weights; apart, because processes that
    share a batch divide by the weight of all of it."""

    total: torch.Tensor
    weight: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """total / weight; 0 for a batch without weight."""
        return self.total / self.weight.clamp(min=1e-12)


class Loss(Protocol):
    """The loss of a batch."""

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, synthetic: torch.Tensor, share: torch.Tensor | None = None
    ) -> WeightedSum:
        """
        Args:
            logits: float [B, num_classes].
            labels: int64 [B]; of mixed images [2 B], the labels of each image and then those of its partner.
            synthetic: bool, of the same shape.
            share: of each label in a mixed image, float [2 B]; None: nothing was mixed.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy in which a synthetic sample weighs omega and a real one 1; the labels of a mixed image count by
    their shares.

    The paper leaves the normalisation open; this is the weighted mean, as in torch's weighted cross-entropy, so that
    omega does not change the size of the step.

    Attributes:
        omega: not negative.
        prior: float [num_classes], added to the logits; see `log_prior`.
    """

    omega: float = 1.0
    prior: torch.Tensor | None = None

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, synthetic: torch.Tensor, share: torch.Tensor | None = None
    ) -> WeightedSum:
        """See `Loss`."""
        if self.prior is not None:
            logits = logits + self.prior
        weight = torch.where(synthetic, self.omega, 1.0)
        if share is not None:
            logits, weight = logits.repeat(2, 1), share * weight
        return WeightedSum((weight * F.cross_entropy(logits, labels, reduction="none")).sum(), weight.sum())


def log_prior(effective_counts: torch.Tensor) -> torch.Tensor:
    """log pi_c of logit adjustment, float32 [num_classes], added to the logits in training alone (Menon et al. 2021,
    eq. 10, tau = 1).

    Args:
        effective_counts: float [num_classes], the weight of each class in training.
    """
    return torch.log(effective_counts / effective_counts.sum()).float()
