"""Scaled dot-product attention in xformers' layout: softmax(q k^T / sqrt(width)) v, no mask.

On CUDA xformers' memory-efficient attention serves where it can; everywhere else, and for the types and widths that it
refuses, torch's scaled_dot_product_attention. Neither writes the [tokens, tokens] matrix: what must move is q, k and v
in and the result out. Training in bfloat16 on a CPU writes the matrix, which is faster there.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import constant


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend without a mask, scale 1 / sqrt(width).

    q, k, v: [batch, tokens, heads, width], of one floating dtype; k and v may have another number of tokens.
    Returns [batch, tokens of q, heads, width] in the same dtype. Raises ValueError on shapes that do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise ValueError(
            "attention: q, k, v must be [batch, tokens, heads, width] with equal batch, heads and width, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.is_cuda and _xformers_refusal(q.device, q.dtype, q.shape[-1]) is None:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # A quarter to three quarters of the time of scaled_dot_product_attention, forward and backward. Scores are
        # rounded to bfloat16: for standard normal q and k a relative error of 5e-3, against 2e-3.
        weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).softmax(3)
        return torch.matmul(weights, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_backend(device: torch.device | str) -> tuple[str, str]:
    """The implementation that serves `attention` on `device`, and why: ("xformers" | "torch", reason).

    The reason is for bfloat16 at width 64; other types and widths are tried at their first use.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "torch", f"xformers' attention needs a CUDA device, this is {device.type}"
    refusal = _xformers_refusal(device, torch.bfloat16, 64)
    if refusal is not None:
        return "torch", refusal
    import xformers

    return "xformers", f"xformers {xformers.__version__} runs forward and backward here"


@constant  # the choice, not the trial
def _xformers_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    return _try_xformers(device, dtype, width)


@functools.cache
def _try_xformers(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why xformers cannot serve, or None: found by running it once, forward and backward, on 8 tokens.

    A trial, because what it supports depends on its build, torch's CUDA, the card, dtype and width together.
    """
    try:
        # Imported here and only for CUDA: without a GPU the import warns and nothing in it works.
        from xformers.ops import memory_efficient_attention

        with torch.inference_mode(False), torch.enable_grad():
            q = torch.zeros(1, 8, 1, width, device=device, dtype=dtype, requires_grad=True)
            memory_efficient_attention(q, q, q).sum().backward()
    except (ImportError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"xformers refuses {dtype} at width {width}: {first_line}"
    return None
