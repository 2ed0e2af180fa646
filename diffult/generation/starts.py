"""Samples that start from real images of other classes, with noise added, in place of noise alone.

SDEdit (Meng et al. 2022) across classes: a class of ten images has ten ways to look, but images of other classes share
its poses, sizes and styles. Noise hides what a real image shows in detail, the model draws it again with the wanted
label, and the sample keeps the layout of an image that the class never had (docs/experiments.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffult.data.packing import Packed
from diffult.reporting.pictures import evenly
from ffcv_writers import CenterCrop, Loader
from kernels.random import uniform

_MOST_BYTES = 2**30  # of the images that stay on the device
_STEP = 2**32 - 1  # the choice's step number: noise counts its own from 0


@dataclass(frozen=True)
class OtherClasses:
    """Training images, sorted by class, that samples of the other classes start from.

    Attributes:
        images: uint8 [N, H, W, C].
        first: int64 [num_classes + 1], where each class begins, and N.
    """

    images: Tensor
    first: Tensor

    @classmethod
    def of(cls, packed: Packed, device: torch.device, view: CenterCrop | None) -> OtherClasses:
        """The training images as the diffusion model sees them, or as many of them, evenly spread over the classes'
        images, as fit 1 GiB."""
        train = packed.train
        order = np.argsort(train.labels, kind="stable")
        height, width = train.image_shape[:2] if view is None else (view.size, view.size)
        order = evenly(order, max(1, _MOST_BYTES // (height * width * train.channels)))
        loader = Loader(train, 1024, device=device, crop=view, resident=False)
        images = torch.cat([batch.images for batch in loader.batches(order)])
        first = np.searchsorted(train.labels[order], np.arange(len(packed.classes) + 1))
        return cls(images, torch.from_numpy(first).to(device))

    def choose(self, seed: int, labels: Tensor, indices: Tensor) -> Tensor:
        """The images that these samples start from, uint8 [B, H, W, C]: any image of another class is as likely, and
        the same for a name, int64 [B] each, in every batch. Nothing here waits for the host."""
        first, count = self.first[labels], self.first[labels + 1] - self.first[labels]
        others = len(self.images) - count
        number = (uniform(seed, labels, indices, _STEP, 1)[:, 0] * others).ceil().long().clamp(min=1) - 1
        number = torch.minimum(number, others - 1)
        return self.images[number + torch.where(number >= first, count, 0)]
