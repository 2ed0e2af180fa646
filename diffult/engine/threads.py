"""Threads of a training on a CPU that others use, too.

Threads of one convolution wait for the slowest of them. Where a neighbour keeps one of two cores busy, a step on two
threads takes longer than on one, so a training takes as many threads as there are cores that others leave free.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)
_SECONDS = 1.0  # between looks; the counters are exact to 0.01 s
_BUSY = 0.4  # of a core: others that take less are no reason to leave it
_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by the user, or by torchrun


class _Reading(NamedTuple):
    """Seconds so far."""

    wall: float
    own: float  # of this process on all cores
    idle: float  # of the cores that it may use


class ThreadWatch:
    """Sets torch's number of threads as the load of this process's cores changes; call it after every step. On leaving
    its context the number is what it was before.

    Nothing is done where the user has set OMP_NUM_THREADS or MKL_NUM_THREADS, on one core, and where there is no
    /proc/stat. Sums over another number of threads round otherwise: beside a changing neighbour the same seed gives
    losses that differ in their fifth digit.
    """

    def __init__(self, stat: Path = Path("/proc/stat"), clock: Callable[[], float] = time.monotonic) -> None:
        self._stat, self._clock = stat, clock
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._most = torch.get_num_threads()
        chosen = any(os.environ.get(name) for name in _CHOSEN)
        watches = not chosen and self._most > 1 and len(self._cores) > 1 and stat.exists()
        self._last = self._read() if watches else None

    def __enter__(self) -> ThreadWatch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            torch.set_num_threads(self._most)

    def __call__(self) -> None:
        """Looks at the load at most once a second."""
        if self._last is None or self._clock() < self._last.wall + _SECONDS:
            return
        before, now = self._last, self._read()
        self._last = now
        others = len(self._cores) - (now.idle - before.idle + now.own - before.own) / (now.wall - before.wall)
        free = len(self._cores) - max(0, math.ceil(others - _BUSY))
        threads = max(1, min(self._most, free))
        if threads != torch.get_num_threads():
            log.info("threads: %d of %d, others keep %.1f cores busy", threads, self._most, max(0.0, others))
            torch.set_num_threads(threads)

    def _read(self) -> _Reading:
        """Idle time is the fourth and fifth column of a core's line in /proc/stat, in ticks (proc(5))."""
        ticks = 0
        for line in self._stat.read_text().splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in self._cores:
                ticks += int(values[3]) + int(values[4])
        return _Reading(self._clock(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"))
