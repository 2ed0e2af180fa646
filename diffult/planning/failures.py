"""What would fail in a run, a line each, from what its rehearsal measured and from the limits of the system."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffult.config import Config
from diffult.data.packing import origin
from diffult.longtail.statistics import MIN_IMAGES_FOR_RADIUS
from diffult.planning.rehearsal import Rehearsal
from diffult.reporting.text import counted, size
from ffcv_writers.readers import Source

_HARDLY, _ENOUGH = 0.05, 8  # a class of which less passes, of so many candidates at the least
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
            first = paths[chosen[missing[split].argmax()]]
            gone = counted(int(missing[split].sum()), "file is", "files are")
            failures.append(f"{gone} missing in split {split}, the first is {first}; restore them, or correct the list")
    return missing, failures


def disk_failures(rehearsal: Rehearsal, place: Path) -> Iterator[str]:
    """What the file system at `place` has no room for."""
    checkpoint = rehearsal.stages["diffusion"].checkpoint  # two lie there, and a third while it is written
    free, needed = shutil.disk_usage(place).free, sum(cost.disk for cost, _, _ in rehearsal.costs())
    if needed > free:
        yield f"disk: the run takes {size(needed)}, {place} has {size(free)} free; make room, or choose another --run"
    elif needed + checkpoint > free:
        yield (
            f"disk: {place} has {size(free)} free, but the run takes {size(needed)} and the checkpoint of the "
            f"diffusion training, {size(checkpoint)}, lies there three times while it is written; make room"
        )
    previews = -(-rehearsal.config.diffusion.steps // rehearsal.config.diffusion.checkpoint_every)
    files = 100 + previews + _SHARDS * rehearsal.processes + 5 * len(rehearsal.config.classifier.methods)
    system = os.statvfs(place)
    if system.f_files > 0 and system.f_favail < files:
        yield f"disk: the run writes up to {files:,} files, {place} has inodes for {system.f_favail:,}; delete files"


def open_file_failures(open_now: int) -> Iterator[str]:
    """`open_now`: files that the process had open at the most."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < open_now + _OPEN_FILES:
        wanted = open_now + _OPEN_FILES
        yield f"open files: the limit is {limit}, a process needs up to {wanted}; ulimit -n {max(1024, 2 * wanted)}"


def memory_failures(rehearsal: Rehearsal, host: float, local: int) -> Iterator[str]:
    """`host`: bytes that are free on this machine, for its `local` processes."""
    name, stage = max(rehearsal.stages.items(), key=lambda item: item[1].host)
    if stage.host * local > _MEMORY * host:
        processes = counted(local, "process", "processes")
        yield (
            f"host memory: stage {name} takes {size(stage.host * local)} in {processes}, {size(host)} are free; "
            "start fewer processes on a machine"
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


def hardly_passing(drawn: np.ndarray, passed: np.ndarray, classes: Sequence[str], max_draws: float) -> Iterator[str]:
    """Classes of whose candidates, int64 [C] each, the filter keeps next to none."""
    hard = np.flatnonzero((drawn >= _ENOUGH) & (passed < _HARDLY * drawn))
    if len(hard):
        yield (
            f"{_named(hard, classes)}: the filter kept {passed[hard].sum()} of {drawn[hard].sum()} candidates: these "
            f"will be short of samples after {max_draws:g} draws for each; train longer, or raise generate.max_draws"
        )


def _named(which: np.ndarray, classes: Sequence[str]) -> str:
    names = ", ".join(classes[label] for label in which[:3]) + (", ..." if len(which) > 3 else "")
    return f"{names} ({counted(len(which), 'class', 'classes')})"
