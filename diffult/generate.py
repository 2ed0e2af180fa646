"""Stage generate: draw samples and judge them until every class has its quota of accepted ones.

Writes generate/synthetic.beton (of more than 4 GB synthetic-000.beton ...), candidates.safetensors, manifest.json,
summary.json and grid.png; where the timesteps are searched first (generate.search), timesteps.json; where pixel levels
are matched to the training images (generate.match_histogram), levels.safetensors.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pydantic import ValidationError

from diffult.cli import SetOption, main
from diffult.config import refusal
from diffult.data.class_names import MOST_SAMPLES, ClassNames, parse_classes, read_counts
from diffult.diffusion.samplers import SAMPLERS
from diffult.engine.device import peak_flops
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError, one_of
from diffult.generation.candidates import draw_candidates
from diffult.generation.config import LARGEST_BATCH, GenerateConfig
from diffult.generation.export import FORMATS, export, parse_formats
from diffult.generation.fill import fill, speed
from diffult.generation.sampler import Sampler
from diffult.generation.shards import ShardStore, kept_files, manifest, open_kept, refuse_other
from diffult.generation.timesteps import trial_names
from diffult.longtail.extractor import load_extractor
from diffult.longtail.filter import FILTERS
from diffult.longtail.quota import Quota, quotas_to
from diffult.reporting.pictures import NO_SAMPLES, sample_grid
from diffult.reporting.text import duration
from diffult.runs.files import atomic_write, write_json
from diffult.runs.run_dir import RunDir
from diffult.runs.sampler import LEVELS, TRIALS, compiling_pays, open_sampler
from diffult.runs.shared_disk import lock_shared, wait_for_same_files
from diffult.runs.stages import Stage

log = logging.getLogger(__name__)
BUNDLED = "digits-lt"
# --fast: the fewest evaluations that were no worse than the ten before, in docs/experiments.md
FAST: dict[str, Any] = {
    "sampler": "dpm++",
    "steps": 5,
    "spacing": "sigma",
    "sigma_max": 40.0,
    "sigma_min": 0.05,
    "rho": 3.0,
    "timesteps": (),
    "search": 0,
    "start": "noise",
    "guidance": 0.0,
}


@dataclass(frozen=True)
class Request:
    """What to draw with a run's model.

    Attributes:
        quotas: int64 [num_classes], accepted samples of each class.
        seed: of the noise.
        compiled: whether the network goes through torch.compile; None: on CUDA alone.
    """

    settings: GenerateConfig
    quotas: np.ndarray
    seed: int
    compiled: bool | None = None


def generate_stage(
    run: RunDir, batch_size: int | None = None, compiled: bool | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Fills every class up to N_t, into generate/. The batch size (default: the run's) and `compiled` affect the speed
    alone. Returns the figures for metrics.json. Every process of `world` calls this."""
    packed = run.packed()
    run.require("extractor")
    run.require("diffusion")
    with run.stage("generate", world, keep=lambda file: file.name in (TRIALS, LEVELS)) as record:
        if record is not None:
            own = run.config.generate
            settings = own.model_copy(update={"batch_size": batch_size or own.batch_size})
            request = Request(settings, quotas_to(own.balance_to, packed.counts, own.dose), run.config.seed, compiled)
            record["generation"] = fill_folder(run.folder("generate"), run, request, world)
    return run.require("generate")["generation"]


def fill_folder(folder: Path, run: RunDir, request: Request, world: World = ALONE) -> dict[str, Any]:
    """Draws what is requested into a folder, or what an interrupted attempt left to draw. Returns the figures of
    summary.json. Every process of `world` calls this, the first with the folder locked.

    Raises:
        UserError: the folder holds samples of another request, or the processes do not see the same files in it.
    """
    wait_for_same_files([folder], world)
    settings, classes = request.settings, run.packed().classes
    check = partial(_check_folder, folder, run, request)
    sampler = open_sampler(run, settings, request.seed, request.compiled, folder, world, check)
    settings = sampler.settings  # with the timesteps that were searched
    extractor = load_extractor(run.folder("extractor"), sampler.device)
    quota = Quota(request.quotas, settings.max_draws, FILTERS[settings.filter])
    if world.is_main:
        store = open_store(folder, run, settings, request.quotas, request.seed)
        store.resume(quota)
        if 0 < (there := int(quota.accepted.sum())) < quota.quotas.sum():
            log.info("generate: resuming with %d of %d samples", there, quota.quotas.sum())
    quota = world.gather(quota)[0]  # what the first process found on disk; the others read nothing of it
    wait_for_same_files([folder], world)  # a new folder has its first file now
    if not world.is_main:
        store = open_store(folder, run, settings, request.quotas, request.seed, world.rank)
    result = fill(sampler, extractor, store, quota, classes, world)
    if world.is_main:
        with atomic_write(folder / "grid.png") as temporary:
            sample_grid(open_kept(folder) or NO_SAMPLES, classes, temporary)
        write_json(folder / "summary.json", result)
    world.barrier()
    return result


def open_store(
    folder: Path, run: RunDir, settings: GenerateConfig, quotas: np.ndarray, seed: int, rank: int = 0
) -> ShardStore:
    """The shards in `folder`. Raises UserError if another model or other settings made them."""
    levels = {"levels": folder / LEVELS} if settings.match_histogram else {}
    return ShardStore(folder, manifest(settings, quotas, seed, _networks(run) | levels), rank)


def _check_folder(folder: Path, run: RunDir, request: Request, settings: GenerateConfig) -> None:
    """As `open_store`, before anything is searched or fitted: a refused request leaves the folder as it was."""
    if not (folder / "manifest.json").exists():
        return
    unknown = {"timesteps": "to be searched"} if settings.search else {}
    if settings.match_histogram:
        unknown["levels"] = "to be fitted"
    refuse_other(folder, manifest(settings, request.quotas, request.seed, _networks(run)), unknown)


def _networks(run: RunDir) -> dict[str, Path]:
    return {
        "diffusion": run.folder("diffusion") / "ema.safetensors",
        "extractor": run.folder("extractor") / "weights.safetensors",
    }


# Options


def _quotas(
    run: RunDir, balance_to: int | None, per_class: int | None, counts_file: Path | None, classes: str | None
) -> np.ndarray:
    if sum(given is not None for given in (balance_to, per_class, counts_file)) > 1:
        raise UserError("--balance-to, --per-class and --counts exclude each other; give one")
    packed = run.packed()
    names = ClassNames(packed.classes)
    if counts_file is not None:
        quotas = read_counts(counts_file, names)
    elif per_class is not None:
        quotas = np.full_like(packed.counts, per_class)
    elif balance_to is not None:
        quotas = quotas_to(balance_to, packed.counts)
    else:
        quotas = quotas_to(run.config.generate.balance_to, packed.counts, run.config.generate.dose)
    if classes is None:
        return quotas
    return np.where(np.isin(np.arange(len(quotas)), parse_classes(classes, names)), quotas, 0)


def _settings(run: RunDir, fast: bool, given: dict[str, Any]) -> GenerateConfig:
    """The run's own settings, overridden by --fast, and both by single options that are not None."""
    values = run.config.generate.model_dump() | (FAST if fast else {})
    values |= {key: value for key, value in given.items() if value is not None}
    if given["steps"] is not None:  # other than those that the run lists
        values["timesteps"] = ()
    _check_name("--sampler", SAMPLERS, values["sampler"])
    if values["steps"] > run.config.diffusion.timesteps:
        raise UserError(f"--steps {values['steps']}: the model has {run.config.diffusion.timesteps} timesteps")
    if values["guidance"] and not run.config.diffusion.label_dropout:
        raise UserError(f"--guidance {values['guidance']}: the model was trained with diffusion.label_dropout = 0")
    try:
        return GenerateConfig(**values)
    except ValidationError as error:
        raise refusal(error.errors()[0], "options") from None


def _check_name(option: str, names: Iterable[str], given: str) -> None:
    try:
        one_of(names, given)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _is_own(run: RunDir, request: Request) -> bool:
    """Whether the request is what the run's generate stage draws."""
    own = run.config.generate.model_copy(update={"batch_size": request.settings.batch_size})
    quotas = quotas_to(own.balance_to, run.packed().counts, own.dose)
    return (request.settings, request.seed) == (own, run.config.seed) and np.array_equal(request.quotas, quotas)


# Cost and traces


def _log_work(request: Request, classes: tuple[str, ...]) -> None:
    settings = request.settings
    guidance = f", guidance {settings.guidance}" if settings.guidance else ""
    wanted = ", ".join(f"{name}: {n}" for name, n in zip(classes, request.quotas, strict=True) if n)
    log.info(
        "%d samples, %d evaluations each (%s, %d steps%s)\nper class: %s", request.quotas.sum(), settings.evaluations,
        settings.sampler, settings.steps, guidance, wanted,
    )  # fmt: skip


def _print_cost(run: RunDir, request: Request) -> None:
    """Prints disk space, and time if the run has a model to measure."""
    samples, data = int(request.quotas.sum()), run.config.data
    size = f"{samples * data.channels * data.image_size**2 / 2**20:.1f} MiB of kept images"
    if run.done("diffusion") is None:
        print(f"{size}; the time is unknown: the run has no finished model to measure")
        return
    sampler, draw = _trial(run, request)
    begun = time.perf_counter()
    draw()
    rate = request.settings.batch_size / (time.perf_counter() - begun)
    if request.settings.search:
        trials = request.settings.search * len(trial_names(np.arange(len(run.packed().classes)))[0])
        size += f"; at most {duration(trials / rate)} to search timesteps"
    print(
        f"{size}; {speed(rate, sampler.flops(), peak_flops(sampler.device))}: {duration(samples / rate)} if all "
        f"pass, at most {duration(request.settings.max_draws * samples / rate)}"
    )


def _trial(run: RunDir, request: Request) -> tuple[Sampler, Callable[[], object]]:
    """A sampler, and a function that draws and judges a batch for nothing; compiling and recording are done."""
    settings = request.settings.model_copy(update={"search": 0, "match_histogram": False})
    sampler = open_sampler(run, settings, request.seed, request.compiled)
    extractor, filter = load_extractor(run.folder("extractor"), sampler.device), FILTERS[request.settings.filter]
    indices = np.arange(request.settings.batch_size)
    draw = partial(draw_candidates, sampler, extractor, filter, 0 * indices, indices)
    sampler.prepare()
    for _ in range(4 if sampler.device.type == "cuda" else 1):  # each kind of evaluation is recorded at its fourth
        draw()
    return sampler, draw


def _write_trace(run: RunDir, request: Request, file: Path) -> None:
    """A profile of two batches, drawn for it alone."""
    _, draw = _trial(run, request)
    with torch.profiler.profile() as profiler:
        draw()
        draw()
    with atomic_write(file) as temporary:
        profiler.export_chrome_trace(str(temporary))
    log.info("wrote %s (chrome://tracing, Perfetto)", file)


def _run_bundled(path: Path, until: Stage, world: World) -> None:
    if world.is_main and not (path / until / "done.json").exists():
        log.info("no --run given and no finished stage %r in %s: running the bundled %s first", until, path, BUNDLED)
        command = [sys.executable, "-m", "diffult.run", "--run", str(path), "--until", until]
        if not (path / "config.toml").exists():
            command += ["--preset", BUNDLED]
        alone = os.environ | {"WORLD_SIZE": "1"}  # not one more process of this torchrun
        if code := subprocess.run(command, check=False, env=alone).returncode:
            raise UserError(f"running the bundled {BUNDLED} in {path} failed (exit code {code})")
    world.barrier()


def command(
    run: Annotated[Path | None, typer.Option(help=f"Run directory; default: the bundled runs/{BUNDLED}.")] = None,
    set_: SetOption = None,
    fast: Annotated[bool, typer.Option("--fast", help="DPM-Solver++(2M), 5 steps, no guidance.")] = False,
    balance_to: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SAMPLES, help="Fill every class up to N images; default: the run's."),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(min=0, max=MOST_SAMPLES, help="N samples of every class instead.")
    ] = None,
    counts_file: Annotated[
        Path | None,
        typer.Option(
            "--counts",
            exists=True,
            dir_okay=False,
            help="Samples of each class instead: a file of lines 'class count', the class as in --classes.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Only these classes, such as cat,3,7-9: by name, or where no name is a number by label; default: all."
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)}; default: the run's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps; default: the run's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="w in eps + w (eps - eps_null), 0: off; default: the run's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_BATCH, help="Samples drawn at a time; default: the run's.")
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="On a CPU a minute and g++, then 1.05 to 1.1 x the speed; default: on CUDA, and with --fast from "
            "twenty minutes on.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise; default: the run's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the samples; default: see above.")
    ] = None,
    export_: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            help=f"Also write the samples as {', '.join(FORMATS)}: one, or several between commas; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print samples, time and disk space, and stop.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also write a trace of two batches, trace.json.")] = False,
) -> None:
    """Draw exactly as many accepted samples as each class of a long-tailed set needs.

    With the run's own settings, which --set changes, this is its stage generate and writes to RUN/generate; with any
    other sampler, seed or quota it writes to RUN/generated. The kept samples are in synthetic.beton there. An
    interrupted command resumes; batch size and --compile change samples by rounding only.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.generate --fast --run RUN
    """
    world = init_distributed()
    formats = parse_formats(export_ or [])
    bundled, run = run is None, run or Path("runs") / BUNDLED
    if bundled:  # options are checked against the packed images, before any training
        _run_bundled(run, "pack", world)
    run_dir = RunDir.open(run, overrides=set_, world=world)
    given = {"sampler": sampler, "steps": steps, "guidance": guidance, "batch_size": batch_size}
    settings = _settings(run_dir, fast, given)
    quotas = _quotas(run_dir, balance_to, per_class, counts_file, classes)
    request = Request(settings, quotas, run_dir.config.seed if seed is None else seed, compile_)
    names = run_dir.packed().classes
    _log_work(request, names)
    if dry_run:
        if world.is_main:
            _print_cost(run_dir, request)
        return
    if bundled:
        _run_bundled(run, "diffusion", world)
    run_dir.require("extractor")
    run_dir.require("diffusion")
    if fast and compile_ is None:
        compile_ = compiling_pays(run_dir, settings, int(quotas.sum()) // world.size)
        request = replace(request, compiled=compile_)
    if out is None and _is_own(run_dir, request):
        folder, result = run_dir.folder("generate"), generate_stage(run_dir, batch_size, compile_, world)
    else:
        folder = out or run / "generated"
        with lock_shared(folder, world) if world.is_main else nullcontext():
            result = fill_folder(folder, run_dir, request, world)
    if not world.is_main:
        return
    print(json.dumps({key: value for key, value in result.items() if key != "by_class"}))
    kept = ", ".join(file.name for file in kept_files(folder)) or "no sample"
    log.info("wrote %s (%s, candidates.safetensors, manifest.json, summary.json, grid.png)", folder, kept)
    if profile:
        _write_trace(run_dir, request, folder / "trace.json")
    for name in formats:
        log.info("wrote %s", export(name, folder, names) or f"no {name}: no sample was kept")


if __name__ == "__main__":
    main(command)
