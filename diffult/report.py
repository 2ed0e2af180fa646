"""Stage report: a run as one HTML file that needs nothing beside it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from diffult.cli import RunOption, main
from diffult.engine.device import machine
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError
from diffult.generation.shards import open_kept
from diffult.reporting.content import read_content
from diffult.reporting.pictures import NO_SAMPLES
from diffult.reporting.run import render
from diffult.runs.files import write_text
from diffult.runs.records import check_classes, read_metrics
from diffult.runs.run_dir import RunDir
from diffult.runs.shared_disk import lock_shared


def write_report(run: RunDir, out: Path | None = None, world: World = ALONE) -> Path:
    """Writes the report to `out`, or report.html in the run directory, and returns its path. Raises UserError if the
    run is not evaluated with the present settings, or a file is damaged."""
    file = run.path / "metrics.json"
    metrics = read_metrics(file, run.hash("evaluate"), run.config.classifier.methods)
    if metrics is None:
        raise UserError(f"{file}: no metrics of the present settings; run python -m diffult.evaluate --run {run.path}")
    packed, here = run.packed(), machine()
    check_classes(metrics, packed.classes, file)
    samples = open_kept(run.folder("generate")) or NO_SAMPLES
    with nullcontext() if out else lock_shared(run.path, world):
        path = out or run.path / "report.html"
        where = f"{here['device']}, torch {here['torch']}"
        write_text(path, render(read_content(run.path, run.config, metrics, packed, samples, where)))
    return path


def command(
    run: RunOption,
    out: Annotated[
        Path | None, typer.Option(help="File to write, for a run in a read-only place; default: RUN/report.html.")
    ] = None,
) -> None:
    """Write the report of an evaluated run: one HTML file with answers, tables, figures, samples, cost and settings."""
    world = init_distributed()
    run_dir = RunDir.open(run, world=world)
    if world.is_main:
        print(write_report(run_dir, out, world))
    world.barrier()


if __name__ == "__main__":
    main(command)
