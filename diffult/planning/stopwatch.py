"""Seconds and memory of work that is done for their sake alone."""

from __future__ import annotations

import ctypes
import gc
import itertools
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch

from diffult.engine.device import pick_device
from diffult.engine.distributed import ALONE, World
from diffult.engine.memory import own_memory, status_bytes
from ffcv_writers import Batch, Loader

T = TypeVar("T")
# Steps that come before: their memory is allocated then; on CUDA each kind is recorded as a graph at its fourth call.
_TOUCHED, _RECORDED = 2, 5
_STRETCHES, _LEAST = 10, 3  # readings of the clock, and steps at the least, however long they take
_LOOK = 0.02  # seconds between looks at the memory


def clock() -> float:
    """Seconds, once the device has done all that was asked of it."""
    if pick_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its seconds."""
    begun = clock()
    result = work()
    return result, clock() - begun


def stretches(
    steps: Iterator[object], seconds: float, world: World = ALONE, group: int = 1, warm_up: int | None = None
) -> tuple[float, tuple[float, ...]]:
    """Takes steps for about so long, as many on each process of `world`.

    Args:
        group: steps of several kinds that belong together, of which no part is timed.
        warm_up: steps at the start; None: as training steps need them.

    Returns:
        Seconds that the first steps took beyond those that follow, and those of a step in up to ten stretches.
    """

    def take(count: int) -> tuple[int, float]:
        begun = clock()
        taken = sum(1 for _ in itertools.islice(steps, count))
        return taken, clock() - begun

    on_card = pick_device().type == "cuda"
    first, warm = take(warm_up or (_RECORDED * group if on_card else _TOUCHED))
    end = time.perf_counter() + seconds - warm
    taken, length = take(group)
    if not taken:  # the whole stage is as short
        return 0.0, (warm / max(first, 1),)
    each = [length / taken]
    size = world.gather(group * max(1, int((seconds - warm) / length / _STRETCHES)))[0]
    while len(each) < _STRETCHES:
        late = len(each) >= (_LEAST if group == 1 else 1) and time.perf_counter() > end
        if world.gather(late)[0]:
            break
        taken, length = take(size)
        if not taken:
            break
        each.append(length / taken)
    return max(0.0, warm - first * median(each)), tuple(each)


class Peak:
    """Memory at the most, in bytes: `host`, what this process held itself, and `device` as torch reserved it, 0 without
    one."""

    host = 0.0
    device = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Of what is done within; known at its end, good or bad. The host's is looked at every 20 ms."""
    peak, on_card, done = Peak(), pick_device().type == "cuda", threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            with suppress(MemoryError):
                peak.host = max(peak.host, own_memory())

    if on_card:
        torch.cuda.reset_peak_memory_stats()
    peak.host, looking = own_memory(), threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield peak
    finally:
        done.set()
        looking.join()
        peak.host = max(peak.host, own_memory()) or 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak.device = float(torch.cuda.max_memory_reserved()) if on_card else 0.0
        release()


def release() -> None:
    """Gives memory that nothing holds back to the system, so that the next peak is of its own work."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def bounded_memory(free: float) -> Iterator[None]:
    """Within, this process gets an error when it asks for more than the bytes that are free; without it, the system
    ends the process. On a CPU alone: drivers of cards set addresses aside that they never use."""
    before, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if pick_device().type == "cuda":
        yield
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int((status_bytes("VmData") or 1e15) + free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def since_start() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    with suppress(OSError, IndexError, ValueError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100
    return 0.0


class HeldLoader(Loader):
    """Reads one batch and gives it again and again: what is left is the network's time."""

    def __init__(self, loader: Loader) -> None:
        self.__dict__ |= vars(loader)
        self._batch: Batch | None = None

    def batches(self, order: np.ndarray, positions: np.ndarray | None = None) -> Iterator[Batch]:
        if self._batch is None:
            size = slice(self.batch_size)
            (self._batch,) = super().batches(order[size], None if positions is None else positions[size])
        return itertools.repeat(self._batch, -(-len(order) // self.batch_size))


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit, so that what is to be removed is."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
