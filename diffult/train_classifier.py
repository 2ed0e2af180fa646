"""Stage classifier: a final classifier for each method, all with the same network, steps, rate and seed.

Writes classifier/METHOD.safetensors and classifier/METHOD.metrics.jsonl.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from diffult.cli import RunOption, SetOption, main
from diffult.data.packing import Packed
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.generation.shards import open_kept
from diffult.longtail.classification import Training, fit_all, training_loader
from diffult.longtail.methods import METHODS, SPECIFIC, TrainingSet, class_counts
from diffult.models.resnet import build_classifier, save_classifier
from diffult.runs.files import metadata
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import reads
from ffcv_writers import Loader, open_set

_STAGE = 3  # its number among the seeds


def train_classifier(run: RunDir, world: World = ALONE) -> None:
    """Trains the classifier of every configured method that is not up to date. Every process of `world` calls this.

    Raises:
        UserError: a stage before is not finished, the processes do not divide the batch, or see `fit_all`.
    """
    packed = run.packed()
    run.require("generate")
    world.local_slice(run.config.classifier.batch_size, "classifier.batch_size")
    with run.stage("classifier", world, keep=lambda file: _up_to_date(run, file)) as record:
        if record is not None:
            _train(run, packed, world)


def method_hash(run: RunDir, name: str) -> str:
    """Of what a method reads."""
    method, config = METHODS[name], run.config
    own = config.classifier.model_dump(mode="json", exclude_defaults=True, exclude={"methods", *SPECIFIC})
    specific = config.classifier.model_dump(mode="json") | {"balance_to": config.generate.balance_to}
    own |= {setting: specific[setting] for setting in method.reads}
    general = {"method": name, "seed": config.seed, "precision": config.precision, "classifier": own}
    return run.digest(reads(config, "generate" if method.synthetic else "pack") | general)


def _up_to_date(run: RunDir, file: Path) -> bool:
    name = file.name.partition(".")[0]
    weights = file.with_name(f"{name}.safetensors")
    return name in METHODS and weights.exists() and metadata(weights).get("hash") == method_hash(run, name)


def _train(run: RunDir, packed: Packed, world: World) -> None:
    config, data, folder = run.config.classifier, run.config.data, run.folder("classifier")
    device, seed, num_classes = pick_device(), (run.config.seed, _STAGE), len(packed.classes)
    kept = open_kept(run.folder("generate"))
    both = open_set([*packed.train.paths, *kept.paths], mixed_sizes=True) if kept else packed.train
    real_loader, loader = (training_loader(part, data, config, seed, device, world) for part in (packed.train, both))
    missing = [name for name in config.methods if not _up_to_date(run, folder / f"{name}.safetensors")]
    missing = world.gather(missing)[0]  # of the first process: it may already write the first of them
    trainings = [
        _training(run, name, loader if METHODS[name].synthetic else real_loader, num_classes, world, device)
        for name in missing
    ]
    for training in fit_all(trainings):
        if world.is_main:
            name = training.checkpoint.name.removesuffix(".state.pt")
            save_classifier(
                folder / f"{name}.safetensors", training.model, config.network, data.channels, config.image_size,
                training.config_hash,
            )  # fmt: skip


def _training(run: RunDir, name: str, loader: Loader, num_classes: int, world: World, device: torch.device) -> Training:
    config, method, images = run.config.classifier, METHODS[name], loader.image_set
    train = TrainingSet(images.labels, images.synthetic, num_classes, config, run.config.generate.balance_to)
    drawing = method.draw(train)
    loss = method.loss(class_counts(train, drawing, device), config.omega)
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, run.config.data.channels, config.image_size).to(device)
    return Training(
        f"classifier {name}", model, loader, drawing.order, loss, config, run.folder("classifier") / f"{name}.state.pt",
        (run.config.seed, _STAGE), method_hash(run, name), compute_dtype(run.config.precision, device), world,
    )  # fmt: skip


def command(run: RunOption, set_: SetOption = None) -> None:
    """Train the final classifiers on real and synthetic images, and the baselines with the same budget.

    Needs the stages pack, extractor, diffusion and generate.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_classifier --run RUN
    """
    world = init_distributed()
    train_classifier(RunDir.open(run, overrides=set_), world)


command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\nMethods (classifier.methods): {', '.join(METHODS)}."

if __name__ == "__main__":
    main(command)
