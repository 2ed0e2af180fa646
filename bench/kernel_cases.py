"""The shapes at which every kernel is compiled, checked and timed, and the bytes that each must move at the least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.adamw_ema import AdamWEma
from kernels.augment import augment, reference_augment
from kernels.denoise_step import denoise_step
from kernels.diffuse import diffuse
from kernels.group_norm_silu import group_norm_silu
from kernels.random import normal, reference_normal

Result = Tensor | tuple[Tensor, ...]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Call:
    """A kernel's call on fixed inputs.

    Attributes:
        run: the public function; the switch decides what serves.
        exact: the same in float64, written independently where there is arithmetic to check.
        leaves: inputs that take a gradient.
    """

    run: Callable[[], Result]
    exact: Callable[[], Result]
    leaves: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        bytes: that a forward pass must move, inputs read and outputs written once.
        bytes_backward: the same of a backward pass; 0: none.
        layouts: memory formats of the input that are timed for the PyTorch rival.
    """

    kernel: str
    shape: str
    build: Callable[[torch.device, torch.memory_format], Call] = field(repr=False)
    bytes: int
    bytes_backward: int = 0
    layouts: tuple[torch.memory_format, ...] = (torch.channels_last,)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norm(batch: int, channels: int, side: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device, layout: torch.memory_format) -> Call:
        x = torch.randn(batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=layout)
        weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
        scale, shift = (torch.randn(batch, channels, device=device).to(dtype) for _ in range(2))
        leaves = tuple(t.requires_grad_() for t in (x, weight, bias, scale, shift))

        def exact() -> Tensor:
            y = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
            return F.silu(y * (1 + scale.double())[:, :, None, None] + shift.double()[:, :, None, None])

        return Call(lambda: group_norm_silu(x, 32, weight, bias, scale, shift), exact, leaves)

    size = batch * channels * side**2 * dtype.itemsize
    layouts = (torch.channels_last, torch.contiguous_format)
    return Case(
        "group_norm_silu", f"{batch}x{channels}x{side}x{side} {_name(dtype)}", build, 2 * size, 3 * size, layouts
    )


def _names(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(batch, device=device) % 10, torch.arange(batch, device=device)


def _denoise(batch: int, side: int, dtype: torch.dtype, guided: bool, noise: bool) -> Case:
    """The three colours of a DPM-Solver++(2M) step, or with noise of a DDPM step without memory."""

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        def image(count: int) -> Tensor:
            return torch.randn(count, 3, side, side, device=device).contiguous(memory_format=layout)

        x, previous = image(batch), None if noise else image(batch)
        out = image(2 * batch if guided else batch).to(dtype)
        row = [1.2, -0.7, 0.5 if guided else 0.0, 1.0, 0.3, 0.8, 0.0 if noise else -0.2, 0.4 if noise else 0.0]
        coefficients = torch.tensor(row, device=device).repeat(batch, 1)
        labels, indices = _names(batch, device)

        def exact() -> tuple[Tensor, Tensor]:
            both = out.double().split(batch)
            guess = both[0] + row[2] * (both[0] - both[1]) if guided else both[0]
            x0 = (row[0] * x.double() + row[1] * guess).clamp(-1, 1)
            following = row[4] * x.double() + row[5] * x0
            if previous is not None:
                following = following + row[6] * previous.double()
            if noise:
                following = following + row[7] * reference_normal(7, labels, indices, 5, (3, side, side)).double()
            return following, x0

        def run() -> tuple[Tensor, Tensor]:
            return denoise_step(x, out, coefficients, previous, 7, labels, indices, 5, with_noise=noise)

        return Call(run, exact)

    elements = batch * 3 * side**2
    size = elements * (4 + 8 + (0 if noise else 4) + dtype.itemsize * (1 + guided))
    kind = ("guided " if guided else "") + ("with noise " if noise else "")
    return Case("denoise_step", f"{batch}x3x{side}x{side} {kind}{_name(dtype)}", build, size)


def _diffuse(batch: int, side: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device, layout: torch.memory_format) -> Call:
        images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device)
        positions = torch.arange(batch, device=device)
        row = [0.6, 0.8, -0.8, 0.6]
        coefficients = torch.tensor(row, device=device).repeat(batch, 1)
        flips = positions % 2 == 0

        def exact() -> tuple[Tensor, Tensor]:
            x0 = images.permute(0, 3, 1, 2).double() / 127.5 - 1
            x0 = torch.where(flips.view(-1, 1, 1, 1), x0.flip(3), x0)
            eps = reference_normal(7, positions >> 32, positions, 0, (3, side, side)).double()
            return row[0] * x0 + row[1] * eps, row[2] * x0 + row[3] * eps

        return Call(lambda: diffuse(images, 7, positions, coefficients, flips, dtype)[:2], exact)

    elements = batch * 3 * side**2
    return Case("diffuse", f"{batch}x3x{side}x{side} {_name(dtype)}", build, elements * (1 + 4 + dtype.itemsize))


def _normal(batch: int, side: int) -> Case:
    def build(device: torch.device, layout: torch.memory_format) -> Call:
        labels, indices = _names(batch, device)
        shape = (3, side, side)
        return Call(
            lambda: normal(7, labels, indices, 1, shape),
            lambda: reference_normal(7, labels, indices, 1, shape).double(),
        )

    return Case("normal", f"{batch}x3x{side}x{side}", build, batch * 3 * side**2 * 4)


def _augment(batch: int, stored: int, side: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device, layout: torch.memory_format) -> Call:
        images = torch.randint(0, 256, (batch, stored, stored, 3), dtype=torch.uint8, device=device)
        positions = torch.arange(batch, device=device)
        pad = 4 if side == stored else 0

        def exact() -> Tensor:
            return reference_augment(images, 7, positions, size=side, pad=pad, flip=True).double()

        return Call(lambda: augment(images, 7, positions, size=side, pad=pad, flip=True, dtype=dtype), exact)

    elements = batch * 3 * side**2
    return Case("augment", f"{batch}x{stored}>{side} {_name(dtype)}", build, elements * (1 + dtype.itemsize))


def _adamw(parameters: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device, layout: torch.memory_format) -> Call:
        model = nn.Linear(1024, parameters // 1024, bias=False, device=device, dtype=dtype)
        optimizer = AdamWEma(model, weight_decay=0.01)
        gradient = torch.randn_like(model.weight)
        optimizer.grad[: gradient.numel()].copy_(gradient.flatten())
        start = model.weight.detach().double().clone()

        def run() -> tuple[Tensor, Tensor]:
            optimizer.step(1e-3, 0.999, 1.0)
            return optimizer.master[: start.numel()], optimizer.ema[: start.numel()]

        def exact() -> tuple[Tensor, Tensor]:
            weight = nn.Parameter(start.clone())
            weight.grad = gradient.double()
            nn.utils.clip_grad_norm_([weight], 1.0)
            torch.optim.AdamW([weight], 1e-3, weight_decay=0.01).step()
            ema = start.lerp(weight.detach(), 1 - 0.999)
            return weight.detach().flatten(), ema.flatten()

        return Call(run, exact)

    per_parameter = 36 + 2 * dtype.itemsize - (4 if dtype == FP32 else 0)  # and the norm reads the gradient once more
    return Case("adamw_ema", f"{parameters / 1e6:.1f}M {_name(dtype)}", build, parameters * per_parameter)


def cases(types: tuple[torch.dtype, ...] = (BF16,)) -> Iterator[Case]:
    """Every kernel at the shapes of the 32, 64 and 256 pixel networks, for networks that compute in `types`."""
    for dtype in types:
        for batch, channels, side in (
            (64, 128, 32), (64, 256, 16), (64, 256, 8), (64, 512, 8), (64, 256, 4), (64, 192, 64), (64, 384, 32),
            (256, 128, 32), (8, 256, 256),
        ):  # fmt: skip
            yield _norm(batch, channels, side, dtype)
        for batch, side in ((256, 32), (64, 64), (16, 256)):
            yield _denoise(batch, side, dtype, guided=False, noise=False)
            yield _denoise(batch, side, dtype, guided=True, noise=True)
            yield _diffuse(batch, side, dtype)
        for batch, stored, side in ((128, 32, 32), (256, 256, 224)):
            yield _augment(batch, stored, side, dtype)
        if dtype != FP16:
            yield _adamw(36 * 2**20, dtype)
    yield _normal(256, 32)
    yield _normal(16, 256)
