"""The extractor phi0 with the centre and radius of each class in its features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffult.engine.device import autocast
from diffult.errors import UserError
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import Classifier, load_classifier
from diffult.runs.files import load_tensors
from kernels.augment import center_crop, normalise


@dataclass(frozen=True)
class Extractor:
    """phi0, frozen, in evaluation mode. Images larger than the `image_size` it was trained on are cropped to their
    middle.

    Attributes:
        prior: float32 [num_classes], what its logits hold of the class frequencies: their `log_prior` after plain
            cross-entropy, 0 where the loss adjusted the logits.
    """

    network: Classifier
    image_size: int
    statistics: ClassStatistics
    prior: torch.Tensor

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, F] of images, float [B, C, H, W] in [-1, 1]."""
        return self.network.features(center_crop(images, self.image_size))

    @torch.no_grad()
    def features_of(self, images: torch.Tensor, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Penultimate features, float32 [B, F], of any number of stored images, uint8 [B, H, W, C], so many at a time,
        computed in `dtype`."""
        with autocast(dtype, images.device):
            return torch.cat([self.features(normalise(part)).float() for part in images.split(batch_size)])

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Of each class, float32 [B, num_classes], from features [B, F], were all classes equally frequent."""
        return (self.network.head(features).float() - self.prior).softmax(1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """phi0's class, int64 [B], from features [B, F], its logits without the class frequencies (Menon et al. 2021,
        eq. 9): with them, it would assign most samples of the tail to head classes."""
        logits = self.network.head(features)
        return (logits.float() - self.prior).argmax(1)


def load_extractor(folder: Path, device: torch.device) -> Extractor:
    """The extractor of a finished stage's folder; UserError if a file is missing, damaged or of an earlier version."""
    network = load_classifier(folder / "weights.safetensors", device)
    tensors, _ = load_tensors(folder / "statistics.safetensors")
    if "prior" not in tensors:
        raise UserError(f"{folder}: an extractor of an earlier version; delete the folder and train it again")
    statistics = ClassStatistics(tensors["centres"], tensors["radii"])
    return Extractor(network, network.image_size, statistics.to(device), tensors["prior"].to(device))
