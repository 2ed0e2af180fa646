"""Losses of the classifier: cross-entropy and those of the long-tail literature. Those of several heads and of soft
labels are in `expert_losses`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from diffult.models.heads import COSINE_SCALE


class Targets(NamedTuple):
    """What a batch of B images should be classified as; of mixed images every field is [2 B], of each image and then
    of its partner.

    Attributes:
        labels: int64 [B].
        synthetic: bool [B].
        sample: int64 [B], the number of the image in the joined set.
        share: float [2 B], of each label in its mixed image; None: nothing was mixed.
    """

    labels: Tensor
    synthetic: Tensor
    sample: Tensor
    share: Tensor | None = None


class WeightedSum(NamedTuple):
    """Scalars: the sum of the samples' weighted losses, and the sum of their weights; apart, because processes that
    share a batch divide by the weight of all of it."""

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """total / weight; 0 for a batch without weight."""
        return self.total / self.weight.clamp(min=1e-12)


class Loss(Protocol):
    """The loss of a batch."""

    def __call__(self, outputs: Tensor, targets: Targets) -> WeightedSum:
        """
        Args:
            outputs: float [B, C], what `Classifier.outputs` gives; [H, B, C] of a network with H heads.
            targets: with `share` of length B, as `PerHead` passes it, these are weights of images that are not mixed.
        """
        ...


@dataclass(frozen=True)
class LabelLoss(ABC):
    """A loss of one image and one label, `of_labels`, averaged over the batch: a synthetic sample weighs omega and a
    real one 1, and the labels of a mixed image count by their shares.

    The paper leaves the normalisation open; this is the weighted mean, as in torch's weighted cross-entropy, so that
    neither omega nor class weights change the size of the step.

    Attributes:
        omega: not negative.
        class_weights: float [C], by which samples weigh too; see `class_balanced_weights`.
    """

    omega: float = 1.0
    class_weights: Tensor | None = field(default=None, kw_only=True)

    def __call__(self, outputs: Tensor, targets: Targets) -> WeightedSum:
        """See `Loss`."""
        weight = torch.where(targets.synthetic, self.omega, 1.0)
        if self.class_weights is not None:
            weight = weight * self.class_weights[targets.labels]
        if targets.share is not None:
            weight = weight * targets.share
        if len(targets.labels) > outputs.shape[-2]:  # mixed images: each has two labels
            outputs = torch.cat([outputs, outputs], dim=-2)
        return WeightedSum((weight * self.of_labels(outputs, targets)).sum(), weight.sum())

    @abstractmethod
    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Float [N], from outputs [..., N, C] and N targets."""


@dataclass(frozen=True)
class CrossEntropy(LabelLoss):
    """Cross-entropy.

    Attributes:
        prior: float [C], added to the logits; see `log_prior`.
        smoothing: this much of each label is spread evenly over all classes (Szegedy et al. 2016, section 7).
    """

    prior: Tensor | None = None
    smoothing: float = 0.0

    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        logits = outputs if self.prior is None else outputs + self.prior
        return F.cross_entropy(logits, targets.labels, reduction="none", label_smoothing=self.smoothing)


@dataclass(frozen=True)
class Focal(LabelLoss):
    """-(1 - p_y)^gamma log p_y (Lin et al. 2017, eq. 4, with the softmax's p as in Cui et al. 2019). gamma = 1 is that
    of LDAM-DRW's long-tail tables; Lin et al. take 2.

    Class weights multiply the loss, as in Cui et al.; LDAM-DRW's code puts them into p_y as well.

    Attributes:
        gamma: 1 or more: the slope of lower powers has no bound.
    """

    gamma: float = 1.0

    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        value = F.cross_entropy(outputs, targets.labels, reduction="none")
        return (-torch.expm1(-value)) ** self.gamma * value


@dataclass(frozen=True)
class LDAM(LabelLoss):
    """Cross-entropy of scale * (cosine - margin of the label), the label-distribution-aware margin loss (Cao et al.
    2019, eq. 13); `outputs` are the cosines of the head "cosine". With class weights in the last part of the training
    it is LDAM-DRW.

    Attributes:
        margins: float [C]; see `ldam_margins`.
    """

    margins: Tensor = field(kw_only=True)
    scale: float = field(default=COSINE_SCALE, kw_only=True)

    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        own = targets.labels[:, None] == torch.arange(outputs.shape[-1], device=outputs.device)
        return F.cross_entropy(self.scale * (outputs - own * self.margins), targets.labels, reduction="none")


@dataclass(frozen=True)
class LabelAwareSmoothing(LabelLoss):
    """Cross-entropy whose labels are smoothed by class, the more the larger the class (MiSLAS; Zhong et al. 2021,
    section 3.2).

    As in their code, epsilon_y is spread over all K classes, the label among them. The paper spreads it over the K - 1
    others: the same with its epsilon_y larger by K / (K - 1) here.

    Attributes:
        smoothing: float [C], epsilon; see `label_aware_smoothing`.
    """

    smoothing: Tensor = field(kw_only=True)

    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        log_p = F.log_softmax(outputs, dim=-1)
        own = log_p.gather(-1, targets.labels[:, None])[:, 0]
        return -own - self.smoothing[targets.labels] * (log_p.mean(dim=-1) - own)


def log_prior(effective_counts: Tensor) -> Tensor:
    """log pi_c of logit adjustment, float32 [C], added to the logits in training alone (Menon et al. 2021, eq. 10,
    tau = 1).

    Args:
        effective_counts: float [C], the weight of each class in training; so in the functions below.
    """
    return torch.log(effective_counts / effective_counts.sum()).float()


def class_balanced_weights(effective_counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Weights proportional to (1 - beta) / (1 - beta^n), the inverse of the effective number of samples, that sum to
    C; float32 [C] (Cui et al. 2019, section 4). A class counts as one sample at least."""
    counts = effective_counts.double().clamp(min=1)
    weights = (1 - beta) / -torch.expm1(counts * math.log(beta))
    return (weights * (len(weights) / weights.sum())).float()


def ldam_margins(effective_counts: Tensor, largest: float = 0.5) -> Tensor:
    """Margins proportional to n^(-1/4), float32 [C] (Cao et al. 2019, eq. 13), that of the smallest class `largest`. A
    class counts as one sample at least."""
    margins = effective_counts.double().clamp(min=1) ** -0.25
    return (margins * (largest / margins.max())).float()


def label_aware_smoothing(effective_counts: Tensor, head: float = 0.3, tail: float = 0.0) -> Tensor:
    """epsilon of each class, float32 [C], from `tail` in the smallest to `head` in the largest, in the concave form of
    a sine (Zhong et al. 2021, section 3.2). The defaults are those of their code for CIFAR-10-LT at IF = 100. Classes
    that are all of one size get `head`."""
    counts = effective_counts.double()
    position = (counts - counts.min()) / (counts.max() - counts.min())
    return (tail + (head - tail) * torch.sin(position.nan_to_num(1.0) * (math.pi / 2))).float()
