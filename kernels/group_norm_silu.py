"""(Adaptive) group normalisation with SiLU, channels-last, forward and backward.

    y = SiLU(z),    z = n * (1 + scale) + shift,    n = xhat * weight + bias,    xhat = (x - mean) * rstd

with mean and rstd = 1 / sqrt(variance + eps) over the pixels and channels of one group of one sample. Backward, with
dz = dy * SiLU'(z), A = weight * (1 + scale), P = sum over pixels of dz * xhat, Q = sum over pixels of dz:

    dx      = rstd * (A * dz - mean of A * dz over the group - xhat * mean of A * dz * xhat over the group)
    dscale  = weight * P + bias * Q          dshift = Q
    dweight = sum_b (1 + scale) * P          dbias  = sum_b (1 + scale) * Q

At least, forward reads x and writes y; backward reads x and dy and writes dx. A program owns some whole groups (a block
of channels) of one sample, whose memory is [pixels, channels], in one of three ways that `_tiling` chooses from:

    one tile   the block fits in the registers: nothing is read twice
    sweep      two passes over the block's tiles, the second backwards: most of it comes from the caches
    split      few samples, or blocks too large for the caches: the pixels are cut into chunks, one launch leaves each
               chunk's sums, a second merges them (Chan, Golub and LeVeque, 1983) and applies; everything is read twice

Statistics are float32 sums of deviations from a tile's own mean, so a large mean does not cancel. Sums run in a fixed
order, without atomics: the same bits on every run. On a CPU group_norm_silu.cpp does the same, sample by sample.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device, tile, use_triton
from kernels.group_norm_silu_cpu import backward, forward, is_for_cpp, use_cpp

NAME = "group_norm_silu"
_ELEMENTS = 16 * 1024  # of the largest tile that registers hold whole
_BUSY = 192  # programs that fill an H100; on every card, or the order of the sums would depend on it
_CACHED = 256 * 1024  # bytes of a block such that one on each multiprocessor fits in the L2


def reference_group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    silu: bool = True, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The plain PyTorch version; arguments as in `group_norm_silu`, x in any floating type."""
    y = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps=eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, :, None, None].float(), y, 1 + scale[:, :, None, None].float())
    y = F.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)  # a copy on CUDA, whose group_norm returns NCHW


# ---- kernels. A tile is [ROWS, BLOCK]: some of a sample's N pixels by some of its C channels, the first WIDTH real.


@triton.jit
def _place(C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SECOND: tl.constexpr):
    """This program's sample, chunk and channels, and which channels are real; neighbours read neighbouring channels.

    A second launch goes through the samples backwards: what the first read last is still in the cache.
    """
    program = tl.program_id(0)
    if SECOND:
        program = tl.num_programs(0) - 1 - program
    index = tl.arange(0, BLOCK)
    chunk = program // (C // WIDTH) % CHUNKS
    sample = (program // (C // WIDTH) // CHUNKS).to(tl.int64)
    return sample, chunk, program % (C // WIDTH) * WIDTH + index, index < WIDTH


@triton.jit
def _tile(first, channels, real, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """Offsets within one sample of the tile that begins at pixel `first`, and which of them exist."""
    rows = first + tl.arange(0, ROWS)
    return rows[:, None] * C + channels[None, :], (rows < N)[:, None] & real[None, :]


@triton.jit
def _group_sum(values, CPG: tl.constexpr, WIDTH: tl.constexpr):
    """For each channel the sum over its group of CPG channels; values: [BLOCK], 0 from WIDTH on."""
    BLOCK: tl.constexpr = values.shape[0]
    if CPG & (CPG - 1) == 0:
        sums = tl.sum(tl.reshape(values, (BLOCK // CPG, CPG)), 1)
        sums = tl.reshape(tl.broadcast_to(sums[:, None], (BLOCK // CPG, CPG)), (BLOCK,))
    elif WIDTH == CPG:
        sums = tl.zeros_like(values) + tl.sum(values, 0)
    else:
        group = tl.arange(0, BLOCK) // CPG
        sums = tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), 1)
    return sums


@triton.jit
def _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channels, real):
    """z = xhat * gain + offset, per channel."""
    gain = tl.load(weight + channels, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channels, mask=real, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1 + tl.load(scale + sample * scale_stride + channels, mask=real, other=0.0).to(tl.float32)
        gain *= factor
        offset *= factor
        offset += tl.load(shift + sample * shift_stride + channels, mask=real, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def _load_sums(partial, channels, real, C: tl.constexpr, CHUNKS: tl.constexpr):
    """What a FIRST launch left of each chunk of a sample: the chunks' numbers, two of [chunks, BLOCK], 0 beyond."""
    chunks = tl.arange(0, triton.next_power_of_2(CHUNKS))
    here = (chunks < CHUNKS)[:, None] & real[None, :]
    partial += chunks[:, None] * 2 * C + channels[None, :]
    return chunks, tl.load(partial, mask=here, other=0.0), tl.load(partial + C, mask=here, other=0.0)


@triton.jit
def _sigmoid(z):
    # 1 / (1 + exp(-z)) in 5 instructions instead of 11: exp2 and rsqrt need no care for the ends of their range.
    root = tl.rsqrt(1 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def _moments(x, first, channels, real, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Each channel's mean and sum of squared deviations over TILES tiles from pixel `first`; one tile's deviations.

    Sums are of deviations from a pivot, the first tile's mean. That tile being 1 / TILES of the pixels, their mean is
    at most sqrt(TILES) standard deviations away: the subtraction at the end costs log2(TILES) bits at the very most.
    """
    count = tl.minimum(N - first, TILES * ROWS)
    offsets, inside = _tile(first, channels, real, C, N, ROWS)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    pivot = tl.sum(values, 0) / tl.minimum(count, ROWS)
    deviations = tl.where(inside, values - pivot[None, :], 0.0)
    total, squares = deviations, deviations * deviations
    for i in range(1, TILES):
        offsets, inside = _tile(first + i * ROWS, channels, real, C, N, ROWS)
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, values - pivot[None, :], 0.0)
        total += values
        squares += values * values
    mean, squares = pivot, tl.sum(squares, 0)
    if TILES > 1:
        rest = tl.sum(total, 0) / count
        mean += rest
        squares -= count * rest * rest
    return mean, squares, deviations, pivot


@triton.jit
def _forward_kernel(
    x, y, mean, rstd, eps, weight, bias, scale, shift, scale_stride, shift_stride, partial, C: tl.constexpr,
    N: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, CHUNKS: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """y, and float32 mean and rstd [B, C]; of two launches the FIRST leaves partial, float32 [B, CHUNKS, 2, C]."""
    sample, chunk, channels, real = _place(C, WIDTH, BLOCK, CHUNKS, SECOND)
    x += sample * N * C
    y += sample * N * C
    first = chunk * TILES * ROWS
    if SECOND:
        chunks, chunk_means, squares = _load_sums(partial + sample * CHUNKS * 2 * C, channels, real, C, CHUNKS)
        counts = tl.maximum(tl.minimum(N - chunks * TILES * ROWS, TILES * ROWS), 0).to(tl.float32)[:, None]
        means = tl.sum(counts * chunk_means, 0) / N
        apart = chunk_means - means[None, :]
        squares = tl.sum(squares + counts * apart * apart, 0)
    else:
        means, squares, deviations, pivot = _moments(x, first, channels, real, C, N, ROWS, TILES)
    if FIRST:
        partial += (sample * CHUNKS + chunk) * 2 * C + channels
        tl.store(partial, means, mask=real)
        tl.store(partial + C, squares, mask=real)
    else:
        group_mean = _group_sum(means, CPG, WIDTH) / CPG
        apart = tl.where(real, means - group_mean, 0.0)
        variance = _group_sum(squares + N * apart * apart, CPG, WIDTH) / (N * CPG)
        group_rstd = 1 / tl.sqrt(variance + eps)
        tl.store(mean + sample * C + channels, group_mean, mask=real & (chunk == 0))
        tl.store(rstd + sample * C + channels, group_rstd, mask=real & (chunk == 0))

        gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channels, real)
        gain *= group_rstd
        if TILES * CHUNKS == 1:  # what is in the registers are deviations from the pivot
            offset += (pivot - group_mean) * gain
        for i in range(TILES):  # backwards: what was read last is still in the caches
            offsets, inside = _tile(first + (TILES - 1 - i) * ROWS, channels, real, C, N, ROWS)
            if TILES * CHUNKS > 1:
                deviations = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - group_mean[None, :]
            z = deviations * gain[None, :] + offset[None, :]
            if SILU:
                z *= _sigmoid(z)
            tl.store(y + offsets, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_tile(dy, x, offsets, inside, mean, rstd, gain, offset, SILU: tl.constexpr):
    """dz and xhat of one tile; dz is 0 outside."""
    xhat = (tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    dz = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * gain[None, :] + offset[None, :]
        s = _sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    return dz, xhat


@triton.jit
def _backward_kernel(
    dy, x, dx, p, q, mean, rstd, weight, bias, scale, shift, scale_stride, shift_stride, partial, C: tl.constexpr,
    N: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, CHUNKS: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """dx, and float32 P and Q [B, C]; of two launches the FIRST leaves partial, float32 [B, CHUNKS, 2, C]."""
    sample, chunk, channels, real = _place(C, WIDTH, BLOCK, CHUNKS, SECOND)
    dy += sample * N * C
    x += sample * N * C
    dx += sample * N * C
    first = chunk * TILES * ROWS
    m = tl.load(mean + sample * C + channels, mask=real, other=0.0)
    r = tl.load(rstd + sample * C + channels, mask=real, other=0.0)
    gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channels, real)
    if SECOND:
        _, chunk_p, chunk_q = _load_sums(partial + sample * CHUNKS * 2 * C, channels, real, C, CHUNKS)
        sum_p, sum_q = tl.sum(chunk_p, 0), tl.sum(chunk_q, 0)
    else:
        offsets, inside = _tile(first, channels, real, C, N, ROWS)
        dz, xhat = _backward_tile(dy, x, offsets, inside, m, r, gain, offset, SILU)
        tile_p, tile_q = dz * xhat, dz
        for i in range(1, TILES):
            offsets, inside = _tile(first + i * ROWS, channels, real, C, N, ROWS)
            dz, xhat = _backward_tile(dy, x, offsets, inside, m, r, gain, offset, SILU)
            tile_p += dz * xhat
            tile_q += dz
        sum_p, sum_q = tl.sum(tile_p, 0), tl.sum(tile_q, 0)
    if FIRST:
        partial += (sample * CHUNKS + chunk) * 2 * C + channels
        tl.store(partial, sum_p, mask=real)
        tl.store(partial + C, sum_q, mask=real)
    else:
        tl.store(p + sample * C + channels, sum_p, mask=real & (chunk == 0))
        tl.store(q + sample * C + channels, sum_q, mask=real & (chunk == 0))
        mean_p = r * _group_sum(gain * sum_p, CPG, WIDTH) / (N * CPG)
        mean_q = r * _group_sum(gain * sum_q, CPG, WIDTH) / (N * CPG)
        for i in range(TILES):
            offsets, inside = _tile(first + (TILES - 1 - i) * ROWS, channels, real, C, N, ROWS)
            if TILES * CHUNKS > 1:
                dz, xhat = _backward_tile(dy, x, offsets, inside, m, r, gain, offset, SILU)
            d = (r * gain)[None, :] * dz - mean_q[None, :] - xhat * mean_p[None, :]
            tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)


def _tiling(x: Tensor, groups: int, key: str, tensors: int) -> dict[str, int]:
    """The constants of a launch that reads `tensors` tensors like x: from the table's tile or this default."""
    batch, channels, height, width = x.shape
    pixels, cpg, power = height * width, channels // groups, triton.next_power_of_2
    # Bytes of a pixel by groups in a block: one, or what divides the groups, so that all blocks are alike.
    size = {n: n * cpg * x.element_size() for n in range(1, groups + 1) if groups % n == 0}
    size = {n: bytes_ for n, bytes_ in size.items() if n == 1 or bytes_ <= 256}
    # The narrowest block that wastes least of a memory access: sectors of 32 bytes, 16 aligned bytes a thread.
    whole = [n for n in size if size[n] >= 32] or [max(size)]
    narrow = max(whole, key=lambda n: (min(16, size[n] & -size[n]), -n))
    blocks = [n for n in size if n == narrow or (n % narrow == 0 and size[n] <= 64)]
    in_one = [n for n in blocks if power(n * cpg) * power(pixels) <= _ELEMENTS]
    chunks, rows = 1, power(pixels)
    per_thread = 64 // tensors  # elements, as many as the registers hold
    if in_one:
        block = in_one[-1]
    else:
        per_thread //= 2  # the registers hold sums, too
        block, threads = narrow, 256
        held = pixels * size[narrow] * tensors
        if batch * groups // narrow < _BUSY or held > _CACHED:
            block = blocks[-1]
            most = max(1, 8192 // power(block * cpg))  # every program of the second launch reads all chunks' sums
            chunks = min(32, most, max(1, 3 * _BUSY * block // max(1, batch * groups)))
            rows = power(triton.cdiv(pixels, chunks))
        elif held > _CACHED // 2:
            threads = 512  # and so many registers that one program has a multiprocessor
        rows = min(rows, max(1, threads * per_thread // power(block * cpg)))
    elements = rows * power(block * cpg)
    warps = min(16, max(1, elements // (32 * per_thread), min(4, elements // 512)))
    t = tile(NAME, key, x.device, groups=block, rows=rows, chunks=chunks, warps=warps)

    tiles = triton.cdiv(triton.cdiv(pixels, t["rows"]), t["chunks"])
    return {
        "C": channels, "N": pixels, "CPG": cpg, "WIDTH": t["groups"] * cpg, "BLOCK": power(t["groups"] * cpg),
        "ROWS": t["rows"], "TILES": tiles, "CHUNKS": triton.cdiv(pixels, tiles * t["rows"]), "num_warps": t["warps"],
    }  # fmt: skip


def _key(x: Tensor) -> str:
    return f"C{x.shape[1]}-HW{x.shape[2] * x.shape[3]}-{str(x.dtype).removeprefix('torch.')}"


def _launch(
    kernel: Any, t: dict[str, int], silu: bool, arguments: tuple[Any, ...], weight: Tensor, bias: Tensor,
    scale: Tensor | None, shift: Tensor | None,
) -> None:  # fmt: skip
    """One launch, or where there are chunks two."""
    x, split = arguments[0], t["CHUNKS"] > 1
    partial = torch.empty((len(x), t["CHUNKS"], 2, t["C"]), device=x.device, dtype=torch.float32) if split else None
    # Rows of scale and shift may lie apart, as those of chunk(2, dim=1) do.
    scale, shift = (s if s is None or s.stride(1) == 1 else s.contiguous() for s in (scale, shift))
    strides = [0 if s is None else s.stride(0) for s in (scale, shift)]
    grid = (len(x) * (t["C"] // t["WIDTH"]) * t["CHUNKS"],)
    with on_device(x):
        for first, second in [(True, False), (False, True)] if split else [(False, False)]:
            kernel[grid](
                *arguments, weight.contiguous(), bias.contiguous(), scale, shift, *strides, partial,
                SILU=silu, FIRST=first, SECOND=second, **t,
            )  # fmt: skip


@torch.library.custom_op("diffult::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y as x, channels-last; mean and rstd, float32 [B, C], each group's for each of its channels."""
    x = x.contiguous(memory_format=torch.channels_last)  # a copy only where the caller's layout is another
    if is_for_cpp(x):
        return forward(x, _outputs(x), groups, (weight, bias, scale, shift), silu, eps)
    (y, mean, rstd), t = _outputs(x), _tiling(x, groups, _key(x), tensors=1)
    _launch(_forward_kernel, t, silu, (x, y, mean, rstd, eps), weight, bias, scale, shift)
    return y, mean, rstd


@torch.library.custom_op("diffult::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, weight: Tensor, bias: Tensor,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx as x, channels-last; P and Q, float32 [B, C]."""
    # Compilers may hand a contiguous gradient to a channels-last operation.
    dy, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (dy, x))
    if is_for_cpp(x):
        return backward(dy, x, _outputs(x), (mean, rstd), groups, (weight, bias, scale, shift), silu)
    dx, p, q = _outputs(x)
    t = _tiling(x, groups, f"{_key(x)}-backward", tensors=2)
    _launch(_backward_kernel, t, silu, (dy, x, dx, p, q, mean, rstd), weight, bias, scale, shift)
    return dx, p, q


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty(x.shape[:2], device=x.device, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), sums, torch.empty_like(sums)


_forward.register_fake(lambda x, *_: _outputs(x))
_backward.register_fake(lambda dy, x, *_: _outputs(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, scale, shift, ctx.silu, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], weight, bias, scale, shift)


def _gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    dx, p, q = _backward(dy, x, mean, rstd, ctx.groups, weight, bias, scale, shift, ctx.silu)
    dscale = dshift = None
    if scale is not None:
        dscale, dshift = (weight.float() * p + bias.float() * q).to(scale.dtype), q.to(shift.dtype)
        p, q = ((1 + scale.float()) * sums for sums in (p, q))
    return dx, None, p.sum(0).to(weight.dtype), q.sum(0).to(bias.dtype), dscale, dshift, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    silu: bool = True, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """SiLU(norm(x) * (1 + scale) + shift), norm(x) being group normalisation with weight and bias.

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16, channels-last; another layout is copied to it first.
        groups: a divisor of C.
        weight, bias: [C], any floating type.
        scale, shift: [B, C], any floating type, both or neither.
        silu: without it the result is SiLU's argument.

    Returns the shape and type of x, channels-last. Statistics and arithmetic are float32; gradients have the type of
    what they belong to. Raises ValueError on shapes that do not fit each other, or scale without shift.
    """
    if x.ndim != 4 or x.shape[1] % groups or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"group_norm_silu: x must be [B, C, H, W] with C a multiple of {groups} groups, weight and bias [C], "
            f"got {', '.join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))}"
        )
    rows = [tuple(tensor.shape) for tensor in (scale, shift) if tensor is not None]
    if rows and rows != 2 * [tuple(x.shape[:2])]:
        raise ValueError(f"group_norm_silu: scale and shift must be [B, C], both or neither, got {rows}")
    if use_triton(NAME, _key(x), x.device) or use_cpp(x):
        return _forward(x, groups, weight, bias, scale, shift, silu, eps)[0]
    return reference_group_norm_silu(x, groups, weight, bias, scale, shift, silu, eps)
