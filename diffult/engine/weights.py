"""Weights beside those of a step: an exponential moving average, and the perturbed ones of sharpness-aware steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class WeightAverage:
    """An exponential moving average of parameters and other floating tensors, such as the statistics of batch norms,
    average = d average + (1 - d) p, on their device.

    d is min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights, drawn by chance, are soon forgotten.
    Updates run inside a CUDA graph.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters, self.decay = [p.detach() for p in parameters], decay
        self.average = [p.clone() for p in self.parameters]
        self.updates = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)

    def update(self) -> None:
        """After each step of the optimizer."""
        rest = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        change = torch._foreach_sub(self.parameters, self.average)
        torch._foreach_mul_(change, rest.to(change[0].dtype))
        torch._foreach_add_(self.average, change)
        self.updates += 1

    def copy_to_parameters(self) -> None:
        """Puts the average in their place."""
        torch._foreach_copy_(self.parameters, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.average, state["average"])
        self.updates.copy_(state["updates"])


@contextmanager
def sharpness_aware(parameters: Sequence[Tensor], rho: float) -> Iterator[None]:
    """Inside, the parameters are w + rho g / |g|, with g their gradients and | | over all of them together: a backward
    pass there gives the gradient of sharpness-aware minimization (Foret et al. 2021, eq. 2 and 3) at w. Afterwards they
    are w again, to the bit."""
    trained = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    with torch.no_grad():
        scale = rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
        before = [p.clone() for p in trained]
        torch._foreach_add_(trained, torch._foreach_mul(gradients, scale))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(trained, before)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode normalise by the batch, and leave their running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
