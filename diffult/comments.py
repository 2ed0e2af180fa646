"""Comments in a TOML document of settings: lines above a key that say why it has its value."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping

_WIDTH = 118
_TABLE, _KEY = re.compile(r"\[([\w.]+)\]"), re.compile(r"(\w+) = ")


def with_comments(toml: str, comments: Mapping[str, str]) -> str:
    """The document, as tomli_w writes it, with the comment of each `section.key` above it; others are left out."""
    lines = []
    for key, line in _keys(toml):
        if key in comments:
            lines += [f"# {part}" for part in textwrap.wrap(comments[key], _WIDTH)]
        lines.append(line)
    return "\n".join(lines) + "\n"


def comments_in(toml: str) -> dict[str, str]:
    """By `section.key`, the comment right above it, its lines joined."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for key, line in _keys(toml):
        if line.startswith("#"):
            waiting.append(line.lstrip("# "))
            continue
        if key and waiting:
            found[key] = " ".join(waiting)
        waiting = []
    return found


def _keys(toml: str) -> Iterator[tuple[str, str]]:
    """Each line, and the `section.key` that it sets, "" if none."""
    section = ""
    for line in toml.rstrip("\n").split("\n"):  # a string may hold other ends of lines
        table, key = _TABLE.match(line), _KEY.match(line)
        if table:
            section = f"{table[1]}."
        yield section + key[1] if key else "", line
