"""Training state on disk, from which an interrupted loop resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffult.errors import UserError
from diffult.runs.files import load_state, save_state


def save_checkpoint(path: Path, step: int, first_loss: float, config_hash: str, parts: Mapping[str, Any]) -> None:
    """Writes the state of `parts` after `step` steps.

    Args:
        first_loss: the monitored loss of the first step.
        parts: objects with state_dict and load_state_dict, by name.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(path, {"step": step, "first": first_loss, "config": config_hash} | state)


def load_checkpoint(path: Path, config_hash: str, parts: Mapping[str, Any]) -> tuple[int, float]:
    """Loads a checkpoint into `parts`. One that it lacks stays new: settings that no hash reads may add it later.

    Returns:
        The steps done and the monitored loss of the first step; 0 and NaN if there is no checkpoint.

    Raises:
        UserError: the checkpoint is damaged or was written under another configuration.
    """
    if not path.exists():
        return 0, math.nan
    state = load_state(path)
    if state.get("config") != config_hash:
        raise UserError(
            f"{path}: written under another configuration ({state.get('config')}, now {config_hash}); "
            "restore config.toml, or delete the checkpoint to start this stage anew"
        )
    try:
        for name, part in parts.items():
            if name in state:
                part.load_state_dict(state[name])
        return int(state["step"]), float(state.get("first", math.nan))
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: damaged checkpoint ({reason}); delete it to restart this stage") from None
