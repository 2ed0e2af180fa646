"""Stage 5: the final classifiers, one for each method compared, all with the same network, steps, rate and seed.

Writes classifier/METHOD.safetensors.
"""

from __future__ import annotations

import numpy as np
import torch

from diffult.classification import fit
from diffult.cli import RunOption, main
from diffult.device import compute_dtype, pick_device
from diffult.files import save_tensors
from diffult.longtail.losses import log_prior, weighted_cross_entropy
from diffult.longtail.methods import RECIPES, Method
from diffult.models.resnet import build_classifier
from diffult.parts import open_part
from diffult.run_dir import RunDir
from ffcv_writers import Batch, ImageSet, Loader

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


def _train(run: RunDir, method: Method, train: ImageSet, num_classes: int) -> None:
    config, recipe = run.config.classifier, RECIPES[method]
    device = pick_device()
    weight = np.where(train.synthetic, config.omega, 1.0)
    effective_counts = np.bincount(train.labels, weight, minlength=num_classes)
    prior = log_prior(torch.from_numpy(effective_counts)).to(device)

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        if recipe.logit_adjusted:
            logits = logits.float() + prior
        return weighted_cross_entropy(logits, batch.labels, batch.synthetic, config.omega)

    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, run.config.data.channels, config.image_size)
    model.to(device)
    fit(
        f"classifier {method}",
        model,
        Loader(train, config.batch_size, device=device),
        recipe.order,
        config,
        loss,
        run.folder("classifier") / f"{method}.state.pt",
        (run.config.seed, _STAGE),
        run.config.hash,
        compute_dtype(run.config.precision, device),
        device,
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
