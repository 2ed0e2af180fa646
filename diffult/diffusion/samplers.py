"""Solvers of the reverse process: pure functions over a denoiser.

A denoiser maps (x_t [B, C, H, W], t int) to the predicted clean image x_0 [B, C, H, W]; guidance and clipping live in
it. Coefficients are float64 numbers on the host, one set a step. The grid of a solver is a falling list of timesteps;
after the last one comes the clean image (abar = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]
Noise = Callable[[int], torch.Tensor]
SamplerName = Literal["ddim", "ddpm", "dpm++"]


def timestep_grid(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 downwards, equally spaced, T - 1 always included ("trailing", Lin et al. 2024).

    Raises:
        ValueError: if steps is not in 1..T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps = {steps} is not in 1..{timesteps}")
    return [round(timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def _levels(alphas_cumprod: torch.Tensor, grid: list[int]) -> list[tuple[float, float]]:
    """(a, s) at each step of the grid and, last, (1, 0) for the clean image."""
    abar = [float(alphas_cumprod[t]) for t in grid] + [1.0]
    return [(math.sqrt(value), math.sqrt(1 - value)) for value in abar]


def ddim(
    denoise: Denoiser,
    x: torch.Tensor,
    grid: list[int],
    alphas_cumprod: torch.Tensor,
    noise: Noise,
    eta: float = 0.0,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, DDPM with the small variance at eta = 1.

    Args:
        denoise: the denoiser.
        x: initial noise, [B, C, H, W].
        grid: falling timesteps.
        alphas_cumprod: float64 [T].
        noise: step number (1 for the first) -> standard normal [B, C, H, W]; called only where it is needed.
        eta: share of the posterior's deviation that is drawn anew.

    Returns:
        The sample, [B, C, H, W].
    """
    levels = _levels(alphas_cumprod, grid)
    for i, t in enumerate(grid):
        (a, s), (a_next, s_next) = levels[i], levels[i + 1]
        x0 = denoise(x, t)
        eps = (x - a * x0) / s
        sigma = eta * (s_next / s) * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))
        x = a_next * x0 + math.sqrt(max(0.0, s_next**2 - sigma**2)) * eps
        if sigma > 0:
            x = x + sigma * noise(i + 1)
    return x


def ddpm(
    denoise: Denoiser, x: torch.Tensor, grid: list[int], alphas_cumprod: torch.Tensor, noise: Noise
) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, eq. 7) with the large variance beta_t, on any grid.

    Arguments and result as in `ddim`.
    """
    levels = _levels(alphas_cumprod, grid)
    for i, t in enumerate(grid):
        (a, s), (a_next, s_next) = levels[i], levels[i + 1]
        x0 = denoise(x, t)
        beta = 1 - (a / a_next) ** 2
        x = (a_next * beta / s**2) * x0 + ((a / a_next) * s_next**2 / s**2) * x
        if s_next > 0:
            x = x + math.sqrt(beta) * noise(i + 1)
    return x


def dpm_solver_pp(denoise: Denoiser, x: torch.Tensor, grid: list[int], alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in the half log-SNR, one evaluation a step.

    Arguments and result as in `ddim`; it draws no noise. The first and the last step are of first order.
    """
    levels = _levels(alphas_cumprod, grid)
    previous, h_previous = None, 0.0
    for i, t in enumerate(grid):
        (a, s), (a_next, s_next) = levels[i], levels[i + 1]
        x0 = denoise(x, t)
        if s_next == 0:
            return x0
        h = math.log(a_next / s_next) - math.log(a / s)
        direction = x0
        if previous is not None:
            weight = h / (2 * h_previous)
            direction = (1 + weight) * x0 - weight * previous
        x = (s_next / s) * x - a_next * math.expm1(-h) * direction
        previous, h_previous = x0, h
    return x
