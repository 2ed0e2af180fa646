"""A function of device tensors as one CUDA graph: launched at once, without the host in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


class CUDAGraphRunner:
    """Calls `function(*tensors)`; on CUDA the calls after the first `warm_up` replay a recorded graph.

    The function must take tensors of one shape at each call, keep no number on the host and wait for nothing. It may
    change tensors in place. What it returns (a tensor, or a dict or tuple of tensors) is overwritten by the next call.
    Elsewhere than on CUDA it is called as it is. While warming up libraries choose their algorithms, compilers compile
    and buffers are allocated.
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
            return self._beside(tensors)
        if self._graph is None:
            self._record(tensors)
        for kept, given in zip(self._inputs, tensors, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _beside(self, tensors: Tensors) -> Any:
        """One call on a side stream, as recording asks of the calls before it."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            outputs = self.function(*tensors)
        torch.cuda.current_stream(self.device).wait_stream(side)
        return outputs

    def _record(self, tensors: Tensors) -> None:
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self.function(*self._inputs)
