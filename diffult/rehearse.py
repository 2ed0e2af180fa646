"""A rehearsal: every stage for some minutes at full size on this machine, with the run's own networks, batches and
processes, in a folder that is removed afterwards; from it the cost of the whole run, and what would fail.

The stages are those of the verbs. What a later one needs of an earlier is made by networks as they start out, which
take as long as trained ones. Finished stages of the run are not rehearsed, and what they made is used.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np

from diffult.data.packing import Packed
from diffult.diffusion.objective import stride
from diffult.diffusion.trainer import build_trainer
from diffult.engine.checkpoints import Checkpoints
from diffult.engine.device import pick_device
from diffult.engine.distributed import ALONE, Arrivals, World
from diffult.engine.load import Load, share_of_others
from diffult.engine.loop import LoopConfig, LRBackoff, train_steps
from diffult.engine.memory import local_processes, out_of_memory
from diffult.errors import UserError, first_line
from diffult.evaluate import evaluate
from diffult.generation.candidates import CandidateBatch, draw_candidates
from diffult.generation.checks import ModelChecks
from diffult.generation.shards import ShardStore, open_kept
from diffult.longtail.classification import Training, batches_of, fit_steps, side_by_side
from diffult.longtail.extractor import load_extractor
from diffult.longtail.filter import FILTERS, Verdict
from diffult.longtail.methods import find_method, in_waves
from diffult.longtail.quota import Quota, quotas_to
from diffult.models.resnet import build_classifier, save_classifier
from diffult.models.unet import build_unet, save_unet
from diffult.planning.cost import Amounts, copies_flops, method_steps
from diffult.planning.failures import hardly_passing, would_fail
from diffult.planning.part import amounts_of, pack_part
from diffult.planning.rehearsal import Part, Rehearsal, Rehearsed, expected_passing
from diffult.planning.stopwatch import (
    HeldLoader,
    bounded_memory,
    ended_by_sigterm,
    peak_memory,
    release,
    since_start,
    stretches,
    timed,
)
from diffult.planning.timing import free_host_memory
from diffult.report import write_report
from diffult.runs.files import lock_folder, write_json
from diffult.runs.run_dir import REHEARSAL, RunDir
from diffult.runs.sampler import open_sampler
from diffult.runs.stages import Stage
from diffult.train_classifier import method_hash, method_loaders, method_training
from diffult.train_diffusion import build_preview
from diffult.train_extractor import extractor_training, save_extractor

log = logging.getLogger(__name__)
# Shares of the minutes; of a training's, its steps, and then its loader and its network alone.
_SHARES: dict[Stage, float] = {
    "pack": 0.15, "extractor": 0.1, "diffusion": 0.3, "generate": 0.2, "classifier": 0.2, "evaluate": 0.05,
}  # fmt: skip
_STEPS, _ALONE = 0.6, 0.2
_FOLDER, _SOON = ".rehearsal", 10.0  # seconds between processes that are refused for the same reason


@dataclass
class _Context:
    """The run in the folder that is removed, its packed images and those of the whole run, and the seconds to spend."""

    run: RunDir
    packed: Packed
    amounts: Amounts
    seconds: float
    world: World

    @property
    def synthetic(self) -> int:
        return self.amounts.synthetic(self.run.config.generate.balance_to, self.run.config.generate.dose)


def rehearse(run: RunDir, minutes: float, world: World = ALONE) -> tuple[Rehearsal, list[str]]:
    """Rehearses every unfinished stage for its share of the minutes. Every process of `world` calls this.

    Returns:
        What was measured, and what would fail, a line each. Both also go to rehearsal.json, which is all that is left.

    Raises:
        UserError: as packing does; another rehearsal of the run is at work; one process of several fails alone.
    """
    begun, start, load = time.perf_counter(), since_start(), Load.now()
    quiet, level = logging.getLogger(), logging.getLogger().level
    quiet.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        with _scratch(run, world) as scratch:
            rehearsal = _rehearse(run, scratch, 60 * minutes, start, world)
    finally:
        quiet.setLevel(level)
    rehearsal.seconds_taken = time.perf_counter() - begun
    rehearsal.others = share_of_others(load, Load.now(), world)
    failures = would_fail(rehearsal, run.path, free_host_memory()) if world.is_main else []  # its own files are gone
    failures = world.gather(failures)[0]
    if world.is_main:
        write_json(run.path / REHEARSAL, rehearsal.content() | {"failures": failures})
    return rehearsal, failures


@contextmanager
def _scratch(run: RunDir, world: World) -> Iterator[RunDir]:
    """A run of the same settings beside the stages of this one, with those that are finished."""
    folder = run.path / _FOLDER
    with lock_folder(folder) if world.is_main else nullcontext(), ended_by_sigterm():
        scratch = RunDir(folder / "run", run.config)
        try:
            if world.is_main:
                shutil.rmtree(scratch.path, ignore_errors=True)  # of one that was killed
                if run.done("pack") is not None:
                    scratch.share(run)
            scratch.synchronise(world)
            yield scratch
        finally:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # not empty
                    run.path.rmdir()


def _rehearse(real: RunDir, run: RunDir, seconds: float, start: float, world: World) -> Rehearsal:
    if world.is_main:
        log.info("rehearsing pack")
    finished = world.gather([stage for stage in _SHARES if (real if stage == "classifier" else run).done(stage)])[0]
    packing, amounts = _rehearse_packing(run, _SHARES["pack"] * seconds, world)
    packing.add_start(start)
    packing.finished = "pack" in finished
    rehearsal = Rehearsal(run.config, amounts, world.size, {"pack": packing})
    packed = run.packed()
    trained = {"extractor", "diffusion"} <= set(finished)
    for stage, work in _STAGES.items():
        context = _Context(run, packed, amounts, _SHARES[stage] * seconds, world)
        rehearsed = rehearsal.stages[stage] = Rehearsed(finished=stage in finished)
        if stage not in finished:
            _measure(stage, work, context, rehearsed)
        elif stage == "classifier":
            _untrained_classifiers(context)
    generate, into = run.config.generate, rehearsal.stages["generate"]
    if trained and "generate" not in finished:
        quotas = quotas_to(generate.balance_to, amounts.counts, generate.dose)
        drawn, passed = into.candidates or (np.zeros(1, int), np.zeros(1, int))
        rehearsal.passing = expected_passing(quotas, drawn, passed, generate.max_draws)
        hard, unsure = hardly_passing(drawn, passed, packed.classes, generate.max_draws)
        into.failures += hard
        into.notes += unsure
    return rehearsal


def _measure(stage: Stage, work: Callable[[_Context, Rehearsed], None], context: _Context, into: Rehearsed) -> None:
    """Rehearses a stage. What it cannot do is recorded and the next one begins, unless others wait for this process."""
    world, refused, arrivals = context.world, "", Arrivals(context.world)
    if world.is_main:
        log.info("rehearsing %s", stage)
    with peak_memory() as peak:
        try:
            with bounded_memory(free_host_memory() / local_processes()):
                work(context, into)
        except UserError as error:
            refused = str(error)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            refused = f"out of memory ({first_line(error)}); a smaller batch needs less"
            if world.size > 1:  # the others wait for this process
                raise UserError(f"{stage}, process {world.rank}: {refused}") from None
        arrivals.mark()
        if refused:
            if not arrivals.all_within(_SOON):
                raise UserError(f"{stage}, process {world.rank}: {refused}")
            into.failures.append(refused)
    release()
    into.host, into.device = (max(column) for column in zip(*world.gather((peak.host, peak.device)), strict=True))
    into.note_open_files()


# Packing


def _rehearse_packing(run: RunDir, seconds: float, world: World) -> tuple[Rehearsed, Amounts]:
    into, amounts = Rehearsed(), None
    with peak_memory() as peak, run.stage("pack", world) as record:
        if record is not None and world.is_main:
            amounts, packed = pack_part(run.config, run.folder("pack"), seconds, into)
            record |= packed | {"place": {}}
    into.host = peak.host
    if record is None:
        amounts = amounts_of(run.packed())
    into, amounts = world.gather((into, amounts))[0]
    assert amounts is not None  # the first process's
    return into, amounts


# Training


def _time_training(
    into: Rehearsed, what: str, make: Callable[[], list[Training]], seconds: float, world: World, share: float = 1.0
) -> None:
    """Steps of trainings that take turns, `share` of the stage's; loader and network alone where not yet known."""
    trainings = make()
    start, each = stretches(fit_steps(trainings), _STEPS * seconds, world, len(trainings))
    into.add_start(start)
    into.parts.append(Part(what, each, share=share))
    if into.images_per_s:
        return
    (one, *_), size = make(), trainings[0].config.batch_size
    held = replace(one, loader=HeldLoader(one.loader), checkpoint=one.checkpoint.with_name("held.state.pt"))
    for name, steps in {"loader": batches_of(one), "network": fit_steps([held])}.items():
        into.images_per_s[name] = size / median(stretches(steps, _ALONE * seconds, world)[1])


def _extractor(context: _Context, into: Rehearsed) -> None:
    run, packed, world = context.run, context.packed, context.world
    with run.stage("extractor", world) as record:
        if record is not None and world.is_main:
            _, took = timed(lambda: save_extractor(run, packed, extractor_training(run, packed)))
            each = (took / len(packed.train),)
            into.parts.append(Part("images measured", each, count=float(context.amounts.counts.sum())))
    _time_training(into, "steps", lambda: [extractor_training(run, packed, world)], context.seconds, world)


def _diffusion(context: _Context, into: Rehearsed) -> None:
    run, packed, world, seconds = context.run, context.packed, context.world, context.seconds
    config, folder, classes = run.config.diffusion, run.folder("diffusion"), len(packed.classes)
    with run.stage("diffusion", world) as record:
        if record is not None and world.is_main:
            weights = build_unet(run.config, classes).state_dict()
            save_unet(folder / "ema.safetensors", weights, run.config, classes, run.hash("diffusion"))
    extractor = load_extractor(run.folder("extractor"), pick_device()) if config.uses_extractor else None
    trainer, building = timed(lambda: build_trainer(run.config, packed, extractor, world, LRBackoff()))
    loop = LoopConfig(
        "diffusion", config.steps, folder / "state.pt", config.steps + 1, (run.config.seed, world.rank), "",
        config.batch_size, world=world, monitor="ddpm",
    )  # fmt: skip
    group = stride(config.aid_steps) if config.aid else 1
    steps = train_steps(loop, trainer.batches, trainer.step, {"optimizer": trainer.optimizer})
    start, each = stretches(steps, _STEPS * seconds, world, group)
    into.add_start(building + start)
    into.parts.append(Part("steps", each, share=1.0))
    batch = next(trainer.batches(0))
    alone = {"loader": trainer.batches(0), "network": (trainer.step(i, batch) for i in itertools.count())}
    for name, repeated in alone.items():
        timing = stretches(repeated, _ALONE * seconds, world, group if name == "network" else 1)
        into.images_per_s[name] = config.batch_size / median(timing[1])
    file, state = folder / "checkpoint.pt", {"optimizer": trainer.optimizer}

    def save() -> None:
        with Checkpoints(file, "", state, world) as checkpoints:
            checkpoints.save(0, 0.0)

    _, took = timed(save)
    preview = build_preview(run, trainer, packed.classes, world)

    def draw() -> None:
        preview(config.checkpoint_every, {})
        preview.write()

    (_, first), (_, again) = timed(draw), timed(draw)
    checkpoints = -(-config.steps // config.checkpoint_every)
    into.add_start(max(0.0, first - again))
    into.parts += [Part("checkpoints", (took,), count=checkpoints), Part("previews", (again,), count=checkpoints)]
    into.checkpoint = world.gather(file.stat().st_size if world.is_main else 0)[0]
    pictures = checkpoints * sum(picture.stat().st_size for picture in folder.glob("*.png"))
    into.disk = 2 * into.checkpoint + (folder / "ema.safetensors").stat().st_size + pictures
    if config.check_every and packed.val is not None and extractor is not None:
        checks, building = timed(
            lambda: ModelChecks(run.config, packed, extractor, trainer.optimizer, trainer.micro_batch, world)
        )
        _, took = timed(checks)
        into.add_start(building)
        into.parts.append(Part("checks", (took,), count=-(-config.steps // config.check_every)))


# Samples


def _generate(context: _Context, into: Rehearsed) -> None:
    run, packed, world = context.run, context.packed, context.world
    settings = run.config.generate.model_copy(update={"search": 0, "match_histogram": False})  # counted as samples
    with run.stage("generate", world) as record:
        if record is None:
            return
        sampler, opening = timed(lambda: open_sampler(run, settings, run.config.seed, world=world))
        _, compiling = timed(sampler.prepare)
        extractor, filter = load_extractor(run.folder("extractor"), sampler.device), FILTERS[settings.filter]
        everything = replace(filter, keeps=tuple(Verdict))
        quotas, classes = quotas_to(settings.balance_to, context.amounts.counts, settings.dose), len(packed.classes)
        lacking = np.flatnonzero(quotas) if quotas.any() else np.arange(classes)
        for first in (True, False):  # the first writes the manifest
            if world.is_main == first:
                store = ShardStore(run.folder("generate"), {"rehearsal": True}, world.rank)
            world.barrier()
        drawn, passed = np.zeros((2, classes), np.int64)

        def batches() -> Iterator[CandidateBatch]:
            for number in itertools.count(world.rank, world.size):
                names = number * settings.batch_size + np.arange(settings.batch_size)
                labels, indices = lacking[names % len(lacking)], names // len(lacking)
                batch = draw_candidates(sampler, extractor, everything, labels, indices)
                store.add(batch)
                np.add.at(drawn, labels, 1)
                np.add.at(passed, labels, filter.accepts(batch.verdict))
                yield batch

        start, each = stretches(batches(), context.seconds, world, warm_up=1)
        store.flush()
        drawn, passed = (sum(part) for part in zip(*world.gather((drawn, passed)), strict=True))
        into.candidates = drawn, passed
        together = settings.batch_size * world.size
        into.add_start(opening + compiling + start)
        into.parts.append(Part("samples drawn", tuple(part / together for part in each), share=1.0))
        if world.is_main:
            quota = Quota(drawn, 1.0, everything)
            store.resume(quota)
            _, took = timed(lambda: store.finish(quota))
            into.parts.append(Part("samples kept", (took / int(drawn.sum()),), count=context.synthetic))
            tally = {"drawn": int(drawn.sum()), "accepted": int(drawn.sum()), "id": 0, "aid": 0, "ood": 0}
            record["generation"] = tally | {"nfe": settings.evaluations, "images_per_s": None, "by_class": {}}


# Classifiers


def _untrained_classifiers(context: _Context) -> list[list[str]]:
    """Writes one for each method; returns the methods in waves."""
    run, world, waves = context.run, context.world, in_waves(context.run.config.classifier.methods)
    config, channels, classes = run.config.classifier, run.config.data.channels, len(context.packed.classes)
    with run.stage("classifier", world) as record:
        for name in itertools.chain(*waves) if record is not None and world.is_main else ():
            model = build_classifier(config.network, classes, channels, config.image_size, find_method(name).heads)
            file = run.folder("classifier") / f"{name}.safetensors"
            save_classifier(file, model, config.network, channels, config.image_size, method_hash(run, name))
    return waves


def _classifiers(context: _Context, into: Rehearsed) -> None:
    run, packed, world = context.run, context.packed, context.world
    waves = _untrained_classifiers(context)
    loaders = method_loaders(run, packed, world)
    steps = method_steps(run.config.classifier, int(context.amounts.counts.sum()), context.synthetic)

    def trainings(names: list[str]) -> list[Training]:
        of = {name: loaders[find_method(name).synthetic] for name in names}
        return [method_training(run, packed, name, name, of[name], world) for name in names]

    trained = [wave for names in waves if (wave := [name for name in names if steps[name]])]
    for wave in trained:
        for names in [wave] if side_by_side(trainings(wave)) else [[name] for name in wave]:
            seconds = context.seconds * len(names) / sum(map(len, trained))
            share = sum(steps[name] for name in names) / sum(steps.values())
            make = partial(trainings, names)
            _time_training(into, f"steps of {', '.join(names)}", make, seconds, world, share)


def _evaluate(context: _Context, into: Rehearsed) -> None:
    run, packed = context.run, context.packed
    if not context.world.is_main:
        return
    if run.done("generate") is None:
        into.notes.append("not rehearsed, for want of samples")
        return
    kept = open_kept(run.folder("generate"))
    _, both = timed(lambda: evaluate(run))
    (run.path / "metrics.json").unlink()
    _, again = timed(lambda: evaluate(run))  # the search for copies is kept
    _, report = timed(lambda: write_report(run))
    part = amounts_of(packed)
    samples = np.bincount(kept.labels if kept else np.zeros(0, int), minlength=len(packed.classes))
    factor = copies_flops(run.config, context.amounts) / copies_flops(run.config, part, samples)
    images = part.held_out * len(run.config.classifier.methods)
    into.parts = [
        Part("images classified", (again / images,), share=1.0),
        Part("search for copies", (max(0.0, both - again) * factor,), count=1, linear=False),
        Part("report", (report,), count=1),
    ]


_STAGES: dict[Stage, Callable[[_Context, Rehearsed], None]] = {
    "extractor": _extractor, "diffusion": _diffusion, "generate": _generate, "classifier": _classifiers,
    "evaluate": _evaluate,
}  # fmt: skip
