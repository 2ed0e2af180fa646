"""Counter-based normal numbers: the noise of a sample depends on its name, never on the batch it sits in.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter and a
64-bit key to 128 random bits by ten rounds of multiply and xor. Here

    key     = the seed (64 bit)
    counter = (block of four numbers within the sample, step, index, class)

so every number can be made alone, in any order, on any device. Four 32-bit words give four normals by two
Box-Muller pairs: sqrt(-2 ln u1) * (cos, sin)(2 pi u2).
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1: the key's increment per round

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _mul_hi_lo(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _uniform(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word to float32 in (0, 1]: never 0, so that its logarithm is finite."""
    return (word.to(torch.float32) + 0.5) * 2.0**-32


def _words(seed: int, labels: torch.Tensor, indices: torch.Tensor, step: int, blocks: int) -> Words:
    """Four words for each of `blocks` blocks of each named sample, each int64 [B, blocks]."""
    block = torch.arange(blocks, device=labels.device, dtype=torch.int64)[None, :]
    counter = (block, torch.full_like(block, step), (indices & _MASK)[:, None], (labels & _MASK)[:, None])
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))


def uniform(seed: int, labels: torch.Tensor, indices: torch.Tensor, step: int, count: int) -> torch.Tensor:
    """Uniform numbers in (0, 1], float32 [B, count]; arguments as in `normal`."""
    words = _words(seed, labels, indices, step, (count + 3) // 4)
    return torch.stack([_uniform(word) for word in words], dim=-1).flatten(1)[:, :count]


def normal(seed: int, labels: torch.Tensor, indices: torch.Tensor, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise for samples named (seed, class, index) at one step.

    Args:
        seed: 0 <= seed < 2**64.
        labels: int64 [B], each sample's class.
        indices: int64 [B], each sample's number within its class.
        step: which draw of the sample's life this is; 0 is the initial noise.
        shape: the shape of one sample, such as (C, H, W).

    Returns:
        float32 [B, *shape] on the labels' device; row i depends on (seed, labels[i], indices[i], step) alone.
    """
    count = math.prod(shape)
    u = [_uniform(word) for word in _words(seed, labels, indices, step, (count + 3) // 4)]
    pairs = []
    for radius_u, angle_u in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius_u))
        angle = (2.0 * math.pi) * angle_u
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count].reshape(-1, *shape)
