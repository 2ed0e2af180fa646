"""The extractor phi0 with the classes as it sees them."""

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
    """phi0, frozen, in evaluation mode.

    Attributes:
        network: a classifier with `features`.
        image_size: side of the images it was trained on; larger ones are cropped to their middle.
        statistics: centre and radius of each class in its feature space.
    """

    network: Classifier
    image_size: int
    statistics: ClassStatistics

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, F] of images, float [B, C, H, W] in [-1, 1]."""
        return self.network.features(center_crop(images, self.image_size))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The class that phi0 sees, int64 [B], from features [B, F], with the class frequency taken out of its logits
        (Menon et al. 2021, eq. 9): unadjusted, it would see head classes in most samples of the tail."""
        logits = self.network.head(features)
        return (logits.float() - log_prior(self.statistics.counts)).argmax(1)


def load_extractor(folder: Path, device: torch.device) -> Extractor:
    """What the stage extractor left in its folder: phi0 in evaluation mode, and the classes.

    Raises:
        UserError: a file is missing or damaged.
    """
    network = load_classifier(folder / "weights.safetensors", device)
    statistics, _ = load_tensors(folder / "statistics.safetensors")
    return Extractor(network, network.image_size, ClassStatistics(**statistics).to(device))
