"""Changes to the head of a trained classifier that need no training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffult.models.resnet import Classifier


@torch.no_grad()
def tau_normalise(classifier: Classifier, tau: float) -> None:
    """Divides the weights of each class by the tau-th power of their norm, in place, and drops the bias (Kang et al.
    2020, eq. 5): 0 leaves the weights, 1 makes the classes' norms equal. ValueError without a linear head."""
    for layer in _linear(classifier):
        layer.weight.div_(layer.weight.norm(dim=1, keepdim=True).clamp(min=1e-12) ** tau)
        layer.bias.zero_()


@torch.no_grad()
def adjust_bias(classifier: Classifier, prior: Tensor) -> None:
    """Subtracts `prior`, float [num_classes], as `log_prior` gives it, from the logits for good (Menon et al. 2021,
    eq. 9, tau = 1). ValueError without a linear head."""
    for layer in _linear(classifier):
        layer.bias.sub_(prior)


def _linear(classifier: Classifier) -> list[nn.Linear]:
    layers = [layer for layer in classifier.head.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"heads {classifier.heads!r} have no linear layer")
    return layers
