"""uint8 NHWC batches to what a classifier trains on: cropped, mirrored, jittered, normalised, channels-last.

Every random number is keyed by (seed, position), the place of the sample in the training stream, so a batch is the same
on any device and after any restart. With u_4, u_5, u_6 the uniform numbers of a sample (`kernels.random.uniform`), its
pixel at row i, column j of the crop's middle [size, size] window M is

    M[i + d_4, j' + d_5] / 127.5 - 1    d = ceil(u (2 pad + 1)) - 1 - pad    j' = size - 1 - j if u_6 <= 1/2, else j

and -1, black, where that lies outside. What must move is 1 byte in and 4 (float32) or 2 out for each number: the kernel
moves these once, and makes its random numbers where it uses them. With jitter everything is PyTorch operations.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import on_device, tile, use_triton
from kernels.random import check_names, halves, philox4x32_block, signed, uniform


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1], channels-last."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # an NHWC tensor permuted is channels-last


def denormalise(images: Tensor) -> Tensor:
    """float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], rounded to nearest, values outside clipped."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle size x size of [B, C, H, W]."""
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size]


def reference_augment(
    images: Tensor,
    seed: int,
    positions: Tensor,
    *,
    size: int,
    pad: int = 0,
    flip: bool = False,
    jitter: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`augment` in plain PyTorch. What moves pixels comes first, on bytes: a quarter of the memory of floats."""
    u = uniform(seed, positions >> 32, positions, 0, 10)
    x = center_crop(images.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    if pad:
        x = _shift(x, torch.ceil(u[:, 4:6] * (2 * pad + 1)).long() - 1, pad)
    if flip:
        kept = len(x) * (u[:, 6] > 0.5)
        both = torch.cat([x.flip(2), x])  # whole images are taken from these: half the time of torch.where on bytes
        x = both.index_select(0, torch.arange(len(x), device=x.device) + kept)
    x = normalise(x.contiguous())
    if jitter:
        x = _jitter(x, 1 + jitter * (2 * u[:, 7:10] - 1))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _shift(x: Tensor, start: Tensor, pad: int) -> Tensor:
    """Of each image [H, W, C], padded with `pad` black pixels, the window of its size from `start`, int64 [B, 2]."""
    _, height, width, _ = x.shape
    windows = F.pad(x, (0, 0, pad, pad, pad, pad)).unfold(1, height, 1).unfold(2, width, 1)
    return windows[torch.arange(len(x), device=x.device), start[:, 0], start[:, 1]].permute(0, 2, 3, 1)


def _jitter(x: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation by `factors`, float [B, 3], in this order, clipped as images are."""
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    y = ((x + 1) * brightness).clamp(0, 2)  # [0, 2]: black is 0
    y = y + (1 - contrast) * (_grey(y).mean((1, 2, 3), keepdim=True) - y)
    y = y.clamp(0, 2)
    y = y + (1 - saturation) * (_grey(y) - y)
    return y.clamp(0, 2) - 1


def _grey(x: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of RGB, or the image itself where it has one channel."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def symmetric_beta(u: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Numbers of Beta(alpha, alpha) from two uniform ones each, by the polar method (Bailey 1994 for Student's t, with
    2 alpha degrees of freedom, whose t / sqrt(2 alpha + t^2) is 2 x - 1 of a symmetric beta number x):

    w = u^(1 / alpha)    c = cos(2 pi v)    x = (1 + c sqrt((1 - w) / (w + (1 - w) c^2))) / 2
    """
    w, c = u ** (1 / alpha), torch.cos(2 * math.pi * v)
    return ((1 + c * torch.sqrt((1 - w) / (w + (1 - w) * c**2))) / 2).clamp(0, 1)  # against rounding


def mixup(images: Tensor, seed: int, positions: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each image mixed with the one before it in the batch, the first with the last (Zhang et al. 2018, "mixup: Beyond
    empirical risk minimization", eq. 1, here with a share for each image).

    Args:
        images: float [B, C, H, W], in a random order: the one before is a partner drawn by chance.
        seed: as in `augment`, in [0, 2**64).
        positions: int64 [B], each sample's place in the training stream.
        alpha: of Beta(alpha, alpha), above 0.

    Returns:
        The mixed images, of the same type, and the share of its own image in each, float32 [B].

    Raises:
        ValueError: positions of another type or shape; alpha or seed out of range.
    """
    check_names(len(images), positions=positions)
    if not alpha > 0:
        raise ValueError(f"mixup needs alpha > 0, got {alpha}")
    u, v = uniform(signed(seed), positions >> 32, positions, 1, 2).unbind(1)  # step 1: `augment` takes those of step 0
    share = symmetric_beta(u, v, alpha)
    return torch.lerp(images.roll(1, 0), images, share.to(images.dtype).view(-1, 1, 1, 1)), share


@triton.jit
def _uniform(word):
    """`kernels.random.uniform`, to the bit."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32


@triton.jit
def _offset(word, pad):
    return tl.ceil(_uniform(word) * (2 * pad + 1)).to(tl.int32) - 1 - pad


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _augment_kernel(
    images_ptr, positions_ptr, out_ptr, seed_low, seed_high, height, width, size, pad,
    CHANNELS: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows and COLUMNS numbers along them of one result; a column's index is computed once for all its rows."""
    length = size * CHANNELS
    across = tl.cdiv(length, COLUMNS)
    tiles = across * tl.cdiv(size, ROWS)
    sample = tl.program_id(0) // tiles
    tile_row = (tl.program_id(0) % tiles) // across
    tile_column = tl.program_id(0) % across
    position = tl.load(positions_ptr + sample)
    # u_4 to u_7 are the second block of four.
    second, step = tl.full((), 1, tl.uint32), tl.zeros_like(position)
    word4, word5, word6, _ = philox4x32_block(seed_low, seed_high, position >> 32, position, step, second)

    row = tile_row * ROWS + tl.arange(0, ROWS)
    along = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    column, channel = along // CHANNELS, along % CHANNELS
    if FLIP:
        column = tl.where(_uniform(word6) <= 0.5, size - 1 - column, column)
    from_row, from_column = row + _offset(word4, pad), column + _offset(word5, pad)
    # Black by a factor of 0 from the row or the column: 2 operations a number, where a mask for each load takes 10.
    row_scale = tl.where((from_row >= 0) & (from_row < size), 1.0, 0.0)
    column_scale = tl.where((from_column >= 0) & (from_column < size), 0.00784313725490196, 0.0)  # 1 / 127.5
    from_row = (height - size) // 2 + tl.minimum(tl.maximum(from_row, 0), size - 1)
    from_column = (width - size) // 2 + tl.minimum(tl.maximum(from_column, 0), size - 1)
    source = (from_row * (width * CHANNELS))[:, None] + (from_column * CHANNELS + channel)[None, :]
    pixel = tl.load(images_ptr + sample.to(tl.int64) * height * width * CHANNELS + source).to(tl.float32)
    value = pixel * (row_scale[:, None] * column_scale[None, :]) - 1.0

    target = out_ptr + sample.to(tl.int64) * size * length + (row * length)[:, None] + along[None, :]
    written = (row < size)[:, None] & (along < length)[None, :]
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=written)


@torch.library.custom_op("diffult::augment", mutates_args=())
def _augment(
    images: Tensor, positions: Tensor, seed: int, size: int, pad: int, flip: bool, dtype: torch.dtype
) -> Tensor:
    batch, height, width, channels = images.shape
    out = _augment_fake(images, positions, seed, size, pad, flip, dtype)
    # 32 numbers a thread, so that what is computed for a sample, a row and a column is spread over many.
    columns = min(64, triton.next_power_of_2(size * channels))
    rows = min(32, triton.next_power_of_2(size))
    tiles = tile("augment", _key(images, size, dtype), images.device, columns=columns, rows=rows, warps=2)
    across, down = triton.cdiv(size * channels, tiles["columns"]), triton.cdiv(size, tiles["rows"])
    with on_device(images):
        _augment_kernel[(batch * across * down,)](
            images.contiguous(), positions.contiguous(), out, *halves(seed), height, width, size, pad,
            CHANNELS=channels, FLIP=flip, ROWS=tiles["rows"], COLUMNS=tiles["columns"], num_warps=tiles["warps"],
        )  # fmt: skip
    return out


@_augment.register_fake
def _augment_fake(
    images: Tensor, positions: Tensor, seed: int, size: int, pad: int, flip: bool, dtype: torch.dtype
) -> Tensor:
    shape = (len(images), images.shape[3], size, size)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _key(images: Tensor, size: int, dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, images.shape[1:]))}-{size}-{str(dtype).removeprefix('torch.')}"


def augment(
    images: Tensor,
    seed: int,
    positions: Tensor,
    *,
    size: int,
    pad: int = 0,
    flip: bool = False,
    jitter: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Augments and normalises a batch for training.

    Args:
        images: uint8 [B, H, W, C]; copied first where they are not contiguous.
        seed: of the whole training run, in [0, 2**64).
        positions: int64 [B], each sample's place in the training stream.
        size: side of the result; the middle of larger images is taken.
        pad: random crop after padding by so many black pixels.
        flip: mirror left-right with probability 1/2.
        jitter: brightness, contrast and saturation each by a factor in [1 - jitter, 1 + jitter].
        dtype: of the result, a floating type; the arithmetic is float32.

    Returns:
        [B, C, size, size] of `dtype`, channels-last. Values lie in [-1, 1].

    Raises:
        ValueError: images of another type or shape, or smaller than `size`; positions of another type or shape; a
            seed out of range.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"augment needs uint8 images [B, H, W, C], got {images.dtype} {list(images.shape)}")
    check_names(len(images), positions=positions)
    seed = signed(seed)
    if min(images.shape[1:3]) < size:
        raise ValueError(f"augment cannot take {size} x {size} out of images {list(images.shape[1:3])}")
    if not jitter and use_triton("augment", _key(images, size, dtype), images.device):
        return _augment(images, positions, seed, size, pad, flip, dtype)
    return reference_augment(images, seed, positions, size=size, pad=pad, flip=flip, jitter=jitter, dtype=dtype)
