"""The training loop that all stages share: resume, seed each step, monitor the loss, save checkpoints, log speed."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from diffult.engine.checkpoints import Checkpoints
from diffult.engine.data_wait import DataWait
from diffult.engine.device import seed_step
from diffult.engine.distributed import ALONE, World
from diffult.engine.divergence import DivergenceError, DivergenceMonitor
from diffult.engine.progress import progress_bar
from diffult.engine.threads import ThreadWatch
from diffult.errors import UserError
from diffult.runs.files import read_lines, write_text

Batch = TypeVar("Batch")
Losses = dict[str, torch.Tensor]
Callback = Callable[[int, Mapping[str, float]], None]  # steps done; losses and speed by name
log = logging.getLogger(__name__)
_LOG_EVERY = 50  # steps between readings of the loss: each one waits for the device


@dataclass(frozen=True)
class LoopConfig:
    """What a loop needs to know beside its step.

    Attributes:
        title: its name on the progress bar.
        steps: number of steps.
        checkpoint: its file, written every `every` steps and at the end; the one before is kept beside it.
        seed: torch's generators are seeded with it and the step's number before each step.
        config_hash: of the run's configuration; a checkpoint of another one is refused.
        images: per step, over all processes; 0: not logged.
        flops: of a step, over all processes; 0: not logged.
        peak: FLOP/s of the hardware at most; 0: unknown.
        metrics: a file of JSON lines, one for each reading of the loss; None: none.
        world: the processes that share each step; the first writes files and shows progress.
        monitor: name of the loss that is checked for divergence; a steady one.
        collapsed: see `DivergenceMonitor`.
    """

    title: str
    steps: int
    checkpoint: Path
    every: int
    seed: tuple[int, ...]
    config_hash: str
    images: int = 0
    flops: float = 0
    peak: float = 0
    metrics: Path | None = None
    world: World = ALONE
    monitor: str = "loss"
    collapsed: float = math.inf


class LRBackoff:
    """A factor of the learning rate: 1, and `after` once the loss has diverged and the loop has gone back."""

    def __init__(self, after: float = 0.5) -> None:
        self.factor, self.after = 1.0, after

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.factor = state["factor"]


class Check(Protocol):
    """Judges a training on the way and may end it. Called by every process, which must all come to the same."""

    every: int  # steps between calls; the last step calls it too
    reason: str  # why training ends after this step; empty: it goes on

    def __call__(self, step: int) -> Mapping[str, float]:
        """Called after `step` steps; returns values to be logged."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def learning_rate_factor(
    step: int,
    steps: int,
    warmup: float,
    milestones: tuple[float, ...] = (),
    decay: float = 0.1,
    cosine: bool = False,
) -> float:
    """Factor of the learning rate: linear warm-up over `warmup` steps, then decay at milestones (shares of all steps)
    or half a cosine to 0."""
    ramp = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if cosine:
        return ramp * 0.5 * (1 + math.cos(math.pi * step / steps))
    return ramp * decay ** sum(step >= share * steps for share in milestones)


def train_loop(
    config: LoopConfig,
    batches: Callable[[int], Iterator[Batch]],
    step: Callable[[int, Batch], Losses],
    parts: Mapping[str, Any],
    lr_backoff: LRBackoff | None = None,
    callbacks: Sequence[Callback] = (),
    check: Check | None = None,
) -> None:
    """Runs `train_steps` to its end."""
    for _ in train_steps(config, batches, step, parts, lr_backoff, callbacks, check):
        pass


def train_steps(
    config: LoopConfig,
    batches: Callable[[int], Iterator[Batch]],
    step: Callable[[int, Batch], Losses],
    parts: Mapping[str, Any],
    lr_backoff: LRBackoff | None = None,
    callbacks: Sequence[Callback] = (),
    check: Check | None = None,
) -> Iterator[int]:
    """Runs `step(i, batch)` for i in 0..steps-1, from the checkpoint on if there is one. Yields the number of steps
    done after each, so that several loops can take turns.

    Args:
        batches: gives the batches from a step on.
        step: does one step and returns its losses by name, scalar tensors; "loss" is the sum.
        parts: the state to save and restore, objects with state_dict and load_state_dict.
        lr_backoff: if given, a loss that diverges sends the loop back to its last checkpoint, once, at a lower rate.
        callbacks: called after each reading of the loss that is good, before the checkpoint is written. One that
            exchanges anything is given by every process.
        check: if given, may end the loop before its last step; saved and restored with `parts`.

    Raises:
        UserError: no checkpoint is whole, or it is of another configuration, or could not be written; or the loss
            diverged: the last good checkpoint is kept.
    """
    monitor = DivergenceMonitor(config.monitor, config.collapsed)
    own = {"lr_backoff": lr_backoff, "check": check, "divergence": monitor}
    state = {**parts, **{name: part for name, part in own.items() if part is not None}}
    with Checkpoints(config.checkpoint, config.config_hash, state, config.world) as checkpoints:
        start, monitor.first = _resume(config, checkpoints)
        while True:
            try:
                yield from _run(config, start, monitor, batches(start), step, checkpoints, callbacks, check)
                return
            except DivergenceError as error:
                found = checkpoints.newest()
                if lr_backoff is None or lr_backoff.factor != 1 or found is None:
                    raise UserError(
                        f"{config.title}: {error}; lower the learning rate, or set precision=float32 "
                        f"(last good checkpoint: {found or 'none'})"
                    ) from None
                log.warning(
                    "%s: %s; back to %s at %g times the learning rate", config.title, error, found, lr_backoff.after
                )
                start, monitor.first = _resume(config, checkpoints)
                # Saved with the next checkpoint: a loop killed before that diverges again and comes back here.
                lr_backoff.factor = lr_backoff.after


def _resume(config: LoopConfig, checkpoints: Checkpoints) -> tuple[int, float]:
    """Loads the checkpoint and drops the metrics beyond it. Returns the steps done and the first step's loss."""
    start, first = checkpoints.load()
    if start:
        log.info("%s: resuming at step %d of %d", config.title, start, config.steps)
    if config.world.is_main and config.metrics is not None and config.metrics.exists():
        readings = [reading for reading in read_lines(config.metrics) if reading["step"] <= start]
        write_text(config.metrics, "".join(json.dumps(reading) + "\n" for reading in readings))
    return start, first


def _run(
    config: LoopConfig,
    start: int,
    monitor: DivergenceMonitor,
    batches: Iterator[Batch],
    step: Callable[[int, Batch], Losses],
    checkpoints: Checkpoints,
    callbacks: Sequence[Callback],
    check: Check | None,
) -> Iterator[int]:
    writes, wait = config.world.is_main, DataWait()
    logged, since = start, time.perf_counter()
    bar = progress_bar(total=config.steps, initial=start, desc=config.title, unit="step", disable=not writes)
    with bar, ThreadWatch() as adapt_threads:
        for i, batch in zip(range(start, config.steps), wait.measured(batches), strict=False):
            if check is not None and check.reason:
                return
            seed_step(*config.seed, i)
            losses = step(i, batch)
            if math.isnan(monitor.first):  # before any update: by the first reading it may have exploded already
                monitor.first = losses[config.monitor].item()
            bar.update()
            adapt_threads()
            done = i + 1
            saves = done % config.every == 0 or done == config.steps
            judged = check is not None and (done % check.every == 0 or done == config.steps)
            if saves or judged or done % _LOG_EVERY == 0:
                checkpoints.check()
                values = {name: value.item() for name, value in losses.items()}
                monitor.read(values, done)
                seconds = time.perf_counter() - since
                speed = _speed(config, (done - logged) / seconds) | {"data_wait": round(wait.read() / seconds, 4)}
                if check is not None and judged:
                    values |= check(done)
                    saves |= bool(check.reason)
                logged, since = done, time.perf_counter()
                bar.set_postfix_str(_line(speed | values), refresh=False)
                if writes and config.metrics is not None:
                    with config.metrics.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"step": done} | speed | values) + "\n")
                for callback in callbacks:
                    callback(done, speed | values)
            if saves and not (monitor.risen and done < config.steps):
                checkpoints.save(done, monitor.first)
            yield done


def _speed(config: LoopConfig, steps_per_s: float) -> dict[str, float]:
    speed = {}
    if config.images:
        speed["images_per_s"] = round(steps_per_s * config.images, 1)
    if config.flops:
        speed["tflop_per_s"] = round(steps_per_s * config.flops / 1e12, 4)
        if config.peak:
            speed["share_of_peak"] = round(steps_per_s * config.flops / config.peak, 4)
    return speed


def _line(values: Mapping[str, float]) -> str:
    names = {"images_per_s": "img/s", "tflop_per_s": "TFLOP/s", "share_of_peak": "of peak", "data_wait": "data wait"}
    return ", ".join(f"{names.get(name, name)}={value:.4g}" for name, value in values.items())
