"""A preset over several seeds: mean and deviation of every method, as a results file and a Markdown table.

    python -m bench.seeds --preset digits-lt --seeds 5

Each seed draws its own long-tailed subset, trains everything anew and is a full run of `diffult.run` in runs/. Seeds
run side by side with `--jobs`, each with its share of the cores.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer

from diffult.cli import SetOption, main
from diffult.engine.device import fast_bfloat16, pick_device
from diffult.errors import UserError
from diffult.longtail.methods import METHODS
from diffult.longtail.metrics import COLUMNS
from diffult.runs.files import read_json, write_json


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = pick_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {len(models) or os.cpu_count()} cores"
        name += ", bfloat16" * fast_bfloat16(device)
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def run_seed(preset: str, seed: int, folder: Path, overrides: list[str], threads: int) -> dict[str, Any]:
    """One full run, resumed where it was interrupted. Returns its metrics."""
    settings = [f"seed={seed}", f"data.seed={seed}", *overrides]
    command = [sys.executable, "-m", "diffult.run", "--preset", preset, "--run", str(folder)]
    command += [part for setting in settings for part in ("--set", setting)]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=out, stderr=out, env=environment, check=False).returncode
    if code:
        raise UserError(f"seed {seed} of {preset} failed, see {log}")
    return read_json(folder / "metrics.json")


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """[mean, sample deviation] of each method and group in percent, and of the gain over cross-entropy of the same
    seed. A group without a class is left out. Nothing is rounded: a figure is rounded once, where it is shown."""
    summary: dict[str, dict[str, list[float]]] = {}
    for method in METHODS:
        if method in runs[0]:
            groups = [group for group in COLUMNS if all(run[method][group] is not None for run in runs)]
            values = {group: [run[method][group] for run in runs] for group in groups}
            gains = {f"{group}_gain": [run[method][group] - run["ce"][group] for run in runs] for group in groups}
            summary[method] = {name: [mean(v), stdev(v) if len(v) > 1 else 0.0] for name, v in (values | gains).items()}
    return summary


def markdown(summary: dict[str, dict[str, list[float]]]) -> str:
    """The table of the README."""
    lines = ["| | top-1 | many | medium | few | few, gain over CE |", "|---|---|---|---|---|---|"]
    for method, row in summary.items():
        columns = (*COLUMNS, "few_gain")
        cells = [f"{row[name][0]:.1f} ± {row[name][1]:.1f}" if name in row else "–" for name in columns]
        lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command(
    preset: Annotated[str, typer.Option(help="Preset to run.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to N - 1.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    set_: SetOption = None,
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/seeds"),
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Run a preset over several seeds and tell mean and deviation of every method."""
    overrides = set_ or []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda s: run_seed(preset, s, folder / f"{preset}-{s}", overrides, threads), range(seeds)))
    summary = summarise(runs)
    typed = f"python -m bench.seeds --preset {preset} --seeds {seeds} --jobs {jobs}"
    typed += "".join(f" --set {setting}" for setting in overrides)
    file = out / f"seeds-{preset}.json"
    write_json(file, {"command": typed, "machine": machine(), "summary": summary, "runs": runs})
    print(markdown(summary))
    print(json.dumps({"results": str(file)}))


if __name__ == "__main__":
    main(command)
