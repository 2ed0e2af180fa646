"""Whether a training has diverged: exploded, or fallen back to where it began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

_EXPLODED = 10.0  # a loss this many times that of the first step is as bad as NaN
_READINGS = 5  # in a row; a single batch may be hard


class DivergenceError(Exception):
    """The loss is not finite, or many times what it was."""


class DivergenceMonitor:
    """Follows one loss of a training.

    A network may collapse: its loss jumps to that of a constant output, below where it began, and stays there. That is
    so when each of the last five readings is `collapsed` times the highest of five earlier ones in a row.

    Args:
        name: of the loss.
        collapsed: infinity for a loss that may come near 0.

    A part of the training's checkpoints: one that goes on from a checkpoint knows what the loss had been.

    Attributes:
        first: the loss of the first step, not part of the state; NaN until that is known.
        risen: whether the last reading is as high as a collapse: it may be one.
    """

    def __init__(self, name: str, collapsed: float, first: float = math.nan) -> None:
        self.name, self.collapsed, self.first, self.risen = name, collapsed, first, False
        self._recent: deque[float] = deque(maxlen=_READINGS)
        self._reached = math.inf

    def read(self, values: Mapping[str, float], step: int) -> None:
        """Takes a reading of all losses. Raises DivergenceError."""
        loss = values[self.name]
        self._recent.append(loss)
        self.risen = loss > self.collapsed * self._reached
        exploded = not all(map(math.isfinite, values.values())) or loss > _EXPLODED * self.first
        if exploded or min(self._recent) > self.collapsed * self._reached:
            losses = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            before = "" if exploded else f", was below {self._reached:.3g}"
            raise DivergenceError(f"the loss diverged by step {step} ({losses}{before})")
        if len(self._recent) == _READINGS:
            self._reached = min(self._reached, max(self._recent))

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self._reached, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reached, self._recent = float(state["reached"]), deque(state["recent"], _READINGS)
