"""Timesteps, solvers of the reverse process, and the loop that runs them.

With the predicted clean image x0 every solver takes the step

    x_next = c_x x + c_x0 x0 + c_previous (x0 of the step before) + c_noise z,    z standard normal

so a solver is a function from a grid and abar to its coefficients (c_x, c_x0, c_previous, c_noise), float64 [steps, 4]
on the host. The grid is a falling list of timesteps; the last step returns x0 itself.

A new sampler is a function with the signature of `ddim` and a line in SAMPLERS; settings and --help follow from that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

Solver = Callable[[list[int], torch.Tensor, float], torch.Tensor]
Spacing = Callable[[torch.Tensor, int], list[int]]
Evaluate = Callable[[torch.Tensor, int], torch.Tensor]
Update = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None, bool], tuple[torch.Tensor, torch.Tensor]]


def sample(
    x: torch.Tensor, grid: list[int], coefficients: torch.Tensor, evaluate: Evaluate, update: Update
) -> torch.Tensor:
    """Runs a solver from noise to the sample.

    Args:
        x: initial noise, [B, C, H, W].
        grid: falling timesteps.
        coefficients: the solver's, float64 [steps, 4].
        evaluate: (x, timestep) -> the network's output.
        update: (step from 0, x, output, x0 of the step before or None if c_previous is 0, with noise if c_noise is not
            0) -> (next x, x0). Its noise is number step + 1 of the sample, the initial one being number 0.

    Returns:
        The sample, [B, C, H, W].
    """
    x0 = None
    for i, (t, (_, _, c_previous, c_noise)) in enumerate(zip(grid, coefficients.tolist(), strict=True)):
        x, x0 = update(i, x, evaluate(x, t), x0 if c_previous else None, c_noise != 0)
    return x


def timestep_grid(timesteps: int, steps: int) -> list[int]:
    """`steps` equally spaced timesteps from T - 1 downwards ("trailing", Lin et al. 2024); ValueError beyond 1..T."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps = {steps} is not in 1..{timesteps}")
    return [round(timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def log_snr_grid(alphas_cumprod: torch.Tensor, steps: int) -> list[int]:
    """`steps` falling timesteps from T - 1 to 0, equally spaced in log-SNR but for rounding (Lu et al. 2022, section
    3.3); ValueError beyond 1..T."""
    timesteps = len(alphas_cumprod)
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps = {steps} is not in 1..{timesteps}")
    log_snr = torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    nearest = (log_snr[None, :] - wanted[:, None]).abs().argmin(1).tolist()
    grid: list[int] = []
    for i, t in enumerate(nearest):
        below = grid[-1] - 1 if grid else timesteps - 1
        grid.append(max(min(t, below), steps - 1 - i))  # leaves a timestep for each later step
    return grid


SPACINGS: dict[str, Spacing] = {
    "time": lambda alphas_cumprod, steps: timestep_grid(len(alphas_cumprod), steps),
    "log_snr": log_snr_grid,
}


def _levels(alphas_cumprod: torch.Tensor, grid: list[int]) -> list[tuple[float, float]]:
    """(a, s) at each step of the grid."""
    return [(math.sqrt(abar), math.sqrt(1 - abar)) for abar in (float(alphas_cumprod[t]) for t in grid)]


def _coefficients(rows: list[tuple[float, float, float, float]]) -> torch.Tensor:
    """Adds the row of the last step, which returns x0."""
    return torch.tensor([*rows, (0.0, 1.0, 0.0, 0.0)], dtype=torch.float64)


def ddim(grid: list[int], alphas_cumprod: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, DDPM with the small variance at eta = 1.

    Args:
        grid: falling timesteps.
        alphas_cumprod: float64 [T].
        eta: share of the posterior's standard deviation that is drawn as noise.

    Returns:
        float64 [steps, 4].
    """
    levels, rows = _levels(alphas_cumprod, grid), []
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        sigma = eta * (s_next / s) * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))
        c_eps = math.sqrt(max(0.0, s_next**2 - sigma**2))  # of eps = (x - a x0) / s
        rows.append((c_eps / s, a_next - c_eps * a / s, 0.0, sigma))
    return _coefficients(rows)


def ddpm(grid: list[int], alphas_cumprod: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, eq. 7) with the large variance beta_t, on any grid.

    Arguments and result as in `ddim`; eta is unused.
    """
    levels, rows = _levels(alphas_cumprod, grid), []
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        beta = 1 - (a / a_next) ** 2
        rows.append(((a / a_next) * s_next**2 / s**2, a_next * beta / s**2, 0.0, math.sqrt(beta)))
    return _coefficients(rows)


def dpm_solver_pp(grid: list[int], alphas_cumprod: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in the half log-SNR, one evaluation a step.

    Arguments and result as in `ddim`; eta is unused. The first and the last step are of first order.
    """
    levels, rows, h_previous = _levels(alphas_cumprod, grid), [], math.inf
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        h = math.log(a_next / s_next) - math.log(a / s)
        weight = h / (2 * h_previous)
        c_direction = -a_next * math.expm1(-h)  # of (1 + weight) x0 - weight x0_previous
        rows.append((s_next / s, c_direction * (1 + weight), -c_direction * weight, 0.0))
        h_previous = h
    return _coefficients(rows)


SAMPLERS: dict[str, Solver] = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_solver_pp}
