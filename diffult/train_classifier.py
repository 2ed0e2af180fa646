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
from diffult.longtail.classification import Training, TrainingPhase, fit_all, training_loader
from diffult.longtail.draws import TrainingSet, class_counts
from diffult.longtail.methods import METHODS, MODIFIERS, SPECIFIC, Method, Phase, find_method, in_waves
from diffult.models.resnet import Classifier, build_classifier, load_classifier, save_classifier
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
    """Of what a method reads, and the method that it starts from."""
    method, config = find_method(name), run.config
    own = config.classifier.model_dump(mode="json", exclude_defaults=True, exclude={"methods", *SPECIFIC})
    filling = {"balance_to": config.generate.balance_to, "dose": config.generate.dose}
    specific = config.classifier.model_dump(mode="json") | filling
    own |= {setting: specific[setting] for setting in method.reads}
    general = {"method": name, "seed": config.seed, "precision": config.precision, "classifier": own}
    if method.start:
        general["start"] = method_hash(run, method.start)
    return run.digest(reads(config, "generate" if method.synthetic else "pack") | general)


def _up_to_date(run: RunDir, file: Path) -> bool:
    name = file.name.partition(".")[0]
    weights = file.with_name(f"{name}.safetensors")
    try:
        return weights.exists() and metadata(weights).get("hash") == method_hash(run, name)
    except ValueError:  # of no method
        return False


def _train(run: RunDir, packed: Packed, world: World) -> None:
    config, data, folder = run.config.classifier, run.config.data, run.folder("classifier")
    device, seed = pick_device(), (run.config.seed, _STAGE)
    kept = open_kept(run.folder("generate"))
    both = open_set([*packed.train.paths, *kept.paths], mixed_sizes=True) if kept else packed.train
    real_loader, loader = (training_loader(part, data, config, seed, device, world) for part in (packed.train, both))
    for wave in in_waves(config.methods):
        missing = [name for name in wave if not _up_to_date(run, folder / f"{name}.safetensors")]
        missing = world.gather(missing)[0]  # of the first process: it may already write the first of them
        loaders = (loader if find_method(name).synthetic else real_loader for name in missing)
        for training in fit_all([_training(run, *pair, world) for pair in zip(missing, loaders, strict=True)]):
            if world.is_main:
                name = training.checkpoint.name.removesuffix(".state.pt")
                save_classifier(
                    folder / f"{name}.safetensors", training.model, config.network, data.channels, config.image_size,
                    training.config_hash,
                )  # fmt: skip
        world.barrier()  # the next wave starts from these weights


def _training(run: RunDir, name: str, loader: Loader, world: World) -> Training:
    config, method, images = run.config.classifier, find_method(name), loader.image_set
    filling = run.config.generate
    train = TrainingSet(
        images.labels, images.synthetic, len(run.packed().classes), config, filling.balance_to, dose=filling.dose
    )
    dtype = compute_dtype(run.config.precision, loader.device)
    return Training(
        f"classifier {name}", _network(run, method, train.num_classes, loader.device), loader,
        tuple(_phase(phase, train, loader.device) for phase in method.phases), config,
        run.folder("classifier") / f"{name}.state.pt", (run.config.seed, _STAGE), method_hash(run, name), dtype, world,
        method.mix, method.trains == "head",
    )  # fmt: skip


def _phase(phase: Phase, train: TrainingSet, device: torch.device) -> TrainingPhase:
    drawing, config = phase.draw(train), train.settings
    loss = phase.loss(train, class_counts(train, drawing, device))
    steps = config.steps if config.epochs is None else config.epochs * drawing.order.length / config.batch_size
    return TrainingPhase(max(1, round(phase.share * steps)), drawing.order, loss)


def _network(run: RunDir, method: Method, num_classes: int, device: torch.device) -> Classifier:
    config, channels = run.config.classifier, run.config.data.channels
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, channels, config.image_size)
    if method.start:
        trunk = load_classifier(run.folder("classifier") / f"{method.start}.safetensors", torch.device("cpu")).trunk
        model.trunk.load_state_dict(trunk.state_dict())
    return model.to(device)


def command(run: RunOption, set_: SetOption = None) -> None:
    """Train the final classifiers on real and synthetic images, and the baselines with the same budget.

    Needs the stages pack, extractor, diffusion and generate.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_classifier --run RUN
    """
    world = init_distributed()
    train_classifier(RunDir.open(run, overrides=set_), world)


command.__doc__ = (
    f"{inspect.cleandoc(command.__doc__ or '')}\n\nMethods (classifier.methods): {', '.join(METHODS)}; "
    f"after one, any of +{', +'.join(MODIFIERS)}."
)

if __name__ == "__main__":
    main(command)
