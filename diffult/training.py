"""The loop that every training stage shares: resume, seed each step, watch the loss, keep checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from diffult.device import seed_step
from diffult.errors import UserError
from diffult.files import load_state, save_state

Batch = TypeVar("Batch")
log = logging.getLogger(__name__)
_WATCH_EVERY = 50  # steps between looks at the loss: each look waits for the device


class Ema:
    """Exponential moving average of a network's floating-point state.

    The decay is min(ema, (1 + step) / (10 + step)), so that the first steps do not hold on to the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        averaged = [key for key, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.state[key] for key in averaged], [current[key] for key in averaged], 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for key, value in state.items():
            self.state[key].copy_(value)


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
    title: str,
    steps: int,
    batches: Callable[[int], Iterator[Batch]],
    step: Callable[[int, Batch], dict[str, torch.Tensor]],
    parts: dict[str, Any],
    checkpoint: Path,
    every: int,
    seed: tuple[int, int],
    config_hash: str,
) -> None:
    """Runs `step(i, batch)` for i in 0..steps-1, going on from the checkpoint where there is one.

    Args:
        title: what the progress line calls it.
        batches: the batches from a given step on.
        step: does one step and returns its losses by name, scalar tensors; "loss" is the sum.
        parts: what makes up the state, each with state_dict and load_state_dict.
        checkpoint: its file; written every `every` steps and at the end.
        seed: (run's seed, stage's number); torch's generators are seeded from it and i before each step.
        config_hash: of the run's configuration; a checkpoint of another one is refused.

    Raises:
        UserError: the checkpoint is damaged or of another configuration; or the loss is no longer finite: the last good
            checkpoint is kept.
    """
    start = 0
    if checkpoint.exists():
        state = load_state(checkpoint)
        if state.get("config") != config_hash:
            raise UserError(
                f"{checkpoint}: written under another configuration ({state.get('config')}, now {config_hash}); "
                "restore config.toml, or delete the checkpoint to start this stage anew"
            )
        start = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        log.info("%s: going on at step %d of %d", title, start, steps)

    with tqdm(total=steps, initial=start, desc=title, unit="step", mininterval=1.0, dynamic_ncols=True) as bar:
        for i, batch in zip(range(start, steps), batches(start), strict=False):
            seed_step(*seed, i)
            losses = step(i, batch)
            bar.update()
            last = i + 1 == steps
            if (i + 1) % _WATCH_EVERY == 0 or last or (i + 1) % every == 0:
                values = {name: value.item() for name, value in losses.items()}
                if not math.isfinite(values["loss"]):
                    raise UserError(
                        f"{title}: the loss is {values['loss']} at step {i + 1}; lower the learning rate, or set "
                        f"precision=float32 (last good checkpoint: {checkpoint if checkpoint.exists() else 'none'})"
                    )
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
            if (i + 1) % every == 0 or last:
                state = {name: part.state_dict() for name, part in parts.items()}
                save_state(checkpoint, {"step": i + 1, "config": config_hash} | state)
