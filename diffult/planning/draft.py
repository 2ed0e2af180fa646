"""Settings as they are chosen one after the other, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Draft:
    """A document of settings that grows; what the user has set wins over what is put.

    Attributes:
        fixed: the user's settings, as `parse_overrides` gives them.
        document: of all settings so far.
        comments: why each was chosen, by `section.key`.
        notes: what the user should know, a line each.
    """

    fixed: Mapping[str, Any]
    document: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set_by_user(self, key: str) -> Any:
        """The user's value of `section.key`, None if there is none."""
        value: Any = self.fixed
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def put(self, key: str, value: Any, why: str = "") -> Any:
        """Sets a value unless the user has; returns what holds."""
        if (fixed := self.set_by_user(key)) is not None:
            value, why = fixed, "Set on the command line."
        *section, name = key.split(".")
        target = self.document
        for part in section:
            target = target.setdefault(part, {})
        target[name] = value
        self.comments.pop(key, None)
        if why:
            self.comments[key] = why
        return value
