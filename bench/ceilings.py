"""What this machine can do at the most, measured in the run that is compared with it: products, convolutions, copies.

A ceiling is the best of many calls: other work on the machine only ever slows it down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONVOLUTIONS = {
    "cpu": ((16, 64, 32), (16, 128, 16), (16, 256, 8)),
    "cuda": ((128, 128, 32), (128, 256, 16), (64, 512, 32)),
}
_PRODUCTS = {"cpu": (768, 1536), "cuda": (4096, 8192)}
_COPY = {"cpu": 2**26, "cuda": 2**28}  # float32 numbers: many times the caches


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen, in FLOP/s and bytes/s (a copy reads and writes).

    Attributes:
        product_float32, product: of square matrices, in float32 and in the compute type.
        convolution: 3x3, channels-last, in the compute type.
    """

    dtype: str
    product_float32: float
    product: float
    convolution: float
    copy: float

    @property
    def compute(self) -> float:
        """FLOP/s that a network could reach."""
        return max(self.product, self.convolution)

    def row(self) -> dict[str, Any]:
        return asdict(self)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The fastest of the calls that fit in `budget` seconds, at least three."""
    call()
    synchronise(device)
    best, calls, end = float("inf"), 0, time.perf_counter() + budget
    while calls < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        synchronise(device)
        best, calls = min(best, time.perf_counter() - begun), calls + 1
    return best


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype, budget: float = 1.0) -> Ceilings:
    """The ceilings of `device`, each from about `budget` seconds of calls for each shape."""

    def product(kind: torch.dtype) -> float:
        rates = []
        for n in _PRODUCTS[device.type]:
            a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
            rates.append(2 * n**3 / best_seconds(lambda a=a, b=b: a @ b, device, budget))
        return max(rates)

    def convolution() -> float:
        rates = []
        for batch, channels, side in _CONVOLUTIONS[device.type]:
            x = torch.randn(batch, channels, side, side, device=device).to(dtype)
            weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
            seconds = best_seconds(lambda x=x, w=weight: F.conv2d(x, w, padding=1), device, budget)
            # As the FLOP counter counts them: borders too are nine products.
            rates.append(2 * batch * channels**2 * 9 * side**2 / seconds)
        return max(rates)

    def copy() -> float:
        source = torch.ones(_COPY[device.type], device=device)
        target = torch.ones_like(source)
        return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, budget)

    float32 = product(torch.float32)
    name = str(dtype).removeprefix("torch.")
    return Ceilings(name, float32, float32 if dtype == torch.float32 else product(dtype), convolution(), copy())


class _Traffic(TorchDispatchMode):
    """Counts the bytes of every operator's inputs and outputs; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
        return out


def traffic(call: Callable[[], object]) -> int:
    """Bytes that `call` moves if every operator reads its inputs and writes its outputs once, and nothing is fused or
    stays in a cache: the intensity at which a network stands in the roofline plot."""
    with torch.no_grad(), _Traffic() as mode:
        call()
    return mode.moved
