"""Progress bars: one line that moves on a terminal, now and then a line of its own in a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_EVERY = 60.0  # seconds between lines in a file: a log of two hours stays readable
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """Standard error, each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*arguments: Any, **options: Any) -> tqdm[Any]:
    """A `tqdm` on standard error with these options. Where that is no terminal, such as a log, no line is overwritten:
    a new one a minute, and one at the end of what took a second."""
    if sys.stderr.isatty():
        return tqdm(*arguments, mininterval=1.0, dynamic_ncols=True, **options)
    pace = {"mininterval": _EVERY, "miniters": 1, "delay": 1.0}
    return tqdm(*arguments, file=_Lines(), bar_format=_LINE, **pace, **options)
