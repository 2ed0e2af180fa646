"""Histogram matching: pixel levels of samples are mapped so that samples have the levels of real images.

Also called histogram specification (Gonzalez and Woods, "Digital Image Processing", chapter 3.3): with G and F the
cumulative histograms of samples and of real images, level v of a channel becomes F^-1(G(v) - g(v) / 2), where g(v) is
the share of v itself, whose middle stands for all of it. The map never falls, and only gives levels that real images
have; where both histograms are equal it changes nothing. In either histogram all classes weigh the same.

Samples have a haze, such as levels 1 to 5 where the background of real images is black, and more of it the finer the
solver (docs/experiments.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffult.engine.distributed import ALONE, World
from diffult.reporting.pictures import evenly
from diffult.runs.files import load_tensors, save_tensors
from ffcv_writers import Loader

_CLASSES, _PER_CLASS = 64, 16  # at the most, of the pilot samples


def match(images: Tensor, levels: Tensor) -> Tensor:
    """Images, uint8 [B, H, W, C], with each level replaced by that of its channel in `levels`, uint8 [C, 256]. Nothing
    here waits for the host."""
    return levels[torch.arange(len(levels), device=images.device), images.long()]


def matching_levels(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The table that gives samples the levels of real images, uint8 [C, 256].

    Args:
        drawn, real: pixels of each level, int64 [num_classes, C, 256]. Classes without samples or without real images
            are left out of both; at least one has both.
    """
    both = (drawn.sum((1, 2)) > 0) & (real.sum((1, 2)) > 0)
    shares, wanted = ((count / count.sum(2, keepdims=True)).mean(0) for count in (drawn[both], real[both]))
    middles = shares.cumsum(1) - shares / 2
    table = np.empty(shares.shape, np.uint8)
    for row, middle, share in zip(table, middles, wanted, strict=True):
        first, last = np.flatnonzero(share)[[0, -1]]
        row[:] = np.searchsorted(share.cumsum(), middle).clip(first, last)
    return table


def count_levels(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each level in images, uint8 [B, H, W, C], of classes, int64 [B]: int64 [num_classes, C, 256]."""
    channels = images.shape[-1]
    rows = labels[:, None, None, None] * channels + torch.arange(channels, device=images.device)
    counts = torch.bincount((rows * 256 + images).flatten(), minlength=num_classes * channels * 256)
    return counts.view(num_classes, channels, 256)


@dataclass(frozen=True)
class HistogramMatching:
    """What samples are matched to.

    Attributes:
        real: pixels of each level in the real images, int64 [num_classes, C, 256].
    """

    real: np.ndarray
    world: World = ALONE

    @classmethod
    def to(cls, images: Loader, num_classes: int, world: World = ALONE) -> HistogramMatching:
        """To the images of a loader, of which each process counts its share."""
        counts = torch.zeros(num_classes, images.image_set.channels, 256, dtype=torch.int64, device=images.device)
        for batch in images.batches(np.arange(world.rank, len(images.image_set), world.size)):
            counts += count_levels(batch.images, batch.labels, num_classes)
        world.sum_(counts)
        return cls(counts.cpu().numpy(), world)

    def levels(self, drawn: Tensor, labels: np.ndarray) -> Tensor:
        """The table for samples, uint8 [B, H, W, C], of classes, int64 [B], of which each process has its share: uint8
        [C, 256] on their device, the same on every process."""
        counts = count_levels(drawn, torch.from_numpy(labels).to(drawn.device), len(self.real))
        self.world.sum_(counts)
        return torch.from_numpy(matching_levels(counts.cpu().numpy(), self.real)).to(drawn.device)


def pilot_names(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class and index, int64 [N] each, of the samples that a table is fitted to."""
    classes = evenly(np.arange(num_classes), _CLASSES)
    return np.repeat(classes, _PER_CLASS), np.tile(np.arange(_PER_CLASS), len(classes))


def read_levels(file: Path, key: str) -> Tensor | None:
    """The table that `write_levels` wrote to the file with this key, None where there is none. Raises UserError if the
    file is damaged."""
    if not file.exists():
        return None
    tensors, about = load_tensors(file)
    return tensors["levels"] if about.get("key") == key else None


def write_levels(file: Path, key: str, levels: Tensor) -> None:
    """key: of what the table depends on."""
    save_tensors(file, {"levels": levels}, {"key": key})
