"""A function of device tensors as one CUDA graph: one launch, with no host work in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


class CUDAGraphRunner:
    """Calls `function(*tensors)`; on CUDA, calls after the first `warm_up` replay a captured graph.

    The function must take tensors of the same shapes at each call, must not make tensors of host values, and must not
    wait for the device. It may change tensors in place. What it returns (a tensor, or a dict or tuple of tensors) is
    overwritten by the next call. The warm-up lets libraries choose algorithms, compilers compile and optimizers
    allocate their state. On other devices every call runs the function itself.

    Work goes to the current stream: runners used on streams of their own run side by side.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, warm_up: int = 3) -> None:
        self.function, self.device, self.warm_up = function, device, warm_up
        self._calls = 0
        self._graph: Any = None
        self._inputs: Tensors = ()
        self._outputs: Any = None

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self.device.type != "cuda":
            return self.function(*tensors)
        self._calls += 1
        if self._calls <= self.warm_up:
            return self._warm_up(tensors)
        if self._graph is None:
            self._capture(tensors)
        for kept, given in zip(self._inputs, tensors, strict=True):
            if kept.shape != given.shape:
                raise ValueError(f"captured with shape {tuple(kept.shape)}, called with {tuple(given.shape)}")
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _warm_up(self, tensors: Tensors) -> Any:
        """One call on a side stream, which capture requires of the calls before it."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            outputs = self.function(*tensors)
        torch.cuda.current_stream(self.device).wait_stream(side)
        return outputs

    def _capture(self, tensors: Tensors) -> None:
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self.function(*self._inputs)
