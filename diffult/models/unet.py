"""The class-conditional UNet that predicts noise or velocity in pixel space.

DDPM's (Ho et al., 2020; with labels in CBDM) adds the embedding and resamples with convolutions; ADM's (Dhariwal and
Nichol, 2021) scales and shifts the norms and resamples inside residual blocks. Activations are channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffult.config import Config
from diffult.errors import UserError
from diffult.models.config import UNetConfig
from diffult.models.dropout import Dropout
from diffult.models.norm import GroupNorm
from diffult.runs.files import as_weights, load_tensors, save_tensors
from kernels.attention import attention

Resample = Literal["", "down", "up"]


class UNet(nn.Module):
    """UNet for square images of `image_size` pixels and `channels` colours; the label `num_classes` means "no class".
    Raises UserError if the image size, the levels and the attention settings do not fit."""

    def __init__(self, config: UNetConfig, image_size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        sizes = _level_sizes(config, image_size)
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        _check_attention(config, image_size, sizes, widths)
        self.config = config

        embed = 4 * config.channels
        self.time_embedding = nn.Sequential(nn.Linear(config.channels, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label_embedding = nn.Embedding(num_classes + 1, embed)
        self.augment_embedding = nn.Linear(config.augment_dim, embed, bias=False) if config.augment_dim else None

        def block(inputs: int, width: int, attend: bool, resample: Resample = "") -> ResBlock:
            return ResBlock(inputs, width, embed, config, attend, resample)

        attends = [size in config.attention_resolutions for size in sizes]
        pixels = channels * config.patch**2
        width = widths[0]
        self.conv_in = nn.Conv2d(pixels, width, 3, padding=1)
        skips = [width]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            if level:
                in_block = config.resample_in_block
                self.down.append(block(width, width, False, "down") if in_block else Downsample(width))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.down.append(block(width, out, attends[level]))
                width = out
                skips.append(width)

        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(block(width + skips.pop(), out, attends[level]))
                width = out
            if level:
                in_block = config.resample_in_block
                self.upsample.append(block(width, width, False, "up") if in_block else Upsample(width))

        self.norm_out = GroupNorm(width)
        self.conv_out = nn.Conv2d(width, pixels, 3, padding=1)
        self._initialise()
        self.to(memory_format=torch.channels_last)

    def _initialise(self) -> None:
        """DDPM's: every layer uniform Xavier, biases zero; zero where a branch or the network ends."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, SelfAttention):
                for part in module.qkv.weight.chunk(3):  # three layers in one: Xavier for each
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, augment: Tensor | None = None) -> Tensor:
        """Predicts from noisy images; computes in the type of its weights.

        Args:
            x: float [B, channels, image_size, image_size].
            t: timesteps 0 .. T-1, int or float [B].
            y: int64 [B] in 0 .. num_classes.
            augment: float [B, augment_dim]; None is the same as zeros.

        Returns:
            The shape and type of x, channels-last.
        """
        embedding = self._embed(t, y, augment)
        h = F.pixel_unshuffle(x.to(self.conv_in.weight.dtype), self.config.patch)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for level in range(len(self.config.multipliers)):
            blocks = self.config.num_res_blocks + 1
            for layer in self.up[level * blocks : (level + 1) * blocks]:
                h = layer(torch.cat([h, skips.pop()], dim=1), embedding)
            if level < len(self.upsample):
                h = self.upsample[level](h, embedding)
        h = F.pixel_shuffle(self.conv_out(self.norm_out(h)), self.config.patch)
        return h.to(x.dtype).contiguous(memory_format=torch.channels_last)

    def _embed(self, t: Tensor, y: Tensor, augment: Tensor | None) -> Tensor:
        dtype = self.conv_in.weight.dtype
        embedding = self.time_embedding(sinusoid(t, self.config.channels).to(dtype)) + self.label_embedding(y)
        if augment is not None and self.augment_embedding is not None:
            embedding = embedding + self.augment_embedding(augment.to(dtype))
        return F.silu(embedding)  # once for all blocks


def build_unet(config: Config, num_classes: int) -> UNet:
    """The freshly initialised UNet of a configuration."""
    return UNet(config.unet, config.data.image_size, config.data.channels, num_classes)


def save_unet(file: Path, weights: Mapping[str, Tensor], config: Config, num_classes: int, digest: str) -> None:
    """Writes the weights of a configuration's UNet with all that `load_unet` needs; `digest` is of its settings."""
    sizes = {"image_size": config.data.image_size, "channels": config.data.channels, "num_classes": num_classes}
    info = {"hash": digest, "unet": config.unet.model_dump_json()} | {key: str(value) for key, value in sizes.items()}
    save_tensors(file, weights, info)


def load_unet(file: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> UNet:
    """The UNet of `save_unet` in evaluation mode, computing in `dtype`; UserError if the file is missing or damaged."""
    weights, info = load_tensors(file)
    with as_weights(file):
        sizes = (int(info[key]) for key in ("image_size", "channels", "num_classes"))
        model = UNet(UNetConfig.model_validate_json(info["unet"]), *sizes)
        model.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(device, dtype)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input; the embedding enters at the second norm; may attend.

    With `resample` both branches are halved ("down": mean) or doubled ("up": nearest) before the first convolution.
    """

    def __init__(
        self, inputs: int, width: int, embed: int, config: UNetConfig, attend: bool, resample: Resample
    ) -> None:
        super().__init__()
        self.resample = resample
        self.gradient_checkpointing = config.gradient_checkpointing
        self.scale_shift = config.scale_shift
        self.norm1 = GroupNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.embed = nn.Linear(embed, 2 * width if config.scale_shift else width)
        self.norm2 = GroupNorm(width)
        self.dropout = Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)
        self.attention = SelfAttention(width, config.head_width) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self._forward(x, embedding)
        drops = self.training and self.dropout.p > 0  # then the same units must be dropped again
        return checkpoint(self._forward, x, embedding, use_reentrant=False, preserve_rng_state=drops)

    def _forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = _double(h), _double(x)
        h = self.conv1(h)
        e = self.embed(embedding)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h, scale, shift)
        else:
            h = self.norm2(h + e[:, :, None, None])
        h = self.conv2(self.dropout(h))
        return self.attention(self.shortcut(x) + h)


class SelfAttention(nn.Module):
    """Self-attention over the positions of a feature map, plus the input."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width if head_width else 1
        self.norm = GroupNorm(width, silu=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        # channels-last is [B, H, W, C] in memory: tokens are a view of it, and the other way round
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, rows * columns, width)
        q, k, v = self.qkv(tokens).view(batch, rows * columns, 3, self.heads, width // self.heads).unbind(2)
        h = self.out(attention(q, k, v).reshape(batch, rows * columns, width))
        return x + h.view(batch, rows, columns, width).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves the resolution with a strided convolution (DDPM). Called like a block, with the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the resolution: nearest, then a convolution (DDPM). Called like a block, with the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(_double(x))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Features of timesteps (Vaswani, 2017): cos, then sin of t / 10000^(2i / width), [B] -> [B, width]."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _level_sizes(config: UNetConfig, image_size: int) -> list[int]:
    levels = len(config.multipliers)
    factor = config.patch * 2 ** (levels - 1)
    if image_size < factor or image_size % factor:
        raise UserError(
            f"UNet: with patch {config.patch} and {levels} multipliers the image size must be a multiple of {factor}, "
            f"got {image_size}; use fewer multipliers or another patch"
        )
    return [image_size // config.patch // 2**level for level in range(levels)]


def _check_attention(config: UNetConfig, image_size: int, sizes: list[int], widths: list[int]) -> None:
    if missing := set(config.attention_resolutions) - set(sizes):
        raise UserError(
            f"UNet: attention_resolutions names {sorted(missing)}, but a {image_size}-pixel image has levels of "
            f"{sizes}; choose among these"
        )
    attending = [w for s, w in zip(sizes, widths, strict=True) if s in config.attention_resolutions] + widths[-1:]
    for width in attending:
        if config.head_width and width % config.head_width:
            raise UserError(
                f"UNet: head_width {config.head_width} does not divide a level of {width} channels; choose a divisor, "
                "or 0 for one head"
            )
