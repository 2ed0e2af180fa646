"""Checks of a diffusion model in training: its loss on held-out images, the copies among its samples, and what they
teach."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import numpy as np
import torch

from diffult.config import Config, DiffusionConfig
from diffult.data.packing import Packed
from diffult.diffusion.held_out import FixedNoiseLoss
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import compute_dtype
from diffult.engine.distributed import World
from diffult.engine.early_stopping import EarlyStopping, Judgement
from diffult.generation.preview import preview_settings
from diffult.generation.sampler import Sampler
from diffult.longtail.classification import extract_features
from diffult.longtail.copies import copies_among, measure_copies, rows_at_a_time
from diffult.longtail.extractor import Extractor
from diffult.longtail.linear_probe import probe_accuracy
from diffult.models.unet import build_unet
from ffcv_writers import ImageSet, Loader
from kernels.adamw_ema import AdamWEma

log = logging.getLogger(__name__)
# Of the training's evaluations of the network, a step's backward counted as two, so many are made in checks.
CHECK_SHARE = 0.04
_MOST_ITEMS, _MOST_SAMPLES = 4096, 1024  # of a check, where there are fewer classes
SCORED = "held-out loss"


def score(values: Mapping[str, float]) -> float:
    """What decides how long is trained, from the values of a check; lower is better. SCORED is its name."""
    return values["held_out_loss"]


class ModelChecks:
    """Measures the averaged weights. Training is not affected: the weights are copied, and torch's generators are not
    used. How much is measured follows from `check_every`: a check takes CHECK_SHARE of the network evaluations between
    two of them, half of it for the losses and half for samples, and at least one image of each class.

    Every process calls it and gets the same values: each computes its share.
    """

    def __init__(
        self,
        config: Config,
        packed: Packed,
        extractor: Extractor,
        optimizer: AdamWEma,
        batch_size: int,
        world: World,
    ) -> None:
        """
        Args:
            packed: with validation images.
            optimizer: of the network in training, whose averages are measured.
            batch_size: images computed at a time; as many as the training computes at a time fit.
        """
        assert packed.val is not None
        self.extractor, self.optimizer, self.world = extractor, optimizer, world
        device, self.classes, diffusion = optimizer.ema.device, len(packed.classes), config.diffusion
        self.dtype, self.mirrored = compute_dtype(config.precision, device), diffusion.flip
        self.unet = build_unet(config, self.classes).eval().requires_grad_(False).to(device, self.dtype)
        items, samples = check_sizes(config, self.classes)
        # Not the seed of training or of `generate`: noise that the model has not seen, and samples that are not kept.
        seeds = np.random.SeedSequence((config.seed, 0x4E1D)).generate_state(2, np.uint64)
        seed, drawn_seed = map(int, seeds)
        self.labels, self.indices = (part.flatten() for part in np.indices((self.classes, samples)))
        self.batch_size = min(batch_size, len(self.labels))
        self.sampler = Sampler.for_run(config, self.unet, preview_settings(diffusion.timesteps), drawn_seed)

        def loader(image_set: ImageSet, rows: int) -> Loader:
            return Loader(image_set, rows, device=device, crop=config.data.view(config.data.image_size))

        schedule = Schedule(diffusion.schedule, diffusion.timesteps, device)
        classes = np.unique(packed.val.labels)
        self.losses = {
            name: FixedNoiseLoss(
                loader(images, batch_size), classes, items, diffusion, schedule, seed, self.dtype, world
            )
            for name, images in {"held_out_loss": packed.val, "train_loss": packed.train}.items()
        }
        rows = rows_at_a_time(config.data.image_size, config.data.channels)
        self.train, held_out = loader(packed.train, rows), loader(packed.val, rows)
        thresholds = np.empty(0)
        if world.is_main:
            self.features, _ = extract_features(extractor.network, held_out, self.dtype)
            self.features_labels = packed.val.labels
            copies = measure_copies(self.train, None, held_out, extractor, self.dtype, self.mirrored)
            thresholds = copies["threshold"].numpy()
            _warn_without(thresholds)
        self.thresholds = world.gather(thresholds)[0]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The values by name: "held_out_loss" and "train_loss", see `FixedNoiseLoss`; "copies", percent of the samples
        of the classes that have a threshold (`copy_thresholds`), not there where none has; "cas", percent, see
        `probe_accuracy`; and "check_seconds"."""
        begun = time.perf_counter()
        self.unet.load_state_dict(self.optimizer.ema_state_dict())
        losses = {name: loss(self.unet) for name, loss in self.losses.items()}
        everyone = self.world.gather((losses, self._samples()))
        values = {}
        if self.world.is_main:  # for all, or the last digits might differ between machines
            for name in self.losses:
                total, items = np.sum([part[name] for part, _ in everyone], axis=0)
                values[name] = float(total / items)
            labels, features, copies = map(np.concatenate, zip(*(part for _, part in everyone), strict=True))
            known = ~np.isnan(self.thresholds[labels])
            if known.any():
                values["copies"] = 100.0 * float(copies[known].mean())
            held_out = self.features.cpu().numpy()
            values["cas"] = probe_accuracy(features, labels, held_out, self.features_labels, self.classes)
            values["check_seconds"] = round(time.perf_counter() - begun, 3)
        return self.world.gather(values)[0]

    def _samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of this process's samples the labels, int64 [N], features, float32 [N, F], and copies, bool [N]."""
        own = slice(self.world.rank, None, self.world.size)
        labels, indices = self.labels[own], self.indices[own]
        drawn = self.sampler.draw_all(labels, indices, self.batch_size)
        features = self.extractor.features_of(drawn, self.batch_size, self.dtype)
        copies = copies_among(drawn, labels, self.train, self.thresholds, self.mirrored)
        return labels, features.cpu().numpy(), copies


def _warn_without(thresholds: np.ndarray) -> None:
    """Logs a warning where copies in some classes, or in all, cannot be told."""
    missing = int(np.isnan(thresholds).sum())
    if missing:
        log.warning(
            "diffusion: copies in %d of %d classes are not counted, so diffusion.max_copies %s: too few validation "
            "images; data.val_per_class keeps more",
            missing,
            len(thresholds),
            "has no effect" if missing == len(thresholds) else "is about the others",
        )


def check_sizes(config: Config, classes: int) -> tuple[int, int]:
    """Items of each of the two losses and samples, of one class and in one check."""
    diffusion = config.diffusion
    half = CHECK_SHARE * 3 * diffusion.check_every * diffusion.batch_size / 2
    evaluations = preview_settings(diffusion.timesteps).evaluations
    items, samples = min(half / 2, _MOST_ITEMS), min(half / evaluations, _MOST_SAMPLES)
    return max(1, int(items / classes)), max(1, int(samples / classes))


def early_stopping(checks: ModelChecks, config: DiffusionConfig) -> EarlyStopping:
    """Runs the checks; with `config.early_stopping` training ends by their `score`, or at too many copies."""

    def judge() -> Judgement:
        values = checks()
        share = values.get("copies", 0.0)
        fault = f"{share:.0f} % of the samples are copies of training images, above diffusion.max_copies"
        return Judgement(values, score(values), fault if share > 100 * config.max_copies else "")

    patience = config.patience if config.early_stopping else None
    return EarlyStopping(config.check_every, judge, checks.optimizer.ema_state_dict, patience, SCORED)
