"""Stage 2: the class-conditional diffusion model, from random weights, on the long-tailed set alone.

Writes diffusion/ema.safetensors, the averaged weights with which samples are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffult.artifacts import build_unet, load_extractor
from diffult.cli import PresetOption, RunOption, SetOption, main
from diffult.config import DiffusionConfig
from diffult.data import Data, load_data
from diffult.device import autocast, compute_dtype, pick_device
from diffult.diffusion.augment import augment
from diffult.diffusion.losses import aid_distance, aid_loss, cbdm_loss, ddpm_loss
from diffult.diffusion.schedule import Schedule
from diffult.files import save_tensors
from diffult.longtail.extractor import Extractor
from diffult.run_dir import RunDir
from diffult.training import Ema, learning_rate_factor, train_loop
from ffcv_writers import stream_chunks
from kernels.augment import normalise

_STAGE = 2  # its number among the seeds


class DiffusionLoss:
    """L_DDPM + L_CBDM + L_AID of one batch. Draws its random numbers from torch's global generator.

    A sample whose label is dropped takes part in L_CBDM and L_AID with eps_theta(x_t, t, no class).
    """

    def __init__(
        self,
        model: nn.Module,
        config: DiffusionConfig,
        schedule: Schedule,
        class_share: torch.Tensor,
        null_label: int,
        extractor: Extractor,
    ) -> None:
        """
        Args:
            class_share: float [num_classes], the share of each class in the training batches; L_CBDM draws y' from it.
            null_label: the label that stands for "no class".
            extractor: phi0 with the radii d_f, for L_AID.
        """
        self.model, self.config, self.schedule = model, config, schedule
        self.class_share, self.null_label = class_share, null_label
        self.extractor = extractor
        self.noise_last = float((1 - schedule.alphas_cumprod[-1]).sqrt())

    def __call__(self, x0: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses by name for clean images x0 [B, C, H, W] in [-1, 1] with labels y [B]; "loss" is their sum."""
        config, schedule = self.config, self.schedule
        x0, augment_label = self._augmented(x0)
        t = torch.randint(schedule.timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        x_t = schedule.add_noise(x0, eps, t)
        dropped = torch.rand(len(y), device=y.device) < config.label_dropout
        labels = torch.where(dropped, self.null_label, y)

        if config.cbdm:
            y_other = torch.multinomial(self.class_share, len(y), replacement=True)
            both = (torch.cat([z, z]) if z is not None else None for z in (x_t, t, augment_label))
            x2, t2, augment2 = both
            out, out_other = self.model(x2, t2, torch.cat([labels, y_other]), augment2).float().chunk(2)
        else:
            out = self.model(x_t, t, labels, augment_label).float()

        weight = schedule.min_snr_weight(config.prediction, t, config.min_snr) if config.min_snr else None
        losses = {"ddpm": ddpm_loss(out, schedule.target(config.prediction, x0, eps, t), weight)}
        if config.cbdm or config.aid:
            eps_theta = schedule.to_eps(config.prediction, out, x_t, t)
        if config.cbdm:
            eps_other = schedule.to_eps(config.prediction, out_other, x_t, t)
            losses["cbdm"] = cbdm_loss(eps_theta, eps_other, t, schedule.timesteps, config.cbdm_tau, config.cbdm_gamma)
        if config.aid:
            losses["aid"] = self._aid(x0, eps, eps_theta, t, y)
        return {"loss": torch.stack(list(losses.values())).sum()} | {k: v.detach() for k, v in losses.items()}

    def _augmented(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        if config.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0.flip(3), x0)
        if not config.augment_probability:
            return x0, None
        return augment(x0, config.augment_probability, flips=config.augment_flips)

    def _aid(
        self, x0: torch.Tensor, eps: torch.Tensor, eps_theta: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        real = self.extractor.features(x0)
        shifted = self.extractor.features(x0 + eps - eps_theta)
        _, s = self.schedule.levels(t)
        distance = aid_distance(real, shifted, s.flatten(), self.noise_last)
        return aid_loss(distance, self.extractor.statistics.radii[y], self.config.aid_alpha)


def train_diffusion(run: RunDir, data: Data, extractor: Extractor) -> None:
    """Trains the diffusion model on the long-tailed set.

    Args:
        extractor: phi0, which L_AID needs.
    """
    with run.stage("diffusion") as note:
        if note is not None:
            _train(run, data, extractor, note)


def _train(run: RunDir, data: Data, extractor: Extractor, note: dict[str, Any]) -> None:
    config, train = run.config.diffusion, data.train
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    num_classes = len(train.classes)
    torch.manual_seed(run.config.seed)
    model = build_unet(run.config, num_classes).to(device).train()
    ema = Ema(model, config.ema)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: learning_rate_factor(i, config.steps, config.warmup_steps, cosine=config.cosine_decay),
    )
    balanced = config.batches == "class_balanced"
    counts = torch.from_numpy(train.counts()).to(device, torch.float32)
    loss = DiffusionLoss(
        model,
        config,
        Schedule(config.schedule, config.timesteps, device),
        torch.ones_like(counts) / num_classes if balanced else counts / counts.sum(),
        num_classes,
        extractor,
    )
    images = torch.from_numpy(train.load()).to(device)
    labels = torch.from_numpy(train.labels).to(device)

    def batches(start: int) -> Iterator[torch.Tensor]:
        size = config.batch_size
        for order in stream_chunks(config.batches, train.labels, run.config.seed, size, start, config.steps):
            yield from torch.from_numpy(order).split(size)

    def step(i: int, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = rows.to(device)
        with autocast(dtype, device):
            losses = loss(normalise(images[rows]), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        scheduler.step()
        ema.update(model, i)
        return losses

    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    folder = run.folder("diffusion")
    train_loop(
        "diffusion", config.steps, batches, step, parts, folder / "state.pt", config.checkpoint_every,
        (run.config.seed, _STAGE), run.config.hash,
    )  # fmt: skip
    info = {
        "config": run.config.hash,
        "num_classes": str(num_classes),
        "unet": run.config.unet.model_dump_json(),
    }
    save_tensors(folder / "ema.safetensors", ema.state_dict(), info)
    note["images"] = config.steps * config.batch_size


def command(run: RunOption, preset: PresetOption = None, set_: SetOption = None) -> None:
    """Train the class-conditional diffusion model on the long-tailed set. Needs the extractor stage."""
    run_dir = RunDir.open(run, preset, set_)
    data = load_data(run_dir.config.data)
    train_diffusion(run_dir, data, load_extractor(run_dir, pick_device()))


if __name__ == "__main__":
    main(command)
