"""Races of the diffusion model: forward pass, training step, samplers, each against diffusers doing the same work.

On a CPU the networks are small (the figures are ratios); on a CUDA card they are cifar10-lt-100's own. Random images
and weights: no time depends on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.ceilings import traffic
from bench.contestants import (
    CLASSES,
    PLAIN_LOSS,
    SAME_NETWORK,
    Model,
    build_model,
    build_peer_step,
    build_step,
    compiled,
    our_draw,
    peer_draw,
)
from bench.race import Call, Work, race
from diffult.config import Config, load_preset
from diffult.engine.device import pick_device
from diffult.errors import UserError
from diffult.generation.config import GenerateConfig
from diffult.models.cost import forward_flops
from diffult.planning.cost import step_flops

_SMALL = ["unet.channels=32", "unet.multipliers=[1, 2, 2]", "unet.num_res_blocks=1", "diffusion.batch_size=8"]
_HALVES = ["diffusion.cbdm_share=0.5", "diffusion.aid_share=0.5", "diffusion.aid_steps=0.5"]


def model_config(*overrides: str) -> Config:
    """cifar10-lt-100's model, narrow where there is no card."""
    small = _SMALL if pick_device().type == "cpu" else []
    return load_preset("cifar10-lt-100", [*SAME_NETWORK, *small, *overrides])


def sampler_config(*overrides: str) -> Config:
    """The model that is sampled: cifar10-lt-100's on a card, fashion-mnist-lt's on a CPU, where a draw must not take
    minutes."""
    if pick_device().type == "cuda":
        return model_config(*overrides)
    return load_preset("fashion-mnist-lt", ["diffusion.batch_size=32", "generate.spacing=time", *overrides])


def same(name: str, outputs: list[torch.Tensor], allowed: float, rounded: bool = False) -> str:
    """How much the others' outputs [B, ...] differ from the first, ours, in words; UserError where it is more than
    `allowed`: the largest difference, or the largest mean of an image where all were `rounded` on the way, step by
    step. Nothing where there are no others."""
    ours, *others = (out.float().flatten(1) for out in outputs)
    if not others:
        return ""
    differences = (torch.stack(others) - ours).abs()
    kind = "an image's mean" if rounded else "largest"
    difference = (differences.mean(2) if rounded else differences).max().item()
    if not difference <= allowed:
        raise UserError(f"{name}: {kind} difference of outputs {difference:.3g}, more than {allowed:.3g}: not fair")
    return f"{kind} difference of outputs {difference:.2g}, same number of parameters"


@race("network forward", *peers.SETTINGS)
def forward(folder: Path) -> Work:
    """One evaluation of the UNet in its compute type."""
    model = build_model(model_config())
    networks = {"ours": model.unet, **model.peers()}

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
        {name: lambda network=network: call(compiled(network)) for name, network in networks.items()}, equal,
        peers.absent(),
    )  # fmt: skip


@race("training step", *peers.SETTINGS)
def training_step(folder: Path) -> Work:
    """Forward, backward, clip, AdamW and average with the plain DDPM loss."""
    config = model_config(*PLAIN_LOSS)
    model = build_model(config, training=True)
    networks = model.peers()
    run: dict[str, Call] = {"ours": build_step(config, CLASSES, model.device)}
    run |= {name: build_peer_step(model, network, _plain(name)) for name, network in networks.items()}

    def compiled_step(name: str) -> Call:  # gradients go wrong in reduce-overhead's reused memory
        return build_peer_step(model, torch.compile(networks[name].in_setting(name)), _plain(name))

    work = Work(run, model.size, step_flops(config, CLASSES)["ddpm"], 3.0 * traffic(lambda: model.unet(*model.inputs)))
    work.compilable = {name: lambda name=name: compiled_step(name) for name in networks}
    work.equal = "same network and number of parameters; noise, timesteps and dropped labels are each side's own"
    work.absent = peers.absent()
    return work


def _plain(name: str) -> bool:
    """Whether a setting of diffusers is the one as it comes."""
    return peers.SETTINGS[name] is None


@race("all loss terms", "plain loss", "all terms of the whole batch")
def all_terms(folder: Path) -> Work:
    """Our step with L_CBDM and L_AID from half of the batch and L_AID in every second step, beside the plain loss."""
    device, config = pick_device(), model_config(*_HALVES)
    kinds = {"ours": config, "plain loss": model_config(*PLAIN_LOSS), "all terms of the whole batch": model_config()}
    steps = {name: build_step(kind, CLASSES, device) for name, kind in kinds.items()}

    def pair(step: Call) -> Call:
        return lambda: (step(), step())  # one with L_AID, one without

    flops = 2 * sum(step_flops(config, CLASSES).values())
    return Work({name: pair(step) for name, step in steps.items()}, 2 * config.diffusion.batch_size, flops)


def _draws(model: Model, settings: GenerateConfig) -> dict[str, Call]:
    """One batch by our engine and by diffusers' loop from the same noise, uint8 [B, H, W, C]."""
    theirs = {name: peer_draw(model, settings, peer) for name, peer in model.peers().items()}
    return {"ours": our_draw(model, settings), **theirs}


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
    work = Work(run, model.size, flops, equal=equal and equal + " (levels of 255)", absent=peers.absent())
    work.compilable = {"ours": lambda: our_draw(model, config.generate, compiled=True)}
    for name, peer in model.peers().items():
        work.compilable[name] = lambda peer=peer: peer_draw(model, config.generate, compiled(peer))
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
    work = Work(_draws(model, config.generate), model.size * ANCESTRAL_STEPS / 1000, absent=peers.absent())
    work.flops = 2 * ANCESTRAL_STEPS * model.size * forward_flops(model.unet, model.inputs)
    work.equal = "same network and number of evaluations; noise is each side's own"
    return work
