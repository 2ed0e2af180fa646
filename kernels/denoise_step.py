"""One step of a sampler: guidance, the clean image, clipping, the solver's update and its noise, in one pass.

For each sample, with the network's output o (and o_n for "no class"), numbers from `coefficients` and noise z:

    guided = o + w (o - o_n)                                          (Ho & Salimans 2022)
    x0     = clamp((p_x x + p_out guided) / limit, -1, 1)             (limit > 0; neither divided nor clipped otherwise)
    next   = c_x x + c_x0 x0 + c_previous x0_previous + c_noise z

p_x and p_out turn an epsilon, x0 or v prediction into the clean image (`Schedule.x0_coefficients`); c_* are a solver's
row (`diffult.diffusion.samplers`): DDIM, DDPM and DPM-Solver++(2M) differ in these numbers alone. limit = 1 clips to
[-1, 1].

What must move, per element: x 4 bytes and the output 2 or 4 bytes (twice with guidance) in, 8 out, and 4 more in where
the last x0 is used: 14 to 24 bytes. This pass moves no more; the noise, made where it is used, moves none.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device, use_triton
from kernels.random import as_steps, check_names, elementwise_tile, halves, normal_tile, reference_normal, signed

COLUMNS = ("p_x", "p_out", "w", "limit", "c_x", "c_x0", "c_previous", "c_noise")


def predict_x0(x: Tensor, out: Tensor, coefficients: Tensor) -> Tensor:
    """The clean image under guidance, not clipped, in the dtype of x [B, C, H, W]; arguments as in `denoise_step`."""
    p_x, p_out, w = (column.to(x.dtype).view(-1, 1, 1, 1) for column in coefficients[:, :3].unbind(1))
    out = out.to(x.dtype)
    if len(out) != len(x):
        conditional, unconditional = out.chunk(2)
        out = conditional + w * (conditional - unconditional)
    return p_x * x + p_out * out


def reference_denoise_step(
    x: Tensor,
    out: Tensor,
    coefficients: Tensor,
    previous: Tensor | None,
    seed: int,
    labels: Tensor,
    indices: Tensor,
    steps: int | Tensor,
    with_noise: bool,
) -> tuple[Tensor, Tensor]:
    """`denoise_step` in plain PyTorch, in the dtype of x; differentiable."""
    columns = [column.to(x.dtype).view(-1, 1, 1, 1) for column in coefficients[:, 3:].unbind(1)]
    limit, c_x, c_x0, c_previous, c_noise = columns
    x0 = predict_x0(x, out, coefficients)
    scaled = x0 / torch.where(limit > 0, limit, 1)
    x0 = torch.where(limit > 0, scaled.clamp(-1, 1), x0)
    x_next = c_x * x + c_x0 * x0
    if previous is not None:
        x_next = x_next + c_previous * previous
    if with_noise:
        _, channels, height, width = x.shape
        x_next = x_next + c_noise * reference_normal(seed, labels, indices, steps, (channels, height, width))
    return _channels_last(x_next), _channels_last(x0)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _denoise_step_kernel(
    x,
    out,
    coefficients,
    previous,
    labels,
    indices,
    steps,
    x_next,
    x0_out,
    seed_low,
    seed_high,
    count,
    batch,
    GUIDED: tl.constexpr,
    PREVIOUS: tl.constexpr,
    NOISE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one sample; `count` elements a sample."""
    tiles = tl.cdiv(count, TILE)
    sample = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * TILE
    offsets = start + tl.arange(0, TILE)
    inside = offsets < count
    base = sample.to(tl.int64) * count

    row = coefficients + sample * 8
    p_x, p_out, limit = tl.load(row), tl.load(row + 1), tl.load(row + 3)
    state = tl.load(x + base + offsets, mask=inside)
    guided = tl.load(out + base + offsets, mask=inside).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(out + (batch + sample).to(tl.int64) * count + offsets, mask=inside).to(tl.float32)
        guided += tl.load(row + 2) * (guided - unconditional)

    x0 = (p_x * state + p_out * guided) * tl.div_rn(1.0, tl.where(limit > 0, limit, 1.0))
    bound = tl.where(limit > 0, 1.0, float("inf"))
    x0 = tl.where(x0 > bound, bound, x0)  # unlike minimum and maximum, comparisons let a NaN through
    x0 = tl.where(x0 < -bound, -bound, x0)
    update = tl.load(row + 4) * state + tl.load(row + 5) * x0
    if PREVIOUS:
        update += tl.load(row + 6) * tl.load(previous + base + offsets, mask=inside)
    if NOISE:
        label, index, step = tl.load(labels + sample), tl.load(indices + sample), tl.load(steps + sample)
        update += tl.load(row + 7) * normal_tile(seed_low, seed_high, label, index, step, start, TILE)
    tl.store(x_next + base + offsets, update, mask=inside)
    tl.store(x0_out + base + offsets, x0, mask=inside)


@torch.library.custom_op("diffult::denoise_step", mutates_args=())
def _denoise_step(
    x: Tensor,
    out: Tensor,
    coefficients: Tensor,
    previous: Tensor | None,
    seed: int,
    labels: Tensor,
    indices: Tensor,
    steps: Tensor,
    with_noise: bool,
) -> tuple[Tensor, Tensor]:
    # The kernel walks over memory: every image must lie in the order in which the noise is numbered.
    x, out = _channels_last(x), _channels_last(out)
    previous = None if previous is None else _channels_last(previous)
    x_next, x0 = _empty_like(x), _empty_like(x)
    batch, count = len(x), x[0].numel()
    sizes = elementwise_tile("denoise_step", _key(x, out), count, x.device)
    with on_device(x):
        _denoise_step_kernel[(batch * triton.cdiv(count, sizes["elements"]),)](
            x, out, coefficients.contiguous(), previous, labels.contiguous(), indices.contiguous(), steps.contiguous(),
            x_next, x0, *halves(seed), count, batch, GUIDED=len(out) != batch, PREVIOUS=previous is not None,
            NOISE=with_noise, TILE=sizes["elements"], num_warps=sizes["warps"],
        )  # fmt: skip
    return x_next, x0


@_denoise_step.register_fake
def _denoise_step_fake(
    x: Tensor,
    out: Tensor,
    coefficients: Tensor,
    previous: Tensor | None,
    seed: int,
    labels: Tensor,
    indices: Tensor,
    steps: Tensor,
    with_noise: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_like(x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _key(x: Tensor, out: Tensor) -> str:
    """The shape's name in the tile table."""
    guidance = "-guided" if len(out) != len(x) else ""
    return f"n{x[0].numel()}-{str(out.dtype).removeprefix('torch.')}{guidance}"


def denoise_step(
    x: Tensor,
    out: Tensor,
    coefficients: Tensor,
    previous: Tensor | None,
    seed: int,
    labels: Tensor,
    indices: Tensor,
    steps: int | Tensor,
    *,
    with_noise: bool,
) -> tuple[Tensor, Tensor]:
    """One step of the reverse process for a batch whose samples may be at different steps.

    Args:
        x: the state x_t, float32 [B, C, H, W].
        out: the network's output, float [B, C, H, W], or [2B, C, H, W] for guidance: first with each sample's class,
            then without.
        coefficients: float32 [B, 8], columns as in `COLUMNS`.
        previous: x0 of the step before, float32 [B, C, H, W], or None where c_previous is 0.
        seed, labels, indices, steps: the name of the noise, as in `kernels.random.normal`.
        with_noise: False where c_noise is 0 for the whole batch: no noise is made.

    Returns:
        The next state and x0, both float32 [B, C, H, W], channels-last. Inputs of another layout are copied first.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    batch = len(x)
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [B, C, H, W], got {x.dtype} {list(x.shape)}")
    if not out.is_floating_point() or out.shape[1:] != x.shape[1:] or len(out) not in (batch, 2 * batch):
        raise ValueError(f"out must be float [{batch} or {2 * batch}, ...] like x, got {out.dtype} {list(out.shape)}")
    if coefficients.shape != (batch, len(COLUMNS)) or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients must be float32 [{batch}, 8], got {coefficients.dtype} {list(coefficients.shape)}"
        )
    if previous is not None and (previous.shape != x.shape or previous.dtype != torch.float32):
        raise ValueError(f"previous must be float32 like x, got {previous.dtype} {list(previous.shape)}")
    steps = as_steps(steps, labels)
    check_names(batch, labels=labels, indices=indices, steps=steps)
    seed = signed(seed)
    arguments = (x, out, coefficients, previous, seed, labels, indices, steps, with_noise)
    if use_triton("denoise_step", _key(x, out), x.device):
        return _denoise_step(*arguments)
    return reference_denoise_step(*arguments)
