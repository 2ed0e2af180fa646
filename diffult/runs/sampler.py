"""A finished run's sampler: its diffusion model at the timesteps that its settings give or have searched."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World
from diffult.errors import UserError
from diffult.generation.config import GenerateConfig
from diffult.generation.sampler import Sampler
from diffult.generation.timesteps import read_trials, search, trial_distance
from diffult.longtail.classification import extract_features
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.models.unet import load_unet
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import digest
from ffcv_writers import Loader

TRIALS = "timesteps.json"  # in a folder of samples: the lists of timesteps that were tried
_ENOUGH = 2  # validation images of each class, for a spread


def open_sampler(
    run: RunDir,
    settings: GenerateConfig,
    seed: int,
    compiled: bool = False,
    search_in: Path | None = None,
    world: World = ALONE,
) -> Sampler:
    """A finished run's diffusion model, ready to draw on this machine; compiled on CUDA in any case. Its settings have
    the timesteps that it draws at listed, where a search was asked for.

    Args:
        search_in: a folder that this process has locked: timesteps are searched there, by every process of `world`. The
            lists that the run's stage generate has tried are known; None: it has tried all that are needed.

    Raises:
        UserError: the stage is not finished, a file is damaged, or there is a list to try and no folder.
    """
    run.require("diffusion")
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    unet = load_unet(run.folder("diffusion") / "ema.safetensors", device, dtype)
    sampler = Sampler.for_run(run.config, unet, settings, seed, compiled or device.type == "cuda")
    return _search(run, sampler, search_in, world) if settings.search else sampler


def _search(run: RunDir, sampler: Sampler, folder: Path | None, world: World) -> Sampler:
    read = sampler.settings.model_dump(include={"sampler", "eta", "guidance"})  # lists of all lengths share a file
    held_out = run.require("pack")["held_out"].get("val")
    key = digest(run.hash("extractor"), run.hash("diffusion"), held_out, read)
    files = [place / TRIALS for place in (run.folder("generate"), folder) if place is not None]
    known = {name: distance for file in files for name, distance in read_trials(file, key).items()}
    known = world.gather(known)[0]
    if folder is None:
        return search(sampler, partial(_refuse, run), files[0], key, known, world)
    extractor = load_extractor(run.folder("extractor"), sampler.device)
    # Not the run's own seed: kept samples are of noise that the search has never seen.
    seed = int(np.random.SeedSequence((run.config.seed, 0x57E9)).generate_state(1, np.uint64)[0])
    distance = trial_distance(sampler, extractor, _real_features(run, extractor, sampler), seed, world)
    return search(sampler, distance, files[1], key, known, world)


def _refuse(run: RunDir, timesteps: list[int]) -> float:
    raise UserError(f"{run.path}: has not searched its timesteps; run python -m diffult.generate --run {run.path}")


def _real_features(run: RunDir, extractor: Extractor, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, float32 [N, F], and labels, int64 [N], of the validation images; of the training images where there are
    too few."""
    packed, config, data = run.packed(), run.config.extractor, run.config.data
    enough = packed.val is not None and np.bincount(packed.val.labels, minlength=len(packed.classes)).min() >= _ENOUGH
    images = packed.val if packed.val is not None and enough else packed.train
    view = data.view(config.image_size, config.image_size / data.image_size)  # as of samples
    loader = Loader(images, config.batch_size, device=sampler.device, crop=view)
    return extract_features(extractor.network, loader, sampler.dtype)
