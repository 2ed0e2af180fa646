"""Methods side by side over several seeds, each with the same budget: mean, deviation, and differences seed by seed.

Writes comparison.json, comparison.csv and report.html, and beside them a run directory for each seed and each set of
settings. A run trains all the methods that share its settings; runs of a seed share the stages that read the same
settings, by hard links. The same command resumes; with one more method it trains that one alone.
"""

from __future__ import annotations

import inspect
import logging
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from diffult.cli import PresetOption, SetOption, main
from diffult.config import Config, load_preset, preset_name, preset_names
from diffult.data.survey import locate
from diffult.engine.device import machine, pick_device
from diffult.engine.progress import progress_bar
from diffult.errors import UserError
from diffult.longtail.comparison import baseline, compare, table, to_csv
from diffult.longtail.methods import METHODS, MODIFIERS, find_method
from diffult.longtail.metrics import COLUMNS
from diffult.longtail.rows import Row, ablation, parse_row, parse_rows
from diffult.planning import DEFAULT_HOURS, plan_name, propose
from diffult.reporting.comparison import render
from diffult.runs.children import Children
from diffult.runs.files import lock_folder, read_json, read_lines, write_json, write_text
from diffult.runs.run_dir import RunDir
from diffult.runs.variants import Plan, Variant, plan
from ffcv_writers import available_cores

log = logging.getLogger(__name__)


def run_all(plan: Plan, todo: Sequence[Variant], jobs: int) -> list[str]:
    """Runs what is to do, so many at a time, each with its share of the cores. Returns a line for each that failed.

    A run starts when the one before it that shares most stages with it has ended, and takes over these stages.
    """
    threads, failures = max(1, available_cores() // jobs), []
    futures: dict[Path, Future[str | None]] = {}

    def work(variant: Variant) -> str | None:
        before = plan.before(variant)
        if before and (nearest := futures.get(variant.nearest(before).path)):
            wait([nearest])
        try:
            run = variant.open()
            for other in before:
                if other.path not in futures or futures[other.path].done():  # else it may yet delete a stage
                    _take_over(run, other)
        except (UserError, OSError) as error:
            return f"{variant.path}: {error}"
        return _failure(variant, children.run(variant.command, variant.log, threads))

    with ThreadPoolExecutor(jobs) as pool, Children() as children:
        for variant in todo:
            futures[variant.path] = pool.submit(work, variant)
        with progress_bar(total=len(todo), desc="compare", unit="run") as bar:
            try:
                for future in as_completed(futures.values()):
                    bar.update()
                    failures += [failure] if (failure := future.result()) else []
            except BaseException:  # interrupted: what has not started does not
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


def _take_over(run: RunDir, other: Variant) -> None:
    if (other.path / "config.toml").exists():
        run.share(RunDir.open(other.path))


def _failure(variant: Variant, code: int) -> str | None:
    if code == 0:
        return None
    lines = variant.log.read_text(encoding="utf-8", errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith("error: ")] or lines[-1:] or [f"exit code {code}"]
    return f"see {variant.log} ({reasons[-1].removeprefix('error: ')})"


def gather(plan: Plan) -> dict[str, Any]:
    """The part of comparison.json that is measured, over the seeds of which every run is evaluated; empty if there is
    no such seed."""
    metrics = {variant.path: variant.metrics() for variant in plan.runs}
    complete = [seed for seed in plan.seeds if all(metrics[v.path] for v in plan.runs if v.seed == seed)]
    if not complete:
        return {}
    first = plan.runs[0]
    packed = RunDir(first.path, first.config).packed()
    rows = []
    for row in plan.rows:
        variants = [plan.variants[plan.settings[row.name]][seed] for seed in complete]
        found = [metrics[variant.path] or {} for variant in variants]
        trained = [_training(variant, row.method) for variant in variants]
        held_out = [run.get("validation", {}).get(row.method) for run in found]
        rows.append({
            "name": row.name, "method": row.method, "title": row.title, "synthetic": row.synthetic,
            "filled": [variants[0].config.generate.balance_to, variants[0].config.generate.dose],
            "steps": trained[0][0],
            "seconds": sum(seconds for _, seconds in trained) / len(trained),
            "seeds": [_accuracies(run[row.method]) for run in found],
            "validation": [values["top1"] for values in held_out if values] or None,
        })  # fmt: skip
    best, groups = baseline(rows), first.config.groups
    chosen = {"name": best["name"], "chosen_on": "validation" if best["validation"] else "test"} if best else None
    return {
        "seeds": complete, "classes": list(packed.classes), "counts": packed.counts.tolist(),
        "test_counts": np.bincount(packed.test.labels, minlength=len(packed.classes)).tolist(),
        "groups": {"many": groups.many, "few": groups.few}, "split": "test", "baseline": chosen, "rows": compare(rows),
        "runs": [_cost(v, metrics[v.path] or {}) for v in plan.runs if v.seed in complete],
    }  # fmt: skip


def _accuracies(metrics: dict[str, Any]) -> dict[str, Any]:
    return {column: metrics[column] for column in (*COLUMNS, "by_class")}


def _training(variant: Variant, method: str) -> tuple[int, float]:
    """Steps of a method's training and the seconds that they took, with those of the method that it starts from, read
    from their logs."""
    start = find_method(method).start
    before, seconds = _training(variant, start) if start else (0, 0.0)
    file, steps = variant.path / "classifier" / f"{method}.metrics.jsonl", 0
    for line in read_lines(file) if file.exists() else ():
        seconds += (line["step"] - steps) * variant.config.classifier.batch_size / line["images_per_s"]
        steps = line["step"]
    return before + steps, seconds


def _cost(variant: Variant, metrics: dict[str, Any]) -> dict[str, Any]:
    """Of a run: what was trained and drawn, and the seconds of its stages; of those it took over, the seconds that they
    took where they ran."""
    drawn = {key: metrics["generation"][key] for key in ("drawn", "accepted")}
    names = {"folder": variant.path.name, "seed": variant.seed, "methods": list(variant.config.classifier.methods)}
    return names | {"seconds": metrics["seconds"], "generation": drawn}


def write(comparison: dict[str, Any], out: Path) -> None:
    """comparison.json, comparison.csv and report.html."""
    write_json(out / "comparison.json", comparison)
    write_text(out / "comparison.csv", to_csv(comparison))
    write_text(out / "report.html", render(comparison))


def _announce(plan: Plan, todo: Sequence[Variant], jobs: int, budget: dict[str, Any]) -> None:
    """Prints the budget, what is shared and what there is to do."""
    first, seeds = plan.runs[0], len(plan.seeds)
    untrained = sum(len(variant.untrained()) for variant in todo)
    print(f"{first.config.name}: {', '.join(row.title for row in plan.rows)}")
    print(f"seeds: {'0' if seeds == 1 else f'0 to {seeds - 1}'}")
    length = f"{budget['steps']} steps" if "steps" in budget else f"{budget['epochs']:g} epochs of its own images"
    print(
        f"budget of each classifier: {length} in batches of {budget['batch_size']}, unless a row sets another; "
        "heads that are retrained take 15 % more"
    )
    print("shared: the methods of a run use one extractor, one diffusion model and one set of samples")
    print(
        f"to do: {len(todo)} of {len(plan.runs)} runs, with {untrained} classifiers to train, {jobs} at a time "
        f"with {max(1, available_cores() // jobs)} of {available_cores()} cores each"
    )
    if todo:
        print(f"progress of each run: {todo[0].log}" + ", ..." * (len(todo) > 1))


def _left_out(out: Path, rows: Sequence[Row]) -> list[str]:
    """Rows of the comparison that is there already which the command does not name."""
    file = out / "comparison.json"
    before = read_json(file).get("rows") if file.exists() else []
    names = [row.get("name") for row in before if isinstance(row, dict)] if isinstance(before, list) else []
    return [str(name) for name in names if name not in {row.name for row in rows}]


def _aligned(markdown: str) -> str:
    """A Markdown table for a terminal."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    del rows[1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _planned(folder: Path, data: Path, hours: float | None, overrides: Sequence[str], rows: Sequence[Row]) -> str:
    """The file of the settings proposed for own images, made and printed where it is not there yet.

    Raises:
        UserError: the folder has a plan for other images.
    """
    file = folder / "plan.toml"
    if file.exists():
        planned, here = load_preset(str(file)).data, locate(data)
        if any(getattr(planned, key) != value for key, value in here.items()):
            raise UserError(f"{file}: is for other images ({planned.path}); give another --run")
        print(f"{file}: goes on with these settings (delete the file to plan anew)")
        return str(file)
    methods = [f"classifier.methods={list(dict.fromkeys(row.method for row in rows))}"] if rows else []
    plan = propose(data, hours or DEFAULT_HOURS, [*overrides, *methods], folder)
    write_text(file, plan.config.to_toml(plan.comments))
    print("\n".join(plan.lines + plan.table))
    return str(file)


def _rows(config: Config, given: list[Row], with_ablation: bool) -> list[Row]:
    if not given and not with_ablation:
        return [parse_row(name) for name in config.classifier.methods]
    return [*given, *(ablation(config) if with_ablation else [])]


def _checked_rows(preset: str | None, data: Path | None, hours: float | None, methods: str | None) -> list[Row]:
    """The rows of --methods; UserError for options that do not go together."""
    if preset is not None and data is not None:
        raise UserError("--data proposes settings, --preset names some: give one of the two")
    if preset is None and data is None:
        raise UserError(f"give --preset NAME (one of {', '.join(preset_names())}) or --data DIR")
    if data is None and hours is not None:
        raise UserError("--hours is for your own images: give --data DIR, too")
    given = parse_rows(methods or "")
    if methods is not None and not given:
        raise UserError("--methods: give one at least, such as --methods ce,diffult")
    return given


def _typed(options: Iterable[tuple[str, Any]], flag: str) -> str:
    words = [word for name, value in options if value is not None for word in (name, str(value))]
    return shlex.join(["python", "-m", "diffult.compare", *words]) + flag


def command(
    preset: PresetOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Own images, with settings proposed for them (RUN/plan.toml): CLASS/*.jpg, .npz, .tar or a list."
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="With --data: what one seed may take here.", show_default=f"{DEFAULT_HOURS:g}"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Rows, by commas, each with settings of its own if wanted: ce,diffult,diffult@classifier.omega=0.3.",
            show_default="the preset's",
        ),
    ] = None,
    ablation_: Annotated[
        bool,
        typer.Option(
            "--ablation", help="The paper's ablation, nine rows: each part added in turn, then ID, AID or OOD alone."
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to N - 1, each with its own draw of training images.")] = 3,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs side by side; default: the seeds, at most a core each; on a GPU 1."),
    ] = None,
    set_: SetOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the runs.", show_default="runs/compare/PRESET")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of comparison.json, comparison.csv and report.html.", show_default="that of the runs"
        ),
    ] = None,
) -> None:
    """Compare methods over several seeds with the same budget: which one wins, by how much, and whether that is more
    than chance.

    Resumable: the same command goes on, and with one more method trains that one alone. Differences are of each method
    with synthetic images to the best one without (chosen on the validation images) and to as many duplicates of
    real images; each interval stands for itself.
    """
    given = _checked_rows(preset, data, hours, methods)
    overrides, typed = set_ or [], [("--preset", preset), ("--data", data), ("--hours", hours), ("--run", run)]
    folder = run or Path("runs/compare") / (preset_name(preset) if preset else plan_name(data or Path()))
    out = out or folder
    if (folder / "config.toml").exists():
        raise UserError(f"{folder}: holds a run, not a comparison; give another --run")
    preset = preset or _planned(folder, data or Path(), hours, overrides, given)
    config = load_preset(preset, overrides)
    planned = plan(folder, preset, _rows(config, given, ablation_), overrides, seeds)
    logging.getLogger("diffult.runs.run_dir").setLevel(logging.WARNING)  # what a run redoes stands in its own log
    for variant in planned.runs:  # what can be refused is refused before any work
        variant.open()
    options = [*typed, ("--methods", methods), ("--seeds", seeds), *(("--set", s) for s in overrides)]
    about: dict[str, Any] = {
        "preset": config.name,
        "command": _typed(options, " --ablation" * ablation_),
        "machine": machine(),
    }
    epochs, size = config.classifier.epochs, config.classifier.batch_size
    length = {"steps": config.classifier.steps} if epochs is None else {"epochs": epochs}
    about["budget"] = length | {"batch_size": size}
    with lock_folder(folder), lock_folder(out) if out != folder else nullcontext():
        todo = [variant for variant in planned.runs if variant.metrics() is None]
        default = 1 if pick_device().type == "cuda" else min(seeds, available_cores())
        jobs = min(jobs or default, max(1, len(todo)))
        _announce(planned, todo, jobs, about["budget"])
        if left_out := _left_out(out, planned.rows):
            print(f"left out, though trained before (name them again to show them): {', '.join(left_out)}")
        failures = run_all(planned, todo, jobs) if todo else []
        if measured := gather(planned):
            comparison = about | measured
            write(comparison, out)
            print(_aligned(table(comparison)))
            if len(measured["seeds"]) == 1:
                print("one seed: no deviation and no interval; differences may be chance (--seeds)")
            print(f"report: {out / 'report.html'}")
    if failures:
        rest = f"; {len(failures) - 1} more failed" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{rest}; the same command resumes")


command.__doc__ = (
    f"{inspect.cleandoc(command.__doc__ or '')}\n\nMethods, explained in docs/methods.md: {', '.join(METHODS)}; after "
    f"one, any of +{', +'.join(MODIFIERS)}."
)

if __name__ == "__main__":
    main(command)
