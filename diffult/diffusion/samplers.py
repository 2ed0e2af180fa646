"""Solvers of the reverse process: each is a table of numbers, one row a step.

With the predicted clean image x0 every solver here takes the step

    x_next = c_x x + c_x0 x0 + c_previous (x0 of the step before) + c_noise z,    z standard normal

so a solver is a function from the grid and abar to its rows (c_x, c_x0, c_previous, c_noise), float64 [steps, 4] on the
host. `kernels.denoise_step` takes such rows; `solve` is the same loop over any denoiser. The grid is a falling list of
timesteps; after the last one comes the clean image (abar = 1), so the last step returns x0 itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]
Noise = Callable[[int], torch.Tensor]
SamplerName = Literal["ddim", "ddpm", "dpm++"]
Spacing = Literal["time", "log_snr"]

_LAST = (0.0, 1.0, 0.0, 0.0)


class Step(NamedTuple):
    """One step of a draw: its timestep, whether guidance acts, and whether the whole network runs or, with what its
    deep levels gave before, its first level alone."""

    t: int
    guided: bool
    whole: bool


def timestep_grid(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 downwards, equally spaced, T - 1 always included ("trailing", Lin et al. 2024).

    Raises:
        ValueError: if steps is not in 1..T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps = {steps} is not in 1..{timesteps}")
    return [round(timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def log_snr_grid(alphas_cumprod: torch.Tensor, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 to 0, as equally spaced in log-SNR as whole timesteps allow, each lower than the one
    before (Lu et al. 2022, section 3.3, who advise it at low resolution).

    Raises:
        ValueError: if steps is not in 1..T.
    """
    timesteps = len(alphas_cumprod)
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps = {steps} is not in 1..{timesteps}")
    log_snr = torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    nearest = (log_snr[None, :] - wanted[:, None]).abs().argmin(1).tolist()
    grid: list[int] = []
    for i, t in enumerate(nearest):
        below = grid[-1] - 1 if grid else timesteps - 1
        grid.append(max(min(t, below), steps - 1 - i))  # leaves a timestep for each step to come
    return grid


def solver_coefficients(
    sampler: SamplerName, grid: list[int], alphas_cumprod: torch.Tensor, eta: float = 0.0
) -> torch.Tensor:
    """The rows of the solver of this name, float64 [steps, 4]; eta is for ddim alone."""
    if sampler == "ddim":
        return ddim(grid, alphas_cumprod, eta)
    return ddpm(grid, alphas_cumprod) if sampler == "ddpm" else dpm_solver_pp(grid, alphas_cumprod)


def solve(denoise: Denoiser, x: torch.Tensor, grid: list[int], rows: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Runs a solver.

    Args:
        denoise: (x_t [B, C, H, W], t) -> the predicted clean image, same shape; guidance and clipping live in it.
        x: initial noise, [B, C, H, W].
        grid: falling timesteps.
        rows: the solver's, float64 [steps, 4].
        noise: step number (1 for the first) -> standard normal [B, C, H, W]; called only where c_noise is not 0.

    Returns:
        The sample, [B, C, H, W].
    """
    previous = None
    for i, t in enumerate(grid):
        c_x, c_x0, c_previous, c_noise = rows[i].tolist()
        x0 = denoise(x, t)
        x = c_x * x + c_x0 * x0
        if previous is not None:
            x = x + c_previous * previous
        if c_noise:
            x = x + c_noise * noise(i + 1)
        previous = x0
    return x


def _levels(alphas_cumprod: torch.Tensor, grid: list[int]) -> list[tuple[float, float]]:
    """(a, s) at each step of the grid."""
    return [(math.sqrt(abar), math.sqrt(1 - abar)) for abar in (float(alphas_cumprod[t]) for t in grid)]


def _rows(rows: list[tuple[float, float, float, float]]) -> torch.Tensor:
    return torch.tensor([*rows, _LAST], dtype=torch.float64)


def ddim(grid: list[int], alphas_cumprod: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, DDPM with the small variance at eta = 1.

    Args:
        grid: falling timesteps.
        alphas_cumprod: float64 [T].
        eta: share of the posterior's deviation that is drawn anew.

    Returns:
        float64 [steps, 4].
    """
    levels, rows = _levels(alphas_cumprod, grid), []
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        sigma = eta * (s_next / s) * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))
        c_eps = math.sqrt(max(0.0, s_next**2 - sigma**2))  # of eps = (x - a x0) / s
        rows.append((c_eps / s, a_next - c_eps * a / s, 0.0, sigma))
    return _rows(rows)


def ddpm(grid: list[int], alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, eq. 7) with the large variance beta_t, on any grid.

    Arguments and result as in `ddim`.
    """
    levels, rows = _levels(alphas_cumprod, grid), []
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        beta = 1 - (a / a_next) ** 2
        rows.append(((a / a_next) * s_next**2 / s**2, a_next * beta / s**2, 0.0, math.sqrt(beta)))
    return _rows(rows)


def dpm_solver_pp(grid: list[int], alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in the half log-SNR, one evaluation a step.

    Arguments and result as in `ddim`; it draws no noise. The first and the last step are of first order.
    """
    levels, rows, h_previous = _levels(alphas_cumprod, grid), [], math.inf
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        h = math.log(a_next / s_next) - math.log(a / s)
        weight = h / (2 * h_previous)
        c_direction = -a_next * math.expm1(-h)  # of (1 + weight) x0 - weight x0_previous
        rows.append((s_next / s, c_direction * (1 + weight), -c_direction * weight, 0.0))
        h_previous = h
    return _rows(rows)
