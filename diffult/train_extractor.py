"""Stage extractor: phi0, an ordinary classifier of the long-tailed set, and where each class lies in its features.

Writes extractor/weights.safetensors, extractor/statistics.safetensors (centres, radii, prior) and metrics.jsonl there.
"""

from __future__ import annotations

from typing import Any

import torch

from diffult.cli import RunOption, SetOption, main
from diffult.data.packing import Packed
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.longtail.classification import Training, TrainingPhase, extract_features, fit, training_loader
from diffult.longtail.losses import CrossEntropy, log_prior
from diffult.longtail.statistics import ClassStatistics, class_statistics
from diffult.models.resnet import build_classifier, save_classifier
from diffult.runs.files import save_tensors
from diffult.runs.run_dir import RunDir
from ffcv_writers import Loader, Natural

_STAGE = 1  # its number among the seeds


def train_extractor(run: RunDir, world: World = ALONE) -> None:
    """Trains phi0 on the packed training images and measures the classes. Every process of `world` calls this.

    Raises:
        UserError: the images are not packed, the processes do not divide the batch, or see `fit`.
    """
    packed = run.packed()
    world.local_slice(run.config.extractor.batch_size, "extractor.batch_size")
    with run.stage("extractor", world) as record:
        if record is not None:
            _train(run, packed, world, record)


def extractor_training(run: RunDir, packed: Packed, world: World = ALONE) -> Training:
    """The training of a new network, on this process's device."""
    config, images, device = run.config.extractor, packed.train, pick_device()
    dtype, seed = compute_dtype(run.config.precision, device), (run.config.seed, _STAGE)
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, len(packed.classes), run.config.data.channels, config.image_size)
    loader = training_loader(images, run.config.data, config, seed, device, world)
    prior = _prior(packed).to(device) if config.loss == "logit_adjust" else None
    phase = TrainingPhase(
        config.steps, Natural(len(images)), CrossEntropy(prior=prior, smoothing=config.label_smoothing)
    )
    checkpoint, digest = run.folder("extractor") / "state.pt", run.hash("extractor")
    return Training("extractor", model.to(device), loader, (phase,), config, checkpoint, seed, digest, dtype, world)


def _prior(packed: Packed) -> torch.Tensor:
    return log_prior(torch.from_numpy(packed.counts))


def _train(run: RunDir, packed: Packed, world: World, record: dict[str, Any]) -> None:
    training = extractor_training(run, packed, world)
    fit(training)
    if world.is_main:  # the others wait where the stage ends
        statistics = save_extractor(run, packed, training)
        record["radii"] = [round(float(r), 3) for r in statistics.radii]


def save_extractor(run: RunDir, packed: Packed, training: Training) -> ClassStatistics:
    """Measures the classes with the network, and writes both to the stage's folder."""
    config, data, folder, digest = run.config.extractor, run.config.data, run.folder("extractor"), training.config_hash
    view = data.view(config.image_size, config.image_size / data.image_size)  # as of samples
    loader = Loader(packed.train, config.batch_size, device=training.loader.device, crop=view)
    features, labels = extract_features(training.model, loader, training.dtype)
    statistics = class_statistics(features, labels, len(packed.classes))
    file = folder / "weights.safetensors"
    save_classifier(file, training.model, config.network, data.channels, config.image_size, digest)
    prior = _prior(packed)
    left = torch.zeros_like(prior) if config.loss == "logit_adjust" else prior  # in the logits of the trained network
    save_tensors(folder / "statistics.safetensors", vars(statistics) | {"prior": left}, {"hash": digest})
    return statistics


def command(run: RunOption, set_: SetOption = None) -> None:
    """Train the extractor phi0 on the long-tailed set and measure centre and radius of each class. Needs stage pack.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_extractor --run RUN
    """
    world = init_distributed()
    train_extractor(RunDir.open(run, overrides=set_, world=world), world)


if __name__ == "__main__":
    main(command)
