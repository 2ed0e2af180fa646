"""Solvers on a Gaussian, whose exact solution is known, and against closed forms of single steps."""

import itertools
import math

import pytest
import torch
from plain_solver import solve

from diffult.diffusion.samplers import SAMPLERS, SigmaRange, ddim, ddpm, log_snr_grid, sigma_grid, timestep_grid
from diffult.diffusion.schedule import Schedule
from diffult.generation.config import GenerateConfig
from diffult.generation.sampler import Sampler
from kernels.random import normal

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

        solve(denoise, x, grid, SAMPLERS[solver](grid, abar, 0.0), no_noise)
        exact = exact_flow(x, float(abar[start]), float(abar[end]))
        errors.append(float((seen[end] - exact).abs().max()))
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(rate - order) < 0.35 for rate in rates), (errors, rates)


@pytest.mark.parametrize(
    ("solver", "eta", "order"), [("ddpm", 0.0, 1), ("ddim", 0.5, 1), ("ddim", 1.0, 1), ("dpm++sde", 0.0, 2)]
)
def test_order_of_convergence_in_distribution(solver, eta, order):
    """With noise the samples of a Gaussian stay Gaussian, together with the x0 of the step before: the error of their
    deviation, and how much is left of a shift of the mean at the start, without drawing any."""
    timesteps = 100_000
    abar = torch.sigmoid(2 * torch.linspace(-3, 2.5, timesteps, dtype=torch.float64).flip(0))
    start, end = timesteps - 1, 20_000
    at_start, at_end = (float(abar[t]) * STD**2 + 1 - float(abar[t]) for t in (start, end))  # variances
    left = math.sqrt(float(abar[start] / abar[end])) * at_end / at_start  # of a reverse SDE with full noise
    errors = []
    for steps in (32, 64, 128):
        grid = [round(start + (end - start) * i / steps) for i in range(steps + 1)]
        covariance = torch.tensor([[at_start, 0], [0, 0]], dtype=torch.float64)
        shift = torch.tensor([1, 0], dtype=torch.float64)
        rows = SAMPLERS[solver](grid, abar, eta).tolist()
        for t, (c_x, c_x0, c_previous, c_noise) in zip(grid[:-1], rows, strict=False):
            slope = float(gaussian_denoiser(abar)(1.0, t) - gaussian_denoiser(abar)(0.0, t))
            step = torch.tensor([[c_x + c_x0 * slope, c_previous], [slope, 0]], dtype=torch.float64)
            shift, covariance = step @ shift, step @ covariance @ step.T
            covariance[0, 0] += c_noise**2
        errors.append(abs(float(covariance[0, 0]) ** 0.5 - at_end**0.5))
        if eta != 0.5:
            assert float(shift[0]) == pytest.approx(left, abs=1e-12)  # exact, however few the steps
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(rate - order) < 0.35 for rate in rates), (errors, rates)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++", "dpm++sde"])
def test_samples_have_the_mean_and_deviation_of_the_data(solver):
    abar = Schedule("cosine", 1000).alphas_cumprod
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g, dtype=torch.float64)
    denoise = gaussian_denoiser(abar)
    grid = timestep_grid(1000, 1000 if solver == "ddpm" else 50)

    def noise(step):
        return torch.randn(20_000, generator=g, dtype=torch.float64)

    rows = SAMPLERS[solver](grid, abar, 0.0)
    out = solve(denoise, x, grid, rows, noise if float(rows[0, 3]) else no_noise)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(STD, abs=0.03)


def test_log_snr_grid_is_equally_spaced_where_timesteps_allow():
    abar = Schedule("linear", 1000).alphas_cumprod
    grid = log_snr_grid(abar, 10)
    log_snr = [math.log(float(abar[t]) / (1 - float(abar[t]))) for t in grid]
    steps = [b - a for a, b in itertools.pairwise(log_snr)]
    assert (grid[0], grid[-1], len(grid)) == (999, 0, 10)
    assert max(steps[:-1]) / min(steps[:-1]) < 1.1  # the last timesteps lie far apart
    abar = Schedule("cosine", 1000).alphas_cumprod
    for count in (1, 2, 999, 1000):
        grid = log_snr_grid(abar, count)
        assert len(grid) == count and grid[0] == 999 and grid[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(grid))
    with pytest.raises(ValueError, match="steps = 1001"):
        log_snr_grid(abar, 1001)


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [((40, 0.05, 3), [983, 965, 905, 611, 24]), ((80, 0.02, 7), [991, 969, 844, 271, 6])],
)
def test_sigma_grid_is_nearest_to_the_levels_of_karras(sigmas, expected):
    abar = Schedule("cosine", 1000).alphas_cumprod
    assert sigma_grid(abar, 5, SigmaRange(*sigmas)) == expected
    high, low, rho = sigmas
    for i, t in enumerate(expected):  # eq. 5 of Karras et al. 2022
        wanted = (high ** (1 / rho) + i / 4 * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        assert abs(math.sqrt((1 - abar[t]) / abar[t]) / wanted - 1) < 0.1


def test_sigma_grid_falls_where_levels_share_a_timestep():
    abar = Schedule("cosine", 1000).alphas_cumprod
    assert sigma_grid(abar, 4, SigmaRange(1e-3, 1e-4, 7)) == [3, 2, 1, 0]  # all below the least noise there is
    assert sigma_grid(abar, 4, SigmaRange(1e9, 1e8, 7)) == [999, 998, 997, 996]
    assert sigma_grid(abar, 1000, SigmaRange(80, 0.002, 7)) == list(range(999, -1, -1))
    assert sigma_grid(abar, 1, SigmaRange(80, 0.002, 7)) == [991]
    with pytest.raises(ValueError, match="steps = 1001"):
        sigma_grid(abar, 1001, SigmaRange(80, 0.002, 7))


def test_guidance_takes_two_evaluations_a_step():
    assert GenerateConfig(balance_to=1, steps=10).evaluations == 10
    assert GenerateConfig(balance_to=1, steps=10, guidance=0.1).evaluations == 20


def test_ddim_with_eta_one_is_ancestral_with_the_small_variance():
    """sigma^2 = (1 - abar_s) / (1 - abar_t) beta_t (Ho et al. 2020, section 3.2), mean as in eq. 7."""
    abar = Schedule("linear", 1000).alphas_cumprod
    t = 500
    x, x0, z = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    second = {}

    def denoise(value, step):
        second[step] = value
        return x0

    solve(denoise, x, [t, t - 1], ddim([t, t - 1], abar, eta=1.0), lambda i: z)
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

    solve(denoise, x, [t, t - 1], ddpm([t, t - 1], abar), lambda i: z)
    a_t, a_s = float(abar[t]), float(abar[t - 1])
    beta = 1 - a_t / a_s
    mean = math.sqrt(a_s) * beta / (1 - a_t) * x0 + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x
    torch.testing.assert_close(second[t - 1], mean + math.sqrt(beta) * z)


def test_dpm_solver_pp_2m_step_is_the_papers():
    """Lu et al. 2022, algorithm 2, with alpha, sigma, lambda in its own notation and r_i = h_{i-1} / h_i."""
    abar = Schedule("cosine", 1000).alphas_cumprod
    grid = [800, 500, 300]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lam = (alpha / sigma).log()
    h = [lam[grid[i + 1]] - lam[grid[i]] for i in range(2)]
    x, *x0 = (torch.randn(5, dtype=torch.float64) for _ in range(4))
    seen = []

    def denoise(value, t):
        seen.append(value)
        return x0[grid.index(t)]

    out = solve(denoise, x, grid, SAMPLERS["dpm++"](grid, abar, 0.0), no_noise)
    first = sigma[500] / sigma[800] * x - alpha[500] * (torch.exp(-h[0]) - 1) * x0[0]
    r = h[0] / h[1]
    d = (1 + 1 / (2 * r)) * x0[1] - 1 / (2 * r) * x0[0]
    second = sigma[300] / sigma[500] * first - alpha[300] * (torch.exp(-h[1]) - 1) * d
    torch.testing.assert_close(seen[1], first)
    torch.testing.assert_close(seen[2], second)
    assert torch.equal(out, x0[2])


def test_sde_dpm_solver_pp_2m_step_is_the_papers():
    """Lu et al. 2022, appendix C, in its notation: the first step of first order, then D1 = (x0 - x0_previous) / r."""
    abar = Schedule("cosine", 1000).alphas_cumprod
    grid = [800, 500, 300]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lam = (alpha / sigma).log()
    x, *x0 = (torch.randn(5, dtype=torch.float64) for _ in range(4))
    z = {step: torch.randn(5, dtype=torch.float64) for step in (1, 2)}
    seen = []

    def denoise(value, t):
        seen.append(value)
        return x0[grid.index(t)]

    solve(denoise, x, grid, SAMPLERS["dpm++sde"](grid, abar, 0.0), z.__getitem__)
    expected, h_before = [x], None
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        h = lam[t] - lam[s]
        d1 = (x0[i] - x0[i - 1]) / (h_before / h) if i else 0 * x
        drift = alpha[t] * (1 - torch.exp(-2 * h)) * (x0[i] + d1 / 2)
        noise = sigma[t] * torch.sqrt(1 - torch.exp(-2 * h)) * z[i + 1]
        expected.append(sigma[t] / sigma[s] * torch.exp(-h) * expected[-1] + drift + noise)
        h_before = h
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("solver", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_last_step_returns_the_clean_image_itself(solver, steps, eta):
    abar = Schedule("linear", 1000).alphas_cumprod
    rows = SAMPLERS[solver](timestep_grid(1000, steps), abar, eta)
    assert rows.shape == (steps, 4) and rows.dtype == torch.float64
    assert rows[-1].tolist() == [0, 1, 0, 0]
    assert rows[0, 2] == 0  # there is no x0 before the first
    noisy = solver in ("ddpm", "dpm++sde") or (solver == "ddim" and eta > 0)
    assert bool((rows[:-1, 3] > 0).all()) == (noisy or steps == 1)


@pytest.mark.parametrize("steps", [1, 7, 20, 1000])
def test_grid_falls_from_the_last_timestep(steps):
    grid = timestep_grid(1000, steps)
    assert len(grid) == steps and grid[0] == 999 and grid[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_grid_is_refused(steps):
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        timestep_grid(1000, steps)


class Network(torch.nn.Module):
    """A made-up network that predicts v and tells labels (9: no class) and times apart."""

    def forward(self, x, t, labels):
        return torch.tanh(0.7 * x + 0.1 * (labels % 9).view(-1, 1, 1, 1) - t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("guidance", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_engine_draws_what_the_solver_says_in_float64(sampler, guidance):
    schedule, shape, steps, beyond = Schedule("cosine", 1000), (3, 8, 6), 5, []
    labels, indices = torch.tensor([3, 1, 8]), torch.tensor([0, 7, 2])
    settings = GenerateConfig(balance_to=0, sampler=sampler, steps=steps, eta=0.3, guidance=guidance)
    engine = Sampler(Network(), schedule, "v", settings, shape, 9, 11, torch.float32, torch.device("cpu"))

    def denoise(x, t):
        abar, times = schedule.alphas_cumprod[t], torch.full((3,), t)
        with_class, without = (Network()(x, times, y) for y in (labels, torch.full((3,), 9)))
        x0 = abar.sqrt() * x - (1 - abar).sqrt() * (with_class + guidance * (with_class - without))
        beyond.append(float(x0.abs().max()))
        return x0.clamp(-1, 1)

    def noise(step):
        return normal(11, labels, indices, step, shape).double()

    grid = timestep_grid(1000, steps)
    exact = solve(denoise, noise(0), grid, SAMPLERS[sampler](grid, schedule.alphas_cumprod, 0.3), noise)
    assert max(beyond) > 1.01  # clipping matters here
    grey = (exact.permute(0, 2, 3, 1) + 1) * 127.5
    difference = engine.draw(labels, indices).double() - grey
    assert difference.abs().max() < 0.51  # rounding to whole grey levels


# ---- diffusers' schedulers: its coefficients are float32, hence the tolerance


def peer(name, abar, **settings):
    schedulers = pytest.importorskip("diffusers", reason="the bench extra (diffusers) is not installed").schedulers
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return getattr(schedulers, name)(
        trained_betas=betas.numpy(), prediction_type="sample", timestep_spacing="trailing", **settings
    )


def solve_with(scheduler, denoise, x, **options):
    for t in scheduler.timesteps.tolist():
        given = {key: value(t) for key, value in options.items()}
        x = scheduler.step(denoise(x, t), t, x, return_dict=False, **given)[0]
    return x


@pytest.fixture
def noisy():
    g = torch.Generator().manual_seed(1)
    return torch.randn(21, 4, 1, 2, 2, generator=g, dtype=torch.float64)  # the start and the noise of 20 steps


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_diffusers(schedule, eta, noisy):
    abar, grid = Schedule(schedule, 1000).alphas_cumprod, timestep_grid(1000, 20)
    scheduler = peer("DDIMScheduler", abar, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == grid
    denoise = gaussian_denoiser(abar)
    theirs = solve_with(
        scheduler, denoise, noisy[0], eta=lambda t: eta, variance_noise=lambda t: noisy[1 + grid.index(t)]
    )
    ours = solve(denoise, noisy[0], grid, ddim(grid, abar, eta), lambda step: noisy[step])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_is_diffusers(schedule, noisy, monkeypatch):
    """On a grid down to 0. On one that ends above it diffusers adds noise after the last step too; ours ends in x0."""
    abar, grid = Schedule(schedule, 1000).alphas_cumprod, [t - 49 for t in timestep_grid(1000, 20)]
    scheduler = peer("DDPMScheduler", abar, clip_sample=False, variance_type="fixed_large")
    scheduler.set_timesteps(timesteps=grid)
    drawn = iter(noisy[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(drawn))
    denoise = gaussian_denoiser(abar)
    theirs = solve_with(scheduler, denoise, noisy[0])
    ours = solve(denoise, noisy[0], grid, ddpm(grid, abar), lambda step: noisy[step])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("kind", ["", "sde"])
def test_dpm_solver_pp_2m_is_diffusers(schedule, steps, kind, noisy, monkeypatch):
    """Its last step, down to sigma = 0, is of first order as ours. On the cosine schedule its own grid leaves out the
    timesteps of lambda below lambda_min_clipped; here it gets ours."""
    abar, grid = Schedule(schedule, 1000).alphas_cumprod, timestep_grid(1000, steps)
    settings = {"algorithm_type": "sde-dpmsolver++"} if kind else {}
    scheduler = peer("DPMSolverMultistepScheduler", abar, solver_order=2, final_sigmas_type="zero", **settings)
    scheduler.set_timesteps(timesteps=grid)
    drawn = iter(noisy[1:])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", lambda *_, **__: next(drawn)
    )
    denoise = gaussian_denoiser(abar)
    theirs = solve_with(scheduler, denoise, noisy[0])
    noise = noisy.__getitem__ if kind else no_noise
    ours = solve(denoise, noisy[0], grid, SAMPLERS[f"dpm++{kind}"](grid, abar, 0.0), noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
