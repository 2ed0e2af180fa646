"""What this machine computes with: device, number format, and the seed of each step."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch


def pick_device() -> torch.device:
    """CUDA where there is a device (CUDA_VISIBLE_DEVICES chooses, empty hides it), the CPU otherwise."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # `distributed.join` gives each process its own


def machine() -> dict[str, str]:
    """What figures are measured on: "device", and the versions of "torch" and "python"."""
    device = pick_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {len(models) or os.cpu_count()} cores"
        name += ", bfloat16" * fast_bfloat16(device)
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def compute_dtype(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type of convolutions and matrix products; weights and statistics stay float32."""
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: without such instructions a CPU is several times slower in it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# Dense bfloat16 FLOP/s of the data sheets, by a part of the name that torch gives.
_PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def peak_flops(device: torch.device) -> float:
    """What the card can do at the most in bfloat16, FLOP/s; 0 where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAK.items() if part in name), 0.0)


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    if device.type == "meta":  # where nothing is computed there is nothing to cast
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def derived_seed(*key: int) -> int:
    """64 bits that follow from the key alone: a seed for a purpose of its own, such as (seed, purpose)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def seed_step(*key: int) -> None:
    """Seeds torch's generators from the key alone, such as (seed, stage, step): a training loop that calls it each
    step goes on after a restart as if it had never stopped, with no generator state to keep."""
    torch.manual_seed(derived_seed(*key) >> 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets the C library keep the memory of freed tensors for the next ones, instead of handing it back to the system
    and asking for it page by page again, step after step. The peak stays as it is. Nothing where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
