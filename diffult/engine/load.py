"""How busy others keep the cores that this process may use."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diffult.engine.distributed import ALONE, World

STAT = Path("/proc/stat")


class Load(NamedTuple):
    """Seconds so far, exact to 0.01 s."""

    wall: float
    own: float  # of this process on all cores
    idle: float  # of the cores that it may use
    cores: int  # that it may use

    @classmethod
    def now(cls, stat: Path = STAT, clock: Callable[[], float] = time.monotonic) -> Load:
        """Idle time is the fourth and fifth column of a core's line in /proc/stat, in ticks (proc(5)); where there is
        no such file the cores have never been busy."""
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        wall, ticks = clock(), 0
        if not stat.exists():
            return cls(wall, time.process_time(), wall * len(cores), len(cores))
        for line in stat.read_text().splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
                ticks += int(values[3]) + int(values[4])
        return cls(wall, time.process_time(), ticks / os.sysconf("SC_CLK_TCK"), len(cores))

    def others(self, before: Load, own: float | None = None) -> float:
        """Cores that others kept busy since `before`, on average. own: seconds that these processes computed since
        then, where they are more than this one."""
        own = self.own - before.own if own is None else own
        return max(0.0, self.cores - (self.idle - before.idle + own) / (self.wall - before.wall))


def share_of_others(before: Load, now: Load, world: World = ALONE) -> float:
    """The share of the time of this machine's cores that went to others than the processes of `world`, which all call
    this."""
    machine = platform.node()
    spent = world.gather((machine, now.own - before.own))
    return now.others(before, sum(seconds for where, seconds in spent if where == machine)) / max(now.cores, 1)
