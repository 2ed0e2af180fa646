"""Progress on a terminal and in a log."""

from __future__ import annotations

import io
import sys

import pytest

from diffult.engine import progress
from diffult.engine.progress import progress_bar


def test_a_log_has_a_line_a_minute_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(total=300, desc="diffusion", unit="step") as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(300):
            now[0] += 1.0
            bar.set_postfix_str("loss=0.5", refresh=False)
            bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and len(lines) == 5 + 1
    assert lines[0].startswith("diffusion:  20% 60/300 [") and lines[-1].startswith("diffusion: 100% 300/300 [")
    assert all("loss=0.5]" in line for line in lines)


def test_what_takes_no_time_is_not_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress_bar([1, 2], "pack", unit="img")) == [1, 2] and not log.getvalue()


def test_a_terminal_has_one_line_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress_bar([1, 2], "pack", unit="img"))
    assert "\r" in terminal.getvalue() and "100%" in terminal.getvalue()
    assert progress._EVERY == 60
