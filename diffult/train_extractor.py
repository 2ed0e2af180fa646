"""Stage 1: the extractor phi0, an ordinary classifier on the long-tailed set, and where each class lies in it.

Writes extractor/weights.safetensors and extractor/statistics.safetensors (centres, radii).
"""

from __future__ import annotations

from typing import Any

import torch

from diffult.cli import PresetOption, RunOption, SetOption, main
from diffult.data import Data, load_data
from diffult.engine.device import compute_dtype, pick_device
from diffult.longtail.classification import extract_features, fit
from diffult.longtail.statistics import class_statistics
from diffult.models.resnet import build_classifier
from diffult.runs.files import save_tensors
from diffult.runs.run_dir import RunDir
from ffcv_writers import ArraySet, Loader, Natural

_STAGE = 1  # its number among the seeds


def train_extractor(run: RunDir, data: Data) -> None:
    """Trains phi0 on the long-tailed set with plain cross-entropy and measures the classes."""
    with run.stage("extractor") as note:
        if note is not None:
            _train(run, data, note)


def _train(run: RunDir, data: Data, note: dict[str, Any]) -> None:
    config, train, folder = run.config.extractor, data.train, run.folder("extractor")
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    num_classes = len(train.classes)
    torch.manual_seed(run.config.seed)
    model = build_classifier(config.network, num_classes, run.config.data.channels, config.image_size)
    model.to(device)
    loader = Loader(ArraySet(train.load(), train.labels), config.batch_size, device=device)
    fit(
        "extractor", model, loader, Natural(len(train)), config,
        folder / "state.pt", (run.config.seed, _STAGE), run.config.hash, dtype, device,
    )  # fmt: skip

    features, labels = extract_features(model, loader, config.image_size, dtype, device)
    statistics = class_statistics(features, labels, num_classes)
    info = {"config": run.config.hash, "network": config.network, "num_classes": str(num_classes)}
    save_tensors(folder / "weights.safetensors", model.state_dict(), info)
    save_tensors(folder / "statistics.safetensors", vars(statistics), info)
    note["radii"] = [round(float(r), 3) for r in statistics.radii]


def command(run: RunOption, preset: PresetOption = None, set_: SetOption = None) -> None:
    """Train the extractor phi0 on the long-tailed set and measure centre and radius of each class."""
    run_dir = RunDir.open(run, preset, set_)
    train_extractor(run_dir, load_data(run_dir.config.data))


if __name__ == "__main__":
    main(command)
