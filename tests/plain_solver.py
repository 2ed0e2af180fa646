"""The product's sampling loop with the update written out in plain tensors, of any shape and dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffult.diffusion.samplers import sample


def solve(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    x: torch.Tensor,
    grid: list[int],
    coefficients: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """From initial noise x to the sample; denoise: (x_t, t) -> the predicted clean image; noise: number -> standard
    normal, 1 at the first step."""

    def update(i, x, x0, previous, with_noise):
        c_x, c_x0, c_previous, c_noise = coefficients[i].tolist()
        x = c_x * x + c_x0 * x0
        if previous is not None:
            x = x + c_previous * previous
        if with_noise:
            x = x + c_noise * noise(i + 1)
        return x, x0

    return sample(x, grid, coefficients, denoise, update)
