"""Where each class lives in the extractor's feature space: a centre and a radius (DiffuLT, section on generation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# With fewer real images than this a class has no spread to speak of: one image has no pair, and two have one pair,
# whose distance is a single draw. Such a class borrows the median radius of the classes that do have one.
MIN_IMAGES_FOR_RADIUS = 3
_ROWS = 1024  # rows of the distance matrix held at a time: 5000 images need 20 MB, not 100


@dataclass(frozen=True)
class ClassStatistics:
    """Centres f_o, float32 [num_classes, F]; radii d_f, float32 [num_classes]; counts of real images, int64
    [num_classes]."""

    centres: torch.Tensor
    radii: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device) -> ClassStatistics:
        return ClassStatistics(self.centres.to(device), self.radii.to(device), self.counts.to(device))


def _largest_distance(features: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.cdist(rows, features).max() for rows in features.split(_ROWS)]).max()


def class_statistics(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> ClassStatistics:
    """The mean feature of each class and the largest distance between two of its real images.

    Args:
        features: float [N, F], the extractor's features of the real training images.
        labels: int64 [N].
        num_classes: every class in 0..num_classes-1 must have at least one image.

    Raises:
        ValueError: a class without an image, or no class with three images.
    """
    features = features.float()
    by_class = [features[labels == c] for c in range(num_classes)]
    empty = [c for c, rows in enumerate(by_class) if len(rows) == 0]
    if empty:
        raise ValueError(f"no image of class {empty[0]}: a centre needs at least one")
    measured = [len(rows) >= MIN_IMAGES_FOR_RADIUS for rows in by_class]
    if not any(measured):
        raise ValueError(f"no class has {MIN_IMAGES_FOR_RADIUS} images: no radius can be measured")
    radii = torch.stack([_largest_distance(rows) for rows in by_class])
    has_radius = torch.tensor(measured, device=radii.device)
    radii = torch.where(has_radius, radii, radii[has_radius].median())
    counts = torch.tensor([len(rows) for rows in by_class], device=radii.device)
    return ClassStatistics(torch.stack([rows.mean(0) for rows in by_class]), radii, counts)
