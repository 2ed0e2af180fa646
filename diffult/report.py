"""Stage report: a run as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jinja2 import Environment, StrictUndefined, Template

from diffult.cli import RunOption, duration, main
from diffult.config import Config
from diffult.data.packing import Packed
from diffult.engine.device import pick_device
from diffult.engine.distributed import init_distributed
from diffult.errors import UserError
from diffult.generation.shards import open_kept
from diffult.longtail.filter import FILTERS, Verdict
from diffult.longtail.methods import find_method
from diffult.longtail.metrics import COLUMNS, class_groups
from diffult.longtail.quota import quotas_to
from diffult.plots import MAX_CLASSES, NO_SAMPLES, Samples, class_histogram, evenly, first_images, image_strip
from diffult.runs.files import read_json, write_text
from diffult.runs.run_dir import RunDir

log = logging.getLogger(__name__)
_PER_CLASS = 6  # real images of a class, and as many samples beside them
_LONG_TABLE = 40  # more rows than this are folded


def accuracy_rows(accuracies: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row {"title", "cells"} for each trained method, in the order of `accuracies`.

    A cell is {"value", "best", "delta"}: the accuracy, whether it is the highest of its column, and the difference to
    cross-entropy in points, where that was trained. All follow from the rounded accuracies that are shown, so that they
    add up.

    Args:
        accuracies: method -> {"top1", "many", "medium", "few"} in percent, None without test images.
    """

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 1)

    shown = {
        method: {column: rounded(row[column]) for column in COLUMNS}
        for method, row in accuracies.items()
        if isinstance(row, dict) and "top1" in row
    }

    def cell(method: str, column: str) -> dict[str, Any]:
        value, base = shown[method][column], shown["ce"][column] if "ce" in shown else None
        best = max(row[column] or 0.0 for row in shown.values())
        delta = None if method == "ce" or value is None or base is None else value - base
        return {"value": value, "best": value == best, "delta": delta}

    return [{"title": find_method(m).title, "cells": [cell(m, column) for column in COLUMNS]} for m in shown]


def generation_rows(
    by_class: Mapping[str, Mapping[str, int]], classes: tuple[str, ...], counts: np.ndarray, quotas: np.ndarray
) -> list[dict[str, Any]]:
    """The tally of each class that drew candidates, its verdicts in percent, the class with most real images first.

    Args:
        by_class: class name -> {"drawn", "accepted", "id", "aid", "ood"}.
        counts, quotas: int64 [num_classes], real images and samples needed.
    """
    return [
        {"name": classes[c], "real": counts[c], "needed": quotas[c]} | dict(tally) | _shares(tally)
        for c in np.argsort(-counts, kind="stable")
        if (tally := by_class.get(classes[c])) is not None
    ]


def _shares(tally: Mapping[str, int]) -> dict[str, float]:
    """Verdicts in percent of the candidates."""
    return {verdict: 100.0 * tally[verdict] / max(tally["drawn"], 1) for verdict in ("id", "aid", "ood")}


def gallery(packed: Packed, samples: Samples, quotas: np.ndarray) -> list[dict[str, Any]]:
    """The first real images and samples of each class, the class with most real images first; an even choice of more
    than 40 classes."""
    counts = packed.counts
    drawn = np.bincount(samples.labels, minlength=len(counts))
    return [
        {
            "name": packed.classes[c],
            "real": _strip(packed.train, c),
            "real_count": counts[c],
            "generated": _strip(samples, c),
            "generated_count": drawn[c],
            "needed": quotas[c],
        }
        for c in evenly(np.argsort(-counts, kind="stable"), MAX_CLASSES)
    ]


def _strip(images: Samples, label: int) -> dict[str, Any] | None:
    """The first images of a class as {"src", "width"}; None if it has none."""
    shown, buffer = first_images(images, label, _PER_CLASS), io.BytesIO()
    if not shown:
        return None
    strip = image_strip(shown)
    strip.save(buffer, format="PNG", optimize=True)
    return {"src": _data_uri(buffer.getvalue(), "image/png"), "width": strip.width}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def timing_rows(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """{"stage", "seconds", "share"} for each stage, the share in percent of the whole."""
    total = sum(seconds.values()) or 1.0
    return [{"stage": stage, "seconds": spent, "share": 100 * spent / total} for stage, spent in seconds.items()]


def render(config: Config, metrics: Mapping[str, Any], packed: Packed, samples: Samples, machine: str) -> str:
    """The report as HTML.

    Args:
        metrics: the content of metrics.json.
        samples: the kept ones.
        machine: its description, one line.
    """
    counts = packed.counts
    quotas = quotas_to(config.generate.balance_to, counts, config.generate.dose)
    groups = class_groups(counts, config.groups.many, config.groups.few)
    synthetic = np.bincount(samples.labels, minlength=len(counts))
    generation = metrics["generation"]
    return _template().render(
        config=config,
        metrics=metrics,
        machine=machine,
        counts=counts,
        group_sizes={name: len(members) for name, members in groups.items()},
        synthetic=int(synthetic.sum()),
        accuracy=accuracy_rows(metrics),
        validation=accuracy_rows(metrics["validation"]) if "validation" in metrics else [],
        histogram=_data_uri(class_histogram(counts, synthetic, groups, packed.classes), "image/svg+xml"),
        gallery=gallery(packed, samples, quotas),
        generation=generation,
        filtered=Verdict.OOD not in FILTERS[config.generate.filter].keeps,
        shares=_shares(generation),
        by_class=generation_rows(generation["by_class"], packed.classes, counts, quotas),
        long_table=_LONG_TABLE,
        timings=timing_rows(metrics["seconds"]),
    )


def _template() -> Template:
    text = (resources.files("diffult") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    return environment.from_string(text)


def write_report(run: RunDir, out: Path | None = None) -> Path:
    """Writes the report to `out`, or report.html in the run directory, and returns its path. Raises UserError if the
    run is not evaluated with the present settings."""
    file = run.path / "metrics.json"
    metrics = read_json(file) if file.exists() else {}
    if metrics.get("hash") != run.hash("evaluate"):
        raise UserError(f"{file}: no metrics of the present settings; run python -m diffult.evaluate --run {run.path}")
    path = out or run.path / "report.html"
    samples = open_kept(run.folder("generate")) or NO_SAMPLES
    write_text(path, render(run.config, metrics, run.packed(), samples, _machine()))
    return path


def _machine() -> str:
    device = pick_device()
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def command(
    run: RunOption,
    out: Annotated[
        Path | None, typer.Option(help="File to write, for a run in a read-only place; default: RUN/report.html.")
    ] = None,
) -> None:
    """Write the report of an evaluated run: one HTML file with table, histogram, samples and timings."""
    world, run_dir = init_distributed(), RunDir.open(run)
    if world.is_main:
        print(write_report(run_dir, out))
    world.barrier()


if __name__ == "__main__":
    main(command)
