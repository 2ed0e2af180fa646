"""Variants of a preset side by side: how good the samples are, how fast they come, and what the classifier gains.

    python -m bench.variants bench/plans/steps-digits.toml

The file names the preset, the seeds, and for each variant the settings that it changes. Stages that read the same
settings are shared: variants that differ in generation alone share one diffusion model, those that differ in its
training one extractor. Every variant is a run of `diffult.run`, kept in runs/ and resumed where it was interrupted.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer

from bench.quality import quality, train_judge
from diffult.cli import main
from diffult.engine.device import machine
from diffult.errors import UserError
from diffult.evaluate import evaluate
from diffult.longtail.metrics import class_groups
from diffult.run import run_pipeline
from diffult.runs.files import read_json, write_json
from diffult.runs.run_dir import RunDir


def measure(plan: dict[str, Any], seed: int, name: str, folder: Path) -> dict[str, Any]:
    """One variant at one seed: its metrics, its seconds, and the quality of its samples by group of classes."""
    preset, overrides = plan["preset"], plan["variants"][name]
    settings = [f"seed={seed}", f"data.seed={seed}", *plan.get("settings", [])]
    run = RunDir.open(folder / f"{name}-{seed}", preset, [*settings, *overrides])
    if (run.path / "measured.json").exists():
        return read_json(run.path / "measured.json")
    base = RunDir.open(folder / f"base-{seed}", preset, settings)
    if run.path != base.path:
        run.share(base)
    run_pipeline(run)
    packed = run.packed()
    if packed.val is None:
        raise UserError(f"{preset}: there are no validation images to compare samples with; set data.val_per_class")
    judge = train_judge(preset, [f"data.seed={seed}"], folder / f"judge-{seed}")
    seen = quality(run, judge, packed.val, plan["per_class"])
    groups = class_groups(packed.counts, run.config.groups.many, run.config.groups.few)
    metrics = evaluate(run)
    result = {
        "frechet": {group: float(np.mean(np.array(seen["frechet"])[mask])) for group, mask in groups.items()},
        "labelled": {group: 100 * float(np.mean(np.array(seen["labelled"])[mask])) for group, mask in groups.items()},
        "accepted": 100 * metrics["generation"]["accepted"] / max(metrics["generation"]["drawn"], 1),
        "images_per_s": metrics["generation"]["images_per_s"],
        "nfe": metrics["generation"]["nfe"],
        "diffusion_seconds": metrics["seconds"]["diffusion"],
        "validation": metrics["validation"],
    }
    write_json(run.path / "measured.json", result)
    return result


def markdown(results: dict[str, list[dict[str, Any]]], method: str) -> str:
    """A line a variant, means over its seeds; "few" is of the few-shot classes."""
    lines = [
        "| | training, s | evaluations | images/s | Fréchet, few | labelled right, few | accepted | top-1 | few |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in results.items():
        row = [mean(r["diffusion_seconds"] for r in seeds), seeds[0]["nfe"], mean(r["images_per_s"] for r in seeds)]
        row += [mean(r["frechet"]["few"] for r in seeds), mean(r["labelled"]["few"] for r in seeds)]
        row += [mean(r["accepted"] for r in seeds)]
        row += [mean(r["validation"][method][group] for r in seeds) for group in ("top1", "few")]
        cells = [f"{row[0]:.0f}", f"{row[1]}", f"{row[2]:.0f}", f"{row[3]:.2f}"] + [f"{v:.1f}" for v in row[4:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command(
    file: Annotated[Path, typer.Argument(help="TOML: preset, seeds, per_class and [variants].")],
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/variants"),
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Measure variants of a preset's recipe: samples, speed, and the classifier's gain on the validation images."""
    plan = tomllib.loads(file.read_text())
    plan["variants"] = {"base": [], **plan["variants"]}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in plan["variants"]}
    about = {"command": f"python -m bench.variants {file}", "machine": machine()}
    for seed in plan["seeds"]:
        for name in plan["variants"]:
            results[name].append(measure(plan, seed, name, folder / file.stem))
            write_json(out / f"{file.stem}.json", about | plan | {"results": results})
    print(markdown({name: rows for name, rows in results.items() if rows}, "diffult"))
    print(json.dumps({"results": str(out / f"{file.stem}.json")}))


if __name__ == "__main__":
    main(command)
