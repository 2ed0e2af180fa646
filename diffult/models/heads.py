"""What a classifier's trunk ends in: one linear layer, or what long-tail methods put in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineLinear(nn.Module):
    """Cosines [B, num_classes] between features [B, F] and class weights, without bias, as LDAM-DRW's NormedLinear;
    the loss scales them. Computed in the weights' type: the scale would make half precision coarse."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, features).uniform_(-1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        device = "cpu" if x.is_meta else x.device.type  # autocast refuses meta, on which work is counted
        with torch.autocast(device, enabled=False):
            return F.linear(F.normalize(x.to(self.weight.dtype)), F.normalize(self.weight))


class TwoHeads(nn.ModuleList):
    """A linear head for real and one for synthetic images: logits [2, B, num_classes]."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__(nn.Linear(features, num_classes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self])


class ExpertHeads(nn.ModuleList):
    """A cosine head for each expert's features, which come joined [B, 3 F]: cosines [3, B, num_classes]."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__(CosineLinear(features // EXPERTS, num_classes) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(part) for head, part in zip(self, x.chunk(EXPERTS, dim=1), strict=True)])


class ExpertTrunk(nn.Module):
    """Trunks that share their first stages; features [B, 3 F], those of one expert after the other.

    RIDE's experts have three quarters of the width; these have all of it, so that any trunk can be split.

    Args:
        parts: of each expert, the first stages and the rest; only the first expert's first stages are kept.
    """

    def __init__(self, parts: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.shared = parts[0][0]
        self.experts = nn.ModuleList(rest for _, rest in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        return torch.cat([expert(x) for expert in self.experts], dim=1)


class Heads(NamedTuple):
    """A row of HEADS.

    Attributes:
        build: makes the head from the numbers of features and classes.
        prediction: the logits [B, num_classes] by which it classifies, from its outputs.
        scale: that the loss multiplies these by; probabilities are the softmax of the product.
        trunks: of experts.
    """

    build: Callable[[int, int], nn.Module]
    prediction: Callable[[Tensor], Tensor] = lambda outputs: outputs
    scale: float = 1.0
    trunks: int = 1


EXPERTS = 3
COSINE_SCALE = 30.0  # of LDAM (Cao et al. 2019) and RIDE: cosines alone would make near to equal probabilities
HEADS = {
    "linear": Heads(nn.Linear),
    "cosine": Heads(CosineLinear, scale=COSINE_SCALE),
    "two": Heads(TwoHeads, lambda outputs: outputs[0]),
    "experts": Heads(ExpertHeads, lambda outputs: outputs.mean(0), COSINE_SCALE, trunks=EXPERTS),
}
