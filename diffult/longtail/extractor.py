"""The extractor phi0 with the classes as it sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from diffult.longtail.losses import log_prior
from diffult.longtail.statistics import ClassStatistics
from kernels.augment import center_crop


@dataclass(frozen=True)
class Extractor:
    """phi0, frozen, in evaluation mode.

    Attributes:
        network: a classifier with `features`.
        image_size: side of the images it was trained on; larger ones are cropped to their middle.
        statistics: centre and radius of each class in its feature space.
    """

    network: nn.Module
    image_size: int
    statistics: ClassStatistics

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, F] of images, float [B, C, H, W] in [-1, 1]."""
        return self.network.features(center_crop(images, self.image_size))  # type: ignore[operator]

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The class that phi0 sees, int64 [B], from features [B, F], with the class frequency taken out of its logits
        (Menon et al. 2021, eq. 9): unadjusted, it would see head classes in most samples of the tail."""
        logits = self.network.head(features)  # type: ignore[operator]
        return (logits.float() - log_prior(self.statistics.counts)).argmax(1)
