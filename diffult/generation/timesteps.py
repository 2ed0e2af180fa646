"""Timesteps searched for a trained model: those whose samples come nearest to real images in the extractor's features.

A file of the run holds every list that was tried with its distance, so that a search that was interrupted, or gets more
tries, goes on where it stopped, and a finished one takes no time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffult.diffusion.samplers import SigmaRange, sigma_grid
from diffult.diffusion.timestep_search import search_timesteps
from diffult.engine.distributed import ALONE, World
from diffult.engine.progress import progress_bar
from diffult.errors import UserError
from diffult.generation.levels import HistogramMatching, match
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor
from diffult.longtail.frechet import class_frechet_distance
from diffult.reporting.pictures import evenly
from diffult.runs.files import read_json, write_json

log = logging.getLogger(__name__)
Distances = dict[tuple[int, ...], float]  # of lists of timesteps

_CLASSES, _PER_CLASS, _SAMPLES = 64, 64, 1280  # at the most, of the samples that a list is judged by
# Where the search starts, beside the spacing of the settings.
_STARTS = (SigmaRange(40, 0.05, 3), SigmaRange(80, 0.02, 7), SigmaRange(80, 0.002, 7), SigmaRange(20, 0.1, 3))


def search(
    sampler: Sampler, distance: Callable[[list[int]], float], file: Path, key: str, known: Distances, world: World
) -> Sampler:
    """The sampler at the best of as many lists of timesteps as its settings say; every process of `world` calls this.

    Args:
        distance: of a list's samples to real images, see `trial_distance`.
        file: is written after each distance.
        key: of what the distances depend on.
        known: distances that are not measured again; the same on every process.
    """
    settings, abar = sampler.settings, sampler.schedule.alphas_cumprod
    starts = [sampler.timesteps, *(sigma_grid(abar, settings.steps, sigmas) for sigmas in _STARTS)]
    tried: Distances = {}

    def remembered(timesteps: list[int]) -> float:
        name = tuple(timesteps)
        if name not in known:
            known[name] = distance(timesteps)
            if world.is_main:
                _write(file, key, known)
        tried[name] = known[name]
        bar.update()
        bar.set_postfix_str(f"distance {min(tried.values()):.4g}, of the spacing {tried[tuple(starts[0])]:.4g}")
        return known[name]

    bar = progress_bar(total=settings.search, desc="timesteps", unit="list", disable=not world.is_main)
    with bar:
        best = search_timesteps(abar, starts, remembered, settings.search)
    log.info(
        "timesteps: %s, the best of %d lists: distance %.4g to real images; of the spacing %r: %.4g",
        " ".join(map(str, best)), len(tried), tried[tuple(best)], settings.spacing, tried[tuple(starts[0])],
    )  # fmt: skip
    return sampler.at(best)


def trial_distance(
    sampler: Sampler,
    extractor: Extractor,
    real: tuple[Tensor, Tensor],
    seed: int,
    world: World = ALONE,
    matching: HistogramMatching | None = None,
) -> Callable[[list[int]], float]:
    """How far the samples at some timesteps are from real images: `class_frechet_distance` in the extractor's features,
    always of the same samples, of which each process draws its share.

    Args:
        real: features, float [N, F], and labels, int64 [N], of real images; samples are of their classes.
        seed: of the samples' noise.
        matching: of the samples' levels, for each list anew.
    """
    real_features, real_labels = (part.cpu().numpy() for part in real)
    labels, indices = trial_names(np.unique(real_labels))
    share = slice(world.rank, None, world.size)

    def distance(timesteps: list[int]) -> float:
        mine = _features(sampler.at(timesteps, seed), extractor, labels[share], indices[share], matching)
        drawn = np.empty((len(labels), mine.shape[1]), np.float32)
        for rank, features in enumerate(world.gather(mine)):
            drawn[rank :: world.size] = features
        return world.gather(class_frechet_distance(drawn, labels, real_features, real_labels))[0]

    return distance


def trial_names(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class and index, int64 [N] each, of the samples of these classes, int64 [C], that a list is judged by."""
    classes = evenly(classes, _CLASSES)
    per_class = min(_PER_CLASS, _SAMPLES // len(classes))
    return np.repeat(classes, per_class), np.tile(np.arange(per_class), len(classes))


@torch.no_grad()
def _features(
    sampler: Sampler,
    extractor: Extractor,
    labels: np.ndarray,
    indices: np.ndarray,
    matching: HistogramMatching | None = None,
) -> np.ndarray:
    """Of the samples of these names, int64 [N] each: float32 [N, F]."""
    drawn = sampler.draw_all(labels, indices)
    if matching is not None:
        drawn = match(drawn, matching.levels(drawn, labels))
    return extractor.features_of(drawn, sampler.settings.batch_size, sampler.dtype).cpu().numpy()


def read_trials(file: Path, key: str) -> Distances:
    """What `search` wrote to the file with this key, else nothing."""
    content = read_json(file) if file.exists() else {}
    if content.get("key") != key:
        return {}
    try:
        return {tuple(map(int, trial["timesteps"])): float(trial["distance"]) for trial in content["trials"]}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: damaged; delete it to search again") from None


def _write(file: Path, key: str, distances: Distances) -> None:
    trials = [{"timesteps": list(name), "distance": distance} for name, distance in distances.items()]
    write_json(file, {"key": key, "trials": trials})
