"""When a training that is judged on the way ends: when its score no longer improves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Judgement:
    """Of a model in training.

    Attributes:
        values: to be logged, by name.
        score: lower is better.
        fault: in words, why training must not go on; empty if it may.
    """

    values: Mapping[str, float]
    score: float
    fault: str = ""


@dataclass
class EarlyStopping:
    """Judges the weights of a training every so many steps, keeps the best, and ends it when the score has not improved
    for `patience` judgements, or at a fault. A part of the training's checkpoints, the best weights included.

    The learning rate of a training that may end at any step should be constant, with an average of the weights in place
    of a decay (Hägele et al. 2024, arXiv 2405.18392: close to a decay at every step, with nothing to schedule). An
    average that forgets slowly is a tenth of the training long, however long that is: see the trainer.

    Attributes:
        every: steps between judgements.
        judge: of the present weights; the same on all processes.
        weights: copies the present weights.
        patience: judgements without an improvement after which training ends; None: it never does, and no weights are
            kept.
        what: the score, in words.
        best_step, best_score, best: of the best judgement so far without a fault, or of the first one.
        reason: in words, why training has ended; empty while it goes on.
        step: of the last judgement.
    """

    every: int
    judge: Callable[[], Judgement]
    weights: Callable[[], dict[str, Tensor]]
    patience: int | None
    what: str = "score"
    best_step: int = 0
    best_score: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""
    step: int = 0

    def __call__(self, step: int) -> Mapping[str, float]:
        """Judges after `step` steps; returns what is to be logged."""
        judgement = self.judge()
        self.step = step
        if self.patience is not None:
            self._decide(step, judgement, self.patience)
        return judgement.values

    def _decide(self, step: int, judgement: Judgement, patience: int) -> None:
        better = judgement.score < self.best_score and not judgement.fault
        if better or not self.best:
            self.best_step, self.best_score = step, judgement.score
            self.best = {name: weight.cpu() for name, weight in self.weights().items()}
        if judgement.fault:
            self.reason = judgement.fault
        elif step - self.best_step >= patience * self.every:
            self.reason = f"the {self.what} has not improved since step {self.best_step}"

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best_step", "best_score", "best", "reason", "step")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
