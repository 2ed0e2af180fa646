"""group_norm_silu.cpp on a CPU: compiled by g++ for this processor at the first call, kept in ~/.cache/diffult."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kernels import dispatch

# Not -ffast-math: linked, it flushes denormals in the whole process. With these a clamp is one instruction, and what is
# no number still gives none. The threads are those of torch's OpenMP.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros")
_COMMAND = ("g++", "-O3", "-march=native", *_MATH, "-fopenmp", "-fPIC", "-shared")
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def use_cpp(x: Tensor) -> bool:
    """Whether C++ serves for x."""
    return x.dtype in _TYPES and cpp_refusal(x.device) is None


def is_for_cpp(x: Tensor) -> bool:
    """The same within the operator, where Triton is the only other choice: compiled graphs keep what was chosen."""
    return x.device.type == "cpu" and dispatch.mode() != "triton"


@dispatch.constant
def cpp_refusal(device: torch.device | str) -> str | None:
    """Why C++ does not serve on this device in the present mode, or None where it does. The first call compiles, which
    takes two seconds."""
    if dispatch.mode() != "auto":
        return f"the switch DIFFULT_KERNELS is set to {dispatch.mode()}"
    if torch.device(device).type != "cpu":
        return f"C++ needs a CPU, this is {torch.device(device).type}"
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or in one line why there is none."""
    source = Path(__file__).with_name("group_norm_silu.cpp")
    key = hashlib.sha256("\n".join([source.read_text(), *_COMMAND, _processor()]).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffult"
        library = folder / f"{source.stem}-{key}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed when whole: others may compile, too
                made = Path(temporary) / library.name
                subprocess.run([*_COMMAND, source, "-o", made], check=True, capture_output=True, text=True)
                made.replace(library)
        return ctypes.CDLL(str(library))
    except FileNotFoundError:
        return "there is no g++"
    except subprocess.CalledProcessError as error:
        return f"g++ fails: {(error.stderr.strip() or str(error)).splitlines()[0]}"
    except (OSError, RuntimeError) as error:  # no home, no room there, a library that does not load
        return f"compiling fails: {error}"


def _processor() -> str:
    """What -march=native depends on: machines may share a home."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(known)) or platform.processor()


Outputs = tuple[Tensor, Tensor, Tensor]
Affine = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weight, bias [C]; scale, shift [B, C]


def forward(x: Tensor, outputs: Outputs, groups: int, affine: Affine, silu: bool, eps: float) -> Outputs:
    """Fills y, as x channels-last, and float32 mean and rstd [B, C]."""
    _call("forward", x, (x, *outputs), groups, affine, silu, ctypes.c_float(eps))
    return outputs


def backward(
    dy: Tensor, x: Tensor, outputs: Outputs, statistics: tuple[Tensor, Tensor], groups: int, affine: Affine, silu: bool
) -> Outputs:
    """Fills dx, as x channels-last, and float32 P and Q [B, C]; statistics: mean and rstd."""
    _call("backward", x, (dy, x, *outputs, *statistics), groups, affine, silu)
    return outputs


def _call(name: str, x: Tensor, tensors: tuple[Tensor, ...], groups: int, affine: Affine, *rest: object) -> None:
    function = getattr(_library(), f"{name}_{_TYPES[x.dtype]}")
    rows = [row if row is None else row.float().contiguous() for row in affine]  # here until the call is over
    pointers = (ctypes.c_void_p * 4)(*(row if row is None else row.data_ptr() for row in rows))
    batch, channels, height, width = x.shape
    shape = (ctypes.c_int64 * 4)(batch, height * width, channels, groups)
    function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), pointers, shape, *rest)
