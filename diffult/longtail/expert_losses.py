"""Losses of networks with several heads, and of soft labels of synthetic images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from diffult.longtail.losses import LDAM, LabelLoss, Loss, Targets, WeightedSum, class_balanced_weights, ldam_margins
from diffult.models.heads import COSINE_SCALE


@dataclass(frozen=True)
class SoftLabels(LabelLoss):
    """Cross-entropy in which real samples keep their labels and synthetic ones have soft ones.

    Attributes:
        table: float [N, C], the class probabilities of each sample of the joined set; rows of real ones are not read.
        prior: float [C], added to the logits; see `log_prior`.
    """

    table: Tensor = field(kw_only=True)
    prior: Tensor | None = field(default=None, kw_only=True)

    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        log_p = F.log_softmax(outputs if self.prior is None else outputs + self.prior, dim=-1)
        hard = -log_p.gather(-1, targets.labels[:, None])[:, 0]
        soft = -(self.table[targets.sample] * log_p).sum(dim=-1)
        return torch.where(targets.synthetic, soft, hard)


@dataclass(frozen=True)
class PerHead:
    """One loss for real samples and one for synthetic ones: of outputs [2, B, C], head 0 learns from the real alone and
    head 1 from the synthetic; of logits [B, C], the one head from both."""

    real: Loss
    synthetic: Loss

    def __call__(self, outputs: Tensor, targets: Targets) -> WeightedSum:
        """See `Loss`."""
        outputs = outputs if outputs.ndim == 3 else outputs.expand(2, -1, -1)
        share = torch.ones_like(targets.synthetic, dtype=outputs.dtype) if targets.share is None else targets.share
        a = self.real(outputs[0], targets._replace(share=share * ~targets.synthetic))
        b = self.synthetic(outputs[1], targets._replace(share=share * targets.synthetic))
        return WeightedSum(a.total + b.total, a.weight + b.weight)


@dataclass(frozen=True)
class Experts(LabelLoss):
    """The loss of RIDE's experts (Wang et al. 2021, section 3): the sum over outputs [H, B, C] of a loss of each expert
    alone, and of its distance from the experts' mean, which counts negatively and so keeps them apart.

    As in their code: the sum over experts, not its mean; KL(mean || expert) times the squared mean temperature; no
    gradient through the experts' mean, where it is 0 anyway. The divergence takes no class weights. Their code averages
    it over each batch; here it is weighed by `mean_weight`, the same in a batch that has the classes' frequencies, so
    that processes that share a batch need only its summed weights.

    Attributes:
        base: the loss of one expert, with its own omega and class weights.
        diversity: by which the divergence counts. Their code's default; its settings take -0.45.
        scale: logits are this by the outputs, as in the base loss: 30 for cosines.
        temperature: float [C], by which logits are divided in the divergence; None: 1.
        mean_weight: the mean class weight of a training sample in `base`.
    """

    base: Loss = field(kw_only=True)
    diversity: float = field(default=-0.2, kw_only=True)
    scale: float = field(default=COSINE_SCALE, kw_only=True)
    temperature: Tensor | None = field(default=None, kw_only=True)
    mean_weight: Tensor | float = field(default=1.0, kw_only=True)

    def __call__(self, outputs: Tensor, targets: Targets) -> WeightedSum:
        """See `Loss`."""
        experts = [self.base(expert, targets) for expert in outputs]
        apart = super().__call__(outputs, targets).total * (self.diversity * self.mean_weight)
        return WeightedSum(torch.stack([expert.total for expert in experts]).sum() + apart, experts[0].weight)

    def of_labels(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The divergences of all experts from their mean."""
        logits = self.scale * outputs
        if self.temperature is not None:
            logits = logits / self.temperature
        log_mean = F.log_softmax(logits.detach().mean(0), dim=-1)
        divergence = (log_mean.exp() * (log_mean - F.log_softmax(logits, dim=-1))).sum(dim=(0, -1))
        return divergence if self.temperature is None else divergence * self.temperature.mean().square()


def ride(effective_counts: Tensor, omega: float, reweighted: bool, diversity: float = -0.2) -> Experts:
    """RIDE's loss of three cosine experts: LDAM each; `reweighted`, with class weights and the temperatures by class
    that their code brings in at the point where the rate drops.

    Args:
        effective_counts: float [C], the weight of each class in training.
    """
    margins = ldam_margins(effective_counts)
    if not reweighted:
        return Experts(omega, base=LDAM(omega, margins=margins), diversity=diversity)
    weights = class_balanced_weights(effective_counts)
    return Experts(
        omega,
        base=LDAM(omega, margins=margins, class_weights=weights),
        diversity=diversity,
        temperature=diversity_temperature(effective_counts),
        mean_weight=(effective_counts / effective_counts.sum() * weights).sum().float(),
    )


def diversity_temperature(effective_counts: Tensor, factor: float = 0.05) -> Tensor:
    """RIDE's temperatures, float32 [C]: proportional to factor C pi_c + 1 - factor, and 1 for the largest class."""
    prior = effective_counts.double() / effective_counts.sum()
    temperature = factor * len(prior) * prior + 1 - factor
    return (temperature / temperature.max()).float()
