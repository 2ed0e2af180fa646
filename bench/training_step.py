"""The diffusion training step of a preset, whole and with one kernel at a time served by PyTorch instead.

    python -m bench.training_step --preset cifar10-lt-100      # on a CUDA card: the figures that count
    python -m bench.training_step --preset digits-lt           # on a CPU the references serve: the step alone

Random images stand for the set: the step's time does not depend on them. L_AID's extractor is a fresh network. All
variants run in turn, round after round; the median is told.
"""

from __future__ import annotations

import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from bench.cost import step_flops
from bench.seeds import machine
from diffult.artifacts import build_unet
from diffult.cli import main
from diffult.config import Config, load_preset
from diffult.diffusion.objective import DiffusionLoss, stride
from diffult.diffusion.schedule import Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import compute_dtype, peak_flops, pick_device
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import build_classifier
from kernels import dispatch
from kernels.adamw_ema import AdamWEma

KERNELS = ("group_norm_silu", "diffuse", "adamw_ema")


@contextmanager
def without(kernel: str | None) -> Iterator[None]:
    """Within, PyTorch serves this kernel, whatever the switch says."""
    if kernel is None:
        yield
    else:
        with patch.object(importlib.import_module(f"kernels.{kernel}"), "use_triton", lambda *_: False):
            yield


def build_step(config: Config, classes: int, device: torch.device) -> Callable[[], Any]:
    """The step on one batch: forward, backward, AdamW and average; a CUDA graph where there is a card. Every
    1/aid_steps-th call has L_AID."""
    settings, dtype = config.diffusion, compute_dtype(config.precision, device)
    model = build_unet(config, classes).to(device, dtype).train()
    optimizer = AdamWEma(model)
    part = config.extractor
    phi0 = build_classifier(part.network, classes, config.data.channels, part.image_size).to(device).eval()
    statistics = ClassStatistics(torch.zeros(classes, 1), torch.ones(classes), torch.ones(classes, dtype=torch.int64))
    loss = DiffusionLoss(
        torch.compile(model) if device.type == "cuda" else model, settings,
        Schedule(settings.schedule, settings.timesteps, device), torch.full((classes,), 1 / classes, device=device),
        Extractor(phi0.requires_grad_(False), part.image_size, statistics.to(device)), 0, dtype,
    )  # fmt: skip
    size, side = settings.batch_size, config.data.image_size
    images = torch.randint(0, 256, (size, side, side, config.data.channels), dtype=torch.uint8, device=device)
    labels, positions = torch.arange(size, device=device) % classes, torch.arange(size, device=device)
    rates = torch.tensor([settings.learning_rate, 0.99], dtype=torch.float64, device=device)

    def step(positions: torch.Tensor, with_aid: bool) -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(images, labels, positions, with_aid)["loss"]
        value.backward()
        optimizer.step(rates[0], rates[1], settings.gradient_clip)
        return value.detach()

    captured = {with_aid: CUDAGraphRunner(partial(step, with_aid=with_aid), device) for with_aid in (False, True)}
    number = itertools.count()
    return lambda: captured[settings.aid and next(number) % stride(settings.aid_steps) == 0](positions)


def seconds(call: Callable[[], torch.Tensor], steps: int) -> float:
    """Of one step; the last one's loss is waited for."""
    begun = time.perf_counter()
    for _ in range(steps):
        value = call()
    value.item()
    return (time.perf_counter() - begun) / steps


def measure(config: Config, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds a step of each variant, images/s and TFLOP/s of the whole one, and how much slower each other is."""
    variants = [None, *KERNELS] if dispatch.refusal(device) is None else [None]
    built = {}
    for kernel in variants:
        with without(kernel):
            torch._dynamo.reset()
            built[kernel] = build_step(config, 10, device)
            for _ in range(4):  # compiles, and records the graph: what serves is fixed from here on
                built[kernel]()
    times: dict[str | None, list[float]] = {kernel: [] for kernel in variants}
    for _ in range(rounds):
        for kernel in variants:
            with without(kernel):
                times[kernel].append(seconds(built[kernel], steps))
    whole = median(times[None])
    flops = sum(step_flops(config, 10).values())
    return {
        "seconds": whole,
        "images_per_s": config.diffusion.batch_size / whole,
        "tflop_per_s": flops / whole / 1e12,
        "share_of_peak": flops / whole / peak if (peak := peak_flops(device)) else None,
        "times as long without": {k: median(t) / whole for k, t in times.items() if k is not None},
    }


def command(
    preset: Annotated[str, typer.Option(help="Whose network, losses and batch.")] = "cifar10-lt-100",
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median is told.")] = 5,
) -> None:
    """Time the diffusion training step, and what each kernel is worth in it."""
    result = measure(load_preset(preset), pick_device(), steps, rounds)
    print(json.dumps({"preset": preset, "machine": machine()} | result, indent=1))


if __name__ == "__main__":
    main(command)
