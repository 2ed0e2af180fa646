"""The rival code base, diffusers, doing our work: the same network with copied weights, and its own loops around it.

diffusers' UNet2DModel has the parameters of our UNet one for one, so that a race compares two implementations of one
computation. tests/bench/test_bench_peers.py holds outputs and gradients against each other.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffult.config import DiffusionConfig
from diffult.diffusion.samplers import timestep_grid
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import autocast
from diffult.errors import UserError
from diffult.models.unet import ResBlock, UNet

# Its settings: as it comes (None: float32, contiguous), and in the type that we compute in, in either memory format.
SETTINGS = {
    "diffusers": None,
    "diffusers contiguous": torch.contiguous_format,
    "diffusers channels-last": torch.channels_last,
}


@functools.cache
def missing() -> str | None:
    """Why diffusers cannot race here, or None."""
    try:
        from diffusers import UNet2DModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # its lazy modules raise the latter
        return f"diffusers is not there ({str(error).strip().partition(chr(10))[0]}): pip install diffusers"
    return None


def absent(suffix: str = "") -> dict[str, str]:
    """What a race puts down for our opponents in it where diffusers is missing: by name, why."""
    reason = missing()
    return {f"{name}{suffix}": reason for name in SETTINGS} if reason else {}


class Peer(nn.Module):
    """UNet2DModel called like our UNet: (x [B, C, H, W] of any type, t [B], labels [B]) -> [B, C, H, W] in its own."""

    def __init__(self, network: nn.Module, patch: int, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.network, self.patch, self.layout = network, patch, layout

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        h = F.pixel_unshuffle(x.to(self.network.conv_in.weight.dtype), self.patch)
        h = h.contiguous(memory_format=self.layout)
        return F.pixel_shuffle(self.network(h, t, class_labels=labels, return_dict=False)[0], self.patch)

    def in_setting(self, name: str) -> Peer:
        """A copy in the setting of this name (SETTINGS)."""
        network, layout = copy.deepcopy(self.network), SETTINGS[name]
        if layout is None:
            return Peer(network.float(), self.patch)
        return Peer(network.to(memory_format=layout), self.patch, layout)


def build_peer(unet: UNet, image_size: int) -> Peer:
    """diffusers' network of the shape of `unet` with its weights, on its device, in its type.

    Raises:
        UserError: diffusers is missing, or its UNet2DModel has no such network.
    """
    if reason := missing():
        raise UserError(reason)
    from diffusers import UNet2DModel

    config = unet.config
    if config.resample_in_block or config.augment_dim:
        raise UserError("no peer: diffusers' UNet2DModel has no resample_in_block and no augment_dim; set them to 0")
    sizes = [image_size // config.patch // 2**level for level in range(len(config.multipliers))]
    attends = [size in config.attention_resolutions for size in sizes]
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    pixels = unet.conv_in.in_channels
    network = UNet2DModel(
        sample_size=sizes[0],
        in_channels=pixels,
        out_channels=pixels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        block_out_channels=tuple(widths),
        layers_per_block=config.num_res_blocks,
        norm_num_groups=4,  # of every norm; ours vary with the width, and are copied below
        attn_norm_num_groups=4,
        norm_eps=1e-5,
        attention_head_dim=config.head_width or widths[-1],
        flip_sin_to_cos=True,
        freq_shift=0,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        num_class_embeds=unet.label_embedding.num_embeddings,
        dropout=config.dropout,
        downsample_padding=1,
    )
    with torch.no_grad():
        for ours, theirs in _pairs(unet, network, attends):
            theirs.weight.copy_(ours.weight)
            if getattr(ours, "bias", None) is not None:
                theirs.bias.copy_(ours.bias)
            if isinstance(theirs, nn.GroupNorm):
                theirs.num_groups = ours.groups
    counts = [sum(p.numel() for p in model.parameters()) for model in (unet, network)]
    if counts[0] != counts[1]:
        raise UserError(f"no peer: our network has {counts[0]} parameters, diffusers' {counts[1]}")
    weight = unet.conv_in.weight
    network = network.to(weight.device).train(unet.training)
    return Peer(network if weight.dtype == torch.float32 else network.to(weight.dtype), config.patch)


def _pairs(unet: UNet, network: Any, attends: list[bool]) -> Iterator[tuple[Any, Any]]:
    """Our layers beside theirs with the same weights, in the order of the forward pass."""
    yield unet.time_embedding[0], network.time_embedding.linear_1
    yield unet.time_embedding[2], network.time_embedding.linear_2
    yield unet.label_embedding, network.class_embedding
    yield unet.conv_in, network.conv_in
    down, up, upsample = iter(unet.down), iter(unet.up), iter(unet.upsample)
    for block, attend in zip(network.down_blocks, attends, strict=True):
        for i, resnet in enumerate(block.resnets):
            yield from _block_pairs(next(down), resnet, block.attentions[i] if attend else None)
        if block.downsamplers:
            yield next(down).conv, block.downsamplers[0].conv
    middle = network.mid_block
    yield from _block_pairs(unet.middle[0], middle.resnets[0], middle.attentions[0])
    yield from _block_pairs(unet.middle[1], middle.resnets[1], None)
    for block, attend in zip(network.up_blocks, reversed(attends), strict=True):
        for i, resnet in enumerate(block.resnets):
            yield from _block_pairs(next(up), resnet, block.attentions[i] if attend else None)
        if block.upsamplers:
            yield next(upsample).conv, block.upsamplers[0].conv
    yield unet.norm_out, network.conv_norm_out
    yield unet.conv_out, network.conv_out


def _block_pairs(ours: Any, resnet: Any, attention: Any | None) -> Iterator[tuple[Any, Any]]:
    assert isinstance(ours, ResBlock)
    yield ours.norm1, resnet.norm1
    yield ours.conv1, resnet.conv1
    yield ours.embed, resnet.time_emb_proj
    yield ours.norm2, resnet.norm2
    yield ours.conv2, resnet.conv2
    if isinstance(ours.shortcut, nn.Conv2d):
        yield ours.shortcut, resnet.conv_shortcut
    if attention is not None:
        part: Any = ours.attention
        yield part.norm, attention.group_norm
        yield part.out, attention.to_out[0]
        thirds = zip(part.qkv.weight.chunk(3), part.qkv.bias.chunk(3), strict=True)
        for (weight, bias), linear in zip(thirds, (attention.to_q, attention.to_k, attention.to_v), strict=True):
            third = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            third.weight, third.bias = nn.Parameter(weight), nn.Parameter(bias)
            yield third, linear


def _process(config: DiffusionConfig, schedule: Schedule) -> dict[str, Any]:
    """Our forward process as diffusers' schedulers take it."""
    abar = schedule.alphas_cumprod
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    prediction = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[config.prediction]
    return {
        "trained_betas": betas.numpy(),
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": prediction,
    }


def training_step(
    peer: nn.Module, config: DiffusionConfig, schedule: Schedule, images: Tensor, labels: Tensor, null_label: int,
    dtype: torch.dtype, fused: bool,
) -> Callable[[], Tensor]:  # fmt: skip
    """A step of diffusers' training examples on one batch: normalise, flip, noise, loss, clip, AdamW, average.

    Args:
        peer: float32 weights; the forward pass runs under autocast where `dtype` is not float32.
        images: uint8 [B, H, W, C], as our step takes them.
        null_label: stands for a dropped label.
        fused: torch's fused AdamW; False its default.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**_process(config, schedule))
    parameters = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, weight_decay=config.weight_decay, fused=fused or None
    )
    average = [p.detach().clone() for p in parameters]
    device, size = images.device, len(images)

    def step() -> Tensor:
        x0 = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        if config.flip:
            x0 = torch.where(torch.rand(size, 1, 1, 1, device=device) <= 0.5, x0.flip(3), x0)
        noise = torch.randn_like(x0)
        t = torch.randint(0, schedule.timesteps, (size,), device=device)
        y = torch.where(torch.rand(size, device=device) <= config.label_dropout, null_label, labels)
        x_t = scheduler.add_noise(x0, noise, t)
        target = noise if config.prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
        with autocast(dtype, device):
            out = peer(x_t, t, y)
        loss = F.mse_loss(out.float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - config.ema)
        return loss.detach()

    return step


def scheduler(
    config: DiffusionConfig, schedule: Schedule, name: str, steps: int, device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """diffusers' scheduler of a sampler of ours, `name` as in generate.sampler, and what its steps take besides."""
    import diffusers

    shared = _process(config, schedule) | {"timestep_spacing": "trailing"}
    more: dict[str, Any] = {}
    if name == "ddim":
        made: Any = diffusers.DDIMScheduler(set_alpha_to_one=True, clip_sample=True, **shared)
        more["use_clipped_model_output"] = True
    elif name == "ddpm":
        made = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True, **shared)
    else:
        kind = "sde-dpmsolver++" if name == "dpm++sde" else "dpmsolver++"
        made = _clipped(diffusers.DPMSolverMultistepScheduler, algorithm_type=kind, final_sigmas_type="zero", **shared)
    if name.startswith("dpm++"):  # its own grid leaves out the noisiest timesteps of the cosine schedule
        made.set_timesteps(timesteps=timestep_grid(schedule.timesteps, steps), device=device)
    else:
        made.set_timesteps(steps, device=device)
    return made, more


def _clipped(kind: Any, **settings: Any) -> Any:
    """With x0 clipped to [-1, 1]: its own thresholding sorts all pixels to the same end."""
    made = kind(thresholding=True, **settings)
    made._threshold_sample = lambda x0: x0.clamp(-1, 1)
    return made


# diffusers' solvers of few steps, each with its own ways to space them.
_DPM = ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"})
_UNIPC = ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"})
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    "DPM-Solver++": _DPM,
    "DPM-Solver++, Karras": (_DPM[0], _DPM[1] | {"use_karras_sigmas": True}),
    "DPM-Solver++, log-SNR": (_DPM[0], _DPM[1] | {"use_lu_lambdas": True}),
    "SDE-DPM-Solver++": (_DPM[0], _DPM[1] | {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": _UNIPC,
    "UniPC, Karras": (_UNIPC[0], _UNIPC[1] | {"use_karras_sigmas": True}),
}


def own_scheduler(config: DiffusionConfig, schedule: Schedule, name: str, steps: int, device: torch.device) -> Any:
    """diffusers' scheduler of this name (SOLVERS), at timesteps of its own."""
    import diffusers

    kind, settings = SOLVERS[name]
    settings = settings | _process(config, schedule)
    if kind == "DDIMScheduler":
        made = diffusers.DDIMScheduler(clip_sample=True, **settings)
    else:
        made = _clipped(getattr(diffusers, kind), **settings)
    made.set_timesteps(steps, device=device)
    if kind != "DDIMScheduler":
        made.set_begin_index(0)  # Karras' noise levels may share a timestep, by which it would look for its place
    return made


@torch.inference_mode()
def sample(
    peer: nn.Module, scheduler: Any, x: Tensor, labels: Tensor, guidance: float = 0.0, null_label: int = 0,
    more: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """diffusers' sampling loop, from noise x [B, C, H, W] to uint8 [B, H, W, C]; `more`: what a step takes besides."""
    for t in scheduler.timesteps:
        if guidance:
            both = torch.cat([labels, torch.full_like(labels, null_label)])
            out, free = peer(torch.cat([x, x]), t.expand(2 * len(x)), both).float().chunk(2)
            out = out + guidance * (out - free)
        else:
            out = peer(x, t.expand(len(x)), labels).float()
        x = scheduler.step(out, t, x, return_dict=False, **(more or {}))[0]
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
