"""Centre and radius of each class in the extractor's feature space (DiffuLT, section on generation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A class with fewer real images, at most one pair, takes the median radius of the others.
MIN_IMAGES_FOR_RADIUS = 3
_ROWS = 1024  # rows of the distance matrix held at a time


@dataclass(frozen=True)
class ClassStatistics:
    """Centres f_o, float32 [num_classes, F]; radii d_f, float32 [num_classes]."""

    centres: torch.Tensor
    radii: torch.Tensor

    def to(self, device: torch.device) -> ClassStatistics:
        return ClassStatistics(self.centres.to(device), self.radii.to(device))


def _largest_distance(features: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.cdist(rows, features).max() for rows in features.split(_ROWS)]).max()


def class_statistics(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> ClassStatistics:
    """The mean feature of each class and the largest distance between two of its real images.

    Args:
        features: float [N, F], the extractor's features of the real training images.
        labels: int64 [N].
        num_classes: each must have at least one image.

    Raises:
        ValueError: a class without an image, or no class with three images.
    """
    features = features.float()
    by_class = [features[labels == c] for c in range(num_classes)]
    if empty := [c for c, rows in enumerate(by_class) if len(rows) == 0]:
        raise ValueError(f"no image of class {empty[0]}: a centre needs at least one")
    measured = [len(rows) >= MIN_IMAGES_FOR_RADIUS for rows in by_class]
    if not any(measured):
        raise ValueError(f"no class has {MIN_IMAGES_FOR_RADIUS} images: no radius can be measured")
    radii = torch.stack([_largest_distance(rows) for rows in by_class])
    has_radius = torch.tensor(measured, device=radii.device)
    radii = torch.where(has_radius, radii, radii[has_radius].median())
    return ClassStatistics(torch.stack([rows.mean(0) for rows in by_class]), radii)
