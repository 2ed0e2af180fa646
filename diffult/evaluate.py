"""Stage evaluate: every classifier on the whole test set, read here for the first time, and how many of the synthetic
images are copies of training images.

Writes evaluate/predictions.safetensors ("labels" and each method's predictions on the test set, int64 [N]),
evaluate/copies.safetensors (see `diffult.longtail.copies.measure_copies`) and, last, metrics.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffult.cli import RunOption, SetOption, main
from diffult.data.packing import Packed
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.engine.progress import progress_bar
from diffult.generation.shards import open_kept
from diffult.longtail.classification import evaluation_loader, predict
from diffult.longtail.copies import EXPECTED, copy_shares, measure_copies, rows_at_a_time
from diffult.longtail.extractor import load_extractor
from diffult.longtail.methods import find_method
from diffult.longtail.metrics import COLUMNS, accuracies, class_accuracies, class_groups
from diffult.models.resnet import load_classifier
from diffult.runs.files import load_tensors, metadata, save_tensors, write_json
from diffult.runs.records import read_metrics
from diffult.runs.run_dir import RunDir
from ffcv_writers import ImageSet, Loader


def evaluate(run: RunDir, world: World = ALONE) -> dict[str, Any]:
    """Top-1, many / medium / few and each class in percent on the test set, the same on the validation set under
    "validation" with its size as "validation_images", and the share of copies among the synthetic images as "copies".

    Skipped if it is done already; of several processes the first calls it. Raises UserError if a stage before is not
    finished.
    """
    file, folder, digest = run.path / "metrics.json", run.folder("evaluate"), run.hash("evaluate")
    predictions, copies = folder / "predictions.safetensors", folder / "copies.safetensors"
    before = read_metrics(file, digest, run.config.classifier.methods)
    if before is not None and predictions.exists() and copies.exists():
        return before
    run.require("classifier")
    records = {stage: run.require(stage) for stage in ("pack", "extractor", "diffusion", "generate", "classifier")}
    packed = run.packed()
    metrics = {"name": run.config.name, "hash": digest, "seed": run.config.seed}
    metrics |= {"device": str(pick_device()), "torch": torch.__version__}
    with run.lock(world):
        predicted = _predictions(run, packed.test)
        columns = {"labels": packed.test.labels} | predicted
        save_tensors(
            predictions, {name: torch.from_numpy(column) for name, column in columns.items()}, {"hash": digest}
        )
        metrics |= _accuracies(run, packed, packed.test.labels, predicted)
        if packed.val is not None:
            metrics["validation"] = accuracies_on(run, packed, packed.val)
            metrics["validation_images"] = len(packed.val)
        metrics["copies"] = _copies(run, packed, copies)
        metrics["generation"] = records["generate"]["generation"]
        metrics["seconds"] = {stage: record["seconds"] for stage, record in records.items()}
        write_json(file, metrics)
    return metrics


def accuracies_on(run: RunDir, packed: Packed, images: ImageSet) -> dict[str, dict[str, Any]]:
    """Of each trained method on held-out images: top-1, many / medium / few and "by_class", in percent."""
    return _accuracies(run, packed, images.labels, _predictions(run, images))


def _predictions(run: RunDir, images: ImageSet) -> dict[str, np.ndarray]:
    """Of each method, int64 [N]."""
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    loader = evaluation_loader(images, run.config.data, run.config.classifier.image_size, device)
    result = {}
    for method in progress_bar(run.config.classifier.methods, "evaluate", unit="classifier"):
        model = load_classifier(run.folder("classifier") / f"{method}.safetensors", device)
        result[method], _ = predict(model, loader, dtype)
    return result


def _accuracies(
    run: RunDir, packed: Packed, labels: np.ndarray, predictions: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    groups = class_groups(packed.counts, run.config.groups.many, run.config.groups.few)
    return {
        method: accuracies(predicted, labels, groups)
        | {"by_class": class_accuracies(predicted, labels, len(packed.classes))}
        for method, predicted in predictions.items()
    }


def _copies(run: RunDir, packed: Packed, file: Path) -> dict[str, Any]:
    """The shares of what `measure_copies` gave, which is kept in `file`: other classifiers do not measure again."""
    held_out = run.require("pack")["held_out"].get("val")
    digest = run.digest({"generate": run.hash("generate"), "held_out": held_out})
    if metadata(file).get("hash") != digest:
        save_tensors(file, measured_copies(run, packed, open_kept(run.folder("generate"))), {"hash": digest})
    return copy_shares(load_tensors(file)[0], packed.classes)


def measured_copies(run: RunDir, packed: Packed, samples: ImageSet | None) -> dict[str, torch.Tensor]:
    """What `diffult.longtail.copies.measure_copies` finds among samples of the run's diffusion model."""
    data, device = run.config.data, pick_device()
    rows, view = rows_at_a_time(data.image_size, data.channels), data.view(data.image_size)  # as diffusion sees them
    extractor, dtype = load_extractor(run.folder("extractor"), device), compute_dtype(run.config.precision, device)

    def loader(images: ImageSet) -> Loader:
        return Loader(images, rows, device=device, crop=view)

    kept, held_out = (None if images is None else loader(images) for images in (samples, packed.val))
    return measure_copies(loader(packed.train), kept, held_out, extractor, dtype, run.config.diffusion.flip)


def table(metrics: dict[str, Any]) -> str:
    """The comparison as text: a line a method, top-1 and groups in percent."""
    titles = {name: find_method(name).title for name, row in metrics.items() if isinstance(row, dict) and "top1" in row}
    corner = "accuracy in %"
    width = max(map(len, [corner, *titles.values()])) + 2
    lines = [f"{corner:{width}}" + "".join(f"{column:>9}" for column in COLUMNS)]
    for name, title in titles.items():
        cells = ("-" if metrics[name][column] is None else f"{metrics[name][column]:.1f}" for column in COLUMNS)
        lines.append(f"{title:{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def copies_line(copies: dict[str, Any]) -> str:
    """One line about the copies of metrics.json."""
    known = {name: share for name, share in copies["by_class"].items() if share is not None}
    if copies["share"] is None or not known:
        return "copies of training images: not known, without samples or with too few validation images to compare with"
    most = max(known, key=lambda name: known[name])
    return (
        f"copies of training images: {copies['share']:.1f} % of the synthetic images (class {most}: "
        f"{known[most]:.1f} %); "
        f"{100 * EXPECTED:.0f} % of new real images would count as such"
    )


def command(run: RunOption, set_: SetOption = None) -> None:
    """Measure every classifier on the balanced test set: top-1 and many / medium / few; and count the synthetic images
    that are copies of training images. Needs every stage before."""
    world = init_distributed()
    run_dir = RunDir.open(run, overrides=set_, world=world)
    if world.is_main:
        metrics = evaluate(run_dir, world)
        print(table(metrics))
        print(copies_line(metrics["copies"]))
    world.barrier()


if __name__ == "__main__":
    main(command)
