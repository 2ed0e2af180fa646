"""A finished run's sampler: its diffusion model at the timesteps that its settings give or have searched, with the
pixel levels of its samples matched to the training images where its settings ask for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import torch

from diffult.data.packing import Packed
from diffult.engine.device import compute_dtype, derived_seed, pick_device
from diffult.engine.distributed import ALONE, World
from diffult.errors import UserError
from diffult.generation.config import GenerateConfig
from diffult.generation.levels import HistogramMatching, match, pilot_names, read_levels, write_levels
from diffult.generation.sampler import Sampler
from diffult.generation.starts import OtherClasses
from diffult.generation.timesteps import read_trials, search, trial_distance
from diffult.longtail.classification import extract_features
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.models.unet import load_unet
from diffult.reporting.text import duration
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import digest
from ffcv_writers import Loader

log = logging.getLogger(__name__)
TRIALS = "timesteps.json"  # in a folder of samples: the lists of timesteps that were tried
LEVELS = "levels.safetensors"  # in a folder of samples: what their pixel levels became
# Seconds of drawing on a CPU from which compiling pays: it takes up to 70 s and makes drawing 1.05 to 1.1 x as fast.
_LONG = 1200.0
_ENOUGH = 2  # validation images of a class that a search judges samples by, for a spread


def open_sampler(
    run: RunDir,
    settings: GenerateConfig,
    seed: int,
    compiled: bool | None = None,
    folder: Path | None = None,
    world: World = ALONE,
    check: Callable[[GenerateConfig], None] = lambda settings: None,
) -> Sampler:
    """A finished run's diffusion model, ready to draw on this machine. Its settings have the timesteps that it draws at
    listed, where a search was asked for.

    Args:
        compiled: whether the network goes through torch.compile; None: on CUDA alone.
        folder: that this process has locked: what is searched and fitted before drawing goes there, by every process of
            `world`. What the run's stage generate has searched and fitted is known; None: it has tried all lists of
            timesteps that are needed.
        check: raises UserError where the folder is for samples of other settings. It is asked before anything is
            searched, and again, with the timesteps that were found, before anything is fitted.

    Raises:
        UserError: the stage is not finished, a file is damaged, there is a list to try and no folder, or too few
            validation images to judge it by.
    """
    run.require("diffusion")
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    unet = load_unet(run.folder("diffusion") / "ema.safetensors", device, dtype)
    sampler = Sampler.for_run(run.config, unet, settings, seed, device.type == "cuda" if compiled is None else compiled)
    check(settings)
    if settings.start == "other_classes":
        sampler.starts = OtherClasses.of(run.packed(), device, run.config.data.view(run.config.data.image_size))
    if settings.search:
        sampler = _search(run, sampler, folder, world)
        check(sampler.settings)
    if settings.match_histogram:
        sampler.levels = _levels(run, sampler, folder, world).to(device)
    return sampler


def compiling_pays(run: RunDir, settings: GenerateConfig, samples: int) -> bool:
    """Whether drawing so many samples takes so long that the network is better compiled first; logs where it does so on
    a CPU."""
    if pick_device().type == "cuda":
        return True
    if which("g++") is None:
        return False
    plain = settings.model_copy(update={"search": 0, "match_histogram": False})
    seconds = open_sampler(run, plain, seed=0, compiled=False).seconds(samples)
    if seconds < _LONG:
        return False
    log.info("drawing takes about %s: the network is compiled first (--no-compile: not)", duration(seconds))
    return True


def _search(run: RunDir, sampler: Sampler, folder: Path | None, world: World) -> Sampler:
    read = _solver(sampler.settings)  # lists of all lengths share a file
    if sampler.settings.match_histogram:
        read["match_histogram"] = True
    packed = run.packed()
    classes = _judged(run, packed)
    if len(classes) < len(packed.classes):
        read["classes"] = classes.tolist()
    held_out = run.require("pack")["held_out"].get("val")
    key = digest(run.hash("extractor"), run.hash("diffusion"), held_out, read)
    files = [place / TRIALS for place in (run.folder("generate"), folder) if place is not None]
    known = {name: distance for file in files for name, distance in read_trials(file, key).items()}
    known = world.gather(known)[0]
    if folder is None:
        return search(sampler, partial(_refuse, run), files[0], key, known, world)
    extractor = load_extractor(run.folder("extractor"), sampler.device)
    matching = _matching(run, sampler, world) if sampler.settings.match_histogram else None
    real = _real_features(run, extractor, sampler, packed, classes)
    distance = trial_distance(sampler, extractor, real, _own_seed(run), world, matching)
    return search(sampler, distance, files[1], key, known, world)


def _levels(run: RunDir, sampler: Sampler, folder: Path | None, world: World) -> torch.Tensor:
    """What the levels of this model's samples become, uint8 [C, 256]: as in the folder, else as the run's stage
    generate had it, else fitted. It depends on the model and its solver, not on how many samples of which class and
    seed are asked for, so that a sample is the same in every folder."""
    key = digest(run.hash("diffusion"), _solver(sampler.settings), sampler.timesteps)
    own, shared = None if folder is None else folder / LEVELS, run.folder("generate") / LEVELS
    known = None if own is None else read_levels(own, key)
    levels = world.gather(read_levels(shared, key) if known is None else known)[0]
    if levels is None:
        levels = _fit(run, sampler, world)
    if own is not None and known is None and world.is_main:
        write_levels(own, key, levels)
    return levels


def _fit(run: RunDir, sampler: Sampler, world: World) -> torch.Tensor:
    """The table for a few samples of each class; each process draws its share of them."""
    sampler.prepare()
    names = pilot_names(len(run.packed().classes))
    labels, indices = (part[world.rank :: world.size] for part in names)
    drawn = sampler.at(sampler.timesteps, _own_seed(run)).draw_all(labels, indices)
    levels = _matching(run, sampler, world).levels(drawn, labels)
    moved = (match(drawn, levels).int() - drawn).abs().float().mean()
    log.info("histogram matched by %d samples: pixels move by %.1f of 255 levels on average", len(names[0]), moved)
    return levels.cpu()


def _matching(run: RunDir, sampler: Sampler, world: World) -> HistogramMatching:
    """To the training images, as the diffusion model sees them."""
    packed, data = run.packed(), run.config.data
    view = data.view(data.image_size)
    images = Loader(packed.train, run.config.diffusion.batch_size, device=sampler.device, crop=view)
    return HistogramMatching.to(images, len(packed.classes), world)


def _solver(settings: GenerateConfig) -> dict[str, Any]:
    """What samples depend on beside their timesteps."""
    return settings.model_dump(include={"sampler", "eta", "guidance", "start"})


def _own_seed(run: RunDir) -> int:
    """Not the run's own: kept samples are of noise that neither the search nor the fit has seen."""
    return derived_seed(run.config.seed, 0x57E9)


def _refuse(run: RunDir, timesteps: list[int]) -> float:
    raise UserError(f"{run.path}: has not searched its timesteps; run python -m diffult.generate --run {run.path}")


def _judged(run: RunDir, packed: Packed) -> np.ndarray:
    """The classes, int64 [C], that have validation images enough to judge samples by. Training images would not do: the
    nearest samples to those are copies of them. Raises UserError if there is no such class."""
    held_out = np.zeros(0, np.int64) if packed.val is None else packed.val.labels
    classes = np.flatnonzero(np.bincount(held_out, minlength=len(packed.classes)) >= _ENOUGH)
    if not len(classes):
        raise UserError(
            f"{run.path}: generate.search = {run.config.generate.search}, but no class has {_ENOUGH} validation images "
            "to judge samples by; set data.val_per_class to 2 or more, or generate.search to 0"
        )
    return classes


def _real_features(
    run: RunDir, extractor: Extractor, sampler: Sampler, packed: Packed, classes: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, float32 [N, F], and labels, int64 [N], of the validation images of these classes."""
    config, data = run.config.extractor, run.config.data
    assert packed.val is not None  # there are classes
    view = data.view(config.image_size, config.image_size / data.image_size)  # as of samples
    loader = Loader(packed.val, config.batch_size, device=sampler.device, crop=view)
    features, labels = extract_features(extractor.network, loader, sampler.dtype)
    judged = torch.isin(labels, torch.from_numpy(classes).to(labels.device))
    return features[judged], labels[judged]
