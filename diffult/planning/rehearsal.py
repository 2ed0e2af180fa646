"""What a rehearsal measured, what the whole run takes by it, and what would fail.

A stage takes count x seconds of one, for each kind of work in it. The counts are those of the plan's cost model; only
the seconds were measured, several times, and their spread is the uncertainty of the sum.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

from diffult.config import Config
from diffult.planning.cost import Amounts, Cost, Work, costs, pass_rate, stage_work
from diffult.reporting.text import counted, duration, size

_WIDTH = 80
_BUSY = 0.2  # share of the cores' time: where others take less, nothing else is at work


@dataclass(frozen=True)
class Part:
    """One kind of work in a stage.

    Attributes:
        what: it counts, in the plural.
        each: seconds of one, measured several times.
        share: of the stage's units, see `Work`.
        count: how many more there are of it.
        linear: whether the measured seconds are of one; if not, scaled by counted work.
    """

    what: str
    each: tuple[float, ...]
    share: float = 0.0
    count: float = 0.0
    linear: bool = True

    def number(self, units: float) -> float:
        return self.count + self.share * units


@dataclass
class Rehearsed:
    """A stage as it was rehearsed.

    Attributes:
        parts: of which its time is made.
        host, device: bytes at the peak, of one process.
        disk: bytes that the whole run's stage takes; None: as the cost model counts them.
        images_per_s: of "loader" and "network", each alone, over all processes; empty: not measured.
        checkpoint: bytes of it.
        open_files: of a process, at the end.
        candidates: drawn, and those that the filter keeps, of each class, int64 [C] each.
        failures: what would fail, and `notes`, what else to know.
        finished: nothing is left to do.
    """

    parts: list[Part] = field(default_factory=list)
    host: float = 0.0
    device: float = 0.0
    disk: float | None = None
    images_per_s: dict[str, float] = field(default_factory=dict)
    checkpoint: float = 0.0
    open_files: int = 0
    candidates: tuple[np.ndarray, np.ndarray] | None = None
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: bool = False

    def add_start(self, seconds: float) -> None:
        """Enters seconds that the stage takes once, before its work."""
        before = [part for part in self.parts if part.what == "start"]
        self.parts = [part for part in self.parts if part.what != "start"]
        self.parts.insert(0, Part("start", (seconds + sum(part.each[0] for part in before),), count=1))

    def note_open_files(self) -> None:
        with suppress(OSError):  # where the system does not say
            self.open_files = len(os.listdir("/proc/self/fd"))

    @property
    def bound(self) -> str:
        """What an epoch waits for: the slower of loader and network."""
        return min(self.images_per_s, key=lambda name: self.images_per_s[name], default="")


@dataclass
class Rehearsal:
    """Of a run, on this machine; a `Machine` of the cost model.

    Attributes:
        amounts: of the whole run.
        stages: by name, in order.
        passing: the share of candidates that a trained model's filter kept; None: there is no trained model.
        seconds_taken: by the rehearsal, and `others`, the share of the cores' time that went to other programs.
    """

    config: Config
    amounts: Amounts
    processes: int = 1
    stages: dict[str, Rehearsed] = field(default_factory=dict)
    passing: float | None = None
    seconds_taken: float = 0.0
    others: float = 0.0
    pick: Callable[[Sequence[float]], float] = median

    def seconds(self, stage: str, work: Work) -> float:
        """See `Machine`; 0 for a stage that is finished."""
        if self.stages[stage].finished:
            return 0.0
        return sum(part.number(work.units) * self.pick(part.each) for part in self.stages[stage].parts)

    @property
    def work(self) -> dict[str, Work]:
        """Of each stage of the whole run."""
        return stage_work(self.config, self.amounts, self._passes[0])

    @property
    def _passes(self) -> tuple[float, float, float]:
        """The share of candidates that is kept: expected, at the most and at the least."""
        if self.passing is not None:
            return (self.passing,) * 3
        least = pass_rate(self.config.generate.filter)
        return least**0.5, 1.0, least

    def costs(self) -> list[tuple[Cost, float, float]]:
        """Of each stage, and the least and the most seconds that the spread allows."""
        picks: tuple[Callable[[Sequence[float]], float], ...] = (median, min, max)
        columns = [
            costs(self.config, self.amounts, replace(self, pick=pick), passing)
            for pick, passing in zip(picks, self._passes, strict=True)
        ]
        rows = []
        for row, least, most in zip(*columns, strict=True):
            stage = self.stages[row.stage]
            disk = 0.0 if stage.finished else row.disk if stage.disk is None else stage.disk
            row = replace(row, memory=stage.device or stage.host, disk=disk)
            rows.append((row, least.seconds, most.seconds))
        return rows

    def content(self) -> dict[str, Any]:
        """For a file of JSON."""
        stages = {}
        for cost, least, most in self.costs():
            measured = asdict(self.stages[cost.stage])
            del measured["candidates"]
            of_run = {"seconds": cost.seconds, "least": least, "most": most, "limit": cost.limit, "disk": cost.disk}
            stages[cost.stage] = measured | of_run
        own = {key: getattr(self, key) for key in ("processes", "seconds_taken", "others", "passing")}
        return {"name": self.config.name} | own | {"stages": stages}


def expected_passing(quotas: np.ndarray, drawn: np.ndarray, passed: np.ndarray, max_draws: float) -> float:
    """The share of candidates kept in a whole run, where each class is drawn until it has its quota or its limit; a
    class of few candidates counts by those of all classes, too. int64 [C] each."""
    overall = max(passed.sum(), 1) / max(drawn.sum(), 1)
    rates = (passed + 4 * overall) / (drawn + 4)
    candidates = np.minimum(quotas / np.maximum(rates, 1e-9), quotas * max_draws)
    return float(min(1.0, quotas.sum() / max(candidates.sum(), 1.0)))


# As text


def lines(rehearsal: Rehearsal, price: float | None) -> list[str]:
    """A table of the stages, what each is made of, what bounds it, and the limits of all this."""
    rows, stages = rehearsal.costs(), rehearsal.stages
    peaks = [(max(getattr(stage, kind) for stage in stages.values())) for kind in ("host", "device")]
    together = [sum(column) for column in zip(*((c.seconds, a, b) for c, a, b in rows), strict=True)]
    disk, limit = sum(cost.disk for cost, _, _ in rows), sum(cost.limit for cost, _, _ in rows)
    table, text = [_row("stage", "time", "range", ["host RAM", "device", "disk"])], list[str]()
    for cost, least, most in rows:
        stage = stages[cost.stage]
        time, span = duration(cost.seconds), _range(least, most)
        if stage.finished or not stage.parts:
            time, span = "finished" if stage.finished else "unknown", ""
        table.append(_row(cost.stage, time, span, [size(stage.host), size(stage.device), size(cost.disk)]))
    row = duration(together[0]), _range(together[1], together[2])
    table.append(_row("together", *row, [*map(size, peaks), size(disk)]))
    if price is not None:
        money = [f"{price * rehearsal.processes * seconds / 3600:,.2f}" for seconds in together]
        devices = counted(rehearsal.processes, "device", "devices")
        text.append(f"money: {money[0]} ({money[1]} to {money[2]}) for {devices} at {price:g} an hour each")
    if rehearsal.passing is None and not stages["generate"].finished:
        share = f"{pass_rate(rehearsal.config.generate.filter):.0%}"
        text.append(f"the range allows for {share} to 100% of candidates passing the filter: no model is trained yet")
    if limit > 1.02 * together[0]:
        text.append(f"at most {duration(limit)}, if every class needs as many candidates as generate.max_draws allows")
    for name, stage in stages.items():
        text += [f"{name}: {line}" for line in _details(stage, rehearsal.work[name].units)]
    scaled = ", ".join(part.what for stage in stages.values() for part in stage.parts if not part.linear)
    text.append(
        "times are the median, least and most that one of each took here, times how many the run has"
        + (f"; {scaled}: by counted work" if scaled else "")
    )
    if not peaks[1] and rehearsal.others > _BUSY:
        share = f"{rehearsal.others:.0%} of the processors' time"
        text.append(f"other programs were running and took {share}; alone the run may be faster")
    return table + [part for line in text for part in textwrap.wrap(line, _WIDTH, subsequent_indent="    ")]


def _range(least: float, most: float) -> str:
    return f"{duration(least)} to {duration(most)}"


def _row(title: str, time: str, span: str, sizes: Iterable[str]) -> str:
    return f"{title:12}{time:>13}{span:>28}" + "".join(f"{size:>9}" for size in sizes)


def _details(stage: Rehearsed, units: float) -> Iterator[str]:
    """What its time is made of, which of loader and network bounds it, and notes."""
    sums = [
        f"{part.what} {_short(median(part.each))}" if part.number(units) == 1 and not part.share
        else f"{part.number(units):,.0f} {part.what} at {_short(median(part.each))}"
        for part in stage.parts
    ]  # fmt: skip
    if sums:
        yield " + ".join(sums)
    if stage.images_per_s:
        alone = ", ".join(f"{what} alone {float(f'{r:.3g}'):,.0f} images/s" for what, r in stage.images_per_s.items())
        yield f"{alone}: the {stage.bound} is the bottleneck"
    yield from stage.notes


def _short(seconds: float) -> str:
    """5.23 ms, or as `duration`."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else duration(seconds)
