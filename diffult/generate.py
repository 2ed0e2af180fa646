"""Stage 3: draw samples, judge them, keep those in or approximately in distribution until every class has its quota.

Writes shards and manifest.json; `diffult.generation.generator` is the engine,
`diffult.longtail.quota` decides what is kept.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

from diffult.cli import duration, main
from diffult.config import GenerateConfig
from diffult.data import load_data
from diffult.diffusion.samplers import SamplerName
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import peak_flops
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError
from diffult.generation.export import FORMATS, export
from diffult.generation.generator import Generator, build_generator, generate
from diffult.generation.shards import ShardStore
from diffult.generation.synthetic import kept_samples, open_store, quotas_to, read_quota
from diffult.longtail.quota import Quota
from diffult.plots import sample_grid
from diffult.runs.files import atomic_write, write_json
from diffult.runs.run_dir import RunDir

log = logging.getLogger(__name__)
BUNDLED = "digits-lt"
# --fast: the knee of the measured tables in the README
FAST: dict[str, Any] = {"sampler": "dpm++", "steps": 10, "spacing": "log_snr", "guidance": 0.0, "cache_interval": 1}


def fill(
    generator: Generator, store: ShardStore, quota: Quota, classes: tuple[str, ...], world: World = ALONE
) -> dict[str, Any]:
    """Draws until the quota is met and writes every wave, each while the next is drawn. Returns what the metrics say
    of generation; "images_per_s" is of all processes together."""
    if quota.missing.any():
        generator.prepare()
    flops, sampled, begun = generator.flops(), 0, time.perf_counter()
    total, there = int(quota.quotas.sum()), int(quota.accepted.sum())
    bar = tqdm(
        total=total, initial=there, desc="generate", unit="img", dynamic_ncols=True, disable=not world.is_main
    )  # fmt: skip
    written: Future[None] | None = None
    with bar, ThreadPoolExecutor(1) as writer:
        for wave in generate(generator, quota, world):
            if written is not None:
                written.result()  # a full disk ends the run here; and no more than one wave waits
            written = writer.submit(store.add, wave)
            sampled += len(wave.labels)
            bar.update(int(quota.accepted.sum()) - bar.n)
            rate = sampled * world.size / (time.perf_counter() - begun)
            speed = _speed(rate, flops, peak_flops(generator.device) * world.size)
            bar.set_postfix_str(f"{_shares(quota, classes)}, {speed}", refresh=False)
        if written is not None:
            written.result()
    seconds = time.perf_counter() - begun
    sampled = sum(world.gather(sampled))
    tallies = [quota.tally(c) for c in range(len(classes))]
    for name, wanted, tally in zip(classes, quota.quotas, tallies, strict=True):
        if tally["accepted"] < wanted:
            log.warning(
                "class %s: only %d of %d samples after %d candidates; the filter hardly ever accepts this class "
                "(train longer, or raise generate.max_draws)", name, tally["accepted"], wanted, tally["drawn"],
            )  # fmt: skip
    totals = {key: sum(tally[key] for tally in tallies) for key in tallies[0]}
    evaluations, first_level = generator.settings.evaluations(generator.schedule)
    return totals | {
        "images_per_s": round(sampled / seconds, 2) if sampled else None,
        "nfe": evaluations,
        "nfe_first_level": first_level,
        "gflop_per_sample": round(flops / 1e9, 6),
        "by_class": {name: tally for name, tally in zip(classes, tallies, strict=True) if tally["drawn"]},
    }


def _shares(quota: Quota, classes: tuple[str, ...]) -> str:
    """Of what was drawn how much is kept, and in the three unfinished classes where it is least."""
    drawn, accepted = np.array(quota.drawn), quota.accepted
    shares = accepted / np.maximum(drawn, 1)
    unfinished = [c for c in np.argsort(shares, kind="stable") if quota.missing[c] and drawn[c]]
    worst = ", ".join(f"{classes[c]}: {shares[c]:.0%}" for c in unfinished[:3])
    return f"{accepted.sum() / max(drawn.sum(), 1):.0%} of {drawn.sum()} kept" + (f" ({worst})" if worst else "")


def _speed(rate: float, flops: float, peak: float) -> str:
    """Samples a second in words; flops: of a sample; peak: FLOP/s of the hardware, 0 where that is not known."""
    share = f", {rate * flops / peak:.0%} of peak" if peak else ""
    return f"{rate:.4g} drawn/s, {rate * flops / 1e12:.3g} TFLOP/s{share}"


def generate_stage(
    run: RunDir, counts: np.ndarray, classes: tuple[str, ...], batch_size: int | None = None, compiled: bool = False,
    world: World = ALONE,
) -> None:  # fmt: skip
    """The pipeline's own generation: fills every class up to N_t, into synthetic/. The batch size, the run's where it
    is None, and `compiled` change the speed alone."""
    with run.stage("synthetic", world) as note:
        if note is not None:
            own, seed = run.config.generate, run.config.seed
            settings = own.model_copy(update={"batch_size": batch_size or own.batch_size})
            quotas = quotas_to(settings.balance_to, counts)
            folder = run.folder("synthetic")
            note["generation"] = _generate_into(folder, run, settings, quotas, seed, classes, compiled, world)


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
    if not world.is_main:
        world.barrier()  # for the first to make the manifest and set damaged shards aside; then all read the same
    store = open_store(folder, run, settings, quotas, seed, world.rank)
    quota = read_quota(store, settings, quotas)
    if world.is_main:
        world.barrier()
    world.barrier()  # none adds a shard while another still reads
    result = fill(build_generator(run, settings, seed, compiled), store, quota, classes, world)
    world.barrier()
    if world.is_main:
        with atomic_write(folder / "grid.png") as temporary:
            sample_grid(kept_samples(store, quota), classes, temporary)
    return result


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


def _bundled_run(path: Path) -> None:
    if (path / "diffusion" / "done.json").exists():
        return
    log.info("no --run given and no finished model in %s: training the bundled %s run first", path, BUNDLED)
    command = [sys.executable, "-m", "diffult.run", "--run", str(path), "--until", "diffusion"]
    if not (path / "config.toml").exists():
        command += ["--preset", BUNDLED]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"training the bundled run in {path} failed (exit code {code})")


def command(
    run: Annotated[Path | None, typer.Option(help="Run directory; without it the bundled digits-lt run.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="DPM-Solver++(2M), 10 steps, no guidance.")] = False,
    balance_to: Annotated[int | None, typer.Option(min=0, help="Fill every class up to N images.")] = None,
    per_class: Annotated[int | None, typer.Option(min=0, help="N samples for every class.")] = None,
    counts_file: Annotated[
        Path | None, typer.Option("--counts", help="File of lines 'class count', the class by name or number.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Only these classes, such as 3,7-9.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm or dpm++.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="w in eps + w (eps - eps_null); 0: off.")] = None,
    cache: Annotated[
        int | None, typer.Option(min=1, help="Whole network every N-th step, its first level between; 1: off.")
    ] = None,
    ema_length: Annotated[
        float | None, typer.Option(help="Length of the weights' average, 0.02 to 0.3; 0: the exponential one.")
    ] = None,
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
        str | None, typer.Option("--export", help="Also write imagefolder, npz, zip (EDM), wds or beton.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell samples, time and disk, and stop.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also write a trace of two waves, trace.json.")] = False,
) -> None:
    """Draw exactly as many accepted samples as each class of a long-tailed set needs.

    Sampler, steps and quotas come from the run's configuration unless given here. What equals the run's own settings
    goes to RUN/synthetic, as the run's generation stage; anything else to RUN/generated. An interrupted command goes
    on where it stopped; batch size and --compile change samples by rounding alone.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.generate --fast --run RUN
    """
    world = init_distributed()
    if sum(given is not None for given in (balance_to, per_class, counts_file)) > 1:
        raise UserError("--balance-to, --per-class and --counts exclude each other; give one")
    if export_ is not None and export_ not in FORMATS:
        raise UserError(f"--export {export_!r}: expected one of {', '.join(FORMATS)}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    bundled = run is None
    run = run or Path("runs") / BUNDLED
    run_dir = RunDir.open(run, BUNDLED if bundled and not (run / "config.toml").exists() else None)
    given: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": guidance, "cache_interval": cache}
    given |= {"ema_length": ema_length, "batch_size": batch_size}
    settings = _settings(run_dir, fast, {key: value for key, value in given.items() if value is not None})
    train = load_data(run_dir.config.data).train
    counts, names = train.counts(), train.classes
    quotas = quotas_to(run_dir.config.generate.balance_to if balance_to is None else balance_to, counts)
    if per_class is not None:
        quotas = np.full_like(counts, per_class)
    if counts_file is not None:
        quotas = read_counts(counts_file, names)
    if classes is not None:
        quotas = np.where(np.isin(np.arange(len(names)), parse_classes(classes, len(names))), quotas, 0)
    _tell_work(run_dir, settings, quotas, names)
    if dry_run:
        _tell_cost(run_dir, settings, quotas, compile_)
        return
    if bundled:
        if world.is_main:
            _bundled_run(run)
        world.barrier()
        run_dir = RunDir.open(run)
    run_dir.require("extractor", "train_extractor")
    run_dir.require("diffusion", "train_diffusion")
    noise_seed = run_dir.config.seed if seed is None else seed
    own = run_dir.config.generate.model_copy(update={"batch_size": settings.batch_size})
    same_quotas = bool((quotas == quotas_to(own.balance_to, counts)).all())
    if out is None and settings == own and same_quotas and noise_seed == run_dir.config.seed:
        generate_stage(run_dir, counts, names, settings.batch_size, compile_, world)
        folder, result = run_dir.folder("synthetic"), (run_dir.done("synthetic") or {})["generation"]
    else:
        folder = out or run / "generated"
        result = _generate_into(folder, run_dir, settings, quotas, noise_seed, names, compile_, world)
    if not world.is_main:
        return
    write_json(folder / "summary.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "by_class"}))
    log.info("wrote %s (shards, manifest.json, summary.json, grid.png)", folder)
    if profile:
        write_trace(build_generator(run_dir, settings, noise_seed, compile_), folder / "trace.json")
        log.info("wrote %s (chrome://tracing, Perfetto)", folder / "trace.json")
    if export_ is not None:
        store = open_store(folder, run_dir, settings, quotas, noise_seed)
        kept = kept_samples(store, read_quota(store, settings, quotas))
        log.info("wrote %s", export(kept, names, folder, export_))


def _tell_work(run: RunDir, settings: GenerateConfig, quotas: np.ndarray, classes: tuple[str, ...]) -> None:
    schedule = Schedule(run.config.diffusion.schedule, run.config.diffusion.timesteps)
    evaluations, first_level = settings.evaluations(schedule)
    guidance = f", guidance {settings.guidance}" if settings.guidance else ""
    cached = f", {first_level} of them of the first level alone" if first_level else ""
    wanted = ", ".join(f"{name}: {n}" for name, n in zip(classes, quotas, strict=True) if n)
    log.info(
        "%d samples, %d evaluations each (%s, %d steps%s)%s\nper class: %s", quotas.sum(), evaluations,
        settings.sampler, settings.steps, guidance, cached, wanted,
    )  # fmt: skip


def _tell_cost(run: RunDir, settings: GenerateConfig, quotas: np.ndarray, compiled: bool) -> None:
    """Time and disk of what would be drawn, from a measured wave where the run has a model."""
    shape = (run.config.data.channels, run.config.data.image_size, run.config.data.image_size)
    samples = int(quotas.sum())
    size = f"{samples * int(np.prod(shape)) / 2**20:.1f} MiB of kept images"
    if run.done("diffusion") is None:
        print(f"{size}; the time is not known: the run has no finished model to measure")
        return
    generator = build_generator(run, settings, 0, compiled)
    draw = _trial_wave(generator)
    begun = time.perf_counter()
    draw()
    rate = settings.batch_size / (time.perf_counter() - begun)
    print(
        f"{size}; {_speed(rate, generator.flops(), peak_flops(generator.device))}: {duration(samples / rate)} if all "
        f"pass, {duration(settings.max_draws * samples / rate)} at the most"
    )


def _trial_wave(generator: Generator) -> Callable[[], object]:
    """Draws and judges a wave for nothing, when called; what compiles and records is behind it."""
    size, no_quota = generator.settings.batch_size, Quota(np.zeros(1, np.int64), 1.0)
    draw = partial(generator.wave, np.zeros(size, np.int64), np.arange(size), no_quota)
    generator.prepare()
    for _ in range(4 if generator.device.type == "cuda" else 1):  # each kind of evaluation is recorded at its fourth
        draw()
    return draw


def write_trace(generator: Generator, file: Path) -> None:
    """A profile of two waves, drawn for it alone, as chrome://tracing and Perfetto read it."""
    draw = _trial_wave(generator)
    with torch.profiler.profile() as profiler:
        draw()
        draw()
    with atomic_write(file) as temporary:
        profiler.export_chrome_trace(str(temporary))


def _settings(run: RunDir, fast: bool, given: dict[str, Any]) -> GenerateConfig:
    """The run's own settings, with --fast over them and single options over that."""
    values = run.config.generate.model_dump() | (FAST if fast else {}) | given
    if values["sampler"] not in (names := SamplerName.__args__):  # type: ignore[attr-defined]
        raise UserError(f"--sampler {values['sampler']!r}: expected one of {', '.join(names)}")
    if values["steps"] > run.config.diffusion.timesteps:
        raise UserError(f"--steps {values['steps']}: the model has {run.config.diffusion.timesteps} timesteps")
    if values["guidance"] and not run.config.diffusion.label_dropout:
        raise UserError(f"--guidance {values['guidance']}: the model was trained with diffusion.label_dropout = 0")
    if values["ema_length"] and not run.config.diffusion.ema_snapshots:
        raise UserError(
            f"--ema-length {values['ema_length']}: the model keeps one average; train with "
            "--set diffusion.ema_snapshots=20, or leave it out"
        )
    if values["ema_length"] and not 0.02 <= values["ema_length"] <= 0.3:
        raise UserError(f"--ema-length {values['ema_length']}: expected 0, or 0.02 to 0.3")
    return GenerateConfig(**values)


if __name__ == "__main__":
    main(command)
