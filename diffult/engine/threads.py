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

import torch

from diffult.engine.load import STAT, Load

log = logging.getLogger(__name__)
_SECONDS = 1.0  # between looks; the counters are exact to 0.01 s
_BUSY = 0.4  # of a core: others that take less are no reason to leave it
_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by the user, or by torchrun


class ThreadWatch:
    """Sets torch's number of threads as the load of this process's cores changes; call it after every step. On leaving
    its context the number is what it was before.

    Nothing is done where the user has set OMP_NUM_THREADS or MKL_NUM_THREADS, on one core, and where there is no
    /proc/stat. Sums over another number of threads round otherwise: beside a changing neighbour the same seed gives
    losses that differ in their fifth digit.
    """

    def __init__(self, stat: Path = STAT, clock: Callable[[], float] = time.monotonic) -> None:
        self._stat, self._clock = stat, clock
        self._most, first = torch.get_num_threads(), Load.now(stat, clock)
        chosen = any(os.environ.get(name) for name in _CHOSEN)
        watches = not chosen and self._most > 1 and first.cores > 1
        self._last = first if watches else None

    def __enter__(self) -> ThreadWatch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            torch.set_num_threads(self._most)

    def __call__(self) -> None:
        """Looks at the load at most once a second."""
        if self._last is None or self._clock() < self._last.wall + _SECONDS:
            return
        before, now = self._last, Load.now(self._stat, self._clock)
        self._last, others = now, now.others(before)
        free = now.cores - max(0, math.ceil(others - _BUSY))
        threads = max(1, min(self._most, free))
        if threads != torch.get_num_threads():
            log.info("threads: %d of %d, others keep %.1f cores busy", threads, self._most, others)
            torch.set_num_threads(threads)
