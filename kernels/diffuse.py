"""The forward process: images to noisy images and the network's target, in one pass.

For each sample, with noise z named by (seed, position) and numbers a, s, k_0, k_e of its timestep
(`Schedule.diffuse_coefficients`):

    x0     = images / 127.5 - 1 for uint8, images as they are otherwise; mirrored left-right where the flip says so
    x_t    = a x0 + s z                                               (Ho et al. 2020, eq. 4)
    target = k_0 x0 + k_e z

What must move, per element: 1 byte (uint8) or 2 or 4 (float) in, 2 or 4 for x_t and 4 for the target out, and 4 more
where the noise itself is asked for: 7 to 16 bytes. This pass moves no more; the noise is made where it is used.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device, use_triton
from kernels.random import check_names, elementwise_tile, halves, normal_tile, reference_normal, signed


def reference_diffuse(
    images: Tensor,
    seed: int,
    positions: Tensor,
    coefficients: Tensor,
    flips: Tensor | None,
    dtype: torch.dtype,
    with_eps: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`diffuse` in plain PyTorch."""
    if images.dtype == torch.uint8:
        x0 = images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # an NHWC tensor permuted is channels-last
    else:
        x0 = images.float().contiguous(memory_format=torch.channels_last)
    if flips is not None:
        x0 = torch.where(flips.view(-1, 1, 1, 1), x0.flip(3), x0)
    _, channels, height, width = x0.shape
    eps = reference_normal(seed, positions >> 32, positions, 0, (channels, height, width))
    a, s, k_0, k_e = (column.view(-1, 1, 1, 1) for column in coefficients.unbind(1))
    return (a * x0 + s * eps).to(dtype), k_0 * x0 + k_e * eps, eps if with_eps else None


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _diffuse_kernel(
    images,
    positions,
    coefficients,
    flips,
    x_t,
    target,
    eps_out,
    seed_low,
    seed_high,
    count,
    width,
    CHANNELS: tl.constexpr,
    BYTES: tl.constexpr,
    FLIPS: tl.constexpr,
    WITH_EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one sample; `count` elements a sample."""
    tiles = tl.cdiv(count, TILE)
    sample = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * TILE
    offsets = start + tl.arange(0, TILE)
    inside = offsets < count
    base = sample.to(tl.int64) * count

    if FLIPS:
        # A branch, not a choice of addresses: samples that stay as they are keep their wide loads.
        if tl.load(flips + sample) != 0:
            column = (offsets // CHANNELS) % width
            mirrored = offsets + (width - 1 - 2 * column) * CHANNELS
            pixels = tl.load(images + base + mirrored, mask=inside)
        else:
            pixels = tl.load(images + base + offsets, mask=inside)
    else:
        pixels = tl.load(images + base + offsets, mask=inside)
    x0 = pixels.to(tl.float32)
    if BYTES:
        x0 = x0 * (1 / 127.5) - 1.0

    row = coefficients + sample * 4
    position = tl.load(positions + sample)
    eps = normal_tile(seed_low, seed_high, position >> 32, position, tl.zeros_like(position), start, TILE)
    noisy = tl.load(row) * x0 + tl.load(row + 1) * eps
    tl.store(x_t + base + offsets, noisy.to(x_t.dtype.element_ty), mask=inside)
    tl.store(target + base + offsets, tl.load(row + 2) * x0 + tl.load(row + 3) * eps, mask=inside)
    if WITH_EPS:
        tl.store(eps_out + base + offsets, eps, mask=inside)


@torch.library.custom_op("diffult::diffuse", mutates_args=())
def _diffuse(
    images: Tensor,
    seed: int,
    positions: Tensor,
    coefficients: Tensor,
    flips: Tensor | None,
    dtype: torch.dtype,
    with_eps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_t, target, eps = _diffuse_fake(images, seed, positions, coefficients, flips, dtype, with_eps)
    batch, channels, height, width = x_t.shape
    count = channels * height * width
    as_bytes = images.dtype == torch.uint8
    images = images.contiguous(memory_format=torch.contiguous_format if as_bytes else torch.channels_last)
    sizes = elementwise_tile("diffuse", _key(images, dtype), count, images.device)
    with on_device(images):
        _diffuse_kernel[(batch * triton.cdiv(count, sizes["elements"]),)](
            images, positions.contiguous(), coefficients.contiguous(), None if flips is None else flips.contiguous(),
            x_t, target, eps, *halves(seed), count, width, CHANNELS=channels, BYTES=as_bytes, FLIPS=flips is not None,
            WITH_EPS=with_eps, TILE=sizes["elements"], num_warps=sizes["warps"],
        )  # fmt: skip
    return x_t, target, eps


@_diffuse.register_fake
def _diffuse_fake(
    images: Tensor,
    seed: int,
    positions: Tensor,
    coefficients: Tensor,
    flips: Tensor | None,
    dtype: torch.dtype,
    with_eps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _image_shape(images)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)

    # An operator returns no None: without the noise its place is taken by an empty tensor.
    eps = empty(shape if with_eps else (0, 1, 1, 1), torch.float32)
    return empty(shape, dtype), empty(shape, torch.float32), eps


def _image_shape(images: Tensor) -> tuple[int, int, int, int]:
    """(B, C, H, W) of uint8 [B, H, W, C] or float [B, C, H, W]."""
    a, b, c, d = images.shape
    return (a, d, b, c) if images.dtype == torch.uint8 else (a, b, c, d)


def _key(images: Tensor, dtype: torch.dtype) -> str:
    """The shape's name in the tile table."""
    names = [str(kind).removeprefix("torch.") for kind in (images.dtype, dtype)]
    return f"n{images[0].numel()}-{names[0]}-{names[1]}"


def diffuse(
    images: Tensor,
    seed: int,
    positions: Tensor,
    coefficients: Tensor,
    flips: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    with_eps: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noisy images and targets of a training batch; not differentiable where Triton serves.

    Args:
        images: uint8 [B, H, W, C], or float [B, C, H, W] in [-1, 1].
        seed: of the whole training run, 0 <= seed < 2**64.
        positions: int64 [B], each sample's place in the training stream. The noise is
            normal(seed, positions >> 32, positions, 0, (C, H, W)), a function of seed and position alone.
        coefficients: float32 [B, 4], (a, s, k_0, k_e) of each sample's timestep.
        flips: bool [B], which images to mirror left-right; None: none. The noise is not mirrored.
        dtype: of x_t.
        with_eps: whether to return the noise as well.

    Returns:
        x_t in `dtype`, the target in float32 and the noise in float32 or None, each [B, C, H, W], channels-last.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images must be uint8 [B, H, W, C] or float [B, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    batch = len(images)
    if coefficients.shape != (batch, 4) or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients must be float32 [{batch}, 4], got {coefficients.dtype} {list(coefficients.shape)}"
        )
    if flips is not None and (flips.shape != (batch,) or flips.dtype != torch.bool):
        raise ValueError(f"flips must be bool [{batch}], got {flips.dtype} {list(flips.shape)}")
    check_names(batch, positions=positions)
    arguments = (images, signed(seed), positions, coefficients, flips, dtype, with_eps)
    if use_triton("diffuse", _key(images, dtype), images.device):
        x_t, target, eps = _diffuse(*arguments)
        return x_t, target, eps if with_eps else None
    return reference_diffuse(*arguments)
