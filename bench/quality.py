"""How good the samples of a run are: seen by a judge that was trained on the whole, balanced set, and by classifiers
that are trained on them alone.

The judge measures and is used for nothing else: the method never sees more than the long-tailed set. All is measured on
the validation images, which serve choices; the test split stays unseen.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffult.config import preset_name
from diffult.data.packing import Packed
from diffult.engine.device import compute_dtype, pick_device
from diffult.evaluate import measured_copies
from diffult.generate import Request, fill_folder, open_sampler
from diffult.generation.candidates import draw_candidates
from diffult.generation.shards import open_kept
from diffult.longtail.classification import (
    Training,
    TrainingPhase,
    evaluation_loader,
    extract_features,
    fit,
    predict,
    training_loader,
)
from diffult.longtail.copies import copy_shares
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.longtail.filter import FILTERS, Verdict
from diffult.longtail.frechet import frechet_distance
from diffult.longtail.losses import CrossEntropy
from diffult.longtail.metrics import accuracies, class_accuracies, class_groups
from diffult.models.resnet import Classifier, build_classifier
from diffult.pack import pack
from diffult.reporting.pictures import sample_grid
from diffult.runs.files import atomic_write
from diffult.runs.run_dir import RunDir
from diffult.train_extractor import train_extractor
from ffcv_writers import ImageSet, Loader, Natural, open_set, write

_STAGE = 4  # the number of CAS among the seeds, after the stages' own


def train_judge(preset: str, seed: int, folder: Path) -> RunDir:
    """A run of the preset's extractor network on every image of the source's training split, found in `folder` or
    trained there."""
    natural = ["data.profile=natural", "data.val_per_class=0", "seed=1000", f"data.seed={seed}"]
    run = RunDir.open(folder / f"judge-{preset_name(preset)}-{seed}", preset, natural)
    pack(run)
    train_extractor(run)
    return run


def sample_quality(run: RunDir, judge: Extractor, per_class: int, folder: Path) -> dict[str, Any]:
    """Of the first `per_class` candidates of every class, drawn as the run's configuration says.

    Args:
        run: its diffusion model and extractor are trained, and it has two or more validation images of each class.
        judge: see `train_judge`.
        folder: takes the candidates, candidates.beton, and a picture of them, grid.png.

    Returns:
        "images_per_s", drawn and judged by the filter; "nfe", evaluations of the network for a sample; and by class
        "frechet", distance to the validation images in the judge's features; in percent of the candidates "labelled",
        those that the judge sees as the class they were drawn for, and "accepted", those that the run's filter accepts;
        "copies", in percent of the accepted, None where there are none or too few validation images.
    """
    packed, num_classes = run.packed(), len(run.packed().classes)
    images, accepted, seconds = _candidates(run, num_classes, per_class)
    labels, indices = np.repeat(np.arange(num_classes), per_class), np.tile(np.arange(per_class), num_classes)
    file = folder / "candidates.beton"
    write(file, images, labels=labels, synthetic=np.ones_like(labels), index=indices)
    drawn, held_out = open_set([file]), packed.val
    assert held_out is not None
    with atomic_write(folder / "grid.png") as temporary:
        sample_grid(drawn, packed.classes, temporary)
    features, real = (_features(run, judge, part) for part in (drawn, held_out))
    with torch.inference_mode():
        seen = judge.network.head(features.to(pick_device())).argmax(1).cpu().numpy()
    copies = measured_copies(run, packed, drawn)
    rows = torch.from_numpy(accepted)
    shares = copy_shares(copies | {name: copies[name][rows] for name in ("labels", "copy")}, packed.classes)
    return {
        "images_per_s": round(len(labels) / seconds, 2),
        "nfe": run.config.generate.evaluations,
        "frechet": [
            frechet_distance(features[labels == c].numpy(), real[held_out.labels == c].numpy())
            for c in range(num_classes)
        ],
        "labelled": class_accuracies(seen, labels, num_classes),
        "accepted": (100 * accepted.reshape(num_classes, per_class).mean(1)).tolist(),
        "copies": list(shares["by_class"].values()),
    }


def _candidates(run: RunDir, num_classes: int, per_class: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The first candidates of each class, in the order (class, index): uint8 [N, H, W, C], which of them the run's
    filter accepts, bool [N], and the seconds that it took to draw and judge them."""
    settings = run.config.generate
    sampler = open_sampler(run, settings, run.config.seed)
    extractor, filter = load_extractor(run.folder("extractor"), sampler.device), FILTERS[settings.filter]
    keeps_all = replace(filter, keeps=tuple(Verdict))
    sampler.prepare()
    images, verdicts, begun = [], [], time.perf_counter()
    for start in range(0, num_classes * per_class, settings.batch_size):
        numbers = np.arange(start, min(start + settings.batch_size, num_classes * per_class))
        batch = draw_candidates(sampler, extractor, keeps_all, numbers // per_class, numbers % per_class)
        images.append(batch.images)
        verdicts.append(batch.verdict)
    seconds = time.perf_counter() - begun
    return np.concatenate(images), filter.accepts(np.concatenate(verdicts)), seconds


def _features(run: RunDir, judge: Extractor, images: ImageSet) -> torch.Tensor:
    """Of images as the diffusion model draws them: float32 [N, F]."""
    data = run.config.data
    loader = Loader(images, 256, device=pick_device(), crop=data.view(data.image_size))
    return extract_features(judge.network, loader, torch.float32)[0].cpu()


def classification_accuracy_score(run: RunDir, per_class: int, folder: Path) -> dict[str, Any]:
    """CAS (Ravuri and Vinyals 2019): how well the run's classifier, trained by plain cross-entropy on accepted samples
    alone, knows the validation images.

    Args:
        run: its diffusion model and extractor are trained, and it has validation images.
        per_class: accepted samples of every class; one that falls short of it is warned of.
        folder: takes the samples and the training, each of which resumes.

    Returns:
        "top1", "many", "medium", "few" and "by_class" in percent, and "images", the samples of each class.
    """
    packed, num_classes = run.packed(), len(run.packed().classes)
    quotas = np.full(num_classes, per_class, dtype=np.int64)
    fill_folder(folder, run, Request(run.config.generate, quotas, run.config.seed))
    kept, held_out, config = open_kept(folder), packed.val, run.config
    assert held_out is not None
    counts = np.bincount(kept.labels, minlength=num_classes) if kept else np.zeros_like(quotas)
    if kept is None:
        predicted = np.full_like(held_out.labels, -1)
    else:
        loader = evaluation_loader(held_out, config.data, config.classifier.image_size, pick_device())
        predicted, _ = predict(_classifier(run, kept, num_classes, folder), loader, _dtype(run))
    groups = class_groups(packed.counts, config.groups.many, config.groups.few)
    return accuracies(predicted, held_out.labels, groups) | {
        "by_class": class_accuracies(predicted, held_out.labels, num_classes),
        "images": counts.tolist(),
    }


def _classifier(run: RunDir, images: ImageSet, num_classes: int, folder: Path) -> Classifier:
    config, data, device, seed = run.config.classifier, run.config.data, pick_device(), (run.config.seed, _STAGE)
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, data.channels, config.image_size).to(device)
    steps = config.steps if config.epochs is None else max(1, round(config.epochs * len(images) / config.batch_size))
    phase = TrainingPhase(steps, Natural(len(images)), CrossEntropy(smoothing=config.label_smoothing))
    loader, digest = training_loader(images, data, config, seed, device), run.hash("generate")
    fit(Training("CAS", model, loader, (phase,), config, folder / "state.pt", seed, digest, _dtype(run)))
    return model


def _dtype(run: RunDir) -> torch.dtype:
    return compute_dtype(run.config.precision, pick_device())


def by_group(values: list[float | None], packed: Packed, run: RunDir) -> dict[str, Any]:
    """Values of the classes, as "by_class", with their "mean" and those of many, medium and few; None where no class
    has a value."""
    groups = {"mean": np.arange(len(values))} | class_groups(
        packed.counts, run.config.groups.many, run.config.groups.few
    )
    known = {name: [values[c] for c in classes if values[c] is not None] for name, classes in groups.items()}
    return {name: float(np.mean(part)) if part else None for name, part in known.items()} | {"by_class": values}
