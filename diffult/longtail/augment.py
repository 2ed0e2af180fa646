"""Augmentations of the classifier's training images beside those of `kernels.augment`: torchvision's policies on bytes,
Cutout and CutMix on the normalised images.

Every random number is keyed by (seed, position), the place of the sample in the training stream, so an image is the
same in a batch of any size, on any process and after any restart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffult.errors import UserError
from diffult.longtail.methods import Mix
from kernels.augment import mixup, symmetric_beta
from kernels.random import check_names, philox4x32, signed, uniform

PolicyName = Literal["none", "randaugment", "autoaugment"]

_CUTMIX, _CUTOUT, _POLICY, _CHOSEN = 2, 3, 4, 5  # steps of the random numbers; `kernels.augment` takes 0 and 1
_SMALL = 64  # pixels: AutoAugment's policy for CIFAR-10 up to here, that for ImageNet above
_WORD = 0xFFFFFFFF

Operation = tuple[str, float]  # torchvision's name and magnitude


class Policy:
    """RandAugment (Cubuk et al. 2020, N = 2, M = 9 of 30) or AutoAugment (Cubuk et al. 2019) of torchvision, drawn for
    each image. AutoAugment's policy is that found on CIFAR-10 for images of up to 64 pixels, on ImageNet above.

    What torchvision draws for an image is recorded first, with torch's generator seeded for that image; then each
    operation is applied to all images that drew it at once, which changes nothing but the time.

    Raises:
        UserError: torchvision does not import.
    """

    def __init__(self, name: Literal["randaugment", "autoaugment"], image_size: int, seed: int) -> None:
        """The images are about `image_size` pixels wide; `seed` lies in [0, 2**64)."""
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise UserError(
                f'augment.policy = "{name}" needs torchvision, which does not import ({error}): install it, or set '
                'augment.policy to "none"'
            ) from None
        learned = v2.AutoAugmentPolicy.CIFAR10 if image_size <= _SMALL else v2.AutoAugmentPolicy.IMAGENET
        transform: Any = v2.RandAugment() if name == "randaugment" else v2.AutoAugment(learned)
        self._transform, self._apply, self._seed = transform, transform._apply_image_or_video_transform, seed
        self._drawn: list[Operation] = []
        self._options: dict[str, Any] = {}
        transform._apply_image_or_video_transform = self._record

    def __call__(self, images: Tensor, positions: np.ndarray) -> Tensor:
        """Augments a batch.

        Args:
            images: uint8 [B, H, W, C] of 1 or 3 channels, left as they are.
            positions: int64 [B], each sample's place in the training stream, on the host: which operations are applied
                is decided there.

        Returns:
            Of the same shape and type; black where nothing of an image was moved to.
        """
        x = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        plans = self._plans(positions, tuple(x.shape[-2:]))
        for turn in range(max(map(len, plans), default=0)):
            groups: defaultdict[Operation, list[int]] = defaultdict(list)
            for row, plan in enumerate(plans):
                if turn < len(plan):
                    groups[plan[turn]].append(row)
            for (operation, magnitude), rows in groups.items():
                where = torch.tensor(rows, device=x.device)
                x[where] = self._apply(x[where], operation, magnitude, **self._options)
        return x.permute(0, 2, 3, 1).contiguous()

    def _plans(self, positions: np.ndarray, size: tuple[int, ...]) -> list[list[Operation]]:
        """The operations on each image in their order, with torch's own generator left as it was."""
        position, zero = torch.from_numpy(positions), torch.zeros((), dtype=torch.int64)
        counter = (zero, zero + _POLICY, position & _WORD, (position >> 32) & _WORD)
        seeds = philox4x32(counter, (self._seed & _WORD, self._seed >> 32))[0].tolist()
        blank, plans = torch.empty(1, *size, dtype=torch.uint8), []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.default_generator.manual_seed(seed)  # of which it takes 32 bits
                self._drawn = []
                self._transform(blank)
                plans.append(self._drawn)
        return plans

    def _record(self, image: Tensor, operation: str, magnitude: float, **options: Any) -> Tensor:
        self._drawn.append((operation, magnitude))
        self._options = options
        return image


def cutout(images: Tensor, seed: int, positions: Tensor, side: int) -> Tensor:
    """Each image with a black square of `side` pixels at a random place (DeVries and Taylor 2017, "Improved
    regularization of convolutional neural networks with Cutout"). Its centre is any pixel, so it may leave the image.

    Args:
        images: float [B, C, H, W] in [-1, 1].
        seed: as in `kernels.augment.augment`, in [0, 2**64).
        positions: int64 [B], each sample's place in the training stream.
        side: of the square, in pixels.

    Raises:
        ValueError: positions of another type or shape; a seed out of range.
    """
    check_names(len(images), positions=positions)
    centre = uniform(signed(seed), positions >> 32, positions, _CUTOUT, 2)
    inside = _rectangles(centre, torch.full_like(centre, side), images.shape[-2:])
    return torch.where(inside[:, None], -1.0, images)


def cutmix(images: Tensor, partners: Tensor, seed: int, positions: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each image with a rectangle of its partner pasted in (Yun et al. 2019, "CutMix: Regularization strategy to train
    strong classifiers with localizable features", eq. 1 and 2). The rectangle has the image's aspect and the share
    1 - lambda of its area, lambda from Beta(alpha, alpha); its centre is any pixel, and what leaves the image is cut.

    Args:
        images: float [B, C, H, W].
        partners: of the same shape and type; image i is that pasted into images[i].
        seed: as in `kernels.augment.augment`, in [0, 2**64).
        positions: int64 [B], each image's place in the training stream.
        alpha: of the beta distribution, above 0.

    Returns:
        The mixed images, of the same type, and the share of its own area in each, float32 [B].

    Raises:
        ValueError: positions of another type or shape; alpha or seed out of range.
    """
    check_names(len(images), positions=positions)
    if not alpha > 0:
        raise ValueError(f"CutMix needs alpha > 0, got {alpha}")
    numbers = uniform(signed(seed), positions >> 32, positions, _CUTMIX, 4)
    cut = torch.sqrt(1 - symmetric_beta(numbers[:, 0], numbers[:, 1], alpha))
    height, width = images.shape[-2:]
    sides = 2 * torch.floor(torch.stack([cut * height, cut * width], dim=1) / 2)  # even, as in the authors' code
    inside = _rectangles(numbers[:, 2:], sides, (height, width))
    return torch.where(inside[:, None], partners, images), 1 - inside.float().mean((1, 2))


def mixed(images: Tensor, partners: Tensor, seed: int, positions: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Each image mixed with its partner as `mix` says, and the share of its own in it, float32 [B]; arguments as in
    `cutmix`. mixup takes the image before it for the partner."""
    if mix.kind == "mixup":
        result, share = mixup(images, seed, positions, mix.alpha)
    else:
        result, share = cutmix(images, partners, seed, positions, mix.alpha)
    if mix.probability < 1:
        chosen = uniform(signed(seed), positions >> 32, positions, _CHOSEN, 1)[:, 0] <= mix.probability
        result, share = torch.where(chosen.view(-1, 1, 1, 1), result, images), torch.where(chosen, share, 1.0)
    return result, share


def _rectangles(centre: Tensor, sides: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels lie in each image's rectangle, bool [B, H, W].

    Args:
        centre: where its middle is, uniform numbers in (0, 1], float32 [B, 2]; the pixel after it for an even side.
        sides: whole numbers, float32 [B, 2].
        size: H, W.
    """
    along = []
    for axis, length in enumerate(size):
        start = torch.ceil(centre[:, axis] * length) - 1 - torch.floor(sides[:, axis] / 2)
        pixel = torch.arange(length, device=centre.device)
        along.append((pixel >= start[:, None]) & (pixel < (start + sides[:, axis])[:, None]))
    return along[0][:, :, None] & along[1][:, None, :]
