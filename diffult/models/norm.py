"""(Adaptive) group normalisation with SiLU: the one place where the UNet normalises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.group_norm_silu import group_norm_silu


class GroupNorm(nn.Module):
    """Group normalisation, by default with SiLU, optionally scaled and shifted by an embedding (ADM)."""

    def __init__(self, channels: int, silu: bool = True) -> None:
        super().__init__()
        self.groups = _groups(channels)
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.groups, self.weight, self.bias, scale, shift, self.silu)


def _groups(channels: int) -> int:
    """32 as in DDPM and ADM; in narrow networks the largest power of two that leaves each 4 channels."""
    groups = 32
    while groups > 1 and (channels % groups or channels // groups < 4):
        groups //= 2
    return groups
