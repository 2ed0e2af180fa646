"""The extractor phi0 with the centre and radius of each class in its features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffult.longtail.losses import log_prior
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import Classifier, load_classifier
from diffult.runs.files import load_tensors
from kernels.augment import center_crop


@dataclass(frozen=True)
class Extractor:
    """phi0, frozen, in evaluation mode. Images larger than the `image_size` it was trained on are cropped to their
    middle."""

    network: Classifier
    image_size: int
    statistics: ClassStatistics

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, F] of images, float [B, C, H, W] in [-1, 1]."""
        return self.network.features(center_crop(images, self.image_size))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """phi0's class, int64 [B], from features [B, F], its logits adjusted for class frequency (Menon et al. 2021,
        eq. 9): unadjusted, it would assign most samples of the tail to head classes."""
        logits = self.network.head(features)
        return (logits.float() - log_prior(self.statistics.counts)).argmax(1)


def load_extractor(folder: Path, device: torch.device) -> Extractor:
    """The extractor of a finished stage's folder; raises UserError if a file is missing or damaged."""
    network = load_classifier(folder / "weights.safetensors", device)
    statistics, _ = load_tensors(folder / "statistics.safetensors")
    return Extractor(network, network.image_size, ClassStatistics(**statistics).to(device))
