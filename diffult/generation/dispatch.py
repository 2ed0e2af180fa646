"""Who draws what: batches of candidates, handed out one at a time to whichever process asks.

Every process replays one log of events, in the order of their numbers, on a quota of its own: "process r has these
verdicts on the oldest batch that it holds, and asks for one more". So all of them agree on who holds which batch, a
process learns its next batch from its own event, and none waits for another while there is a candidate to hand out. At
the end, when what is in hand is expected to do, those without a batch wait for the others: at most as long as the
slowest process takes for a batch, and once more each time the verdicts fall short of what was expected. A host that is
gone silently leaves them waiting for half an hour, or twenty times as long as any batch has taken.

The log is in the store through which torchrun's processes found each other. It does not outlive them: after a restart
the shards on disk say what is known.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from diffult.engine.distributed import ALONE, World
from diffult.errors import UserError
from diffult.longtail.quota import Quota
from diffult.reporting.text import duration

Names = tuple[np.ndarray, np.ndarray]  # labels and indices, int64 [B] each
_NONE = np.empty(0, np.uint8)
_SILENCE, _BATCHES = 1800.0, 20  # seconds that a process may take for a batch at least, and times the longest so far
_POLL = 0.01  # seconds between looks at the log of a process that waits, which so can be interrupted


class Dispatcher:
    """This process's end of the log.

    Args:
        quota: the same on every process to begin with; kept up to date here.
        size: of a batch, at most.
    """

    def __init__(self, quota: Quota, size: int, world: World = ALONE) -> None:
        self._quota, self._size, self._rank = quota, size, world.rank
        self._log = world.store() if world.size > 1 else None
        self._read = 0  # events
        self._held: list[deque[Names]] = [deque() for _ in range(world.size)]
        self._asking: deque[int] = deque()  # ranks; the first one gets the next batch
        self._mine: deque[Names] = deque()  # for this process, not yet taken
        self._since = [time.monotonic()] * world.size  # when each began its oldest batch, as seen from here
        self._longest = 0.0  # seconds that one took for a batch

    def ask(self, verdict: np.ndarray = _NONE) -> None:
        """Asks for one more batch. verdict: uint8 [B], on the oldest batch taken here that had none yet."""
        if self._log is None:
            self._apply(0, verdict)
            return
        number = self._log.add("events", 1)
        self._log.set(str(number), f"{self._rank} {verdict.tobytes().hex()}")
        self._replay(number)

    def take(self, wait: bool) -> Names | None:
        """A batch that was asked for; None when no more are needed or, unless `wait`, when none is there yet. Raises
        UserError where it waits for a process that seems to be gone."""
        while wait and not self._mine and self._quota.missing.any():
            assert self._log is not None  # alone, whoever holds no batch gets one
            while not self._log.check([str(self._read + 1)]):
                self._refuse_silence()
                time.sleep(_POLL)
            self._replay(self._read + 1)
        return self._mine.popleft() if self._mine else None

    def _refuse_silence(self) -> None:
        patience, now = max(_SILENCE, _BATCHES * self._longest), time.monotonic()
        gone = [rank for rank, held in enumerate(self._held) if held and now - self._since[rank] > patience]
        if gone:
            raise UserError(
                f"no verdicts from process {', '.join(map(str, gone))} for {duration(patience)}, on samples that only "
                "it draws: its host may be gone; the same command resumes (lower generate.batch_size if a batch takes "
                "so long)"
            )

    def _replay(self, end: int) -> None:
        """Up to the event of this number."""
        assert self._log is not None
        for event in self._log.multi_get([str(number) for number in range(self._read + 1, end + 1)]):
            rank, _, verdict = event.decode().partition(" ")
            self._apply(int(rank), np.frombuffer(bytes.fromhex(verdict), np.uint8))
        self._read = end

    def _apply(self, rank: int, verdict: np.ndarray) -> None:
        now = time.monotonic()
        if len(verdict):
            self._quota.record(*self._held[rank].popleft(), verdict)
            self._longest, self._since[rank] = max(self._longest, now - self._since[rank]), now
        self._asking.append(rank)
        while self._asking and len((names := self._quota.next_batch(self._size))[0]):
            rank = self._asking.popleft()
            if not self._held[rank]:
                self._since[rank] = now
            self._held[rank].append(names)
            if rank == self._rank:
                self._mine.append(names)
