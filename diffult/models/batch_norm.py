"""Batch normalisation over a batch that several processes share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffult.engine.distributed import World


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes, of equal sizes. torch.nn.SyncBatchNorm needs GPUs."""

    def __init__(self, norm: nn.BatchNorm2d, world: World) -> None:
        """Takes the place of `norm`, with the same parameters and buffers."""
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.world = world

    def forward(self, x: Tensor) -> Tensor:
        """Of [B, C, H, W], in x's type; computed in float32 or wider."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        variances, means = self.world.stack(torch.stack([variance, mean])).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if self.track_running_stats:
            self._update(mean.detach(), variance.detach(), self.world.size * x.numel() // self.num_features)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised = (wide - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalised.to(x.dtype)

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.momentum and self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked.add_(1)


def share_batch_norms(model: nn.Module, world: World) -> None:
    """Makes every BatchNorm2d of `model` normalise over the whole batch, if several processes share it."""
    if world.size > 1:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.BatchNorm2d:
                    setattr(module, name, SharedBatchNorm2d(child, world))
