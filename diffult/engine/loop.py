"""The loop that all training stages share: resume, seed each step, watch the loss, keep checkpoints, tell the rate."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from diffult.engine.device import seed_step
from diffult.errors import UserError
from diffult.runs.files import load_state, save_state, write_text

Batch = TypeVar("Batch")
Losses = dict[str, torch.Tensor]
Callback = Callable[[int, Mapping[str, float]], None]  # steps done; losses and speed by name
log = logging.getLogger(__name__)
_WATCH_EVERY = 50  # steps between looks at the loss: each look waits for the device
_EXPLODED = 10.0  # a loss so many times that of the first step is as bad as NaN


@dataclass(frozen=True)
class LoopConfig:
    """What the loop is told about the work.

    Attributes:
        title: what the progress line calls it.
        steps: how many there are in all.
        checkpoint: its file; written every `every` steps and at the end.
        seed: torch's generators are seeded from it and the step's number before each step.
        config_hash: of the run's configuration; a checkpoint of another one is refused.
        images: a step takes, over all processes.
        flops: of a step, over all processes; 0: not told.
        peak: FLOP/s that the hardware could do at the most; 0: not known.
        metrics: a file of JSON lines, one for each look at the loss; None: none.
        writes: False on all processes but one: they write no file and show no progress.
        monitor: the loss whose growth tells that the training diverges; a steady one, by name.
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
    writes: bool = True
    monitor: str = "loss"


class LRBackoff:
    """What the learning rate is multiplied by: 1, and `after` once the loss has diverged and the loop gone back."""

    def __init__(self, after: float = 0.5) -> None:
        self.factor, self.after = 1.0, after

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.factor = state["factor"]


class DivergenceError(Exception):
    """The loss is not finite, or many times what it was."""


def learning_rate_factor(
    step: int,
    steps: int,
    warmup: float,
    milestones: tuple[float, ...] = (),
    decay: float = 0.1,
    cosine: bool = False,
) -> float:
    """What the learning rate is multiplied by: linear warm-up over `warmup` steps, then decay at milestones, shares of
    all steps, or half a cosine to 0."""
    ramp = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if cosine:
        return ramp * 0.5 * (1 + math.cos(math.pi * step / steps))
    return ramp * decay ** sum(step >= share * steps for share in milestones)


def check_checkpoint(path: Path) -> None:
    """Raises UserError where a checkpoint is there but cannot be read: before any work starts, not in its middle."""
    if path.exists():
        load_state(path)


def train_loop(
    job: LoopConfig,
    batches: Callable[[int], Iterator[Batch]],
    step: Callable[[int, Batch], Losses],
    parts: dict[str, Any],
    lr_backoff: LRBackoff | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Runs `step(i, batch)` for i in 0..steps-1, going on from the checkpoint where there is one.

    Args:
        batches: the batches from a given step on.
        step: does one step and returns its losses by name, scalar tensors; "loss" is the sum.
        parts: what makes up the state, each with state_dict and load_state_dict.
        lr_backoff: given, a loss that diverges sends the loop back to its last checkpoint, once, at a lower rate.
        callbacks: called at each look at a loss that is good, so at every checkpoint, before it is written; on the
            process that writes alone.

    Raises:
        UserError: the checkpoint is damaged or of another configuration; or the loss diverged: the last good checkpoint
            is kept.
    """
    state = parts if lr_backoff is None else parts | {"lr_backoff": lr_backoff}
    start, first = _resume(job, state)
    while True:
        try:
            _run(job, start, first, batches(start), step, state, callbacks if job.writes else ())
            return
        except DivergenceError as error:
            where = job.checkpoint if job.checkpoint.exists() else "none"
            if lr_backoff is None or lr_backoff.factor != 1 or not job.checkpoint.exists():
                raise UserError(
                    f"{job.title}: {error}; lower the learning rate, or set precision=float32 "
                    f"(last good checkpoint: {where})"
                ) from None
            log.warning("%s: %s; back to %s at %g times the learning rate", job.title, error, where, lr_backoff.after)
            start, first = _resume(job, state)
            lr_backoff.factor = (
                lr_backoff.after
            )  # kept with the next checkpoint; killed before it, the loop diverges again


def _resume(job: LoopConfig, parts: dict[str, Any]) -> tuple[int, float]:
    """Loads the checkpoint into the parts. Returns the number of steps done and the monitor loss of the first one, NaN
    where that is not known."""
    start, first = 0, math.nan
    if job.checkpoint.exists():
        state = load_state(job.checkpoint)
        if state.get("config") != job.config_hash:
            raise UserError(
                f"{job.checkpoint}: written under another configuration ({state.get('config')}, now "
                f"{job.config_hash}); restore config.toml, or delete the checkpoint to start this stage anew"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start, first = state["step"], state.get("first", math.nan)
        if start:
            log.info("%s: going on at step %d of %d", job.title, start, job.steps)
    if job.writes and job.metrics is not None and job.metrics.exists():
        whole = [line for line in job.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= start]  # the rest is done again
        write_text(job.metrics, "".join(kept))
    return start, first


def _save(job: LoopConfig, step: int, first: float, parts: dict[str, Any]) -> None:
    if job.writes:
        state = {name: part.state_dict() for name, part in parts.items()}
        save_state(job.checkpoint, {"step": step, "first": first, "config": job.config_hash} | state)


def _run(
    job: LoopConfig,
    start: int,
    first: float,
    batches: Iterator[Batch],
    step: Callable[[int, Batch], Losses],
    parts: dict[str, Any],
    callbacks: Sequence[Callback],
) -> None:
    watched, since = start, time.perf_counter()
    bar = tqdm(
        total=job.steps, initial=start, desc=job.title, unit="step", mininterval=1.0, dynamic_ncols=True,
        disable=not job.writes,
    )  # fmt: skip
    with bar:
        for i, batch in zip(range(start, job.steps), batches, strict=False):
            seed_step(*job.seed, i)
            losses = step(i, batch)
            if math.isnan(first):  # before any update: by the first look the training may have exploded already
                first = losses[job.monitor].item()
            bar.update()
            done, last = i + 1, i + 1 == job.steps
            if done % _WATCH_EVERY == 0 or done % job.every == 0 or last:
                values = {name: value.item() for name, value in losses.items()}
                finite = all(math.isfinite(value) for value in values.values())
                if not finite or values[job.monitor] > _EXPLODED * first:
                    told = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
                    raise DivergenceError(f"the loss diverged by step {done} ({told})")
                now = time.perf_counter()
                speed = _speed(job, (done - watched) / (now - since))
                watched, since = done, now
                bar.set_postfix_str(_line(speed | values), refresh=False)
                if job.writes and job.metrics is not None:
                    with job.metrics.open("a") as file:
                        file.write(json.dumps({"step": done} | speed | values) + "\n")
                for callback in callbacks:
                    callback(done, speed | values)
            if done % job.every == 0 or last:
                _save(job, done, first, parts)


def _speed(job: LoopConfig, steps_per_s: float) -> dict[str, float]:
    speed = {}
    if job.images:
        speed["images_per_s"] = round(steps_per_s * job.images, 1)
    if job.flops:
        speed["tflop_per_s"] = round(steps_per_s * job.flops / 1e12, 4)
        if job.peak:
            speed["share_of_peak"] = round(steps_per_s * job.flops / job.peak, 4)
    return speed


def _line(values: dict[str, float]) -> str:
    names = {"images_per_s": "img/s", "tflop_per_s": "TFLOP/s", "share_of_peak": "of peak"}
    return ", ".join(f"{names.get(name, name)}={value:.4g}" for name, value in values.items())
