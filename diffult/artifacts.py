"""What finished stages leave behind, opened again: extractor, diffusion model, classifiers."""

from __future__ import annotations

import torch

from diffult.config import Config, TrainingConfig
from diffult.diffusion import posthoc_ema
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import Classifier, build_classifier
from diffult.models.unet import UNet
from diffult.runs.files import load_tensors
from diffult.runs.run_dir import RunDir


def build_unet(config: Config, num_classes: int) -> UNet:
    return UNet(config.unet, config.data.image_size, config.data.channels, num_classes)


def load_extractor(run: RunDir, device: torch.device) -> Extractor:
    """phi0 in evaluation mode with the class statistics.

    Raises:
        UserError: the stage is not finished or a file is damaged.
    """
    run.require("extractor", "train_extractor")
    network = _load_classifier(run, run.config.extractor, "extractor/weights.safetensors", device)
    statistics, _ = load_tensors(run.folder("extractor") / "statistics.safetensors")
    return Extractor(network, run.config.extractor.image_size, ClassStatistics(**statistics).to(device))


def load_diffusion(
    run: RunDir, device: torch.device, dtype: torch.dtype = torch.float32, ema_length: float | None = None
) -> UNet:
    """The averaged UNet in evaluation mode, computing in `dtype`.

    Args:
        ema_length: see `GenerateConfig`; None: the run's own.

    Raises:
        UserError: the stage is not finished or a file is missing or damaged.
    """
    run.require("diffusion", "train_diffusion")
    folder, config = run.folder("diffusion"), run.config.diffusion
    weights, info = load_tensors(folder / "ema.safetensors")
    if length := run.config.generate.ema_length if ema_length is None else ema_length:
        steps = posthoc_ema.snapshot_steps(config.steps, config.ema_snapshots)
        weights |= posthoc_ema.average(folder / "snapshots", steps, length)
    model = build_unet(run.config, int(info["num_classes"]))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(device, dtype)


def load_classifier(run: RunDir, method: str, device: torch.device) -> Classifier:
    """The classifier trained by `method`, in evaluation mode.

    Raises:
        UserError: the stage is not finished or the file is damaged.
    """
    run.require("classifier", "train_classifier")
    return _load_classifier(run, run.config.classifier, f"classifier/{method}.safetensors", device)


def _load_classifier(run: RunDir, config: TrainingConfig, file: str, device: torch.device) -> Classifier:
    weights, info = load_tensors(run.path / file)
    model = build_classifier(config.network, int(info["num_classes"]), run.config.data.channels, config.image_size)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(device)
