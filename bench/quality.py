"""How good samples are, seen by a judge that was trained on the whole, balanced set.

The judge measures and is used for nothing else: the method never sees more than the long-tailed set. Distances are to
the validation images, which serve choices; the test split stays unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffult.engine.device import pick_device
from diffult.generate import open_sampler
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.pack import pack
from diffult.runs.run_dir import RunDir
from diffult.train_extractor import train_extractor
from ffcv_writers import ImageSet
from kernels.augment import normalise

_BATCH = 256


def train_judge(preset: str, overrides: list[str], folder: Path) -> Extractor:
    """The preset's extractor network, trained on every image of the source's training split, or found in `folder`."""
    natural = ["data.profile=natural", "data.val_per_class=0", "seed=1000"]
    run = RunDir.open(folder, preset, [*overrides, *natural])
    pack(run)
    train_extractor(run)
    return load_extractor(run.folder("extractor"), pick_device())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, float [N, F] and [M, F] (Heusel et
    al. 2017): |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). Few samples bias it upwards: compare values of the
    same N and M."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    root = _root(np.cov(a, rowvar=False))
    cross = _root(root @ np.cov(b, rowvar=False) @ root)  # has the trace of (C_a C_b)^(1/2), and is symmetric
    spread = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(cross)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


@torch.inference_mode()
def _features(judge: Extractor, images: torch.Tensor) -> torch.Tensor:
    """Of images uint8 [N, H, W, C]: float32 [N, F]."""
    parts = [judge.features(normalise(part.to(pick_device()))) for part in images.split(_BATCH)]
    return torch.cat(parts).float().cpu()


def quality(run: RunDir, judge: Extractor, real: ImageSet, per_class: int) -> dict[str, Any]:
    """Of the first `per_class` candidates of every class, accepted or not, drawn as the run's configuration says.

    Args:
        judge: see `train_judge`.
        real: held-out images, two or more of each class.

    Returns:
        By class: "frechet", the distance to the held-out images in the judge's features, and "labelled", the share that
        the judge sees as the class they were drawn for.
    """
    settings = run.config.generate
    sampler = open_sampler(run, settings, run.config.seed)
    seen = _features(judge, torch.from_numpy(real.take(np.arange(len(real)))))
    distances, shares = [], []
    for c in range(int(real.labels.max()) + 1):
        indices = torch.arange(per_class).split(settings.batch_size)
        drawn = [sampler.draw(torch.full_like(i, c).to(sampler.device), i.to(sampler.device)) for i in indices]
        features = _features(judge, torch.cat(drawn))
        with torch.inference_mode():
            labels = judge.network.head(features.to(pick_device())).argmax(1).cpu()
        distances.append(frechet_distance(features.numpy(), seen[torch.from_numpy(real.labels) == c].numpy()))
        shares.append(float((labels == c).double().mean()))
    return {"frechet": distances, "labelled": shares}
