"""Stage evaluate: every classifier on the whole test set, read here for the first time. Writes metrics.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffult.cli import RunOption, SetOption, main
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import init_distributed
from diffult.longtail.classification import predict
from diffult.longtail.methods import find_method
from diffult.longtail.metrics import COLUMNS, accuracies, class_groups
from diffult.models.resnet import load_classifier
from diffult.runs.files import read_json, write_json
from diffult.runs.run_dir import RunDir
from ffcv_writers import ImageSet, Loader

_BATCH = 256
_SHOWN = 224 / 256  # of the shorter side of larger stored images, as usual on ImageNet


def evaluate(run: RunDir) -> dict[str, Any]:
    """Top-1 and many / medium / few in percent on the test set, and on the validation set under "validation".

    Skipped if metrics.json holds them already. Raises UserError if a stage before is not finished.
    """
    file = run.path / "metrics.json"
    if file.exists() and (metrics := read_json(file)).get("hash") == run.hash("evaluate"):
        return metrics
    run.require("classifier")
    records = {stage: run.require(stage) for stage in ("pack", "extractor", "diffusion", "generate", "classifier")}
    packed = run.packed()
    groups = class_groups(packed.counts, run.config.groups.many, run.config.groups.few)
    metrics = {"name": run.config.name, "hash": run.hash("evaluate"), "seed": run.config.seed}
    metrics |= {"device": str(pick_device()), "torch": torch.__version__}
    with run.lock():
        metrics |= _accuracies(run, packed.test, groups)
        if packed.val is not None:
            metrics["validation"] = _accuracies(run, packed.val, groups)
        metrics["generation"] = records["generate"]["generation"]
        metrics["seconds"] = {stage: record["seconds"] for stage, record in records.items()}
        write_json(file, metrics)
    return metrics


def _accuracies(run: RunDir, images: ImageSet, groups: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    view = run.config.data.view(run.config.classifier.image_size, _SHOWN)
    loader = Loader(images, _BATCH, device=device, crop=view)
    result: dict[str, dict[str, float | None]] = {}
    for method in tqdm(run.config.classifier.methods, "evaluate", unit="classifier", dynamic_ncols=True):
        model = load_classifier(run.folder("classifier") / f"{method}.safetensors", device)
        predictions, labels = predict(model, loader, dtype)
        result[method] = accuracies(predictions, labels, groups)
    return result


def table(metrics: dict[str, Any]) -> str:
    """The comparison as text: a line a method, top-1 and groups in percent."""
    titles = {name: find_method(name).title for name, row in metrics.items() if isinstance(row, dict) and "top1" in row}
    width = max(map(len, titles.values())) + 2
    lines = [" " * width + "".join(f"{column:>9}" for column in COLUMNS)]
    for name, title in titles.items():
        cells = ("-" if metrics[name][column] is None else f"{metrics[name][column]:.1f}" for column in COLUMNS)
        lines.append(f"{title:{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def command(run: RunOption, set_: SetOption = None) -> None:
    """Measure every classifier on the balanced test set: top-1 and many / medium / few. Needs every stage before."""
    world, run_dir = init_distributed(), RunDir.open(run, overrides=set_)
    if world.is_main:
        print(table(evaluate(run_dir)))
    world.barrier()


if __name__ == "__main__":
    main(command)
