"""The extractor phi0 with the classes as it sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

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
