"""Stage 5: the final classifiers, one for each method compared, all with the same network, steps, rate and seed.

Writes classifier/METHOD.safetensors and classifier/METHOD.metrics.jsonl.
"""

from __future__ import annotations

import torch

from diffult.cli import RunOption, main
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.longtail.classification import Training, fit_all, training_loader
from diffult.longtail.methods import METHODS, TrainingSet, class_counts
from diffult.models.resnet import build_classifier
from diffult.parts import open_part
from diffult.runs.files import save_tensors
from diffult.runs.run_dir import RunDir
from ffcv_writers import Loader

_STAGE = 3  # its number among the seeds


def train_classifier(run: RunDir, world: World = ALONE) -> None:
    """Trains the classifier of every method of the configuration; those finished before are skipped.

    Args:
        world: the processes that share each batch; every one of them calls this.

    Raises:
        UserError: the processes do not divide the batch, or what `fit` raises.
    """
    world.local_slice(run.config.classifier.batch_size, "classifier.batch_size")
    with run.stage("classifier", world) as note:
        if note is not None:
            _train(run, world)


def _train(run: RunDir, world: World) -> None:
    config, folder, device = run.config.classifier, run.folder("classifier"), pick_device()
    images = {False: open_part(run, "real"), True: open_part(run, "real", "synthetic")}
    seed = (run.config.seed, _STAGE)
    loaders = {synthetic: training_loader(part, config, seed, device, world) for synthetic, part in images.items()}
    num_classes = int(images[False].labels.max()) + 1
    missing = [name for name in config.methods if not (folder / f"{name}.safetensors").exists()]
    info = {"config": run.config.hash, "network": config.network, "num_classes": str(num_classes)}
    trainings = [_training(run, name, loaders[METHODS[name].synthetic], num_classes, world, device) for name in missing]
    for training in fit_all(trainings):
        if world.is_main:
            name = training.checkpoint.name.removesuffix(".state.pt")
            save_tensors(folder / f"{name}.safetensors", training.model.state_dict(), info)


def _training(run: RunDir, name: str, loader: Loader, num_classes: int, world: World, device: torch.device) -> Training:
    config, method, images = run.config.classifier, METHODS[name], loader.image_set
    train = TrainingSet(images.labels, images.synthetic, num_classes, config, run.config.generate.balance_to)
    drawing = method.draw(train)
    loss = method.loss(class_counts(train, drawing, device), config.omega)
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, run.config.data.channels, config.image_size).to(device)
    return Training(
        f"classifier {name}", model, loader, drawing.order, loss, config, run.folder("classifier") / f"{name}.state.pt",
        (run.config.seed, _STAGE), run.config.hash, compute_dtype(run.config.precision, device), device, world,
    )  # fmt: skip


def command(run: RunOption) -> None:
    """Train the final classifiers on real and synthetic images, and the rivals under the same budget.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_classifier --run RUN
    """
    world = init_distributed()
    run_dir = RunDir.open(run)
    run_dir.require("betons", "balance")
    train_classifier(run_dir, world)


command.__doc__ = f"{command.__doc__}\n\nMethods (classifier.methods): {', '.join(METHODS)}."

if __name__ == "__main__":
    main(command)
