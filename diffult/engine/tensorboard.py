"""Losses and speed as TensorBoard event files, if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffult.errors import UserError


class TensorBoardCallback:
    """A callback of the training loop that writes every value as a scalar.

    A loop that resumes from a checkpoint, or goes back to one, hides the values written beyond it.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install 'diffult[tensorboard]'") from None
        self._writer_from = lambda step: SummaryWriter(str(folder), purge_step=step)
        self._writer: Any = None
        self._last = 0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None or step <= self._last:
            if self._writer is not None:
                self._writer.close()
            self._writer = self._writer_from(step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # calls are seconds apart, and TensorBoard shows what is on disk
        self._last = step
