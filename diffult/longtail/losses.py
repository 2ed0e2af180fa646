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


class Targets(NamedTuple):
    """What a batch of B images should be seen as; of mixed images every field is [2 B], those of each image and then
    those of its partner.

    Attributes:
        labels: int64.
        synthetic: bool.
        sample: int64, numbers in the joined set.
        share: of each label in a mixed image, float; None: nothing was mixed.
    """

    labels: torch.Tensor
    synthetic: torch.Tensor
    sample: torch.Tensor
    share: torch.Tensor | None = None


class Loss(Protocol):
    """The loss of a batch, from what `Classifier.outputs` gives of it."""

    def __call__(self, outputs: torch.Tensor, targets: Targets) -> WeightedSum: ...


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

    def __call__(self, outputs: torch.Tensor, targets: Targets) -> WeightedSum:
        """See `Loss`; outputs: logits, float [B, num_classes]."""
        logits = outputs if self.prior is None else outputs + self.prior
        weight = torch.where(targets.synthetic, self.omega, 1.0)
        if targets.share is not None:
            logits, weight = logits.repeat(2, 1), targets.share * weight
        return WeightedSum((weight * F.cross_entropy(logits, targets.labels, reduction="none")).sum(), weight.sum())


def log_prior(effective_counts: torch.Tensor) -> torch.Tensor:
    """log pi_c of logit adjustment, float32 [num_classes], added to the logits in training alone (Menon et al. 2021,
    eq. 10, tau = 1).

    Args:
        effective_counts: float [num_classes], the weight of each class in training.
    """
    return torch.log(effective_counts / effective_counts.sum()).float()
