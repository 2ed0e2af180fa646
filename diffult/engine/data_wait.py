"""How long a training waits for its batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch

from diffult.engine.device import pick_device

Batch = TypeVar("Batch")


class DataWait:
    """Measures the time from when the computing device needs a batch until it has it, on this process.

    On a CPU that is the time it takes to get it. A GPU runs behind the host, so it is the GPU's own time between two
    marks in its queue, one before the batch is asked for and one when it is there: nothing but the making and copying
    of the batch lies between them, and while earlier steps keep the GPU busy the host may wait for data at no cost.
    """

    def __init__(self) -> None:
        self._on_card = pick_device().type == "cuda"
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def measured(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time measured that each takes."""
        while True:
            begun, mark = time.perf_counter(), self._mark()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if mark is None:
                self._seconds += time.perf_counter() - begun
            elif there := self._mark():
                self._marks.append((mark, there))
            yield batch

    def _mark(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self._on_card else None

    def read(self) -> float:
        """Seconds since the last reading; the device must have done what is queued."""
        seconds = self._seconds + sum(begun.elapsed_time(there) for begun, there in self._marks) / 1e3
        self._seconds, self._marks = 0.0, []
        return seconds
