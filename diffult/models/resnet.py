"""The networks of the extractor phi0 and of the final classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffult.errors import UserError, nearest
from diffult.models.heads import HEADS, ExpertTrunk
from diffult.runs.files import as_weights, load_tensors, save_tensors


class Classifier(nn.Module):
    """A trunk, and one or more heads on its features.

    `trunk` maps float images [B, C, H, W] to [B, feature_dim]; `image_size` is the H and W that it is made for, and
    with a trunk that flattens, as ConvNet, the only one that it takes; `heads` is a name in HEADS.
    """

    def __init__(
        self, trunk: nn.Module, feature_dim: int, num_classes: int, image_size: int, heads: str = "linear"
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.image_size = image_size
        self.heads = heads
        self.head = HEADS[heads].build(feature_dim, num_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features [B, feature_dim] of images [B, C, H, W]."""
        return self.trunk(x.contiguous(memory_format=torch.channels_last))

    def outputs(self, x: Tensor) -> Tensor:
        """What the loss sees: logits [B, num_classes] of images [B, C, H, W], or [H, B, num_classes] of H heads."""
        return self.head(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W], by which they are classified."""
        return HEADS[self.heads].prediction(self.outputs(x))


def build_classifier(name: str, num_classes: int, channels: int, image_size: int, heads: str = "linear") -> Classifier:
    """A freshly initialised classifier of CLASSIFIERS, with heads of HEADS; UserError for an unknown name or too small
    images."""
    if name not in CLASSIFIERS:
        raise UserError(f"unknown classifier {name!r}{nearest(name, CLASSIFIERS)} (known: {', '.join(CLASSIFIERS)})")
    entry = CLASSIFIERS[name]
    if image_size < entry.smallest_image:
        raise UserError(
            f"classifier {name!r} needs images of {entry.smallest_image} pixels or more, not {image_size}: "
            "take convnet or resnet32"
        )
    trunks = [entry.trunk(channels, image_size) for _ in range(HEADS[heads].trunks)]
    trunk = trunks[0] if len(trunks) == 1 else ExpertTrunk([split(trunk) for trunk in trunks])
    model = Classifier(trunk, len(trunks) * entry.feature_dim, num_classes, image_size, heads)
    if name == "resnet32":
        for layer in model.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    return model


def split(trunk: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The stages of a trunk that RIDE's experts share, and those that each has for itself, with the pooling: of
    torchvision's, the first two of four stages."""
    if isinstance(trunk, CifarResNet | ConvNet):
        return trunk.split()
    *layers, _ = trunk.children()
    return nn.Sequential(*layers[:-3]), nn.Sequential(*layers[-3:], nn.Flatten())


def save_classifier(file: Path, model: Classifier, name: str, channels: int, image_size: int, digest: str) -> None:
    """Writes a classifier's weights with all that `load_classifier` needs; `digest` is of its settings."""
    sizes = {"num_classes": model.num_classes, "channels": channels, "image_size": image_size}
    info = {"hash": digest, "network": name, "heads": model.heads} | {key: str(value) for key, value in sizes.items()}
    save_tensors(file, model.state_dict(), info)


def load_classifier(file: Path, device: torch.device) -> Classifier:
    """The classifier of `save_classifier`, in evaluation mode; UserError if the file is missing or damaged."""
    weights, info = load_tensors(file)
    with as_weights(file):
        num_classes, channels, image_size = (int(info[key]) for key in ("num_classes", "channels", "image_size"))
        model = build_classifier(info["network"], num_classes, channels, image_size, info["heads"])
        model.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(device)


class CifarResNet(nn.Module):
    """The trunk of CIFAR's ResNet-(6 n + 2) with 16, 32, 64 channels (He et al., 2016, section 4.2)."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        stages, inputs = [], 16
        for width in (16, 32, 64):
            for _ in range(blocks):
                stages.append(CifarBlock(inputs, width))
                inputs = width
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # as LDAM-DRW's

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(F.relu(self.norm(self.conv(x)))).mean(dim=(2, 3))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The first stage, and the others; see `split` above."""
        first = len(self.stages) // 3
        shared = nn.Sequential(self.conv, self.norm, nn.ReLU(), self.stages[:first])
        return shared, nn.Sequential(self.stages[first:], nn.AdaptiveAvgPool2d(1), nn.Flatten())


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; where the width doubles, the shortcut skips pixels and adds zeros (option A)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.grows = inputs != width
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=2 if self.grows else 1, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.missing = (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.grows:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(h + x)


class ConvNet(nn.Module):
    """Trunk for small images: 3x3 convolutions with batch norm, 32, 64 and 128 wide, strides 1, 2, 2, flattened into
    one hidden layer of 128. A convolution sees 9x9 pixels, so averaging its output would lose where they are."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, width, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [
                nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        side = math.ceil(image_size / 4)
        layers += [nn.Flatten(), nn.Linear(128 * side**2, 128), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The first two convolutions, and the rest; see `split` above."""
        return self.layers[:6], self.layers[6:]


def _torchvision(build: Callable[[Any], Any]) -> Callable[[int, int], nn.Module]:
    """A trunk from torchvision.models.resnet, its first convolution fitted to the number of colours."""

    def trunk(channels: int, image_size: int) -> nn.Module:
        try:
            from torchvision.models import resnet
        except ImportError as error:
            raise UserError(
                f"this classifier needs torchvision, which does not import ({error}): install it, or take convnet or "
                "resnet32"
            ) from None
        net = build(resnet)
        net.fc = nn.Identity()
        if channels != 3:
            net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        return net

    return trunk


class _Entry(NamedTuple):
    trunk: Callable[[int, int], nn.Module]  # of channels and image size
    feature_dim: int
    smallest_image: int


CLASSIFIERS = {
    "convnet": _Entry(ConvNet, 128, 4),
    "resnet32": _Entry(lambda channels, image_size: CifarResNet(channels, blocks=5), 64, 4),
    "resnet10": _Entry(_torchvision(lambda resnet: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])), 512, 32),
    "resnet50": _Entry(_torchvision(lambda resnet: resnet.resnet50()), 2048, 32),
    "resnext50": _Entry(_torchvision(lambda resnet: resnet.resnext50_32x4d()), 2048, 32),
}
