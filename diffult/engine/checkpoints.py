"""Training state on disk, from which an interrupted loop resumes: the last two checkpoints, written while training goes
on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from diffult.engine.distributed import ALONE, World
from diffult.errors import DamagedError, UserError
from diffult.runs.files import damaged_checkpoint, is_of_the_machine, load_state, save_state
from diffult.runs.shared_disk import wait_for_same_files
from kernels.adamw_ema import AdamWEma

T = TypeVar("T")
log = logging.getLogger(__name__)


class Checkpoints:
    """The last two checkpoints of a training, NAME.pt and the one before it, NAME.previous.pt.

    The state is copied to host memory at its step and written by a thread while training goes on, one at a time; the
    `with` block ends when all is on disk. Of several processes the first writes, and all call each method.
    """

    def __init__(self, path: Path, config_hash: str, parts: Mapping[str, Any], world: World = ALONE) -> None:
        """
        Args:
            config_hash: of the configuration; a checkpoint of another one is refused.
            parts: the state, objects with state_dict and load_state_dict, by name.
        """
        self.path, self.config_hash, self.parts, self.world = path, config_hash, parts, world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.finish()

    def save(self, step: int, first_loss: float) -> None:
        """Begins to write the state after `step` steps.

        Args:
            first_loss: the monitored loss of the first step.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        if self.world.is_main:
            # Training changes the tensors while they are written.
            copies = {name: x if isinstance(self.parts[name], AdamWEma) else _copied(x) for name, x in parts.items()}
            state = {"step": step, "first": first_loss, "config": self.config_hash} | copies
            self._writing = self._thread.submit(save_state, self.path, state, previous(self.path))

    def check(self) -> None:
        """Raises the error of a write that has failed, as `finish` does, but waits for none."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Waits until the checkpoint is on disk. Raises UserError where it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def newest(self) -> Path | None:
        """The file to resume from, unless it is damaged; None if there is none."""
        self.finish()
        return self.world.gather(next(iter(_found(self.path)), None))[0]

    def load(self) -> tuple[int, float]:
        """Loads the newest checkpoint that is whole. A part that it lacks stays new: settings that no hash reads may
        add it later.

        Returns:
            The steps done and the monitored loss of the first step; 0 and NaN if there is no checkpoint.

        Raises:
            UserError: none is whole, the newest was written under another configuration, or other processes find
                another one.
            OSError, MemoryError, RuntimeError: the newest cannot be read now; it is left as it is.
        """
        self.finish()
        wait_for_same_files([self.path.parent], self.world)
        path, (step, first) = _newest_whole(self.path, self._load) or (None, (0, math.nan))
        everyone = self.world.gather(step)
        if len(set(everyone)) > 1:
            raise UserError(
                f"{self.path}: the processes find checkpoints of steps {', '.join(map(str, everyone))}; put the run "
                "on a disk that all of them share"
            )
        if path != self.path and self.path.exists() and self.world.is_main:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self.path.replace(aside)  # or it would take the place of the one before
            log.warning(
                "%s: damaged checkpoint, set aside as %s; going on from the one before, of step %d",
                self.path, aside.name, step,
            )  # fmt: skip
        return step, first

    def _load(self, path: Path) -> tuple[int, float]:
        state = load_state(path)
        if state.get("config") != self.config_hash:
            raise UserError(
                f"{path}: written under another configuration ({state.get('config')}, now {self.config_hash}); "
                "restore config.toml, or delete the checkpoint to start this stage anew"
            )
        try:
            for name, part in self.parts.items():
                if name in state:
                    part.load_state_dict(state[name])
            return int(state["step"]), float(state.get("first", math.nan))
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            if is_of_the_machine(error):
                raise
            raise damaged_checkpoint(path, error) from None


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_suffix(".previous.pt")


def check_checkpoints(folder: Path) -> None:
    """Raises DamagedError if a training in the folder has checkpoints, but none that is whole."""
    files = folder.glob("*state*.pt")
    for path in sorted({file.with_name(file.name.replace(".previous.pt", ".pt")) for file in files}):
        _newest_whole(path, load_state)


def _newest_whole(path: Path, read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """What `read` gets from the newest checkpoint that it does not find damaged, and which that is; None if there is no
    checkpoint. Raises DamagedError where it finds all of them damaged."""
    damaged = None
    for file in _found(path):
        try:
            return file, read(file)
        except DamagedError as error:
            damaged = damaged or error
    if damaged is not None:
        others = "".join(f" and {file.name}, damaged too," for file in _found(path)[1:])
        raise DamagedError(str(damaged).replace("delete it", f"delete it{others}"))
    return None


def _found(path: Path) -> list[Path]:
    """The files that are there, the newest first."""
    return [file for file in (path, previous(path)) if file.exists()]


def _copied(value: Any) -> Any:
    """A state whose tensors are copies in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value
