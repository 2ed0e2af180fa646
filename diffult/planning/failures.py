"""What would fail in a run, a line each, from what its rehearsal measured and from the limits of the system."""

from __future__ import annotations

import math
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffult.config import Config
from diffult.data.packing import origin
from diffult.engine.memory import local_processes, own_memory
from diffult.longtail.statistics import MIN_IMAGES_FOR_RADIUS
from diffult.planning.rehearsal import Rehearsal
from diffult.planning.timing import nearest_folder
from diffult.reporting.text import counted, size
from ffcv_writers.readers import Source

_HARDLY, _DOUBT = 0.05, 0.05  # a class of which less passes; the chance at the most that the candidates mislead
_NAMED = 3  # files or classes in a message
_OPEN_FILES = 64  # beyond those seen in the rehearsal: libraries, pipes and sockets
_SHARDS = 300  # of a process at the most, see `diffult.generation.shards`
_MEMORY = 0.9  # of what is free: beyond, the system ends processes


def missing_files(source: Source, numbers: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Of each split's samples, whether the file is missing, bool [n]; and a line where any is."""
    missing, failures = {}, []
    for split, chosen in numbers.items():
        samples = origin(source, split).samples
        paths = getattr(samples, "paths", ())
        missing[split] = np.array([bool(paths) and not os.path.exists(paths[n]) for n in chosen], bool)
        if missing[split].any():
            gone = [str(paths[n]) for n in chosen[missing[split]]]
            failures.append(
                f"{counted(len(gone), 'file is', 'files are')} missing in split {split}: {_some(gone)}; "
                "restore them, or correct the list"
            )
    return missing, failures


def would_fail(rehearsal: Rehearsal, place: Path, free: float) -> list[str]:
    """All that would fail in a run at `place`, where `free` bytes of memory are left beside this process."""
    failures = [f"{name}: {failure}" for name, stage in rehearsal.stages.items() for failure in stage.failures]
    failures += disk_failures(rehearsal, place)
    failures += open_file_failures(max(stage.open_files for stage in rehearsal.stages.values()))
    return [*failures, *memory_failures(rehearsal, free)]


def disk_failures(rehearsal: Rehearsal, place: Path) -> Iterator[str]:
    """What the file system has no room for where `place` is or will be."""
    there = nearest_folder(place)
    checkpoint = rehearsal.stages["diffusion"].checkpoint  # two lie there, and a third while it is written
    free, needed = shutil.disk_usage(there).free, sum(cost.disk for cost, _, _ in rehearsal.costs())
    if needed > free:
        yield f"disk: the run takes {size(needed)}, {place} has {size(free)} free; make room, or choose another --run"
    elif needed + checkpoint > free:
        yield (
            f"disk: {place} has {size(free)} free, but the run takes {size(needed)} and the checkpoint of the "
            f"diffusion training, {size(checkpoint)}, lies there three times while it is written; make room"
        )
    previews = -(-rehearsal.config.diffusion.steps // rehearsal.config.diffusion.checkpoint_every)
    files = 100 + previews + _SHARDS * rehearsal.processes + 5 * len(rehearsal.config.classifier.methods)
    system = os.statvfs(there)
    if system.f_files > 0 and system.f_favail < files:
        yield f"disk: the run writes up to {files:,} files, {place} has inodes for {system.f_favail:,}; delete files"


def open_file_failures(open_now: int) -> Iterator[str]:
    """`open_now`: files that the process had open at the most."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < open_now + _OPEN_FILES:
        wanted = open_now + _OPEN_FILES
        yield f"open files: the limit is {limit}, a process needs up to {wanted}; ulimit -n {max(1024, 2 * wanted)}"


def memory_failures(rehearsal: Rehearsal, free: float) -> Iterator[str]:
    """`free`: bytes on this machine, beside what its processes hold now."""
    local = local_processes()
    host = free + local * own_memory()
    name, stage = max(rehearsal.stages.items(), key=lambda item: item[1].host)
    if stage.host * local > _MEMORY * host:
        processes = counted(local, "process", "processes")
        yield (
            f"host memory: stage {name} takes {size(stage.host * local)} in {processes}, this machine has "
            f"{size(host)} for them; start fewer processes on a machine"
        )


def small_classes(train: np.ndarray, validation: np.ndarray, classes: Sequence[str], config: Config) -> Iterator[str]:
    """Classes without images enough, of those of each class, int64 [C]."""
    few = np.flatnonzero(train < MIN_IMAGES_FOR_RADIUS)
    if len(few):
        yield (
            f"{_named(few, classes)}: fewer than {MIN_IMAGES_FOR_RADIUS} training images, so the filter takes the "
            "median radius of the other classes"
        )
    without = np.flatnonzero(validation == 0)
    if len(without):
        yield f"{_named(without, classes)}: no validation image"
    if config.generate.search and (validation < 2).all():
        yield "generate.search needs two validation images of a class; set data.val_per_class, or generate.search to 0"


def hardly_passing(
    drawn: np.ndarray, passed: np.ndarray, classes: Sequence[str], max_draws: float
) -> tuple[list[str], list[str]]:
    """Classes of whose candidates, int64 [C] each, the filter keeps next to none.

    A class would fail only where less than 5 % pass and the upper bound of the share that passes, at 95 % confidence
    (Clopper and Pearson, 1934), is below one in `max_draws`: not even so many candidates for each sample then give what
    it lacks.

    Returns:
        What would fail, and notes on classes of too few candidates to say so.
    """
    chances = [_at_most(int(k), int(n), 1 / max_draws) for k, n in zip(passed, drawn, strict=True)]
    short = np.array(chances) < _DOUBT  # which is where the bound is below one in max_draws
    failures, notes = list[str](), list[str]()
    hard = np.flatnonzero(short & (passed < _HARDLY * drawn))
    if len(hard):
        failures.append(
            f"{_named(hard, classes)}: the filter kept {passed[hard].sum()} of {drawn[hard].sum()} candidates: these "
            f"will be short of samples after {max_draws:g} draws for each; train longer, or raise generate.max_draws"
        )
    unsure = np.flatnonzero(~short & (passed == 0) & (drawn > 0))
    if len(unsure):
        notes.append(
            f"{_named(unsure, classes)}: the filter kept none of at most {drawn[unsure].max()} candidates each, too "
            "few to tell whether these will be short of samples; a longer rehearsal draws more"
        )
    return failures, notes


def _at_most(passed: int, drawn: int, rate: float) -> float:
    """The chance that so few of so many pass, or fewer, where each does at this rate."""
    if passed >= rate * drawn or rate == 1:  # far from the tail
        return float(passed >= rate * drawn)
    several = (math.lgamma(drawn + 1) - math.lgamma(k + 1) - math.lgamma(drawn - k + 1) for k in range(passed + 1))
    log, log_not = math.log(rate), math.log1p(-rate)
    return sum(math.exp(ways + k * log + (drawn - k) * log_not) for k, ways in enumerate(several))


def _named(which: np.ndarray, classes: Sequence[str]) -> str:
    return f"{_some([classes[label] for label in which])} ({counted(len(which), 'class', 'classes')})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
