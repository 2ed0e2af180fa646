"""The whole pipeline: pack -> extractor -> diffusion -> generate -> classifier -> evaluate -> report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from diffult.cli import PresetOption, SetOption, main
from diffult.config import Config, preset_names, read_config
from diffult.data.survey import locate
from diffult.engine.checkpoints import check_checkpoints
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError
from diffult.evaluate import evaluate, table
from diffult.generate import generate_stage
from diffult.longtail.statistics import MIN_IMAGES_FOR_RADIUS
from diffult.models.cost import summary
from diffult.models.resnet import build_classifier
from diffult.models.unet import build_unet
from diffult.pack import pack
from diffult.planning import DEFAULT_HOURS, plan_name, planned_hours, propose
from diffult.planning.rehearsal import lines
from diffult.rehearse import rehearse
from diffult.report import write_report
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES, Stage
from diffult.train_classifier import train_classifier
from diffult.train_diffusion import train_diffusion
from diffult.train_extractor import train_extractor
from ffcv_writers.readers import LIST_FORMAT

log = logging.getLogger(__name__)


def network_costs(config: Config, num_classes: int) -> list[str]:
    """Parameters and FLOP of each network, a line each."""

    def images(side: int) -> torch.Tensor:
        return torch.empty(1, config.data.channels, side, side)

    lines = []
    for title, part in (("extractor", config.extractor), ("classifier", config.classifier)):
        classifier = build_classifier(part.network, num_classes, config.data.channels, part.image_size)
        lines.append(summary(f"{title} ({part.network})", classifier, [images(part.image_size)]))
    inputs = [images(config.data.image_size), *[torch.zeros(1, dtype=torch.int64)] * 2]
    return [*lines, summary("diffusion (UNet)", build_unet(config, num_classes), inputs)]


def run_pipeline(run: RunDir, until: Stage = "report", world: World = ALONE) -> None:
    """Runs every stage up to `until`; finished ones are skipped, an interrupted one resumes.

    Raises:
        UserError: bad settings or images, damaged checkpoints, or a batch that the processes cannot share.
    """
    for folder in map(run.folder, STAGES if world.is_main else ()):  # before any work starts
        if not (folder / "done.json").exists():
            check_checkpoints(folder)
    wanted = STAGES[: STAGES.index(until) + 1]
    for stage in ("extractor", "diffusion", "classifier"):
        if stage in wanted and not (run.folder(stage) / "done.json").exists():
            world.local_slice(getattr(run.config, stage).batch_size, f"{stage}.batch_size")
    device = pick_device()
    log.info("%s: %s", run.config.name, run.path)
    log.info("device: %s, %s", device, str(compute_dtype(run.config.precision, device)).removeprefix("torch."))

    def start() -> None:
        pack(run, world)
        packed = run.packed()
        if world.is_main:
            run.save_config()
        if packed.counts.max() < MIN_IMAGES_FOR_RADIUS:
            raise UserError(
                f"no class has {MIN_IMAGES_FOR_RADIUS} training images: no radius can be measured; raise data.n_max"
            )
        for line in network_costs(run.config, len(packed.classes)):
            log.info(line)

    stages = {
        "pack": start,
        "extractor": lambda: train_extractor(run, world),
        "diffusion": lambda: train_diffusion(run, world),
        "generate": lambda: generate_stage(run, world=world),
        "classifier": lambda: train_classifier(run, world),
        "evaluate": lambda: print(table(evaluate(run, world))) if world.is_main else None,
        "report": lambda: log.info("report: %s", write_report(run, world=world)) if world.is_main else None,
    }
    for name in wanted:
        stages[name]()
    world.barrier()


def open_data_run(
    run: Path,
    data: Path,
    hours: float | None,
    overrides: list[str],
    world: World,
    anew: bool = False,
    costs: bool = True,
) -> RunDir:
    """The run of the images at `data`: a new one, planned and the plan printed, or the one that is there already, with
    its config.toml as it stands; its images may have moved.

    Args:
        anew: a plan that is there is made again.
        costs: the plan's table of costs is printed, too.

    Raises:
        UserError: the run is of other images or was planned for other hours, or see `propose`.
    """
    if world.gather(anew or not (run / "config.toml").exists())[0]:  # as the first process sees it
        plan = propose(data, hours or DEFAULT_HOURS, overrides, run, world) if world.is_main else None
        plan = world.gather(plan)[0]
        assert plan is not None  # the first process's
        run_dir = RunDir.start(run, plan.config, plan.comments)
        if world.is_main:
            print("\n".join(plan.lines + plan.table * costs))
        return run_dir
    moved = []
    if data.expanduser().exists():
        before, place = read_config(run / "config.toml").data, locate(data)
        if before.source != place.pop("source"):
            raise UserError(f"{run}: holds a run of other images ({before.source}); give another --run")
        moved = [f"data.{key}={value}" for key, value in place.items() if getattr(before, key) != value]
    run_dir = RunDir.open(run, overrides=[*moved, *overrides], world=world)
    if hours is not None and (planned := planned_hours(run_dir.comments)) not in (None, f"{hours:g}"):
        anew_by = "another --run" if any((run / stage).exists() for stage in STAGES) else "--plan"
        raise UserError(
            f"{run}: was planned for --hours {planned}, not {hours:g}; leave --hours out to go on with that plan, or "
            f"give {anew_by} to plan anew"
        )
    log.info("%s: has its plan; goes on with the settings in config.toml", run)
    return run_dir


def print_rehearsal(run: RunDir, minutes: float, price: float | None, world: World) -> None:
    """Rehearses the run and prints its cost.

    Raises:
        UserError: something would fail; it has been printed. Or see `rehearse`.
    """
    rehearsal, failures = rehearse(run, minutes, world)
    if world.is_main:
        print("\n".join([*lines(rehearsal, price), *(f"would fail: {failure}" for failure in failures)]))
    if failures:
        raise UserError(f"{run.config.name}: this run would fail as it is, see the last lines above")


def command(
    run: Annotated[
        Path | None, typer.Option("--run", help="Run directory.", show_default="runs/PRESET or runs/NAME of the images")
    ] = None,
    preset: PresetOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Own images, settings proposed: CLASS/*.jpg or train/CLASS and test/CLASS, .npz, .tar or a list. "
            + LIST_FORMAT
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="With --data: what the run may take here.", show_default=f"{DEFAULT_HOURS:g}"),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="With --data: print the plan, write it to RUN/config.toml, and stop.")
    ] = False,
    set_: SetOption = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Take finished stages from this run where they read the same settings and images."),
    ] = None,
    until: Annotated[str, typer.Option(help=f"Stop after this stage: {', '.join(STAGES)}.")] = "report",
    minutes: Annotated[
        float | None,
        typer.Option(
            "--rehearse",
            min=0.01,
            max=10_000,
            metavar="MINUTES",
            help="Try every stage at full size, for so many minutes or a little more; print what the whole run takes "
            "and what would fail, also to RUN/rehearsal.json.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, help="With --rehearse: of an hour of one device, or process on a CPU."),
    ] = None,
) -> None:
    """Rebalance a long-tailed image set and train on it: every stage, resumable, from images to report.

    Start with --data DIR or --preset NAME; the same command again resumes. --data looks at the images, times a few
    steps, prints what it proposes with the time, memory and disk of each stage, and starts; RUN/config.toml says why,
    and may be edited between --plan and the start: only --plan plans anew. --set on an existing run redoes the stages
    that read the setting. --rehearse tries every stage for some minutes, in a folder that it removes.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.run --preset NAME
    """
    if data is not None and preset is not None:
        raise UserError("--data proposes settings and --preset has them: give one of the two")
    if data is None and (plan or hours is not None):
        raise UserError("--plan and --hours are for your own images: give --data DIR, too")
    if price is not None and minutes is None:
        raise UserError("--price is for the cost that --rehearse MINUTES prints; leave it out, or rehearse")
    if minutes is not None and (plan or from_ is not None or until != "report"):
        raise UserError("--rehearse covers the whole run and starts nothing: leave out --plan, --from and --until")
    if hours is not None and not 0 < hours < 1e5:
        raise UserError(f"--hours {hours:g}: expected a number above 0")
    if run is None:
        if preset is None and data is None:
            raise UserError(f"give --data DIR, --preset NAME (one of {', '.join(preset_names())}) or --run DIR")
        run = Path("runs") / (preset or plan_name(data or Path()))
    if plan and any((run / stage).exists() for stage in STAGES):
        raise UserError(f"{run}: holds a run, with its plan in config.toml; give another --run to plan anew")
    if until not in STAGES:
        raise UserError(f"--until {until!r}: expected one of {', '.join(STAGES)}")
    world = init_distributed()
    if data is None:
        run_dir = RunDir.open(run, preset, set_, world)
    else:
        run_dir = open_data_run(run, data, hours, set_ or [], world, anew=plan, costs=minutes is None)
    if plan:
        if world.is_main:
            run_dir.save_config()
            print(f"written to {run / 'config.toml'}, with the reasons; the same command without --plan starts it")
        return
    if minutes is not None:
        print_rehearsal(run_dir, minutes, price, world)
        return
    if from_ is not None:
        world.barrier()  # every process has opened the run before the first writes to it
        if world.is_main:
            run_dir.share(RunDir.open(from_), world)
    run_dir.synchronise(world)
    run_pipeline(run_dir, until, world)


if __name__ == "__main__":
    main(command)
