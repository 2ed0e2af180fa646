"""How fast this machine is at a plan's networks, from a few timed steps of each."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffult.config import Config
from diffult.engine.device import autocast, compute_dtype, pick_device
from diffult.engine.distributed import ALONE, World
from diffult.engine.memory import local_processes
from diffult.generation.sampler import Sampler
from diffult.models.resnet import build_classifier
from diffult.models.unet import build_unet
from diffult.planning.cost import Speeds, classifier_flops, evaluation_flops
from ffcv_writers import available_cores, free_memory
from kernels.adamw_ema import AdamWEma
from kernels.augment import augment, normalise

# Of each network: steps that are not timed, then seconds of timed ones, twice as many for fewer than five steps. The
# median counts, for a neighbour on the same cores makes single steps ten times as long.
_WARM_UP, _STEPS, _SECONDS = 2, 5, 1.5
_WORK = {"cpu": 2e10, "cuda": 2e12}  # FLOP of a step that is timed, at the least an image's


def guess(place: Path, world: World = ALONE) -> Speeds:
    """What a machine like this one does, unmeasured: enough to choose the networks that are then timed."""
    flops = 1e14 if pick_device().type == "cuda" else 1.2e10 * available_cores()
    return _speeds(flops, flops, flops, place, world)


def measure(config: Config, classes: int, place: Path, world: World = ALONE) -> Speeds:
    """What this machine does with the networks of a plan, whose results are thrown away.

    Args:
        place: where the run will be written.
    """
    unet, classify = evaluation_flops(config, classes), classifier_flops(config, config.classifier, classes)
    share = config.classifier.batch_size // world.size
    train = _rate(lambda n: _unet_step(config, classes, n), 3.0 * unet, config.diffusion.batch_size)
    sample = _rate(lambda n: _draw(config, classes, n), 2.0 * unet, config.generate.batch_size)
    steps = _rate(lambda n: _classifier_step(config, classes, n), 3.0 * classify, share, True)
    return _speeds(train, sample, steps, place, world)


def _speeds(train: float, sample: float, classify: float, place: Path, world: World) -> Speeds:
    on_card = (device := pick_device()).type == "cuda"
    memory = free_memory(device) if on_card else free_host_memory() / local_processes()
    start, size = 150.0 if on_card else 20.0, world.size  # compiling takes time
    free = shutil.disk_usage(nearest_folder(place)).free
    return Speeds(train * size, sample * size, classify * size, available_cores(), start, memory, free, size)


def nearest_folder(place: Path) -> Path:
    """The place, or where it will be made."""
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())


def free_host_memory() -> float:
    """Bytes that programs may still take, as Linux estimates; a cautious guess elsewhere."""
    return free_memory(torch.device("cpu")) or 4e9


def _rate(build: Callable[[int], Callable[[], None]], flops: float, batch_size: int, whole: bool = False) -> float:
    """FLOP/s of a step of as many images as _WORK allows; `flops`: of an image; `whole`: of a whole batch."""
    device = pick_device()
    images = batch_size if whole else max(1, min(batch_size, int(_WORK[device.type] / flops)))
    step = build(images)
    for _ in range(_WARM_UP):
        step()
    times: list[float] = []
    while not times or (sum(times) < (_SECONDS if len(times) >= _STEPS else 2 * _SECONDS) and len(times) < 50):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return flops * images / statistics.median(times)


def _images(config: Config, side: int, count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, config.data.channels), dtype=torch.uint8, device=pick_device())


def _unet_step(config: Config, classes: int, count: int) -> Callable[[], None]:
    device = pick_device()
    dtype = compute_dtype(config.precision, device)
    model = build_unet(config, classes).to(device, dtype).train()
    optimizer = AdamWEma(model)
    images = normalise(_images(config, config.data.image_size, count))
    labels = torch.arange(count, device=device) % classes

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(images, labels, labels).float(), images).backward()
        optimizer.step(1e-4, 0.99, 1.0)

    return step


def _draw(config: Config, classes: int, count: int) -> Callable[[], None]:
    device = pick_device()
    unet = build_unet(config, classes).eval().requires_grad_(False)
    unet = unet.to(device, compute_dtype(config.precision, device))
    sampler = Sampler.for_run(config, unet, config.generate.model_copy(update={"steps": 2, "guidance": 0.0}), 0)
    labels = torch.arange(count, device=device) % classes
    return lambda: (sampler.draw(labels, labels), None)[1]


def _classifier_step(config: Config, classes: int, count: int) -> Callable[[], None]:
    device, settings = pick_device(), config.classifier
    dtype = compute_dtype(config.precision, device)
    model = build_classifier(settings.network, classes, config.data.channels, settings.image_size).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    images = _images(config, settings.image_size, count)
    positions = torch.arange(count, device=device)

    def step() -> None:
        x = augment(
            images, 0, positions, size=settings.image_size, pad=settings.augment.pad, flip=settings.augment.flip,
            jitter=settings.augment.jitter, dtype=dtype,
        )  # fmt: skip
        with autocast(dtype, device):
            logits = model(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), positions % classes).backward()
        optimizer.step()

    return step
