"""CIFAR10-LT from raw images to final classifiers within a time limit, planned from counted work.

    python -m bench.cifar --data cifar-10-python.tar.gz --budget 510 --out bench/results/gpu

Runs the preset cifar10-lt-100-fast. The plan is printed first: work counted on the networks, seconds at 20 % of the
card's peak. Then the time of a training step is measured, and the diffusion model gets as many steps as the time left
allows after what the stages behind it need. DATA may also be an image folder, DATA/train/CLASS and DATA/test/CLASS, or
a .tar.gz of one: a JPEG copy of CIFAR-10, which the results name as such.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.cost import synthetic_images
from diffult.cli import main
from diffult.config import Config
from diffult.engine.device import machine, peak_flops, pick_device
from diffult.engine.distributed import ALONE
from diffult.errors import UserError
from diffult.planning.cost import stage_flops
from diffult.run import run_pipeline
from diffult.runs.files import read_json, write_json
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES
from diffult.train_diffusion import seconds_per_step

PRESET, CLASSES = "cifar10-lt-100-fast", 10
_SHARE = 0.2  # of the card's peak that the plan assumes
_PEAK = 989e12  # where the card's own is not known: an H100's
# Seconds that do not follow from counted work: decoding, compiling, launching many small kernels.
_FIXED = {"pack": 15, "extractor": 40, "measuring": 75, "generate": 40, "classifier": 110, "evaluate": 10, "report": 5}
_SMOKE = [
    "extractor.steps=4", "diffusion.steps=4", "diffusion.checkpoint_every=2", "generate.filter=none",
    "generate.balance_to=20", "classifier.steps=4",
]  # fmt: skip


def plan(config: Config, budget: float, peak: float) -> dict[str, float]:
    """Seconds of each stage within `budget`: counted work at a fifth of `peak` (FLOP/s) and what is fixed; the
    diffusion model gets what is left."""
    flops = stage_flops(config, CLASSES, 1.2 * synthetic_images(config, CLASSES))
    seconds = dict(_FIXED) | {"generate": _FIXED["generate"] + flops["generate"] / (_SHARE * peak)}
    wanted = flops["diffusion"] / (_SHARE * peak)
    return seconds | {"diffusion": max(0.0, min(wanted, budget - sum(seconds.values())))}


def steps_within(seconds: float, a_step: float, wanted: int) -> int:
    """How many of the wanted training steps fit, with 5 % to spare; at least 100, or nothing could be shown."""
    return min(wanted, max(100, int(0.95 * seconds / a_step)))


def data_settings(data: Path, scratch: Path) -> tuple[str, list[str]]:
    """What the set is called in the results, and its settings.

    Raises:
        UserError: neither CIFAR-10's archive or folder, nor an image folder.
    """
    if not data.exists():
        raise UserError(f"--data {data}: not found; give CIFAR-10's python archive, its folder, or an image folder")
    if data.name.endswith((".tar.gz", ".tar")) and "python" not in data.name:
        try:
            with tarfile.open(data) as archive:
                archive.extractall(scratch, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"--data {data}: cannot be unpacked ({error})") from None
        data = scratch
    for folder in (data, *sorted(data.glob("*"))):  # an archive may hold the folder itself
        if (folder / "train").is_dir():
            return "CIFAR-10 (JPEG copy)", ["data.source=folder", f"data.path={folder}"]
    return "CIFAR-10", [f"data.path={data}"]


class Results:
    """What is known so far, on disk after every stage: a run that is killed keeps it."""

    def __init__(self, out: Path, started: float, **about: Any) -> None:
        self.out, self.started = out, started
        self.content: dict[str, Any] = about | {"machine": machine(), "seconds": {}}

    def add(self, run: RunDir, stage: str, begun: float) -> None:
        self.content["seconds"][stage] = round(time.monotonic() - begun, 1)
        self.content["elapsed"] = round(time.monotonic() - self.started, 1)
        for file in ("config.toml", "metrics.json", "report.html", "generate/grid.png"):
            if (run.path / file).exists():
                self.out.mkdir(parents=True, exist_ok=True)
                shutil.copy(run.path / file, self.out / f"cifar-{Path(file).name}")
        if (run.path / "metrics.json").exists():
            self.content["metrics"] = read_json(run.path / "metrics.json")
        write_json(self.out / "cifar.json", self.content)
        print(f"{stage}: {self.content['seconds'][stage]} s, {self.content['elapsed']} s since the start", flush=True)


def command(
    data: Annotated[
        Path | None, typer.Option(help="CIFAR-10's python archive, its folder, or an image folder.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help=f"Run directory; default: runs/{PRESET}, with --smoke runs/cifar-smoke.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all of it.")] = 510.0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value over the preset.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="The bundled digits at a few steps a stage.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench/results"),
) -> None:
    """Train CIFAR10-LT, imbalance 100, from raw images to final classifiers within a time limit."""
    started = time.monotonic()
    run = run or Path("runs") / ("cifar-smoke" if smoke else PRESET)
    if smoke:
        name, preset, settings = "digits", "digits-lt", _SMOKE
    elif data is None:
        raise UserError("give --data PATH, CIFAR-10's python archive, its folder, or an image folder")
    else:
        preset = PRESET
        name, settings = data_settings(data, run.parent / "cifar10-images")
    opened = RunDir.open(run, preset, [*settings, *(set_ or [])])
    peak = peak_flops(pick_device()) or _PEAK
    planned = plan(opened.config, budget, peak)
    for stage in sorted(planned, key=lambda s: STAGES.index(s) if s in STAGES else 2):
        print(f"plan: {stage} {planned[stage]:.0f} s")
    results = Results(out, started, set=name, preset=preset, budget=budget, plan=planned)
    behind = sum(planned[stage] for stage in ("generate", "classifier", "evaluate", "report"))
    for stage in STAGES:
        begun = time.monotonic()
        if stage == "diffusion" and opened.started("diffusion") is None:
            a_step = seconds_per_step(opened, ALONE)
            left = budget - (time.monotonic() - started) - behind
            steps = steps_within(left, a_step, opened.config.diffusion.steps)
            print(f"diffusion: {1e3 * a_step:.2f} ms a step, {steps} steps in the {left:.0f} s left", flush=True)
            results.content |= {"seconds_per_step": a_step, "diffusion_steps": steps}
            opened = RunDir.open(run, overrides=[f"diffusion.steps={steps}"])
        if stage == "classifier" and "extractor" in results.content["seconds"]:
            a_step = results.content["seconds"]["extractor"] / opened.config.extractor.steps
            left = budget - (time.monotonic() - started) - planned["evaluate"] - planned["report"]
            classifier = opened.config.classifier  # at worst its methods train one after another
            steps = steps_within(left / len(classifier.methods), a_step, classifier.steps)
            print(f"classifiers: {1e3 * a_step:.2f} ms a step, {steps} steps in the {left:.0f} s left", flush=True)
            results.content |= {"classifier_steps": steps}
            opened = RunDir.open(run, overrides=[f"classifier.steps={steps}"])
        run_pipeline(opened, stage)
        results.add(opened, stage, begun)
    print(json.dumps({method: row["top1"] for method, row in results.content["metrics"].items() if _is_row(row)}))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and "top1" in value


if __name__ == "__main__":
    main(command)
