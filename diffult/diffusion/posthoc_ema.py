"""Averages of the weights whose length is chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3 and
appendix C).

A power-function average of exponent gamma weighs the weights of step s, when t steps are done, in proportion to the
profile over (s - 1, s]

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),  0 <= s <= t

Its length is told as sigma_rel, the profile's standard deviation as a share of t. Training keeps the averages of two
lengths and writes snapshots of both; afterwards the profile of any other length is the sum of the snapshots' profiles
that fits it best in least squares, and the weights are summed alike. With snapshots at 20 times the fit is off by 9 %
of the profile's norm at 0.02, 3 % at 0.03, 0.2 % at 0.07 and 0.12, 1.5 % at 0.2, 6 % at 0.25; at 0.28 by 18 % and at
0.3 by 64 %, as no snapshot tells the first steps apart.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffult.errors import UserError
from diffult.runs.files import load_tensors, save_tensors
from kernels.adamw_ema import AdamWEma

KEPT = (0.05, 0.10)  # sigma_rel of the averages that training keeps, as in the paper


@cache
def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent of a length: the largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1. There is one up
    to 0.3; 0.289 is the plain mean, gamma = 0."""
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def _inner(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integrals of the products of profiles, all broadcast against each other."""
    t = np.minimum(t_a, t_b)
    shares = (t / t_a) ** gamma_a * (t / t_b) ** gamma_b
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shares / np.maximum(t_a, t_b)


def solve_weights(t_i: np.ndarray, gamma_i: np.ndarray, t_r: float, gamma_r: float) -> np.ndarray:
    """How much of each snapshot makes up an average that was not kept (algorithm 3), summing to 1.

    The least squares alone need not sum to 1: at 0.3 they would shrink the network by a sixth.

    Args:
        t_i, gamma_i: steps done and exponents of the snapshots, float64 [N].
        t_r, gamma_r: those wanted.
    """
    gram = _inner(t_i[:, None], gamma_i[:, None], t_i, gamma_i)
    weights = np.linalg.solve(gram, _inner(t_i, gamma_i, np.array(t_r), np.array(gamma_r)))
    return weights / weights.sum()


def snapshot_steps(steps: int, count: int) -> list[int]:
    """After which of the steps snapshots are written: `count` equally far apart, the last at the end; at most all."""
    return sorted({-(-steps * k // count) for k in range(1, count + 1)})


def _file(folder: Path, step: int, sigma_rel: float) -> Path:
    return folder / f"{step:07d}-{sigma_rel:.2f}.safetensors"


def average(folder: Path, steps: list[int], sigma_rel: float) -> dict[str, Tensor]:
    """The average of length `sigma_rel` over the whole training: trained parameters by name, float32.

    Args:
        folder: of the snapshots.
        steps: after which they were written.

    Raises:
        UserError: a snapshot is missing or damaged.
    """
    snapshots = [(step, kept) for step in steps for kept in KEPT]
    if gone := [file for file in (_file(folder, *snapshot) for snapshot in snapshots) if not file.exists()]:
        raise UserError(f"{gone[0]}: not found; without it there is no ema_length but 0, or train again in a new run")
    times, gammas = np.array([(step, sigma_rel_to_gamma(kept)) for step, kept in snapshots], dtype=np.float64).T
    weights = solve_weights(times, gammas, steps[-1], sigma_rel_to_gamma(sigma_rel)).tolist()
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        for name, value in load_tensors(_file(folder, *snapshot))[0].items():
            total[name] = total.get(name, 0) + value.double() * weight
    return {name: value.float() for name, value in total.items()}


class PowerAverages:
    """The averages that training keeps beside the optimizer's own, flat as its buffers are: one pass over each."""

    def __init__(self, optimizer: AdamWEma) -> None:
        self.optimizer = optimizer
        self.averages = {sigma_rel: optimizer.master.clone() for sigma_rel in KEPT}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights when `step` steps are done: beta = (1 - 1/t)^(gamma + 1)."""
        for sigma_rel, flat in self.averages.items():
            flat.lerp_(self.optimizer.master, 1 - (1 - 1 / step) ** (sigma_rel_to_gamma(sigma_rel) + 1))

    def write(self, folder: Path, step: int, info: dict[str, str]) -> None:
        """Snapshots in float32. The paper has float16, but at 0.03 and below weights of some +-4 multiply its rounding
        to more than what the average and the last weights differ by (measured on digits-lt)."""
        for sigma_rel, flat in self.averages.items():
            save_tensors(_file(folder, step, sigma_rel), self.optimizer.views(flat), info)

    def state_dict(self) -> dict[str, Any]:
        """{sigma_rel: {name: float32}}, views."""
        return {str(sigma_rel): self.optimizer.views(flat) for sigma_rel, flat in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for sigma_rel, flat in self.averages.items():
            for name, view in self.optimizer.views(flat).items():
                view.copy_(state[str(sigma_rel)][name])
