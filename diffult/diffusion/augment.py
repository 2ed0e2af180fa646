"""Augmentation that does not leak into the samples (Karras et al., 2022, appendix F.2; after ADA, 2020).

Each image is moved by a random affine map, a function of the nine numbers that the network gets as a label. They are
zero for an image left as it is, and at sampling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_DIM = 9
SCALE = 0.2  # standard deviation of log2 of the zoom, and of log2 of the stretch
SHIFT = 0.125  # standard deviation of the translation in image widths
UPRIGHT_TURN = math.pi / 6  # largest rotation where orientation carries the class


def augment(
    images: Tensor, probability: float, uniform: Tensor, normal: Tensor, flips: bool = True
) -> tuple[Tensor, Tensor]:
    """Applies each of six transformations to each image with `probability`, independently.

    Args:
        images: float [B, C, N, N] in [-1, 1].
        uniform, normal: the random numbers, float32 [B, 8] in [0, 1] and [B, 4].
        flips: False, for digits and letters, leaves out both flips and turns by 30 degrees at most.

    Returns:
        Images in [-1, 1], channels-last, bit for bit the input where no transformation fell, and labels, float32
        [B, 9]: flip x, flip y, log2(zoom) / 0.2, cos(turn) - 1, sin(turn), stretch (2, see `affine`), translation in x
        and y in units of N / 8 pixels.
    """
    labels = draw_labels(probability, flips, uniform, normal)
    moved = warp(images, affine(labels))
    touched = labels.ne(0).any(dim=1)[:, None, None, None]
    return torch.where(touched, moved, images).contiguous(memory_format=torch.channels_last), labels


def draw_labels(probability: float, flips: bool, uniform: Tensor, normal: Tensor) -> Tensor:
    """Random labels, float32 [B, 9], from uniform [B, 8] and normal [B, 4] numbers."""
    flip_x, flip_y, zoom, turn, stretch, shift = (uniform[:, :6] < probability).float().unbind(1)
    angle = turn * (2 * uniform[:, 6] - 1) * (math.pi if flips else UPRIGHT_TURN)
    axis = 2 * math.pi * uniform[:, 7]
    return torch.stack(
        [
            flip_x * flips,
            flip_y * flips,
            zoom * normal[:, 0],
            angle.cos() - 1,
            angle.sin(),
            stretch * normal[:, 1].abs() * axis.cos(),
            stretch * normal[:, 1].abs() * axis.sin(),
            shift * normal[:, 2],
            shift * normal[:, 3],
        ],
        dim=1,
    )


def affine(labels: Tensor) -> Tensor:
    """The map of each label, [B, 9] -> [B, 2, 3]: where a point (x, y) of the image goes.

    In half image widths: x points right and y down, the centre is 0, turns are from x towards y. The order is
    flips, zoom, turn, stretch, shift. The stretch (u, v) is the symmetric matrix 2^(0.2 [[u, v], [v, -u]]): factors
    2^(0.2 r) along an axis and 2^(-0.2 r) across it, r = |(u, v)|, the axis at half the angle of (u, v).
    """
    flip_x, flip_y, zoom, cosine, sine, u, v, shift_x, shift_y = labels.unbind(1)
    cosine = cosine + 1
    size = torch.exp2(SCALE * zoom)
    a, d = size * (1 - 2 * flip_x), size * (1 - 2 * flip_y)
    r = torch.hypot(u, v)
    exponent = r * (SCALE * math.log(2))
    even, odd = exponent.cosh(), exponent.sinh() / r.clamp_min(torch.finfo(r.dtype).tiny)

    turned = torch.stack([torch.stack([cosine * a, -sine * d], 1), torch.stack([sine * a, cosine * d], 1)], 1)
    stretch = torch.stack([torch.stack([even + odd * u, odd * v], 1), torch.stack([odd * v, even - odd * u], 1)], 1)
    shift = 2 * SHIFT * torch.stack([shift_x, shift_y], 1)
    return torch.cat([stretch @ turned, shift[:, :, None]], dim=2)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Images [B, C, N, N] moved by maps [B, 2, 3] of `affine`: bicubic, mirrored at borders, in [-1, 1]."""
    # grid_sample takes the inverse map, from points of the output to points of the input
    inverse = _inverse(maps[:, :, :2])
    theta = torch.cat([inverse, -inverse @ maps[:, :, 2:]], dim=2).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return moved.clamp(-1, 1)  # a cubic overshoots at edges


def _inverse(matrices: Tensor) -> Tensor:
    """Of [B, 2, 2], in closed form: torch.linalg's waits for the device."""
    (a, b), (c, d) = (row.unbind(1) for row in matrices.unbind(1))
    adjugate = torch.stack([torch.stack([d, -b], 1), torch.stack([-c, a], 1)], 1)
    return adjugate / (a * d - b * c)[:, None, None]
