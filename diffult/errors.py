"""The exception whose message a user reads, and parts of such messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 120, 120, 120


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. Verbs print it and exit with 2."""


class DamagedError(UserError):
    """A file whose content does not parse."""


def shown(value: Any) -> str:
    """What a user gave, for a message: its repr, shortened."""
    return _SHORT.repr(value)


def first_line(error: BaseException, most: int = 200) -> str:
    """Its message's first line, cut to `most` characters; its type's name where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:most]


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'NAME'?`, or nothing if no name is near."""
    close = get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, shortened, and how many more there are."""
    texts = [name if name.isprintable() and len(name) <= 20 else shown(name[:20]) for name in names[:most]]
    return ", ".join(texts) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_of(names: Iterable[str], given: str) -> str:
    """Returns `given`, or raises ValueError with the known names and the nearest if it is not among them."""
    known = list(names)
    if given not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {given!r}{nearest(given, known)}")
    return given
