"""What finished stages leave behind, opened again: extractor, diffusion model, classifiers."""

from __future__ import annotations

import torch
from torch import nn

from diffult.config import Config
from diffult.files import load_tensors
from diffult.longtail.extractor import Extractor
from diffult.longtail.methods import Method
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import build_classifier
from diffult.models.unet import UNet
from diffult.run_dir import RunDir


def build_unet(config: Config, num_classes: int) -> UNet:
    return UNet(config.unet, config.data.image_size, config.data.channels, num_classes)


def load_extractor(run: RunDir, device: torch.device) -> Extractor:
    """phi0 in evaluation mode with the class statistics.

    Raises:
        UserError: the stage is not finished or a file is damaged.
    """
    run.require("extractor", "train_extractor")
    weights, info = load_tensors(run.folder("extractor") / "weights.safetensors")
    statistics, _ = load_tensors(run.folder("extractor") / "statistics.safetensors")
    config = run.config
    model = build_classifier(
        config.extractor.network, int(info["num_classes"]), config.data.channels, config.extractor.image_size
    )
    model.load_state_dict(weights)
    return Extractor(
        _frozen(model, device),
        config.extractor.image_size,
        ClassStatistics(**statistics).to(device),
    )


def load_diffusion(run: RunDir, device: torch.device) -> UNet:
    """The averaged UNet in evaluation mode.

    Raises:
        UserError: the stage is not finished or the file is damaged.
    """
    run.require("diffusion", "train_diffusion")
    weights, info = load_tensors(run.folder("diffusion") / "ema.safetensors")
    model = build_unet(run.config, int(info["num_classes"]))
    model.load_state_dict(weights)
    _frozen(model, device)
    return model


def load_classifier(run: RunDir, method: Method, device: torch.device) -> nn.Module:
    """The classifier trained by `method`, in evaluation mode.

    Raises:
        UserError: the stage is not finished or the file is damaged.
    """
    run.require("classifier", "train_classifier")
    weights, info = load_tensors(run.folder("classifier") / f"{method}.safetensors")
    config = run.config
    model = build_classifier(
        config.classifier.network,
        int(info["num_classes"]),
        config.data.channels,
        config.classifier.image_size,
    )
    model.load_state_dict(weights)
    return _frozen(model, device)


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    model.eval().requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)
