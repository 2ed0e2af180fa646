"""Stage 6: every classifier on the whole test set, seen here for the first time. Writes metrics.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffult.artifacts import load_classifier
from diffult.cli import RunOption, main
from diffult.engine.device import compute_dtype, pick_device
from diffult.longtail.classification import predict
from diffult.longtail.methods import RECIPES
from diffult.longtail.metrics import COLUMNS, accuracies, class_groups
from diffult.parts import open_part
from diffult.runs.files import read_json, write_json
from diffult.runs.run_dir import RunDir
from ffcv_writers import Loader

_BATCH = 256


def evaluate(run: RunDir) -> dict[str, Any]:
    """Top-1 and many / medium / few in percent on the test set, and on the validation set under "validation".

    Skipped where metrics.json of this configuration is there.

    Raises:
        UserError: a stage before is not finished.
    """
    file = run.path / "metrics.json"
    if file.exists() and (metrics := read_json(file)).get("config") == run.config.hash:
        return metrics
    run.require("classifier", "train_classifier")
    run.require("generate", "generate")
    generated = (run.done("generate") or {})["generation"]
    counts = np.bincount(open_part(run, "real").labels)
    groups = class_groups(counts, run.config.groups.many, run.config.groups.few)
    metrics = {"name": run.config.name, "config": run.config.hash, "seed": run.config.seed}
    metrics |= {"device": str(pick_device()), "torch": torch.__version__}
    metrics |= _accuracies(run, "test", groups)
    if (run.done("betons") or {}).get("val"):
        metrics["validation"] = _accuracies(run, "val", groups)
    metrics["generation"] = generated
    metrics["seconds"] = {
        stage: (run.done(stage) or {}).get("seconds", 0.0)
        for stage in ("extractor", "diffusion", "generate", "betons", "classifier")
    }
    write_json(file, metrics)
    return metrics


def _accuracies(run: RunDir, part: str, groups: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    loader = Loader(open_part(run, part), _BATCH, device=device)
    result: dict[str, dict[str, float | None]] = {}
    for method in run.config.classifier.methods:
        model = load_classifier(run, method, device)
        predictions, labels = predict(model, loader, run.config.classifier.image_size, dtype, device)
        result[method] = accuracies(predictions, labels, groups)
    return result


def table(metrics: dict[str, Any]) -> str:
    """The comparison as text: a line a method, top-1 and groups in percent."""
    lines = [f"{'':28}" + "".join(f"{column:>9}" for column in COLUMNS)]
    for method, recipe in RECIPES.items():
        if method in metrics:
            row = metrics[method]
            cells = ("-" if row[column] is None else f"{row[column]:.1f}" for column in COLUMNS)
            lines.append(f"{recipe.title:28}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def command(run: RunOption) -> None:
    """Measure every classifier on the balanced test set: top-1 and many / medium / few."""
    metrics = evaluate(RunDir.open(run))
    print(table(metrics))


if __name__ == "__main__":
    main(command)
