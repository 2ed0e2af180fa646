"""Counter-based normal numbers: the noise of a sample depends on its name, never on the batch it sits in.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter and a
64-bit key to 128 random bits by ten rounds of multiply and xor. Here

    key     = the seed (64 bit)
    counter = (block of four numbers within the sample, step, index, class)

so every number can be made alone, in any order, on any device. Four 32-bit words give four normals by two
Box-Muller pairs: sqrt(-2 ln u1) * (cos, sin)(2 pi u2).

The numbers of an image lie in (H, W, C) order: number e = (h W + w) C + c is lane e % 4 of block e // 4. This is the
order in memory of a channels-last image, so a kernel makes four neighbours in memory from one block and stores them as
one 16-byte word. `normal4` is for such kernels: they need not read noise at all. `normal` alone moves its result once,
4 bytes a number, in one pass.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device, tile, use_triton

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1: the key's increment per round

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2**32, in int64 without losing the top: b is split in halves."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _MASK  # the product wraps modulo 2**64, which leaves its low half right


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox4x32.

    Args:
        counter: four broadcastable int64 tensors with values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of random 32-bit words, in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """A 32-bit word to float32 in (0, 1]: never 0, so that its logarithm is finite."""
    return (word.to(torch.float32) + 0.5) * 2.0**-32


def _words(seed: int, labels: Tensor, indices: Tensor, steps: int | Tensor, blocks: int) -> Words:
    """Four words for each of `blocks` blocks of each named sample, each int64 [B, blocks]."""
    block = torch.arange(blocks, device=labels.device, dtype=torch.int64)[None, :]
    step = as_steps(steps, labels) & _MASK
    counter = (block, step[:, None], (indices & _MASK)[:, None], (labels & _MASK)[:, None])
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))


def as_steps(steps: int | Tensor, labels: Tensor) -> Tensor:
    """One step number for every sample, int64 [B]."""
    return torch.full_like(labels, steps) if isinstance(steps, int) else steps


def signed(seed: int) -> int:
    """The seed's 64 bits as the signed number that operators and kernels take.

    Raises:
        ValueError: it has more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not in [0, 2**64)")
    return seed - 2**64 if seed >= 2**63 else seed


def halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed, signed: what kernels take for it. As one number it would be of another
    type for every kernel from 2**31 on, and of two at once in Triton's interpreter up to 2**32."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def check_names(batch: int, **names: Tensor) -> None:
    """Raises ValueError unless all are int64 [batch]."""
    for name, value in names.items():
        if value.dtype != torch.int64 or value.shape != (batch,):
            raise ValueError(f"{name} must be int64 [{batch}], got {value.dtype} {list(value.shape)}")


def uniform(seed: int, labels: Tensor, indices: Tensor, steps: int | Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1], float32 [B, count]; arguments as in `normal`."""
    words = _words(seed, labels, indices, steps, (count + 3) // 4)
    return torch.stack([_uniform(word) for word in words], dim=-1).flatten(1)[:, :count]


def reference_normal(
    seed: int, labels: Tensor, indices: Tensor, steps: int | Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """`normal` in plain PyTorch."""
    channels, height, width = shape
    count = channels * height * width
    u = [_uniform(word) for word in _words(seed, labels, indices, steps, (count + 3) // 4)]
    pairs = []
    for radius_u, angle_u in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius_u))
        angle = (2.0 * math.pi) * angle_u
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    # Contiguous once the numbers of a last, broken block are cut off: then the permuted view is channels-last.
    flat = torch.stack(pairs, dim=-1).flatten(1)[:, :count].contiguous()
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)


@triton.jit
def philox4x32_block(seed_low, seed_high, label, index, step, blocks):
    """Four uint32 words for each of the blocks, uint32, of the sample (seed, label, index) at `step`. The seed is given
    by its `halves`, the names as int64 scalars, of which the low 32 bits count."""
    zero = tl.zeros_like(blocks)
    return tl.philox_impl(
        blocks, zero + step.to(tl.uint32), zero + index.to(tl.uint32), zero + label.to(tl.uint32),
        seed_low.to(tl.uint32), seed_high.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def _box_muller(radius_word, angle_word):
    """Two float32 normals from two words.

    The angle, as many 2**-32 parts of a turn, is cut into quarter turns and a signed rest of at most an eighth by its
    bits, and the rest goes into the polynomials of Cephes' cosf and sinf: within a rounding of the float64 value, in
    fewer instructions than the library's, which also has a path for huge arguments that costs stack.
    """
    radius_u = (radius_word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    radius = tl.sqrt(-2.0 * tl.log(radius_u))
    quarters = angle_word + 0x20000000  # rounded to the nearest quarter turn, whose number is in the two top bits
    rest = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10  # 2 pi 2**-34
    square = rest * rest
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine = cosine + (1.0 - 0.5 * square)
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    swapped = (quarters & 0x40000000) != 0
    a = tl.where(swapped, sine, cosine).to(tl.uint32, bitcast=True) ^ ((quarters + 0x40000000) & 0x80000000)
    b = tl.where(swapped, cosine, sine).to(tl.uint32, bitcast=True) ^ (quarters & 0x80000000)
    return radius * a.to(tl.float32, bitcast=True), radius * b.to(tl.float32, bitcast=True)


@triton.jit
def normal4(seed_low, seed_high, label, index, step, blocks):
    """Four float32 normals for each block, one tensor a lane; arguments as in `philox4x32_block`."""
    w0, w1, w2, w3 = philox4x32_block(seed_low, seed_high, label, index, step, blocks)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def normal_tile(seed_low, seed_high, label, index, step, start, TILE: tl.constexpr):
    """The TILE normals from number `start` on, both multiples of 4, float32 [TILE] in order of memory."""
    blocks = (start // 4).to(tl.uint32) + tl.arange(0, TILE // 4).to(tl.uint32)
    n0, n1, n2, n3 = normal4(seed_low, seed_high, label, index, step, blocks)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [TILE])  # the four lanes stay in one thread


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _normal_kernel(out, labels, indices, steps, seed_low, seed_high, count, TILE: tl.constexpr):
    tiles = tl.cdiv(count, TILE)
    sample = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * TILE
    label, index, step = tl.load(labels + sample), tl.load(indices + sample), tl.load(steps + sample)
    numbers = normal_tile(seed_low, seed_high, label, index, step, start, TILE)
    offsets = start + tl.arange(0, TILE)
    tl.store(out + sample.to(tl.int64) * count + offsets, numbers, mask=offsets < count)


@torch.library.custom_op("diffult::normal", mutates_args=())
def _normal(
    seed: int, labels: Tensor, indices: Tensor, steps: Tensor, channels: int, height: int, width: int
) -> Tensor:
    out = _normal_fake(seed, labels, indices, steps, channels, height, width)
    count = channels * height * width
    sizes = elementwise_tile("normal", f"n{count}", count, labels.device)
    with on_device(labels):
        _normal_kernel[(len(labels) * triton.cdiv(count, sizes["elements"]),)](
            out, labels.contiguous(), indices.contiguous(), steps.contiguous(), *halves(seed), count,
            TILE=sizes["elements"], num_warps=sizes["warps"],
        )  # fmt: skip
    return out


@_normal.register_fake
def _normal_fake(
    seed: int, labels: Tensor, indices: Tensor, steps: Tensor, channels: int, height: int, width: int
) -> Tensor:
    shape = (len(labels), channels, height, width)
    return torch.empty(shape, device=labels.device, memory_format=torch.channels_last)


def elementwise_tile(kernel: str, key: str, count: int, device: torch.device) -> dict[str, int]:
    """Numbers a program and its warps, for a pass over `count` numbers a sample: 8 numbers a thread, which is two
    16-byte words of float32 and one of bfloat16; small samples take smaller programs."""
    elements = min(1024, max(128, triton.next_power_of_2(count)))
    return tile(kernel, key, device, elements=elements, warps=max(1, elements // 256))


def normal(seed: int, labels: Tensor, indices: Tensor, steps: int | Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise for samples named (seed, class, index), each at one step.

    Args:
        seed: 0 <= seed < 2**64.
        labels: int64 [B], each sample's class; the low 32 bits count.
        indices: int64 [B], each sample's number within its class; the low 32 bits count.
        steps: which draw of the sample's life this is, for all or int64 [B]; 0 is the initial noise.
        shape: (C, H, W).

    Returns:
        float32 [B, C, H, W], channels-last, on the labels' device; row i depends on (seed, labels[i], indices[i],
        steps[i]) alone.

    Raises:
        ValueError: names of another type or shape.
    """
    steps = as_steps(steps, labels)
    check_names(len(labels), labels=labels, indices=indices, steps=steps)
    seed = signed(seed)
    if use_triton("normal", f"n{math.prod(shape)}", labels.device):
        return _normal(seed, labels, indices, steps, *shape)
    return reference_normal(seed, labels, indices, steps, shape)
