"""Numbers as a reader wants them."""

from __future__ import annotations

import re

# Control characters, bytes of file names that are no text, and the two characters that XML leaves out.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def duration(seconds: float) -> str:
    """8.4 s, 1 min 45 s or 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Bytes: 12.3 GB, 456 MB, 7.89 kB, or a dash for nothing."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * unit:
            return f"{count / unit:,.1f} {name}" if unit == 1e9 else f"{count / unit:.3g} {name}"
    return f"{count:.0f} B" if count else "-"


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 1) -> str:
    """A difference, with its sign."""
    return "" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def speed(value: float) -> str:
    """Of what was timed once: no more digits than it is worth."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def counted(count: int, one: str, more: str) -> str:
    """1 class, 3 classes."""
    return f"{count} {one if count == 1 else more}"


def readable(text: str) -> str:
    """With escapes for what UTF-8, HTML or SVG cannot hold: a class may be named by any bytes."""
    return _UNWRITABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(name: str, limit: int = 16) -> str:
    """A name on one line, cut to `limit` characters."""
    name = readable(" ".join(name.split()))
    return name if len(name) <= limit else name[: limit - 1] + "…"


def listed(names: list[str], limit: int = 8) -> str:
    """a, b and c; of more than `limit` names, the number of the others."""
    if len(names) > limit:
        names = [*names[:limit], f"{len(names) - limit} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
