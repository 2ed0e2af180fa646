"""Commands that run side by side, each in a process with its own log, and end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

_PATIENCE = 10.0  # seconds that children have to end by themselves before they are killed


class Children:
    """A context that ends the processes started in it; SIGTERM interrupts it as Ctrl-C does.

    `run` may be called from several threads.
    """

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def run(self, command: list[str], log: Path, threads: int) -> int:
        """Runs a command on so many threads, or the fewer that the environment sets, its output in a file; returns its
        exit code, 130 after `stop`."""
        limits = {name: _fewer(os.environ.get(name, ""), threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            with self._lock:
                if self._stopped:
                    return 130
                # In a group of its own: Ctrl-C reaches it once, from `stop`.
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | limits, process_group=0
                )
                self._alive.add(child)
            try:
                return child.wait()
            finally:
                with self._lock:
                    self._alive.discard(child)

    def stop(self) -> None:
        """Interrupts every process that is running, and waits for it; none starts any more."""
        with self._lock:
            self._stopped, alive = True, list(self._alive)
        for child in alive:
            child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _PATIENCE
        for child in alive:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def _fewer(given: str, threads: int) -> str:
    """The value of a variable such as OMP_NUM_THREADS: `given`, unless it is more than `threads`, or no number."""
    return str(min(int(given), threads) if given.isdecimal() and int(given) > 0 else threads)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
