"""The whole pipeline: set -> extractor -> diffusion -> generate -> balance -> classifier -> metrics -> report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from diffult.artifacts import build_unet, load_extractor
from diffult.balance import balance
from diffult.cli import PresetOption, SetOption, main
from diffult.config import preset_names
from diffult.data import Data, load_data
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.loop import check_checkpoint
from diffult.errors import UserError
from diffult.evaluate import evaluate, table
from diffult.generate import generate_stage
from diffult.longtail.statistics import MIN_IMAGES_FOR_RADIUS
from diffult.models.cost import summary
from diffult.models.resnet import build_classifier
from diffult.report import write_report
from diffult.runs.run_dir import RunDir, Stage
from diffult.train_classifier import train_classifier
from diffult.train_diffusion import train_diffusion
from diffult.train_extractor import train_extractor

log = logging.getLogger(__name__)


def prepare(run: RunDir) -> Data:
    """Everything that can be refused is refused here, before any work starts: data, networks, checkpoints.

    Raises:
        UserError: bad data, networks that do not fit it, or a damaged checkpoint.
    """
    config = run.config
    for checkpoint in sorted(run.path.glob("*/*state.pt")):
        if not (checkpoint.parent / "done.json").exists():
            check_checkpoint(checkpoint)
    data = load_data(config.data)
    num_classes = len(data.train.classes)
    if data.train.counts().max() < MIN_IMAGES_FOR_RADIUS:
        raise UserError(
            f"no class has {MIN_IMAGES_FOR_RADIUS} training images: no radius can be measured; raise data.n_max"
        )
    log.info("%s: %s", config.name, run.path)
    device = pick_device()
    log.info("device: %s, %s", device, str(compute_dtype(config.precision, device)).removeprefix("torch."))
    for title, part in (("extractor", config.extractor), ("classifier", config.classifier)):
        classifier = build_classifier(part.network, num_classes, config.data.channels, part.image_size)
        image = torch.empty(1, config.data.channels, part.image_size, part.image_size)
        log.info(summary(f"{title} ({part.network})", classifier, [image]))
    image = torch.empty(1, config.data.channels, config.data.image_size, config.data.image_size)
    label = torch.zeros(1, dtype=torch.int64)
    log.info(summary("diffusion (UNet)", build_unet(config, num_classes), [image, label, label]))
    data.check()
    return data


def run_pipeline(run: RunDir, until: Stage = "report") -> None:
    """Runs every stage up to `until`; finished ones are skipped, an interrupted one goes on where it stopped."""
    data = prepare(run)
    counts, classes = data.train.counts(), data.train.classes

    def diffusion() -> None:
        train_diffusion(run, data, load_extractor(run, pick_device()))

    def report() -> None:
        print(table(evaluate(run)))
        log.info("report: %s", write_report(run))

    stages = {
        "extractor": lambda: train_extractor(run, data),
        "diffusion": diffusion,
        "generate": lambda: generate_stage(run, counts, classes),
        "betons": lambda: balance(run, data),
        "classifier": lambda: train_classifier(run),
        "report": report,
    }
    for name, stage in stages.items():
        stage()
        if name == until:
            return


def command(
    run: Annotated[Path | None, typer.Option("--run", "--out", help="Run directory; default: runs/PRESET.")] = None,
    preset: PresetOption = None,
    set_: SetOption = None,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "report",
) -> None:
    """Rebalance a long-tailed image set and train on it: every stage, resumable, from images to report.

    Start with --preset NAME; the same command again goes on where it was interrupted.
    """
    if run is None:
        if preset is None:
            raise UserError(f"give --preset NAME (one of {', '.join(preset_names())}) or --run DIR")
        run = Path("runs") / preset
    stages = Stage.__args__  # type: ignore[attr-defined]
    if until not in stages:
        raise UserError(f"--until {until!r}: expected one of {', '.join(stages)}")
    run_pipeline(RunDir.open(run, preset, set_), until)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(command)
