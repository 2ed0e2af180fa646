"""Ours and diffusers' of one configuration, built and ready: network, training step, sampler, draw.

Random images and weights stand for the real ones: no time depends on them. L_AID's extractor is a fresh network.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench import peers
from bench.race import Call
from diffult.config import Config
from diffult.diffusion.objective import DiffusionLoss, stride
from diffult.diffusion.schedule import Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import compute_dtype, pick_device
from diffult.generation.config import GenerateConfig
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import build_classifier
from diffult.models.unet import UNet, build_unet
from kernels.adamw_ema import AdamWEma
from kernels.random import normal

CLASSES = 10
# diffusers' network takes no augmentation label; without it ours has the same parameters.
SAME_NETWORK = ["unet.augment_dim=0", "diffusion.augment_probability=0.0"]
PLAIN_LOSS = ["diffusion.cbdm=false", "diffusion.aid=false"]


@dataclass
class Model:
    """A network with weights that all matter, and one batch of inputs (x, t, labels)."""

    config: Config
    unet: UNet
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return self.config.diffusion.batch_size

    def peers(self) -> dict[str, peers.Peer]:
        """diffusers' network with these weights in each of its settings; none where diffusers is missing."""
        if peers.missing():
            return {}
        peer = peers.build_peer(self.unet, self.config.data.image_size)
        return {name: peer.in_setting(name) for name in peers.SETTINGS}


def build_model(config: Config, training: bool = False, device: torch.device | None = None) -> Model:
    """In evaluation mode its weights are in the compute type; in training they are float32."""
    device = device or pick_device()
    dtype = compute_dtype(config.precision, device)
    torch.manual_seed(0)
    with device:
        unet = build_unet(config, CLASSES)
    for parameter in unet.parameters():  # as initialised, branches end in zeros
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    unet.train(training).requires_grad_(training)
    if not training:
        unet = unet.to(dtype)
    size, side = config.diffusion.batch_size, config.data.image_size
    x = torch.randn(size, config.data.channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    t, labels = (torch.arange(size, device=device) * factor for factor in (7, 1))
    return Model(config, unet, (x, t % 1000, labels % CLASSES), dtype, device)


def build_extractor(config: Config, classes: int, device: torch.device) -> Extractor:
    """A fresh network that accepts everything."""
    part = config.extractor
    phi0 = build_classifier(part.network, classes, config.data.channels, part.image_size)
    statistics = ClassStatistics(torch.zeros(classes, phi0.feature_dim), torch.full((classes,), 1e9)).to(device)
    prior = torch.zeros(classes, device=device)
    return Extractor(phi0.to(device).eval().requires_grad_(False), part.image_size, statistics, prior)


def build_step(config: Config, classes: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """Our training step on one batch: forward, backward, AdamW and average; a CUDA graph where there is a card. Every
    1/aid_steps-th call has L_AID."""
    settings, dtype = config.diffusion, compute_dtype(config.precision, device)
    with device:
        model = build_unet(config, classes).to(dtype).train()
    optimizer = AdamWEma(model)
    loss = DiffusionLoss(
        torch.compile(model) if device.type == "cuda" else model, settings,
        Schedule(settings.schedule, settings.timesteps, device), torch.full((classes,), 1 / classes, device=device),
        build_extractor(config, classes, device), 0, dtype,
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


def build_peer_step(model: Model, peer: Any, plain: bool) -> Callable[[], torch.Tensor]:
    """diffusers' training step with the plain DDPM loss on one batch: as it comes (`plain`), in float32 with torch's
    default AdamW; or at its best, in the compute type with the fused one."""
    config, device = model.config, model.device
    side = config.data.image_size
    images = torch.randint(0, 256, (model.size, side, side, config.data.channels), dtype=torch.uint8, device=device)
    return peers.training_step(
        peer, config.diffusion, Schedule(config.diffusion.schedule, config.diffusion.timesteps, device), images,
        model.inputs[2], CLASSES, torch.float32 if plain else model.dtype, fused=not plain,
    )  # fmt: skip


def build_sampler(model: Model, settings: GenerateConfig, compiled: bool = False) -> Sampler:
    """Draws from `model`."""
    settings = settings.model_copy(update={"batch_size": model.size})
    return Sampler.for_run(model.config, model.unet, settings, seed=0, compiled=compiled)


def our_draw(model: Model, settings: GenerateConfig, compiled: bool = False) -> Call:
    """One batch from noise to uint8 [B, H, W, C]."""
    sampler, labels = build_sampler(model, settings, compiled), model.inputs[2]
    indices = torch.arange(len(labels), device=model.device)
    return lambda: sampler.draw(labels, indices)


def peer_draw(model: Model, settings: GenerateConfig, peer: Any) -> Call:
    """The same batch, from the same noise, by diffusers' loop."""
    config, labels = model.config, model.inputs[2]
    schedule = Schedule(config.diffusion.schedule, config.diffusion.timesteps, model.device)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    noise = normal(0, labels, torch.arange(len(labels), device=model.device), torch.zeros_like(labels), shape)

    def draw() -> torch.Tensor:
        made, more = peers.scheduler(config.diffusion, schedule, settings.sampler, settings.steps, model.device)
        return peers.sample(peer, made, noise, labels, settings.guidance, CLASSES, more)

    return draw


def compiled(network: Any) -> Any:
    """As its users would compile it for drawing: with CUDA graphs where there is a card."""
    return torch.compile(network, mode="reduce-overhead" if torch.cuda.is_available() else "default")


@contextmanager
def without(kernel: str | None) -> Iterator[None]:
    """Within, PyTorch serves this kernel (a file of `kernels`), whatever the switch says."""
    if kernel is None:
        yield
    else:
        with patch.object(importlib.import_module(f"kernels.{kernel}"), "use_triton", lambda *_: False):
            yield
