"""(Adaptive) group normalisation with SiLU: the one place where the UNet normalises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """SiLU(norm(x) * (1 + scale) + shift), norm(x) being group normalisation with weight and bias, eps 1e-5.

    x: [B, C, H, W] in any floating type, channels-last. weight, bias: [C]. scale, shift: [B, C], both or
    neither. Statistics and arithmetic are float32. Returns the shape, type and memory format of x.
    """
    # One cast up and one down: in bfloat16 the steps below take two to three times as long on a CPU.
    y = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps=1e-5)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, :, None, None].float(), y, 1 + scale[:, :, None, None].float())
    if silu:
        y = F.silu(y)
    # CUDA's group_norm answers in NCHW whatever it was given; elsewhere nothing is copied here.
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.Module):
    """Group normalisation, by default with SiLU, that can be scaled and shifted by an embedding (ADM)."""

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
