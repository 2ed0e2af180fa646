"""The stages of a run, in order, and what each of them reads: a stage is redone when that changes, and only then."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args

from diffult.config import Config

Stage = Literal["pack", "extractor", "diffusion", "generate", "classifier", "evaluate", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# Settings, sections or single keys, that a stage reads itself.
_SETTINGS: dict[Stage, tuple[str, ...]] = {
    "pack": ("data",),
    "extractor": ("seed", "precision", "extractor"),
    "diffusion": ("seed", "precision", "unet", "diffusion"),
    "generate": ("seed", "precision", "generate"),
    "classifier": ("seed", "precision", "classifier"),
    "evaluate": ("groups",),
    "report": (),
}
# Settings that change where images come from, how fast a stage is or how it survives, but not what it makes.
_UNREAD = {
    "data": {"path", "train_list", "val_list", "test_list"},
    "diffusion": {"checkpoint_every", "accumulate", "on_divergence"},
    "generate": {"batch_size"},
}


def upstream(config: Config, stage: Stage) -> tuple[Stage, ...]:
    """The stages whose results change what a stage makes."""
    diffusion = config.diffusion
    sources: dict[Stage, tuple[Stage, ...]] = {
        "pack": (),
        "extractor": ("pack",),
        "diffusion": ("pack", "extractor") if diffusion.aid or diffusion.early_stopping else ("pack",),
        "generate": ("extractor", "diffusion"),
        "classifier": ("pack", "generate"),
        "evaluate": ("classifier",),
        "report": ("evaluate",),
    }
    return sources[stage]


def _unread(config: Config) -> dict[str, set[str]]:
    """_UNREAD, and what plays no part beside the other settings."""
    checks = set() if config.diffusion.early_stopping else {"check_every", "patience", "max_copies"}
    return _UNREAD | {
        "diffusion": _UNREAD["diffusion"] | checks,
        "generate": _UNREAD["generate"] | config.generate.unread - {"search"},
    }


def reads(config: Config, stage: Stage) -> dict[str, Any]:
    """The settings that a stage and everything upstream of it read, by section.

    Values that equal their defaults are left out, so that a setting that a later version adds does not invalidate
    existing runs: a default never changes, a preset may.
    """
    everything = config.model_dump(mode="json", exclude_defaults=True, exclude=_unread(config))
    own = {key: everything[key] for key in _SETTINGS[stage] if key in everything}
    for source in upstream(config, stage):
        own = reads(config, source) | own
    return own


def digest(*parts: Any) -> str:
    """Twelve hex digits of a hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def affected(before: Config, after: Config) -> list[Stage]:
    """The stages that a change of settings makes outdated, in order."""
    return [stage for stage in STAGES if reads(before, stage) != reads(after, stage)]
