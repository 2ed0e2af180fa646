"""Races of the diffusion model: forward pass, training step, samplers, each against diffusers doing the same work.

On a CPU the networks are small (the figures are ratios); on a CUDA card they are cifar10-lt-100's own. Random images
and weights: no time depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.ceilings import traffic
from bench.cost import step_flops
from bench.race import Call, Work, race
from bench.training_step import build_step
from diffult.config import Config, GenerateConfig, load_preset
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import compute_dtype, pick_device
from diffult.errors import UserError
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.cost import forward_flops
from diffult.models.resnet import build_classifier
from diffult.models.unet import UNet
from kernels.random import normal

CLASSES = 10
# diffusers' network takes no augmentation label; without it ours has the same parameters.
_SAME = ["unet.augment_dim=0", "diffusion.augment_probability=0.0"]
_SMALL = ["unet.channels=32", "unet.multipliers=[1, 2, 2]", "unet.num_res_blocks=1", "diffusion.batch_size=8"]
_HALVES = ["diffusion.cbdm_share=0.5", "diffusion.aid_share=0.5", "diffusion.aid_steps=0.5"]
_PLAIN = ["diffusion.cbdm=false", "diffusion.aid=false"]


def model_config(*overrides: str) -> Config:
    """cifar10-lt-100's model, narrow where there is no card."""
    small = _SMALL if pick_device().type == "cpu" else []
    return load_preset("cifar10-lt-100", [*_SAME, *small, *overrides])


def sampler_config(*overrides: str) -> Config:
    """The model that is sampled: cifar10-lt-100's on a card, fashion-mnist-lt's on a CPU, where a draw must not take
    minutes."""
    if pick_device().type == "cuda":
        return model_config(*overrides)
    return load_preset("fashion-mnist-lt", ["diffusion.batch_size=32", "generate.spacing=time", *overrides])


@dataclass
class Model:
    """A network with weights that all matter, its peers, and one batch of inputs."""

    config: Config
    unet: UNet
    peers: dict[str, peers.Peer]
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return self.config.diffusion.batch_size


def build_model(config: Config, training: bool = False) -> Model:
    """In evaluation mode peers too compute in the compute type; in training their weights are float32."""
    device = pick_device()
    dtype = compute_dtype(config.precision, device)
    torch.manual_seed(0)
    unet = UNet(config.unet, config.data.image_size, config.data.channels, CLASSES).to(device)
    for parameter in unet.parameters():  # as initialised, branches end in zeros
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    unet.train(training).requires_grad_(training)
    if not training:
        unet = unet.to(dtype)
    peer = peers.build_peer(unet, config.data.image_size)
    settings = {name: peer.in_setting(name) for name in peers.SETTINGS}
    size, side = config.diffusion.batch_size, config.data.image_size
    x = torch.randn(size, config.data.channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    t, labels = (torch.arange(size, device=device) * factor for factor in (7, 1))
    return Model(config, unet, settings, (x, t % 1000, labels % CLASSES), dtype, device)


def same(name: str, outputs: list[torch.Tensor], allowed: float, rounded: bool = False) -> str:
    """How much the others' outputs [B, ...] differ from the first, ours, in words; UserError where it is more than
    `allowed`: the largest difference, or the largest mean of an image where all were `rounded` on the way, step by
    step."""
    ours, *others = (out.float().flatten(1) for out in outputs)
    differences = (torch.stack(others) - ours).abs()
    kind = "an image's mean" if rounded else "largest"
    difference = (differences.mean(2) if rounded else differences).max().item()
    if not difference <= allowed:
        raise UserError(f"{name}: {kind} difference of outputs {difference:.3g}, more than {allowed:.3g}: not fair")
    return f"{kind} difference of outputs {difference:.2g}, same number of parameters"


def _compiled(function: Any) -> Any:
    """As its users would compile it: with CUDA graphs where there is a card."""
    return torch.compile(function, mode="reduce-overhead" if torch.cuda.is_available() else "default")


@race("network forward", *peers.SETTINGS)
def forward(folder: Path) -> Work:
    """One evaluation of the UNet in its compute type."""
    model = build_model(model_config())
    networks = {"ours": model.unet, **model.peers}

    def call(network: Any) -> Call:
        def run() -> torch.Tensor:
            with torch.inference_mode():
                return network(*model.inputs)

        return run

    run = {name: call(network) for name, network in networks.items()}
    outputs = [out() for out in run.values()]
    allowed = (1e-4 if model.dtype == torch.float32 else 5e-2) * float(outputs[0].abs().max())
    equal = same("network forward", outputs, allowed)
    return Work(
        run, model.size, model.size * forward_flops(model.unet, model.inputs),
        traffic(lambda: model.unet(*model.inputs)),
        {name: lambda network=network: call(_compiled(network)) for name, network in networks.items()}, equal,
    )  # fmt: skip


@race("training step", *peers.SETTINGS)
def training_step(folder: Path) -> Work:
    """Forward, backward, clip, AdamW and average with the plain DDPM loss."""
    config = model_config(*_PLAIN)
    model = build_model(config, training=True)
    side, device = config.data.image_size, model.device
    images = torch.randint(0, 256, (model.size, side, side, config.data.channels), dtype=torch.uint8, device=device)
    labels = model.inputs[2]
    schedule = Schedule(config.diffusion.schedule, config.diffusion.timesteps, device)

    def stepper(name: str, network: Any) -> Call:
        """As it comes: float32 and torch's default AdamW; at its best: the compute type and the fused one."""
        plain = peers.SETTINGS[name] is None
        return peers.training_step(
            network, config.diffusion, schedule, images, labels, CLASSES,
            torch.float32 if plain else model.dtype, fused=not plain,
        )  # fmt: skip

    run: dict[str, Call] = {"ours": build_step(config, CLASSES, device)}
    run |= {name: stepper(name, network) for name, network in model.peers.items()}

    def compiled(name: str) -> Call:
        network = model.peers[name].in_setting(name)
        return stepper(name, torch.compile(network))  # gradients go wrong in reduce-overhead's reused memory

    work = Work(run, model.size, step_flops(config, CLASSES)["ddpm"], 3.0 * traffic(lambda: model.unet(*model.inputs)))
    work.compilable = {name: lambda name=name: compiled(name) for name in model.peers}
    work.equal = "same network and number of parameters; noise, timesteps and dropped labels are each side's own"
    return work


@race("all loss terms", "plain loss", "all terms of the whole batch")
def all_terms(folder: Path) -> Work:
    """Our step with L_CBDM and L_AID from half of the batch and L_AID in every second step, beside the plain loss."""
    device, config = pick_device(), model_config(*_HALVES)
    kinds = {"ours": config, "plain loss": model_config(*_PLAIN), "all terms of the whole batch": model_config()}
    steps = {name: build_step(kind, CLASSES, device) for name, kind in kinds.items()}

    def pair(step: Call) -> Call:
        return lambda: (step(), step())  # one with L_AID, one without

    flops = 2 * sum(step_flops(config, CLASSES).values())
    return Work({name: pair(step) for name, step in steps.items()}, 2 * config.diffusion.batch_size, flops)


def accepting_extractor(model: Model) -> Extractor:
    """Fresh, with classes so wide that it accepts everything."""
    part = model.config.extractor
    channels = model.config.data.channels
    phi0 = build_classifier(part.network, CLASSES, channels, part.image_size).eval().requires_grad_(False)
    accepting = torch.full((CLASSES,), 1e9)
    width = phi0.feature_dim
    statistics = ClassStatistics(torch.zeros(CLASSES, width), accepting, torch.ones(CLASSES, dtype=torch.int64))
    return Extractor(phi0.to(model.device), part.image_size, statistics.to(model.device))


def build_sampler(model: Model, settings: GenerateConfig, compiled: bool = False) -> Sampler:
    """Draws from `model`."""
    config = model.config
    return Sampler(
        unet=model.unet,
        schedule=Schedule(config.diffusion.schedule, config.diffusion.timesteps, model.device),
        prediction=config.diffusion.prediction,
        settings=settings.model_copy(update={"batch_size": model.size}),
        shape=(config.data.channels, config.data.image_size, config.data.image_size),
        null_label=CLASSES,
        seed=0,
        dtype=model.dtype,
        device=model.device,
        compiled=compiled,
    )


def _draws(model: Model, settings: GenerateConfig, compiled: bool = False) -> dict[str, Call]:
    """One batch by our engine and by diffusers' loop from the same noise, uint8 [B, H, W, C]."""
    sampler = build_sampler(model, settings, compiled)
    labels = model.inputs[2]
    indices = torch.arange(len(labels), device=model.device)
    noise = normal(sampler.seed, labels, indices, torch.zeros_like(labels), sampler.shape)

    def theirs(peer: Any) -> Call:
        return lambda: peers.sample(
            peer, model.config.diffusion, sampler.schedule, settings.sampler, settings.steps, noise, labels,
            settings.guidance, CLASSES,
        )  # fmt: skip

    networks = {name: _compiled(peer) if compiled else peer for name, peer in model.peers.items()}
    return {"ours": lambda: sampler.draw(labels, indices), **{name: theirs(peer) for name, peer in networks.items()}}


def _sampler_race(sampler: str, steps: int) -> Work:
    """A batch from noise to images without guidance; outputs are held against each other."""
    config = sampler_config(f"generate.sampler={sampler!r}", f"generate.steps={steps}", "generate.guidance=0.0")
    model = build_model(config)
    run = _draws(model, config.generate)
    outputs = [torch.as_tensor(call()) for call in run.values()]
    # Of one grey level: in bfloat16 roundings grow over the steps, at a few pixels to many levels.
    rounded = model.dtype != torch.float32
    equal = same(sampler, outputs, 1.0, rounded)
    flops = steps * model.size * forward_flops(model.unet, model.inputs)
    work = Work(run, model.size, flops, equal=equal + " (levels of 255)")
    work.compilable = {name: lambda name=name: _draws(model, config.generate, compiled=True)[name] for name in run}
    return work


@race("DDIM, 20 steps", *peers.SETTINGS)
def ddim(folder: Path) -> Work:
    """A batch of images from noise to uint8 with 20 evaluations each."""
    return _sampler_race("ddim", 20)


@race("DPM-Solver++(2M), 10 steps", *peers.SETTINGS)
def dpm_solver(folder: Path) -> Work:
    """A batch of images from noise to uint8 with 10 evaluations each."""
    return _sampler_race("dpm++", 10)


ANCESTRAL_STEPS = 8


@race("ancestral, guided, 1000 steps", *peers.SETTINGS)
def ancestral(folder: Path) -> Work:
    """The published sampler, 1000 steps of two evaluations: 8 steps are timed and counted as 8/1000 of an image."""
    config = sampler_config(
        "generate.sampler='ddpm'", f"generate.steps={ANCESTRAL_STEPS}", "generate.guidance=1.6"
    )  # fmt: skip
    model = build_model(config)
    work = Work(_draws(model, config.generate), model.size * ANCESTRAL_STEPS / 1000)
    work.flops = 2 * ANCESTRAL_STEPS * model.size * forward_flops(model.unet, model.inputs)
    work.equal = "same network and number of evaluations; noise is each side's own"
    return work
