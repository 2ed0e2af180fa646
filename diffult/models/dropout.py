"""Dropout, on a CPU from a quarter of the random draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` (Srivastava et al. 2014); on a CPU each number takes 16 random bits, so the probability is
    rounded to 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape and floating type; returns the same, in the same memory layout."""
        if x.device.type != "cpu" or not self.training or self.p in (0, 1):
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()] >= dropped - 2**15
        like = torch.empty_like(x)  # dense, in the layout of x, which the mask gets without a copy
        return x * kept.as_strided(like.shape, like.stride()).to(x.dtype).mul_(1 / (1 - dropped / 2**16))
