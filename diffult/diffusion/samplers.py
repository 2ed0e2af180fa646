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
from typing import NamedTuple

import torch

Solver = Callable[[list[int], torch.Tensor, float], torch.Tensor]
Spacing = Callable[[torch.Tensor, int, "SigmaRange"], list[int]]
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


def log_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """log (a_t^2 / s_t^2) of every timestep, [T], falling: -2 log sigma, with sigma = s_t / a_t."""
    return torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)


def nearest_timesteps(alphas_cumprod: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """Falling timesteps, each the nearest in log-SNR to one of `wanted`, rising float64 [steps], or the next below the
    one before it where that is taken; a timestep is left for each later one. ValueError unless there are 1 to T."""
    timesteps, steps = len(alphas_cumprod), len(wanted)
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps = {steps} is not in 1..{timesteps}")
    nearest = (log_snr(alphas_cumprod)[None, :] - wanted[:, None]).abs().argmin(1).tolist()
    grid: list[int] = []
    for i, t in enumerate(nearest):
        below = grid[-1] - 1 if grid else timesteps - 1
        grid.append(max(min(t, below), steps - 1 - i))
    return grid


def log_snr_grid(alphas_cumprod: torch.Tensor, steps: int) -> list[int]:
    """`steps` falling timesteps from T - 1 to 0, equally spaced in log-SNR but for rounding (Lu et al. 2022, section
    3.3); ValueError beyond 1..T."""
    last, first = log_snr(alphas_cumprod)[[-1, 0]].tolist()
    return nearest_timesteps(alphas_cumprod, torch.linspace(last, first, steps, dtype=torch.float64))


class SigmaRange(NamedTuple):
    """Noise levels sigma = s_t / a_t from `max` to `min`, the closer together at the low end the larger `rho`."""

    max: float
    min: float
    rho: float


def sigma_grid(alphas_cumprod: torch.Tensor, steps: int, sigmas: SigmaRange) -> list[int]:
    """`steps` falling timesteps, nearest to noise levels whose rho-th root is equally spaced (Karras et al. 2022,
    eq. 5); ValueError beyond 1..T.

    The first need not be T - 1. Samples start there from standard normal noise all the same, which is exact for images
    of mean 0 and variance 1 and otherwise off by a_t of their mean and a_t^2 of their variance: with sigma_max = 80,
    1/80 and 1/6400.
    """
    roots = torch.linspace(sigmas.max ** (1 / sigmas.rho), sigmas.min ** (1 / sigmas.rho), steps, dtype=torch.float64)
    return nearest_timesteps(alphas_cumprod, -2 * sigmas.rho * roots.log())


SPACINGS: dict[str, Spacing] = {
    "time": lambda alphas_cumprod, steps, _: timestep_grid(len(alphas_cumprod), steps),
    "log_snr": lambda alphas_cumprod, steps, _: log_snr_grid(alphas_cumprod, steps),
    "sigma": sigma_grid,
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
    return _multistep(grid, alphas_cumprod, 0.0)


def sde_dpm_solver_pp(grid: list[int], alphas_cumprod: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix C): the reverse SDE, and otherwise as `dpm_solver_pp`.

    Its first order is `ddim` with eta = 1.
    """
    return _multistep(grid, alphas_cumprod, 1.0)


def _multistep(grid: list[int], alphas_cumprod: torch.Tensor, noise: float) -> torch.Tensor:
    """Over a step h of the half log-SNR lambda = log(a / s), with D the clean image extrapolated to its middle:

    x_next = (s_next / s) e^(-noise h) x + a_next (1 - e^(-(1 + noise) h)) D + s_next sqrt(1 - e^(-2 noise h)) z
    """
    levels, rows, h_previous = _levels(alphas_cumprod, grid), [], math.inf
    for (a, s), (a_next, s_next) in itertools.pairwise(levels):
        h = math.log(a_next / s_next) - math.log(a / s)
        weight = h / (2 * h_previous)
        c_direction = -a_next * math.expm1(-(1 + noise) * h)  # of D = (1 + weight) x0 - weight x0_previous
        c_x, c_noise = s_next / s * math.exp(-noise * h), s_next * math.sqrt(-math.expm1(-2 * noise * h))
        rows.append((c_x, c_direction * (1 + weight), -c_direction * weight, c_noise))
        h_previous = h
    return _coefficients(rows)


SAMPLERS: dict[str, Solver] = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_solver_pp, "dpm++sde": sde_dpm_solver_pp}
