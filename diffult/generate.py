"""Stage generate: draw samples and judge them until every class has its quota of those that the filter keeps.

Writes generate/synthetic.beton, candidates.safetensors, manifest.json, summary.json and grid.png. Who draws is
`diffult.generation.sampler`; what is accepted is said in `diffult.longtail.filter`, what of it is kept in
`diffult.longtail.quota`.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from diffult.cli import duration, main
from diffult.config import GenerateConfig
from diffult.diffusion.samplers import SAMPLERS
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import compute_dtype, peak_flops, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError, one_of
from diffult.generation.candidates import draw_candidates
from diffult.generation.export import FORMATS
from diffult.generation.fill import fill, speed
from diffult.generation.sampler import Sampler
from diffult.generation.shards import ShardStore, manifest, open_kept
from diffult.longtail.extractor import load_extractor
from diffult.longtail.filter import FILTERS
from diffult.longtail.quota import Quota, quotas_to
from diffult.models.unet import load_unet
from diffult.plots import NO_SAMPLES, sample_grid
from diffult.runs.files import atomic_write, lock_folder, write_json
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import Stage

log = logging.getLogger(__name__)
BUNDLED = "digits-lt"
# --fast: the knee of the measured tables in docs/experiments.md
FAST: dict[str, Any] = {"sampler": "dpm++", "steps": 10, "spacing": "log_snr", "guidance": 0.0}


def generate_stage(
    run: RunDir, batch_size: int | None = None, compiled: bool = False, world: World = ALONE
) -> dict[str, Any]:
    """The pipeline's own generation: fills every class up to N_t, into generate/. The batch size, the run's where it
    is None, and `compiled` change the speed alone. Returns what the metrics report of it."""
    packed = run.packed()
    run.require("extractor")
    run.require("diffusion")
    with run.stage("generate", world) as record:
        if record is not None:
            own, seed = run.config.generate, run.config.seed
            settings = own.model_copy(update={"batch_size": batch_size or own.batch_size})
            quotas = quotas_to(settings.balance_to, packed.counts)
            folder = run.folder("generate")
            record["generation"] = _generate_into(folder, run, settings, quotas, seed, packed.classes, compiled, world)
    return run.require("generate")["generation"]


def _generate_into(
    folder: Path,
    run: RunDir,
    settings: GenerateConfig,
    quotas: np.ndarray,
    seed: int,
    classes: tuple[str, ...],
    compiled: bool,
    world: World = ALONE,
) -> dict[str, Any]:
    sampler = open_sampler(run, settings, seed, compiled)
    extractor = load_extractor(run.folder("extractor"), sampler.device)
    for first in (True, False):  # the first makes the manifest and sets damaged shards aside; then all read the same
        if world.is_main == first:
            store = open_store(folder, run, settings, quotas, seed, world.rank)
            quota = Quota(quotas, settings.max_draws, FILTERS[settings.filter])
            store.resume(quota)
        world.barrier()
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
    """The shards in `folder`, refused where another model or other settings made them."""
    weights = {
        "diffusion": run.folder("diffusion") / "ema.safetensors",
        "extractor": run.folder("extractor") / "weights.safetensors",
    }
    return ShardStore(folder, manifest(settings, quotas, seed, weights), rank)


def open_sampler(run: RunDir, settings: GenerateConfig, seed: int, compiled: bool = False) -> Sampler:
    """Opens a finished run's diffusion model for drawing on this machine.

    Args:
        compiled: the network goes through torch.compile on a CPU too; on a card it always does.

    Raises:
        UserError: the stage is not finished, or a file is damaged.
    """
    device, config = pick_device(), run.config
    dtype = compute_dtype(config.precision, device)
    run.require("diffusion")
    unet = load_unet(run.folder("diffusion") / "ema.safetensors", device, dtype)
    return Sampler(
        unet=unet,
        schedule=Schedule(config.diffusion.schedule, config.diffusion.timesteps, device),
        prediction=config.diffusion.prediction,
        settings=settings,
        shape=(config.data.channels, config.data.image_size, config.data.image_size),
        null_label=unet.label_embedding.num_embeddings - 1,
        seed=seed,
        dtype=dtype,
        device=device,
        compiled=compiled or device.type == "cuda",
    )


def parse_classes(text: str, num_classes: int) -> list[int]:
    """`3,7-9` as [3, 7, 8, 9].

    Raises:
        UserError: not of this form, or no such class.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"--classes {text!r}: expected numbers and ranges such as 3,7-9")
        chosen |= set(range(first, last + 1))
    if outside := [c for c in chosen if c >= num_classes]:
        raise UserError(f"--classes {text!r}: no class {outside[0]}, the set has 0 to {num_classes - 1}")
    return sorted(chosen)


def read_counts(file: Path, classes: tuple[str, ...]) -> np.ndarray:
    """Lines `class count`, the class by its name or number, as int64 [num_classes]; classes not named get 0.

    Raises:
        UserError: a line of another form, an unknown class, or one named twice.
    """
    counts: dict[int, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        name, _, count = line.strip().rpartition(" ")
        c = classes.index(name) if name in classes else int(name) if name.isdecimal() else len(classes)
        if not count.isdecimal() or c >= len(classes):
            raise UserError(f"{file}, line {number}: expected a class and a count, such as '3 500', got {line!r}")
        if c in counts:
            raise UserError(f"{file}, line {number}: class {name} is named twice")
        counts[c] = int(count)
    return np.array([counts.get(c, 0) for c in range(len(classes))], dtype=np.int64)


def _bundled_run(path: Path, until: Stage, world: World) -> None:
    if world.is_main and not (path / until / "done.json").exists():
        log.info("no --run given and no finished stage %r in %s: running the bundled %s first", until, path, BUNDLED)
        command = [sys.executable, "-m", "diffult.run", "--run", str(path), "--until", until]
        if not (path / "config.toml").exists():
            command += ["--preset", BUNDLED]
        if code := subprocess.run(command, check=False).returncode:
            raise UserError(f"running the bundled {BUNDLED} in {path} failed (exit code {code})")
    world.barrier()


def command(
    run: Annotated[Path | None, typer.Option(help="Run directory; without it the bundled digits-lt run.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="DPM-Solver++(2M), 10 steps, no guidance.")] = False,
    balance_to: Annotated[int | None, typer.Option(min=0, help="Fill every class up to N images.")] = None,
    per_class: Annotated[int | None, typer.Option(min=0, help="N samples for every class.")] = None,
    counts_file: Annotated[
        Path | None, typer.Option("--counts", help="File of lines 'class count', the class by name or number.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Only these classes, such as 3,7-9.")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)}; default: the run's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="w in eps + w (eps - eps_null); 0: off.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples drawn at a time.")] = None,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the network on a CPU too: half a minute and g++, then 1.4 x the speed."
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; default: the run's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the samples; default: see above.")] = None,
    export_: Annotated[
        str | None, typer.Option("--export", help=f"Also write the samples as {', '.join(FORMATS)}.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print samples, time and disk, and stop.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also write a trace of two batches, trace.json.")] = False,
) -> None:
    """Draw exactly as many accepted samples as each class of a long-tailed set needs.

    Sampler, steps and quotas come from the run's configuration unless given here. What equals the run's own settings
    goes to RUN/generate, as the run's generation stage; anything else to RUN/generated. The kept samples are in
    synthetic.beton there. An interrupted command goes on where it stopped; batch size and --compile change samples by
    rounding alone.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.generate --fast --run RUN
    """
    world = init_distributed()
    if sum(given is not None for given in (balance_to, per_class, counts_file)) > 1:
        raise UserError("--balance-to, --per-class and --counts exclude each other; give one")
    if export_ is not None:
        _check_name("--export", FORMATS, export_)
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    bundled = run is None
    run = run or Path("runs") / BUNDLED
    if bundled:  # packed, it has all by which options are checked
        _bundled_run(run, "pack", world)
    run_dir = RunDir.open(run)
    given: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": guidance, "batch_size": batch_size}
    settings = _settings(run_dir, fast, {key: value for key, value in given.items() if value is not None})
    packed = run_dir.packed()
    counts, names = packed.counts, packed.classes
    quotas = quotas_to(run_dir.config.generate.balance_to if balance_to is None else balance_to, counts)
    if per_class is not None:
        quotas = np.full_like(counts, per_class)
    if counts_file is not None:
        quotas = read_counts(counts_file, names)
    if classes is not None:
        quotas = np.where(np.isin(np.arange(len(names)), parse_classes(classes, len(names))), quotas, 0)
    _log_work(settings, quotas, names)
    if dry_run:
        _print_cost(run_dir, settings, quotas, compile_)
        return
    if bundled:
        _bundled_run(run, "diffusion", world)
    run_dir.require("extractor")
    run_dir.require("diffusion")
    noise_seed = run_dir.config.seed if seed is None else seed
    own = run_dir.config.generate.model_copy(update={"batch_size": settings.batch_size})
    same_quotas = bool((quotas == quotas_to(own.balance_to, counts)).all())
    if out is None and settings == own and same_quotas and noise_seed == run_dir.config.seed:
        folder, result = run_dir.folder("generate"), generate_stage(run_dir, settings.batch_size, compile_, world)
    else:
        folder = out or run / "generated"
        with lock_folder(folder) if world.is_main else nullcontext():
            result = _generate_into(folder, run_dir, settings, quotas, noise_seed, names, compile_, world)
    if not world.is_main:
        return
    print(json.dumps({key: value for key, value in result.items() if key != "by_class"}))
    log.info("wrote %s (synthetic.beton, candidates.safetensors, manifest.json, summary.json, grid.png)", folder)
    if profile:
        write_trace(run_dir, open_sampler(run_dir, settings, noise_seed, compile_), folder / "trace.json")
        log.info("wrote %s (chrome://tracing, Perfetto)", folder / "trace.json")
    if export_ is not None:
        kept = open_kept(folder)
        log.info("wrote %s", FORMATS[export_](kept, names, folder) if kept else "no export: no sample was kept")


def _log_work(settings: GenerateConfig, quotas: np.ndarray, classes: tuple[str, ...]) -> None:
    guidance = f", guidance {settings.guidance}" if settings.guidance else ""
    wanted = ", ".join(f"{name}: {n}" for name, n in zip(classes, quotas, strict=True) if n)
    log.info(
        "%d samples, %d evaluations each (%s, %d steps%s)\nper class: %s", quotas.sum(), settings.evaluations,
        settings.sampler, settings.steps, guidance, wanted,
    )  # fmt: skip


def _print_cost(run: RunDir, settings: GenerateConfig, quotas: np.ndarray, compiled: bool) -> None:
    """Time and disk of what would be drawn, from a measured batch where the run has a model."""
    shape = (run.config.data.channels, run.config.data.image_size, run.config.data.image_size)
    samples = int(quotas.sum())
    size = f"{samples * int(np.prod(shape)) / 2**20:.1f} MiB of kept images"
    if run.done("diffusion") is None:
        print(f"{size}; the time is not known: the run has no finished model to measure")
        return
    sampler = open_sampler(run, settings, 0, compiled)
    draw = _trial(run, sampler)
    begun = time.perf_counter()
    draw()
    rate = settings.batch_size / (time.perf_counter() - begun)
    print(
        f"{size}; {speed(rate, sampler.flops(), peak_flops(sampler.device))}: {duration(samples / rate)} if all "
        f"pass, {duration(settings.max_draws * samples / rate)} at the most"
    )


def _trial(run: RunDir, sampler: Sampler) -> Callable[[], object]:
    """Draws and judges a batch for nothing, when called; what compiles and records is behind it."""
    size, filter = sampler.settings.batch_size, FILTERS[sampler.settings.filter]
    extractor = load_extractor(run.folder("extractor"), sampler.device)
    draw = partial(draw_candidates, sampler, extractor, filter, np.zeros(size, np.int64), np.arange(size))
    sampler.prepare()
    for _ in range(4 if sampler.device.type == "cuda" else 1):  # each kind of evaluation is recorded at its fourth
        draw()
    return draw


def write_trace(run: RunDir, sampler: Sampler, file: Path) -> None:
    """A profile of two batches, drawn for it alone, as chrome://tracing and Perfetto read it."""
    draw = _trial(run, sampler)
    with torch.profiler.profile() as profiler:
        draw()
        draw()
    with atomic_write(file) as temporary:
        profiler.export_chrome_trace(str(temporary))


def _check_name(option: str, names: Iterable[str], given: str) -> None:
    try:
        one_of(names, given)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _settings(run: RunDir, fast: bool, given: dict[str, Any]) -> GenerateConfig:
    """The run's own settings, with --fast over them and single options over that."""
    values = run.config.generate.model_dump() | (FAST if fast else {}) | given
    _check_name("--sampler", SAMPLERS, values["sampler"])
    if values["steps"] > run.config.diffusion.timesteps:
        raise UserError(f"--steps {values['steps']}: the model has {run.config.diffusion.timesteps} timesteps")
    if values["guidance"] and not run.config.diffusion.label_dropout:
        raise UserError(f"--guidance {values['guidance']}: the model was trained with diffusion.label_dropout = 0")
    return GenerateConfig(**values)


if __name__ == "__main__":
    main(command)
