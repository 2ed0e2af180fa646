"""Pieces of work one after the other within a budget of seconds, in a results file that is rewritten after each.

A piece that fails is recorded and the next begins. The end of the budget breaks off the piece at work. Where an error
has lost the card to this process (an illegal address), it starts anew with --resume for the pieces that are left.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffult.reporting.text import duration
from diffult.runs.files import read_json, write_json

Piece = tuple[str, Callable[[], Any]]
FAILED, NOT_REACHED = 1, 3  # exit codes


class _Spent(BaseException):
    """The budget is. No Exception: nothing that a piece calls may take it for a failure of its own."""


class Ledger:
    """What was done of some pieces of work, kept in a file.

    Attributes:
        done: results by the piece's name.
        failed: in words, why there is none.
    """

    def __init__(self, file: Path, about: dict[str, Any], budget_s: float | None = None, resume: bool = False) -> None:
        """
        Args:
            about: what else the file holds.
            budget_s: from now on; None: no end.
            resume: pieces that the file holds already, done or failed, are not run again.
        """
        before = read_json(file) if resume and file.exists() else {}
        self.file, self.about = file, about
        self.done: dict[str, Any] = before.get("done", {})
        self.failed: dict[str, str] = before.get("failed", {})
        self._seconds_before: float = before.get("seconds", 0.0)
        self._begun = time.monotonic()
        self._budget_s = float("inf") if budget_s is None else budget_s
        self._at_work = False

    def run(self, pieces: Iterable[Piece]) -> int:
        """Runs the pieces in order and prints what failed and what was not reached.

        Returns:
            The exit code: 0, FAILED, or NOT_REACHED where nothing failed.
        """
        not_reached: list[str] = []
        with self._alarm():
            for name, work in pieces:
                if name in self.done or name in self.failed:
                    continue
                if self._left() <= 0 or not self._run_one(name, work):
                    not_reached.append(name)
        self._write(not_reached)
        print(f"{len(self.done)} done in {duration(time.monotonic() - self._begun)}: {self.file}")
        for name, why in self.failed.items():
            print(f"failed: {name}: {why}")
        if not_reached:
            print(f"not reached ({len(not_reached)}): {', '.join(not_reached)}")
        return FAILED if self.failed else NOT_REACHED if not_reached else 0

    def _run_one(self, name: str, work: Callable[[], Any]) -> bool:
        """Whether the piece came to its end, good or bad."""
        begun = time.monotonic()
        try:
            self._at_work = True
            self.done[name] = work()
            self._at_work = False
            print(f"{name}: {self.done[name]} ({duration(time.monotonic() - begun)})", flush=True)
        except _Spent:
            return False
        except Exception as error:
            self._at_work = False
            self.failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:500]}"
            print(f"failed: {name}: {self.failed[name]}", flush=True)
        self._write([])
        if name in self.failed and _card_is_lost():
            self._start_anew()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return True

    def _write(self, not_reached: list[str]) -> None:
        seconds = round(self._seconds_before + time.monotonic() - self._begun, 1)
        content = {"seconds": seconds, "failed": self.failed, "not_reached": not_reached, "done": self.done}
        write_json(self.file, self.about | content)

    def _left(self) -> float:
        return self._begun + self._budget_s - time.monotonic()

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        """Within, the piece at work is broken off when the budget is spent."""

        def ring(*_: Any) -> None:
            if self._at_work:
                self._at_work = False
                raise _Spent

        before = signal.signal(signal.SIGALRM, ring)
        if self._budget_s < float("inf"):
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, self._left()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _start_anew(self) -> None:
        left = ["--budget", f"{max(1.0, self._left()):.0f}"] if self._budget_s < float("inf") else []
        print("the card is lost to this process: starting anew", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--resume", *left])


def _card_is_lost() -> bool:
    """Whether an error has left this process's CUDA context beyond use."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
