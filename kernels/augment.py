"""uint8 NHWC batches to what a classifier trains on: cropped, mirrored, jittered, normalised, channels-last.

Every random number is keyed by (seed, position), the place of the sample in the training stream, so a batch is the same
on any device and after any restart.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from kernels.random import uniform


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1], channels-last."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # an NHWC tensor permuted is channels-last


def denormalise(images: torch.Tensor) -> torch.Tensor:
    """float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], rounded to nearest, values outside clipped."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def center_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """The middle size x size of [B, C, H, W]."""
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size]


def augment(
    images: torch.Tensor,
    seed: int,
    positions: torch.Tensor,
    *,
    size: int,
    pad: int = 0,
    flip: bool = False,
    resized_crop: bool = False,
    jitter: float = 0.0,
) -> torch.Tensor:
    """Augments and normalises a batch for training.

    Args:
        images: uint8 [B, H, W, C].
        seed: of the whole training run.
        positions: int64 [B], each sample's place in the training stream.
        size: side of the result; without `resized_crop` the middle of larger images is taken.
        pad: random crop after padding by so many black pixels.
        flip: mirror left-right with probability 1/2.
        resized_crop: random 8 to 100 % of the area at aspect 3/4 to 4/3, scaled to `size` (Szegedy et al. 2015).
        jitter: brightness, contrast and saturation each by a factor in [1 - jitter, 1 + jitter].

    Returns:
        float32 [B, C, size, size], channels-last. Values lie in [-1, 1].
    """
    x = normalise(images)
    u = uniform(seed, positions >> 32, positions, 0, 10)
    if resized_crop:
        x = _resized_crop(x, u[:, :4], size)
    elif x.shape[2] != size:
        x = center_crop(x, size)
    if pad:
        x = _shift(x, torch.ceil(u[:, 4:6] * (2 * pad + 1)).long() - 1 - pad)
    if flip:
        x = torch.where((u[:, 6] <= 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    if jitter:
        x = _jitter(x, 1 + jitter * (2 * u[:, 7:10] - 1))
    return x.contiguous(memory_format=torch.channels_last)


def _shift(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Moves each image by its own whole-pixel offset, int64 [B, 2]; what comes in is black."""
    _, _, height, width = x.shape
    rows = torch.arange(height, device=x.device)[None, :] + offset[:, :1]
    columns = torch.arange(width, device=x.device)[None, :] + offset[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return torch.where(inside, moved.permute(0, 3, 1, 2), -1.0)


def _resized_crop(x: torch.Tensor, u: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear crops; a crop wider or higher than the image is cut to it, as torchvision's fallback does."""
    area = 0.08 + 0.92 * u[:, 0]
    aspect = torch.exp(math.log(3 / 4) + u[:, 1] * (math.log(4 / 3) - math.log(3 / 4)))
    width, height = (
        (area * aspect).sqrt().clamp(max=1),
        (area / aspect).sqrt().clamp(max=1),
    )  # shares of the sides
    left, top = (1 - width) * u[:, 2], (1 - height) * u[:, 3]
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 0, 2] = width, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _jitter(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation by `factors`, float [B, 3], in this order, clipped as images are."""
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    y = ((x + 1) * brightness).clamp(0, 2)  # [0, 2]: black is 0
    y = y + (1 - contrast) * (_grey(y).mean((1, 2, 3), keepdim=True) - y)
    y = y.clamp(0, 2)
    y = y + (1 - saturation) * (_grey(y) - y)
    return y.clamp(0, 2) - 1


def _grey(x: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R BT.601) of RGB, or the image itself where it has one channel."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)
