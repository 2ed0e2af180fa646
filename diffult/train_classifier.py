"""Stage classifier: a final classifier for each method, all from the same settings and seed.

Writes classifier/METHOD.safetensors and classifier/METHOD.metrics.jsonl.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import torch

from diffult.cli import RunOption, SetOption, main
from diffult.data.packing import Packed
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.generation.shards import open_kept
from diffult.longtail.classification import (
    Training,
    TrainingPhase,
    evaluation_loader,
    extract_features,
    fit_all,
    predict,
    training_loader,
)
from diffult.longtail.draws import TrainingSet, class_counts
from diffult.longtail.extractor import load_extractor
from diffult.longtail.losses import log_prior
from diffult.longtail.methods import METHODS, MODIFIERS, SPECIFIC, Method, Phase, find_method, in_waves
from diffult.models.resnet import Classifier, build_classifier, load_classifier, save_classifier
from diffult.runs.files import metadata
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import reads
from ffcv_writers import ImageSet, Loader, open_set

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
    """Of what a method reads, and the method that it starts from."""
    method, config = find_method(name), run.config
    own = config.classifier.model_dump(mode="json", exclude_defaults=True, exclude={"methods", *SPECIFIC})
    filling = {"balance_to": config.generate.balance_to, "dose": config.generate.dose}
    specific = config.classifier.model_dump(mode="json") | filling
    own |= {setting: specific[setting] for setting in method.reads}
    general = {"method": name, "seed": config.seed, "precision": config.precision, "classifier": own}
    if method.start:
        general["start"] = method_hash(run, method.start)
    if method.adapt or (method.synthetic and run.reads_validation("generate")):
        general["validation"] = run.require("pack")["held_out"].get("val")
    return run.digest(reads(config, "generate" if method.synthetic else "pack") | general)


def _up_to_date(run: RunDir, file: Path) -> bool:
    name = file.name.partition(".")[0]
    weights = file.with_name(f"{name}.safetensors")
    try:
        return weights.exists() and metadata(weights).get("hash") == method_hash(run, name)
    except ValueError:  # of no method
        return False


def _train(run: RunDir, packed: Packed, world: World) -> None:
    config, channels, folder = run.config.classifier, run.config.data.channels, run.folder("classifier")
    of_images = method_loaders(run, packed, world)
    waves = in_waves(config.methods)
    names = [name for wave in waves for name in wave]
    titles = {name: f"classifier {number} of {len(names)}: {name}" for number, name in enumerate(names, start=1)}
    for wave in waves:
        missing = [name for name in wave if not _up_to_date(run, folder / f"{name}.safetensors")]
        missing = world.gather(missing)[0]  # of the first process: it may already write the first of them
        loaders = {name: of_images[find_method(name).synthetic] for name in missing}
        trainings = [method_training(run, packed, name, titles[name], loaders[name], world) for name in missing]
        for training in fit_all(trainings):
            if world.is_main:
                name = training.checkpoint.name.removesuffix(".state.pt")
                _adapt(run, packed, find_method(name), training)
                save_classifier(
                    folder / f"{name}.safetensors", training.model, config.network, channels, config.image_size,
                    training.config_hash,
                )  # fmt: skip
        run.synchronise(world)  # the next wave starts from these weights


def method_loaders(run: RunDir, packed: Packed, world: World = ALONE) -> tuple[Loader, Loader]:
    """Of the real images, and of these and the run's samples: what methods train on, by whether they take samples."""
    kept, seed = open_kept(run.folder("generate")), (run.config.seed, _STAGE)
    both = open_set([*packed.train.paths, *kept.paths], mixed_sizes=True) if kept else packed.train

    def loader(images: ImageSet) -> Loader:
        return training_loader(images, run.config.data, run.config.classifier, seed, pick_device(), world)

    return loader(packed.train), loader(both)


def _adapt(run: RunDir, packed: Packed, method: Method, training: Training) -> None:
    if method.adapt is None:
        return
    validate = None
    if packed.val is not None:
        loader = evaluation_loader(packed.val, run.config.data, training.config.image_size, training.loader.device)

        def validate(model: Classifier) -> float:
            predicted, labels = predict(model, loader, training.dtype)
            return float((predicted == labels).mean())

    prior = log_prior(torch.from_numpy(packed.counts)).to(training.loader.device)
    method.adapt(training.model, prior, validate)


def method_training(
    run: RunDir, packed: Packed, name: str, title: str, loader: Loader, world: World = ALONE
) -> Training:
    """The training of a method's classifier, whose start, if it has one, lies in the stage's folder.

    Args:
        loader: one of `method_loaders`.
    """
    config, method, images = run.config.classifier, find_method(name), loader.image_set
    filling, num_classes, device = run.config.generate, len(packed.classes), loader.device
    train = TrainingSet(
        images.labels, images.synthetic, num_classes, config, filling.balance_to,
        partial(_soft_labels, run, images, num_classes, device), filling.dose,
    )  # fmt: skip
    dtype = compute_dtype(run.config.precision, device)
    return Training(
        title, _network(run, method, num_classes, device), loader,
        tuple(_phase(method, phase, train, device) for phase in method.phases), config,
        run.folder("classifier") / f"{name}.state.pt", (run.config.seed, _STAGE), method_hash(run, name), dtype, world,
        method.mix, method.trains != "all",
    )  # fmt: skip


def _soft_labels(run: RunDir, images: ImageSet, num_classes: int, device: torch.device) -> torch.Tensor:
    """Of each image its label, and of a synthetic one the mean of its label and the extractor's probabilities, float32
    [N, num_classes]."""
    data, extractor = run.config.data, load_extractor(run.folder("extractor"), device)
    view = data.view(extractor.image_size, extractor.image_size / data.image_size)
    loader = Loader(images, 256, device=device, crop=view)
    features, labels = extract_features(extractor.network, loader, compute_dtype(run.config.precision, device))
    hard = torch.nn.functional.one_hot(labels, num_classes).float()
    synthetic = torch.from_numpy(images.synthetic).to(device)[:, None]
    return torch.where(synthetic, (hard + extractor.probabilities(features)) / 2, hard)


def _phase(method: Method, phase: Phase, train: TrainingSet, device: torch.device) -> TrainingPhase:
    drawing, config = phase.draw(train), train.settings
    loss = method.make_loss(phase, train, class_counts(train, drawing, device))
    steps = config.steps if config.epochs is None else config.epochs * drawing.order.length / config.batch_size
    partners = method.mix.partners(train).order if method.mix and method.mix.partners else None
    return TrainingPhase(max(1, round(phase.share * steps)), drawing.order, loss, partners)


def _network(run: RunDir, method: Method, num_classes: int, device: torch.device) -> Classifier:
    """Fresh, or with the weights that the method starts from."""
    config, channels = run.config.classifier, run.config.data.channels
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, channels, config.image_size, method.heads)
    if method.start:
        file = run.folder("classifier") / f"{method.start}.safetensors"
        weights = load_classifier(file, torch.device("cpu")).state_dict()
        new_head = method.trains == "new head"
        kept = {name: value for name, value in weights.items() if not (new_head and name.startswith("head."))}
        model.load_state_dict(kept, strict=not new_head)
    return model.to(device)


def command(run: RunOption, set_: SetOption = None) -> None:
    """Train the final classifiers on real and synthetic images, and the baselines with the same budget.

    Needs the stages pack, extractor, diffusion and generate.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_classifier --run RUN
    """
    world = init_distributed()
    train_classifier(RunDir.open(run, overrides=set_, world=world), world)


command.__doc__ = (
    f"{inspect.cleandoc(command.__doc__ or '')}\n\nMethods (classifier.methods): {', '.join(METHODS)}; "
    f"after one, any of +{', +'.join(MODIFIERS)}."
)

if __name__ == "__main__":
    main(command)
