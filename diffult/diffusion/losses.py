"""The three terms of DiffuLT's training loss, L = L_DDPM + L_CBDM + L_AID.

Squared norms are means over the pixels, as in the code of DDPM and CBDM.
"""

from __future__ import annotations

import torch


def _pixel_mean(x: torch.Tensor) -> torch.Tensor:
    return x.float().flatten(1).mean(1)


def ddpm_loss(out: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """L_DDPM = E w_t |target - out|^2 (Ho et al. 2020, eq. 14, where target = eps and w = 1).

    Args:
        out, target: [B, C, H, W], in the network's own prediction space.
        weight: float [B] per sample (min-SNR), or None for 1.
    """
    per_sample = _pixel_mean((out - target) ** 2)
    return per_sample.mean() if weight is None else (weight * per_sample).mean()


def cbdm_loss(
    eps: torch.Tensor, eps_other: torch.Tensor, t: torch.Tensor, timesteps: int, tau: float, gamma: float
) -> torch.Tensor:
    """L_CBDM (Qin et al. 2023, "Class-balancing diffusion models", as used by DiffuLT):

        tau (t / T) ( |eps_theta(y) - sg eps_theta(y')|^2 + gamma |sg eps_theta(y) - eps_theta(y')|^2 )

    with one label y' per image, drawn from the training labels: an estimate of the paper's average over y'. t counts
    as a share of T as in CBDM's code; sg stops the gradient.

    Args:
        eps: eps_theta(x_t, t, y), [B, C, H, W].
        eps_other: eps_theta(x_t, t, y'), [B, C, H, W].
        t: int64 [B].
    """
    pull = _pixel_mean((eps - eps_other.detach()) ** 2)
    push_back = _pixel_mean((eps.detach() - eps_other) ** 2)
    return (tau * (t.float() / timesteps) * (pull + gamma * push_back)).mean()


def aid_distance(
    features_real: torch.Tensor, features_shifted: torch.Tensor, noise_level: torch.Tensor, noise_last: float
) -> torch.Tensor:
    """d_t of DiffuLT: (s_T / s_t) |phi0(x0) - phi0(x0 + eps - eps_theta)|_2, float [B].

    Args:
        features_real, features_shifted: [B, F], phi0 of x0 and of x0 + eps - eps_theta(x_t, t, y).
        noise_level: s_t = sqrt(1 - abar_t), float [B].
        noise_last: s_T.
    """
    distance = torch.linalg.vector_norm((features_real - features_shifted).float(), dim=1)
    return noise_last / noise_level * distance


def aid_loss(distance: torch.Tensor, radius: torch.Tensor, alpha: float) -> torch.Tensor:
    """L_AID = alpha E (d_t - 3/2 d_f)^2 (DiffuLT): samples are drawn to the middle of the AID shell (d_f, 2 d_f].

    Args:
        distance: d_t, float [B].
        radius: d_f of each sample's class, float [B].
    """
    return alpha * ((distance - 1.5 * radius) ** 2).mean()
