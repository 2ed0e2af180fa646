"""Which implementation serves an operation, Triton or the PyTorch reference, and with which tile.

One switch: the environment variable DIFFULT_KERNELS, or `set_mode`.

    auto    Triton on CUDA cards of compute capability 8.0 and newer, the reference elsewhere and at the shapes
            where the table says that PyTorch was measured faster; on a CPU C++ for group_norm_silu (the default)
    triton  Triton everywhere; on the CPU that needs TRITON_INTERPRET=1, as in the tests
    torch   the reference everywhere

The table kernels/tiles.json holds, by card, kernel and shape, what `python -m bench.kernels --tune` measured; what it
does not hold gets the kernel's own default. Nothing is tuned at import or at the first call.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from importlib import resources
from typing import Any, Literal, TypeVar, cast

# Fused multiply-adds on: Triton's own default changes between versions.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

Mode = Literal["auto", "triton", "torch"]
F = TypeVar("F", bound=Callable[..., Any])
_MODES = ("auto", "triton", "torch")
_MINIMUM_CAPABILITY = (8, 0)

asked: dict[tuple[str, str], dict[str, int]] = {}  # keys and defaults that `tile` has seen, for tuning
_mode: Mode = cast(Mode, os.environ.get("DIFFULT_KERNELS", "auto"))
if _mode not in _MODES:
    raise ValueError(f"DIFFULT_KERNELS={_mode!r} is not one of {', '.join(_MODES)}")


def mode() -> Mode:
    return _mode


def set_mode(name: Mode) -> None:
    """Switches every kernel. Graphs that torch.compile made before keep what they hold.

    Raises:
        ValueError: an unknown mode.
    """
    global _mode
    if name not in _MODES:
        raise ValueError(f"kernel mode {name!r} is not one of {', '.join(_MODES)}")
    _mode = name


def refusal(device: torch.device | str) -> str | None:
    """Why the PyTorch reference serves on this device in the present mode, or None where Triton does."""
    device = torch.device(device)
    if _mode == "triton":
        return None
    if _mode == "torch":
        return "the switch DIFFULT_KERNELS is set to torch"
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def constant(function: F) -> F:
    """A compiled graph holds what the function returned when it was traced.

    What torch.compiler.assume_constant_result does; that imports torch._dynamo, a third of the start of every command.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def use_triton(kernel: str, key: str, device: torch.device) -> bool:
    """Whether Triton serves this kernel at this shape.

    Args:
        kernel: the module's name, such as "group_norm_silu".
        key: the shape's name in the table, such as "C128-HW1024-bfloat16".
    """
    if refusal(device) is not None:
        return False
    return _mode == "triton" or not _row(kernel, key, card(device)).get("torch", False)


def tile(kernel: str, key: str, device: torch.device, **default: int) -> dict[str, int]:
    """The tile sizes for a shape: the table's, where it has them, over the kernel's own default."""
    asked[kernel, key] = default
    row = _row(kernel, key, card(device))
    return {name: int(row.get(name, value)) for name, value in default.items()}


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: this makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Card -> kernel -> shape -> sizes; a size "torch" of 1 sends the shape to the reference."""
    return json.loads((resources.files("kernels") / "tiles.json").read_text())


def _row(kernel: str, key: str, card: str) -> dict[str, int]:
    return table().get(card, {}).get(kernel, {}).get(key, {})
