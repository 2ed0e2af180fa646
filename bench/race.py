"""A race: several contestants do the same work in turn, round after round, and are told apart by ratios.

A machine that others use slows all contestants of a round alike, so a ratio is taken within each round and its median
over the rounds is told. The device is waited for once a turn. The first call of each, which compiles, is
timed apart, and all are warm before the first round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.ceilings import Ceilings, synchronise
from diffult.errors import UserError

Call = Callable[[], object]
OURS = "ours"
_RECORDED = 4  # calls after the first, of which one records the CUDA graph and one replays it


@dataclass
class Work:
    """What the contestants of one race do, built and ready.

    Attributes:
        run: each contestant's call, ours first.
        images: that one call handles.
        flops, moved: operations and bytes of one call, where they are known; `moved` as its race says.
        compilable: of the contestants in `run`, functions that put the compiled one in their place; full suite alone.
        equal: how it was checked that all do equal work.
        absent: why a rival cannot race here, by name.
    """

    run: dict[str, Call]
    images: float
    flops: float = 0.0
    moved: float = 0.0
    compilable: dict[str, Callable[[], Call]] = field(default_factory=dict)
    equal: str = ""
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Race:
    """A race by name: `build(folder)` prepares the work, with files in `folder`; `rivals` are our opponents in it."""

    name: str
    about: str
    rivals: tuple[str, ...]
    build: Callable[[Path], Work]

    def work(self, folder: Path) -> Work:
        work = self.build(folder)
        if (*work.run, *work.absent) != (OURS, *self.rivals):
            raise UserError(f"race {self.name!r}: built {[*work.run, *work.absent]}, named {[OURS, *self.rivals]}")
        return work


RACES: dict[str, Race] = {}


def race(name: str, *rivals: str) -> Callable[[Callable[[Path], Work]], Callable[[Path], Work]]:
    """Enters a function that prepares a race; the first line of its docstring says what is raced."""

    def enter(build: Callable[[Path], Work]) -> Callable[[Path], Work]:
        about = (build.__doc__ or "").strip().splitlines()[0].rstrip(".")
        RACES[name] = Race(name, about, rivals, build)
        return build

    return enter


def turn(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one call out of `calls`; what they queued is waited for once."""
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - begun) / calls


def warm_up(call: Call, device: torch.device) -> float:
    """Calls until what is done once is done: compiling, choosing algorithms, recording. Returns the first's seconds."""
    first = turn(call, 1, device)
    if device.type == "cuda":
        turn(call, _RECORDED, device)
    return first


def run_race(
    work: Work, device: torch.device, rounds: int, turn_s: float, compiled: bool = False
) -> dict[str, dict[str, Any]]:
    """{contestant: {"first_s", "seconds" of a call in each round}}.

    Args:
        rounds: each contestant has a turn in each.
        turn_s: seconds that a turn takes about; one call at the least.
        compiled: also race what can be compiled.
    """
    contestants = dict(work.run)
    if compiled:
        contestants |= {f"{name}, compiled": build() for name, build in work.compilable.items()}
    results: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, call in contestants.items():
        first = warm_up(call, device)
        calls[name] = min(1000, max(1, math.ceil(turn_s / turn(call, 1, device))))
        results[name] = {"first_s": first, "seconds": []}
    for _ in range(rounds):
        for name, call in contestants.items():
            results[name]["seconds"].append(turn(call, calls[name], device))
    return results


def ratios(results: dict[str, dict[str, Any]], rival: str, ours: str = OURS) -> list[float]:
    """How many times as fast as `rival` ours is, in each round."""
    pairs = zip(results[rival]["seconds"], results[ours]["seconds"], strict=True)
    return [theirs / mine for theirs, mine in pairs]


def our_best(results: dict[str, dict[str, Any]]) -> str:
    names = [name for name in results if name.split(",")[0] == OURS]
    return min(names, key=lambda name: median(results[name]["seconds"]))


def best_rival(results: dict[str, dict[str, Any]]) -> str | None:
    """The fastest of the others; None where we race alone."""
    names = [name for name in results if name.split(",")[0] != OURS]
    return min(names, key=lambda name: median(results[name]["seconds"]), default=None)


def row(race: Race, work: Work, results: dict[str, dict[str, Any]], ceilings: Ceilings) -> dict[str, Any]:
    """What the results file keeps of a race."""
    contestants = {}
    for name, result in results.items():
        seconds = median(result["seconds"])
        entry: dict[str, Any] = {"images_per_s": work.images / seconds}
        if work.flops:
            entry["tflop_per_s"] = work.flops / seconds / 1e12
            entry["share_of_compute"] = work.flops / seconds / ceilings.compute
        if work.moved and not work.flops:
            entry["gb_per_s"] = work.moved / seconds / 1e9
            entry["share_of_copy"] = work.moved / seconds / ceilings.copy
        contestants[name] = {key: _short(value) for key, value in entry.items()} | {
            "first_s": _short(result["first_s"]),
            "seconds": [_short(value) for value in result["seconds"]],
        }
    ours, rival = our_best(results), best_rival(results)
    told: dict[str, Any] = {"race": race.name, "about": race.about, "images": work.images}
    told |= {key: value for key in ("flops", "moved", "equal", "absent") if (value := getattr(work, key))}
    told |= {"contestants": contestants, "ours": ours, "best_rival": rival}
    if rival is not None:
        told["ratio"] = _short(median(ratios(results, rival, ours)))
    return told


def _short(value: float) -> float:
    return float(f"{value:.4g}")
