"""The training objective of one batch: L_DDPM + L_CBDM + L_AID.

Every random number (timestep, noise, flip, dropped label, CBDM's other label) is keyed by the seed and the sample's
position in the training stream, so a sample's loss does not depend on micro-batches, processes and restarts, except
for the network's dropout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffult.config import DiffusionConfig
from diffult.diffusion.augment import augment
from diffult.diffusion.losses import aid_distance, aid_loss, cbdm_loss, ddpm_loss
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import autocast
from diffult.longtail.extractor import Extractor
from kernels.augment import normalise
from kernels.diffuse import diffuse
from kernels.random import normal, uniform

_CHOICES, _AUGMENT = 1, 2  # numbers of a sample's draws; the noise of `diffuse` is 0


class DiffusionLoss:
    """Losses of a batch by name. A sample whose label is dropped enters every term without class.

    L_CBDM reads every n-th sample of a batch, n = 1 / cbdm_share, and L_AID likewise: an unbiased estimate at that
    share of the cost.
    """

    def __init__(
        self,
        model: Callable[..., torch.Tensor],
        config: DiffusionConfig,
        schedule: Schedule,
        class_share: torch.Tensor,
        extractor: Extractor | None,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            model: (x_t, t, labels, augmentation label) -> prediction; the label num_classes stands for "no class".
            class_share: float [num_classes], the share of each class in the training batches; L_CBDM draws y' from it.
            extractor: phi0 and the radii d_f, for L_AID.
            dtype: of x_t.
        """
        self.model, self.config, self.schedule = model, config, schedule
        self.null_label = len(class_share)
        self.extractor, self.seed, self.dtype = extractor, seed, dtype
        self.cumulative_share = class_share.double().cumsum(0).float()
        self.noise_last = float((1 - schedule.alphas_cumprod[-1]).sqrt())

    def __call__(
        self, images: torch.Tensor, y: torch.Tensor, positions: torch.Tensor, with_aid: bool = True
    ) -> dict[str, torch.Tensor]:
        """Scalar losses by name: "loss" is their sum, the others are detached.

        Args:
            images: uint8 [B, H, W, C].
            y: labels, int64 [B].
            positions: each sample's place in the training stream, int64 [B].
            with_aid: False leaves L_AID out of this step.
        """
        config, schedule = self.config, self.schedule
        u = uniform(self.seed, positions >> 32, positions, _CHOICES, 4)
        t = (u[:, 0] * schedule.timesteps).ceil().long() - 1
        labels = torch.where(u[:, 1] <= config.label_dropout, self.null_label, y)
        flips = u[:, 2] <= 0.5 if config.flip else None
        x0, augment_label = images, None
        if config.augment_probability:
            x0, augment_label = self._augmented(_clean(images, flips), positions)
            flips = None
        x_t, target, eps = diffuse(
            x0, self.seed, positions, schedule.diffuse_coefficients(config.prediction, t), flips, self.dtype,
            with_eps=config.aid and with_aid,
        )  # fmt: skip

        inputs: list[torch.Tensor | None] = [x_t, t, labels, augment_label]
        if config.cbdm:
            n = stride(config.cbdm_share)
            other = torch.searchsorted(self.cumulative_share, u[::n, 3].contiguous()).clamp(max=self.null_label - 1)
            again = (x_t[::n], t[::n], other, None if augment_label is None else augment_label[::n])
            pairs = zip(inputs, again, strict=True)
            inputs = [None if a is None or b is None else torch.cat([a, b]) for a, b in pairs]
        out_all = self.model(*inputs).float()
        out, out_other = out_all[: len(y)], out_all[len(y) :]

        weight = schedule.min_snr_weight(config.prediction, t, config.min_snr) if config.min_snr else None
        losses = {"ddpm": ddpm_loss(out, target, weight)}
        if config.cbdm:
            x_n, t_n = x_t[::n].float(), t[::n]
            eps_theta, eps_other = (
                schedule.to_eps(config.prediction, prediction, x_n, t_n) for prediction in (out[::n], out_other)
            )
            tau, gamma = config.cbdm_tau, config.cbdm_gamma
            losses["cbdm"] = cbdm_loss(eps_theta, eps_other, t_n, schedule.timesteps, tau, gamma)
        if eps is not None:
            n = stride(config.aid_share)
            clean = _clean(x0[::n], None if flips is None else flips[::n])
            eps_theta = schedule.to_eps(config.prediction, out[::n], x_t[::n].float(), t[::n])
            losses["aid"] = self._aid(clean, clean + (eps[::n] - eps_theta), t[::n], y[::n])
        return {"loss": torch.stack(list(losses.values())).sum()} | {k: v.detach() for k, v in losses.items()}

    def _augmented(self, x0: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, high = self.config, positions >> 32
        return augment(
            x0,
            config.augment_probability,
            uniform(self.seed, high, positions, _AUGMENT, 8),
            normal(self.seed, high, positions, _AUGMENT + 1, (4, 1, 1)).flatten(1),
            flips=config.augment_flips,
        )

    def _aid(self, x0: torch.Tensor, shifted: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert self.extractor is not None, "diffusion.aid needs the extractor"
        with autocast(self.dtype, x0.device):
            with torch.no_grad():
                real = self.extractor.features(x0)
            moved = self.extractor.features(shifted)
        _, s = self.schedule.levels(t)
        distance = aid_distance(real, moved, s.flatten(), self.noise_last)
        return aid_loss(distance, self.extractor.statistics.radii[y], self.config.aid_alpha)


def stride(share: float) -> int:
    """n such that every n-th sample makes that share of a batch."""
    return round(1 / share)


def _clean(images: torch.Tensor, flips: torch.Tensor | None) -> torch.Tensor:
    """The clean images of `diffuse`, float32 [B, C, H, W] in [-1, 1], from uint8 or already so."""
    x0 = normalise(images) if images.dtype == torch.uint8 else images
    return x0 if flips is None else torch.where(flips.view(-1, 1, 1, 1), x0.flip(3), x0)
