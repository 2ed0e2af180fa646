"""Schedule and losses against a second, naive writing of the formulas in float64."""

import math

import numpy as np
import pytest
import torch

from diffult.diffusion.losses import aid_distance, aid_loss, cbdm_loss, ddpm_loss
from diffult.diffusion.schedule import Schedule

T = 1000
PREDICTIONS = ["epsilon", "x0", "v"]


def naive_abar(name: str, timesteps: int) -> list[float]:
    if name == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / (timesteps - 1) for i in range(timesteps)]
    else:
        f = [math.cos((i / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(timesteps + 1)]
        betas = [min(0.999, 1 - f[i + 1] / f[i]) for i in range(timesteps)]
    abar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        abar.append(product)
    return abar


def diffused(schedule: Schedule, prediction: str, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor):
    """x_t and the network's target as the schedule's coefficients say."""
    a, s, k_0, k_e = schedule.diffuse_coefficients(prediction, t)[:, :, None, None, None].unbind(1)
    return a * x0 + s * eps, k_0 * x0 + k_e * eps


def clean(schedule: Schedule, prediction: str, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The image that an output implies as the schedule's coefficients say."""
    rows = torch.tensor([schedule.x0_coefficients(prediction, i) for i in t.tolist()], dtype=torch.float64)
    p_x, p_out = rows[:, :, None, None, None].unbind(1)
    return p_x * x_t + p_out * out


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x0, eps, other = (torch.randn(6, 3, 4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    return x0, eps, other, torch.randint(1, T - 1, (6,), generator=g)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_is_the_published_one(name):
    schedule = Schedule(name, T)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), naive_abar(name, T), rtol=1e-12)
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_linear_schedule_keeps_its_ends_at_other_lengths():
    assert Schedule("linear", 250).alphas_cumprod[-1] == pytest.approx(naive_abar("linear", T)[-1], rel=0.3)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_gives_back_noise_and_image(name, prediction, batch):
    x0, eps, _, t = batch
    schedule = Schedule(name, T)
    x_t, target = diffused(schedule, prediction, x0, eps, t)
    abar = torch.tensor([naive_abar(name, T)[i] for i in t.tolist()], dtype=torch.float64).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * eps, rtol=1e-5, atol=1e-6)
    naive = {"epsilon": eps, "x0": x0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[prediction]
    torch.testing.assert_close(target, naive, rtol=1e-5, atol=1e-6)
    middle = (t > 20) & (t < 900)  # at the ends one of the two is lost in the other
    torch.testing.assert_close(schedule.to_eps(prediction, target, x_t, t)[middle], eps[middle], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(clean(schedule, prediction, target, x_t, t)[middle], x0[middle], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_x0_error_by_clipped_snr(prediction, batch):
    """Whatever is predicted, w |error|^2 must be min(SNR, gamma) |x0 error|^2."""
    x0, eps, other, t = batch
    schedule, gamma = Schedule("cosine", T), 5.0
    middle = (t > 20) & (t < 900)
    x0, eps, other, t = (z[middle] for z in (x0, eps, other, t))
    x_t, target = diffused(schedule, prediction, x0, eps, t)
    out = target + 0.1 * other
    weighted = schedule.min_snr_weight(prediction, t, gamma) * (0.1 * other).pow(2).flatten(1).mean(1)
    x0_error = (clean(schedule, prediction, out, x_t, t) - x0).pow(2).flatten(1).mean(1)
    abar = schedule.alphas_cumprod[t]
    torch.testing.assert_close(
        weighted, (abar / (1 - abar)).clamp(max=gamma) * x0_error, rtol=1e-2, atol=1e-6, check_dtype=False
    )


def test_ddpm_loss(batch):
    _, eps, other, _ = batch
    weight = torch.rand(6, dtype=torch.float64)
    naive = np.mean(
        [w * np.mean((e - o) ** 2) for w, e, o in zip(weight.numpy(), eps.numpy(), other.numpy(), strict=True)]
    )
    assert float(ddpm_loss(eps, other, weight)) == pytest.approx(naive, rel=1e-5)
    assert float(ddpm_loss(eps, other)) == pytest.approx(float(((eps - other) ** 2).mean()), rel=1e-5)


def test_cbdm_loss_value_and_stopped_gradients(batch):
    _, a, b, t = batch
    a, b = a.requires_grad_(), b.requires_grad_()
    tau, gamma = 1.3, 0.25
    loss = cbdm_loss(a, b, t, T, tau, gamma)
    weight = (tau * t.double() / T).view(-1, 1, 1, 1)
    difference = (a - b).detach()
    pixels = difference[0].numel()
    naive = (weight.flatten() * (1 + gamma) * difference.pow(2).flatten(1).mean(1)).mean()
    assert loss.item() == pytest.approx(float(naive), rel=1e-5)
    loss.backward()
    # the first norm moves eps(y) alone, the second, gamma times, eps(y') alone
    expected = 2 * weight * difference / pixels / len(t)
    torch.testing.assert_close(a.grad, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(b.grad, -gamma * expected, rtol=1e-5, atol=1e-9)


def test_cbdm_over_all_labels_is_the_papers_formula(batch):
    """One y' a time, averaged over all y', is (tau t / T |Y|) sum over y' of both norms."""
    _, a, _, t = batch
    others = torch.randn(7, *a.shape, dtype=torch.float64)
    ours = np.mean([float(cbdm_loss(a, other, t, T, 1.0, 0.25)) for other in others])
    naive = 0.0
    for i in range(len(t)):
        terms = sum(float(((a[i] - o[i]) ** 2).mean()) * 1.25 for o in others)
        naive += float(t[i]) / T / len(others) * terms
    assert ours == pytest.approx(naive / len(t), rel=1e-5)


def test_aid_loss(batch):
    t = batch[3]
    real, shifted = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    radius = torch.rand(6, dtype=torch.float64) + 0.5
    abar = naive_abar("linear", T)
    noise_level = torch.tensor([math.sqrt(1 - abar[i]) for i in t.tolist()], dtype=torch.float64)
    d = aid_distance(real, shifted, noise_level, math.sqrt(1 - abar[-1]))
    naive = [
        math.sqrt(1 - abar[-1]) / math.sqrt(1 - abar[i]) * math.dist(r, s)
        for i, r, s in zip(t.tolist(), real.tolist(), shifted.tolist(), strict=True)
    ]
    np.testing.assert_allclose(d.numpy(), naive, rtol=1e-5)
    expected = 0.1 * np.mean([(a - 1.5 * b) ** 2 for a, b in zip(naive, radius.tolist(), strict=True)])
    assert float(aid_loss(d, radius, 0.1)) == pytest.approx(expected, rel=1e-5)
