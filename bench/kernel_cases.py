"""Every kernel at every shape that the presets ask it for (bench/kernel_shapes.py): a call to check and to time, the
same in float64, and the bytes that it must move at the least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernel_shapes import WORKLOADS, Asked, Workload, asked
from kernels.adamw_ema import AdamWEma
from kernels.augment import augment, reference_augment
from kernels.denoise_step import denoise_step
from kernels.diffuse import diffuse
from kernels.group_norm_silu import group_norm_silu
from kernels.random import normal, reference_normal

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_ELEMENTS = 2**27  # of a norm's input: what float64 makes of it, gradients included, has room on a card
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """A kernel's call on fixed inputs.

    Attributes:
        run: the public function; the switch decides what serves.
        exact: the same in float64, written independently where there is arithmetic to check.
        leaves: inputs that take a gradient; then there is one result.
        timed: the call alone, where `run` does more to compare it; None: `run`.
    """

    run: Callable[[], Results]
    exact: Callable[[], Results]
    leaves: Results = ()
    timed: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        bytes: that a forward pass must move, inputs read and outputs written once.
        bytes_backward: the same of a backward pass; 0: none.
        layouts: memory formats of the input that are timed for the PyTorch rival.
        in_network: the reference would run in a network that is compiled; the others' are called as they are.
        compilable: False where the reference is a fused operator of torch's, which no compiler sees into.
    """

    kernel: str
    shape: str
    build: Callable[[torch.device, torch.memory_format], Call] = field(repr=False)
    bytes: int
    bytes_backward: int = 0
    layouts: tuple[torch.memory_format, ...] = (torch.channels_last,)
    in_network: bool = False
    compilable: bool = True

    def __str__(self) -> str:
        return f"{self.kernel} {self.shape}"


def outputs(function: Callable[[], Results], leaves: Results, gradient: Tensor | None) -> Results:
    """What a function of a `Call` gives, and with `gradient`, of its one result, the leaves' gradients."""
    if gradient is None:
        with torch.no_grad():
            return function()
    (out,) = function()
    return (out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _norm(ask: Asked, dtype: torch.dtype, backward: bool) -> Case:
    batch, channels, height, width = ask["x"].shape
    while batch * channels * height * width > _ELEMENTS:
        batch //= 2
    groups, silu, eps, modulated = ask["groups"], ask["silu"], ask["eps"], ask["scale"] is not None
    of_weights = _as(ask["weight"].dtype, dtype)

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        x = torch.randn(batch, channels, height, width, device=device).to(dtype).contiguous(memory_format=layout)
        weight, bias = (torch.randn(channels, device=device).to(of_weights) for _ in range(2))
        rows = torch.randn(batch, 2 * channels, device=device).to(dtype).chunk(2, dim=1) if modulated else (None, None)
        leaves = (x, weight, bias, *(row for row in rows if row is not None))
        for leaf in leaves:
            leaf.requires_grad_(backward)

        def exact() -> Results:
            y = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
            if modulated:
                scale, shift = (row.double()[:, :, None, None] for row in rows)
                y = y * (1 + scale) + shift
            return (F.silu(y) if silu else y,)

        def run() -> Results:
            return (group_norm_silu(x, groups, weight, bias, *rows, silu=silu, eps=eps),)

        return Call(run, exact, leaves if backward else ())

    size = batch * channels * height * width * dtype.itemsize
    kind = " scaled" * modulated + " without SiLU" * (not silu) + " forward" * (not backward)
    shape = f"{_size((batch, channels, height, width))} {_name(dtype)}{kind}"
    layouts = (torch.channels_last, torch.contiguous_format)
    return Case("group_norm_silu", shape, build, 2 * size, 3 * size * backward, layouts, in_network=True)


def _names(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(batch, device=device) % 10, torch.arange(batch, device=device)


def _denoise(ask: Asked, dtype: torch.dtype) -> Case:
    """A step with a row of coefficients in which each of its terms counts."""
    shape, of_out = ask["x"].shape, _as(ask["out"].dtype, dtype)
    batch, noise, with_previous = shape[0], ask["with_noise"], ask["previous"] is not None
    guided = ask["out"].shape[0] != batch

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        def image(count: int) -> Tensor:
            return torch.randn(count, *shape[1:], device=device).contiguous(memory_format=layout)

        x, previous = image(batch), image(batch) if with_previous else None
        out = image(2 * batch if guided else batch).to(of_out)
        row = [1.2, -0.7, 0.5 * guided, 1.0, 0.3, 0.8, -0.2 * with_previous, 0.4 * noise]
        coefficients = torch.tensor(row, device=device).repeat(batch, 1)
        labels, indices = _names(batch, device)

        def exact() -> Results:
            both = out.double().split(batch)
            guess = both[0] + row[2] * (both[0] - both[1]) if guided else both[0]
            x0 = (row[0] * x.double() + row[1] * guess).clamp(-1, 1)
            following = row[4] * x.double() + row[5] * x0
            if previous is not None:
                following = following + row[6] * previous.double()
            if noise:
                following = following + row[7] * reference_normal(7, labels, indices, 5, shape[1:]).double()
            return following, x0

        def run() -> Results:
            return denoise_step(x, out, coefficients, previous, 7, labels, indices, 5, with_noise=noise)

        return Call(run, exact)

    elements = torch.Size(shape).numel()
    size = elements * (4 + 8 + 4 * with_previous + of_out.itemsize * (1 + guided))
    kind = " guided" * guided + " with previous" * with_previous + " with noise" * noise
    return Case("denoise_step", f"{_size(shape)} {_name(of_out)}{kind}", build, size)


def _diffuse(ask: Asked, dtype: torch.dtype) -> Case:
    images_like, with_eps, mirrored = ask["images"], ask["with_eps"], ask["flips"] is not None
    of_out, as_bytes = _as(ask["dtype"], dtype), images_like.dtype == torch.uint8
    shape = images_like.shape

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        if not as_bytes:
            images = (images / 127.5 - 1).to(images_like.dtype).contiguous(memory_format=layout)
        positions = torch.arange(shape[0], device=device)
        row = [0.6, 0.8, -0.8, 0.6]
        coefficients = torch.tensor(row, device=device).repeat(shape[0], 1)
        flips = positions % 2 == 0 if mirrored else None

        def exact() -> Results:
            x0 = images.permute(0, 3, 1, 2).double() / 127.5 - 1 if as_bytes else images.double()
            if flips is not None:
                x0 = torch.where(flips.view(-1, 1, 1, 1), x0.flip(3), x0)
            eps = reference_normal(7, positions >> 32, positions, 0, tuple(x0.shape[1:])).double()
            both = row[0] * x0 + row[1] * eps, row[2] * x0 + row[3] * eps
            return (*both, eps) if with_eps else both

        def run() -> Results:
            x_t, target, eps = diffuse(images, 7, positions, coefficients, flips, of_out, with_eps=with_eps)
            return (x_t, target) if eps is None else (x_t, target, eps)

        return Call(run, exact)

    size = torch.Size(shape).numel() * (images_like.dtype.itemsize + of_out.itemsize + 4 + 4 * with_eps)
    kind = " mirrored" * mirrored + " with noise" * with_eps
    return Case("diffuse", f"{_size(shape)} {_name(images_like.dtype)} > {_name(of_out)}{kind}", build, size)


def _normal(ask: Asked, dtype: torch.dtype) -> Case:
    (batch,), shape = ask["labels"].shape, (ask["channels"], ask["height"], ask["width"])

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        names = _names(batch, device)
        return Call(
            lambda: (normal(7, *names, 1, shape),), lambda: (reference_normal(7, *names, 1, shape).double(),)
        )  # fmt: skip

    return Case("normal", _size((batch, *shape)), build, batch * torch.Size(shape).numel() * 4)


def _augment(ask: Asked, dtype: torch.dtype) -> Case:
    shape, size, pad, flip, of_out = ask["images"].shape, ask["size"], ask["pad"], ask["flip"], _as(ask["dtype"], dtype)

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        positions = torch.arange(shape[0], device=device)
        options: dict[str, Any] = {"size": size, "pad": pad, "flip": flip}
        return Call(
            lambda: (augment(images, 7, positions, **options, dtype=of_out),),
            lambda: (reference_augment(images, 7, positions, **options).double(),),
        )

    moved = shape[0] * shape[3] * size**2 * (1 + of_out.itemsize)
    kind = f" pad {pad}" * bool(pad) + " mirrored" * flip
    return Case("augment", f"{_size(shape)} > {size} {_name(of_out)}{kind}", build, moved)


def _adamw(ask: Asked, dtype: torch.dtype) -> Case:
    (length,), of_gradient, max_norm = ask["grad"].shape, _as(ask["grad"].dtype, dtype), ask["max_norm"]
    rate, decay, settings = 1e-3, 0.9, {name: ask[name] for name in ("eps", "weight_decay")}
    betas = ask["beta1"], ask["beta2"]

    def build(device: torch.device, layout: torch.memory_format) -> Call:
        model = nn.Linear(length, 1, bias=False, device=device, dtype=of_gradient)
        optimizer = AdamWEma(model, betas, **settings)
        optimizer.grad.normal_()
        start, gradient = optimizer.master.clone(), optimizer.grad.clone()

        def run() -> Results:
            """What the first step changed: doing nothing is an error of 1."""
            optimizer.step(rate, decay, max_norm)
            work = () if optimizer.work is None else (optimizer.work,)
            return optimizer.master - start, optimizer.ema - start, optimizer.m, optimizer.v, *work

        def exact() -> Results:
            weight = nn.Parameter(start.double())
            weight.grad = gradient.double()
            if max_norm is not None:
                nn.utils.clip_grad_norm_([weight], max_norm)
            adamw = torch.optim.AdamW([weight], rate, betas, **settings)
            adamw.step()
            change, state = weight.detach() - start.double(), adamw.state[weight]
            work = () if optimizer.work is None else (weight.detach(),)
            return change, (1 - decay) * change, state["exp_avg"], state["exp_avg_sq"], *work

        def step() -> Results:
            return (optimizer.step(rate, decay, max_norm),)

        return Call(run, exact, timed=step)

    per_parameter = 36 + 2 * of_gradient.itemsize - (4 if of_gradient == FP32 else 0)  # the norm reads the gradient too
    return Case("adamw_ema", f"{length} {_name(of_gradient)}", build, length * per_parameter, compilable=False)


def _as(recorded: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Networks are recorded in bfloat16, which stands for the type that they compute in."""
    return dtype if recorded == BF16 else recorded


def _of_workload(workload: Workload, dtype: torch.dtype) -> Iterator[tuple[Case, int]]:
    """Its cases, and how often each is called."""
    calls = asked(workload)
    differentiated = {_norm_key(ask) for ask in calls if ask.operator == "group_norm_silu_backward"}
    for ask, count in calls.items():
        if ask.operator == "group_norm_silu":
            yield _norm(ask, dtype, _norm_key(ask) in differentiated), count
        elif ask.operator == "adamw_ema":
            if dtype != FP16:
                yield _adamw(ask, dtype), count
        elif ask.operator in _BUILDERS:
            yield _BUILDERS[ask.operator](ask, dtype), count


def _norm_key(ask: Asked) -> tuple[Any, ...]:
    return ask["x"], ask["groups"], ask["scale"], ask["silu"]


_BUILDERS = {"denoise_step": _denoise, "diffuse": _diffuse, "normal": _normal, "augment": _augment}


def cases(types: tuple[torch.dtype, ...] = (BF16,), workloads: Sequence[Workload] = WORKLOADS) -> list[Case]:
    """Every kernel at the shapes of these workloads, for networks that compute in `types`. Workload by workload, and
    within one the first of each kernel, then the second of each: first what is trained, and what moves most bytes."""
    found: dict[str, Case] = {}
    for dtype in types:
        for workload in workloads:
            by_kernel: dict[str, list[tuple[int, Case]]] = {}
            for case, calls in _of_workload(workload, dtype):
                by_kernel.setdefault(case.kernel, []).append((calls * (case.bytes + case.bytes_backward), case))
            ranked = []
            for some in by_kernel.values():
                some.sort(key=lambda one: (one[1].in_network and not one[1].bytes_backward, -one[0]))
                ranked += [(rank, -moved, case) for rank, (moved, case) in enumerate(some)]
            for *_, case in sorted(ranked, key=lambda one: one[:2]):
                found.setdefault(str(case), case)
    return list(found.values())
