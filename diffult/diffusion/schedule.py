"""The forward process and the three ways to predict.

x_t = a_t x_0 + s_t eps with a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t) (Ho et al. 2020, eq. 4). A network predicts

    epsilon: out = eps        x0: out = x_0        v: out = a_t eps - s_t x_0  (Salimans & Ho 2022)
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Prediction = Literal["epsilon", "x0", "v"]
ScheduleName = Literal["linear", "cosine"]


class Schedule:
    """Signal and noise levels of T timesteps. `alphas_cumprod`: abar_t, float64 [T] on the CPU, falling."""

    def __init__(self, name: ScheduleName, timesteps: int, device: torch.device | str = "cpu") -> None:
        """linear: beta from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T otherwise (Ho et al. 2020).
        cosine: abar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + 0.008) / 1.008), beta <= 0.999 (Nichol & Dhariwal 2021).
        """
        if name == "linear":
            scale = 1000 / timesteps
            betas = torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)
        else:
            grid = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.timesteps = timesteps
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._signal = self.alphas_cumprod.sqrt().to(device, torch.float32)
        self._noise = (1 - self.alphas_cumprod).sqrt().to(device, torch.float32)

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a_t and s_t, float32 [B, 1, 1, 1], for timesteps t, int64 [B]."""
        return self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)

    def to_eps(self, prediction: Prediction, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise that the network's output implies, [B, C, H, W]."""
        if prediction == "epsilon":
            return out
        a, s = self.levels(t)
        if prediction == "x0":
            return (x_t - a * out) / s
        return s * x_t + a * out

    def x0_coefficients(self, prediction: Prediction, t: int) -> tuple[float, float]:
        """(p_x, p_out): the clean image is p_x x_t + p_out out."""
        abar = float(self.alphas_cumprod[t])
        a, s = math.sqrt(abar), math.sqrt(1 - abar)
        return {"epsilon": (1 / a, -s / a), "x0": (0.0, 1.0), "v": (a, -s)}[prediction]

    def diffuse_coefficients(self, prediction: Prediction, t: torch.Tensor) -> torch.Tensor:
        """(a, s, k_0, k_e), float32 [B, 4]: x_t = a x_0 + s eps and the target is k_0 x_0 + k_e eps; t: int64 [B]."""
        a, s = self._signal[t], self._noise[t]
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        target = {"epsilon": (zero, one), "x0": (one, zero), "v": (-s, a)}[prediction]
        return torch.stack([a, s, *target], dim=1)

    def min_snr_weight(self, prediction: Prediction, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """min-SNR loss weight, float32 [B] (Hang et al. 2023, section 3.4): min(SNR, gamma) on the x0 error, which is
        min(SNR, gamma) / SNR on the noise error and min(SNR, gamma) / (SNR + 1) on the v error."""
        a, s = (level.flatten() for level in self.levels(t))
        snr = (a / s) ** 2
        return snr.clamp(max=gamma) / {"epsilon": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]
