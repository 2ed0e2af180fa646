"""Solvers on a Gaussian, whose exact solution is known, and against closed forms of single steps."""

import itertools
import math

import pytest
import torch

from diffult.diffusion.samplers import ddim, ddpm, dpm_solver_pp, timestep_grid
from diffult.diffusion.schedule import Schedule

MEAN, STD = 0.7, 0.3


def gaussian_denoiser(abar):
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2), exact."""

    def denoise(x, t):
        a, s2 = math.sqrt(float(abar[t])), 1 - float(abar[t])
        return MEAN + a * STD**2 / (a**2 * STD**2 + s2) * (x - a * MEAN)

    return denoise


def exact_flow(x, abar_from, abar_to):
    """The probability flow of a Gaussian keeps the standard score."""
    score = (x - math.sqrt(abar_from) * MEAN) / math.sqrt(abar_from * STD**2 + 1 - abar_from)
    return math.sqrt(abar_to) * MEAN + math.sqrt(abar_to * STD**2 + 1 - abar_to) * score


def no_noise(step):
    raise AssertionError("a deterministic solver asked for noise")


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(solver, order):
    """Halving the steps in log-SNR must divide the error at an inner point by 2^order."""
    timesteps = 100_000
    half_log_snr = torch.linspace(-3, 2.5, timesteps, dtype=torch.float64).flip(0)
    abar = torch.sigmoid(2 * half_log_snr)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, end = timesteps - 1, 20_000
    errors = []
    for steps in (16, 32, 64):
        grid = [round(start + (end - start) * i / steps) for i in range(steps + 1)]
        seen = {}

        def denoise(z, t, seen=seen):
            seen[t] = z
            return gaussian_denoiser(abar)(z, t)

        if solver == "ddim":
            ddim(denoise, x, grid, abar, no_noise)
        else:
            dpm_solver_pp(denoise, x, grid, abar)
        exact = exact_flow(x, float(abar[start]), float(abar[end]))
        errors.append(float((seen[end] - exact).abs().max()))
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(rate - order) < 0.35 for rate in rates), (errors, rates)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_samples_have_the_mean_and_deviation_of_the_data(solver):
    abar = Schedule("cosine", 1000).alphas_cumprod
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g, dtype=torch.float64)
    denoise = gaussian_denoiser(abar)
    grid = timestep_grid(1000, 1000 if solver == "ddpm" else 50)
    if solver == "ddim":
        out = ddim(denoise, x, grid, abar, no_noise)
    elif solver == "ddpm":
        out = ddpm(denoise, x, grid, abar, lambda i: torch.randn(20_000, generator=g, dtype=torch.float64))
    else:
        out = dpm_solver_pp(denoise, x, grid, abar)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(STD, abs=0.03)


def test_ddim_with_eta_one_is_ancestral_with_the_small_variance():
    """sigma^2 = (1 - abar_s) / (1 - abar_t) beta_t (Ho et al. 2020, section 3.2), mean as in eq. 7."""
    abar = Schedule("linear", 1000).alphas_cumprod
    t = 500
    x, x0, z = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    second = {}

    def denoise(value, step):
        second[step] = value
        return x0

    ddim(denoise, x, [t, t - 1], abar, lambda i: z, eta=1.0)
    a_t, a_s = float(abar[t]), float(abar[t - 1])
    beta = 1 - a_t / a_s
    mean = math.sqrt(a_s) * beta / (1 - a_t) * x0 + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x
    torch.testing.assert_close(second[t - 1], mean + math.sqrt((1 - a_s) / (1 - a_t) * beta) * z)


def test_ddpm_step_is_eq_7_with_the_large_variance():
    abar = Schedule("linear", 1000).alphas_cumprod
    t = 300
    x, x0, z = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    second = {}

    def denoise(value, step):
        second[step] = value
        return x0

    ddpm(denoise, x, [t, t - 1], abar, lambda i: z)
    a_t, a_s = float(abar[t]), float(abar[t - 1])
    beta = 1 - a_t / a_s
    mean = math.sqrt(a_s) * beta / (1 - a_t) * x0 + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x
    torch.testing.assert_close(second[t - 1], mean + math.sqrt(beta) * z)


@pytest.mark.parametrize("steps", [1, 7, 20, 1000])
def test_grid_falls_from_the_last_timestep(steps):
    grid = timestep_grid(1000, steps)
    assert len(grid) == steps and grid[0] == 999 and grid[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_grid_is_refused(steps):
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        timestep_grid(1000, steps)
