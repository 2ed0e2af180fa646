"""Stage 5: the final classifiers, one for each method compared, all with the same network, steps, rate and seed.

Writes classifier/METHOD.safetensors.
"""

from __future__ import annotations

import numpy as np
import torch

from diffult.cli import RunOption, main
from diffult.config import ClassifierConfig
from diffult.engine.device import compute_dtype, pick_device
from diffult.longtail.classification import fit
from diffult.longtail.losses import log_prior
from diffult.longtail.methods import RECIPES, Method, Recipe
from diffult.models.resnet import build_classifier
from diffult.parts import open_part
from diffult.runs.files import save_tensors
from diffult.runs.run_dir import RunDir
from ffcv_writers import ClassBalanced, ImageSet, Loader, Natural, Order, Ratio, Weighted

_STAGE = 3  # its number among the seeds


def train_classifier(run: RunDir) -> None:
    """Trains the classifier of every method of the configuration; those finished before are skipped."""
    with run.stage("classifier") as note:
        if note is None:
            return
        real, both = open_part(run, "real"), open_part(run, "real", "synthetic")
        for method in run.config.classifier.methods:
            if not (run.folder("classifier") / f"{method}.safetensors").exists():
                _train(run, method, both if RECIPES[method].synthetic else real, int(real.labels.max()) + 1)


def training_order(recipe: Recipe, config: ClassifierConfig, train: ImageSet) -> tuple[Order, np.ndarray]:
    """The order in which a method draws its images, and how often each is drawn beside the others, float64 (N,)."""
    count, counts = len(train), np.bincount(train.labels)
    if recipe.resampled:
        if config.resample_power == 1:
            return ClassBalanced(train.labels), 1.0 / counts[train.labels]
        weights = counts[train.labels] ** -config.resample_power
        return Weighted(weights), weights
    generated = config.synthetic_images if train.synthetic.any() else 0
    if not generated:
        return Natural(count), np.ones(count)
    real = config.batch_size - generated
    drawn = np.where(train.synthetic, generated / train.synthetic.sum(), real / (~train.synthetic).sum())
    return Ratio(train.synthetic, real, generated), drawn


def _train(run: RunDir, method: Method, train: ImageSet, num_classes: int) -> None:
    config, recipe = run.config.classifier, RECIPES[method]
    device = pick_device()
    order, drawn = training_order(recipe, config, train)
    effective_counts = np.bincount(train.labels, drawn * np.where(train.synthetic, config.omega, 1.0), num_classes)
    prior = log_prior(torch.from_numpy(effective_counts)).to(device) if recipe.logit_adjusted else None
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, run.config.data.channels, config.image_size)
    model.to(device)
    fit(
        f"classifier {method}",
        model,
        Loader(train, config.batch_size, device=device),
        order,
        config,
        run.folder("classifier") / f"{method}.state.pt",
        (run.config.seed, _STAGE),
        run.config.hash,
        compute_dtype(run.config.precision, device),
        device,
        config.omega,
        prior,
    )
    info = {"config": run.config.hash, "network": config.network, "num_classes": str(num_classes)}
    save_tensors(run.folder("classifier") / f"{method}.safetensors", model.state_dict(), info)


def command(run: RunOption) -> None:
    """Train the final classifiers on real and synthetic images, and the rivals under the same budget."""
    run_dir = RunDir.open(run)
    run_dir.require("betons", "balance")
    train_classifier(run_dir)


if __name__ == "__main__":
    main(command)
