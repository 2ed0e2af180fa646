"""Classifiers on a tiny long-tailed set, for the tests of their training and of the methods."""

from pathlib import Path

import numpy as np
import torch

from diffult.config import ClassifierConfig, load_preset
from diffult.longtail.classification import (
    Training,
    TrainingPhase,
    fit,
    training_loader,
)
from diffult.longtail.draws import Drawing, TrainingSet, class_counts
from diffult.longtail.losses import Targets
from diffult.longtail.methods import find_method
from diffult.models.resnet import build_classifier
from ffcv_writers import (
    ImageSet,
    open_set,
    write,
)

REAL, GENERATED = [30, 9, 3], [0, 21, 27]
DIGITS = load_preset("digits-lt").data


def write_sets(folder: Path) -> ImageSet:
    """Three classes, long-tailed, filled up to 30 each."""
    paths = []
    for kind, counts in enumerate((REAL, GENERATED)):
        labels = np.repeat(np.arange(3), counts)
        images = np.random.default_rng(kind).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
        paths.append(folder / f"{kind}.beton")
        write(paths[-1], images, labels=labels, synthetic=0 * labels + kind, index=np.arange(len(labels)))
    return open_set(paths)


def classifier_config(*overrides: str) -> ClassifierConfig:
    return load_preset("digits-lt", [f"classifier.{text}" for text in overrides]).classifier


def draw(method: str, config: ClassifierConfig, images: ImageSet, balance_to: int = 30) -> tuple[TrainingSet, Drawing]:
    train = TrainingSet(images.labels, images.synthetic, 3, config, balance_to)
    return train, find_method(method).phases[0].draw(train)


def targets(labels: list[int], synthetic: list[bool]) -> Targets:
    return Targets(torch.tensor(labels), torch.tensor(synthetic), torch.arange(len(labels)))


def training(images, folder, *overrides: str, method: str = "mix", device: str = "cpu") -> Training:
    """Eight steps on batches of 16, in "mix" a quarter synthetic."""
    config = classifier_config("batch_size=16", "steps=8", "synthetic_share=0.25", *overrides)
    chosen = find_method(method)
    train = TrainingSet(images.labels, images.synthetic, 3, config, 30)
    phases = []
    partners = chosen.mix.partners(train).order if chosen.mix and chosen.mix.partners else None
    for phase in chosen.phases:
        drawing = phase.draw(train)
        loss = chosen.make_loss(phase, train, class_counts(train, drawing, device))
        phases.append(TrainingPhase(round(phase.share * 8), drawing.order, loss, partners))
    torch.manual_seed(0)
    model = build_classifier(config.network, 3, 1, config.image_size, chosen.heads).to(device)
    loader = training_loader(images, DIGITS, config, (0, 9), torch.device(device))
    return Training(
        method, model, loader, tuple(phases), config, folder / f"{method}.state.pt", (0, 9), "hash",
        torch.float32, mix=chosen.mix, head_only=chosen.trains != "all",
    )  # fmt: skip


def weights(training: Training) -> torch.Tensor:
    return torch.cat([value.detach().flatten().cpu() for value in training.model.state_dict().values()])


def trained(images, folder, *overrides: str, stop_at: int | None = None, method: str = "mix") -> torch.Tensor:
    """The weights; optionally cut off by an error before one of the steps."""
    one = training(images, folder, *overrides, method=method)
    if stop_at is not None:
        calls = iter(range(100))

        def break_off(*_: object) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        one.model.trunk.register_forward_pre_hook(break_off)
    fit(one)
    return weights(one)
