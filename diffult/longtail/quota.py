"""Which samples to draw next, and which of those that the filter accepts are kept.

A sample is named (class, index). The kept set of a class is its lowest indices that pass the filter, up to the quota,
so it depends on neither the batch size nor the order of the work nor on restarts.
"""

from __future__ import annotations

import numpy as np

from diffult.longtail.filter import FILTERS, Filter, Verdict

_UNKNOWN = b"\xff"  # in the place of a verdict


def quotas_to(target: int, counts: np.ndarray, dose: float = 1.0) -> np.ndarray:
    """How many samples each class lacks to have `target` images, times `dose`, int64 [num_classes]. The kept set of a
    smaller dose is the beginning of that of a larger one."""
    return np.rint(dose * np.maximum(target - counts, 0)).astype(np.int64)


class Quota:
    """The candidates and verdicts of a generation run, a byte for each.

    Candidates of a class are 0, 1, 2, ... up to a limit; `next_batch` hands each out once, `record` takes its verdict.
    A class is finished when it has its quota or has reached its limit.
    """

    def __init__(self, quotas: np.ndarray, max_draws: float, filter: Filter = FILTERS["distance"]) -> None:
        """
        Args:
            quotas: int64 [num_classes], how many accepted samples each class needs.
            max_draws: at most ceil(quota * max_draws) candidates are drawn for a class.
        """
        self.filter = filter
        self.quotas = np.asarray(quotas, dtype=np.int64)
        self.limits = np.ceil(self.quotas * max_draws).astype(np.int64)
        self._verdicts = [bytearray() for _ in self.quotas]
        self._known, self._passed, self._open, self._next, self._settled, self._counted = (
            np.zeros_like(self.quotas) for _ in range(6)
        )
        # Of each class `_known` verdicts are there, of which `_passed` are accepted; `_open` candidates are handed out
        # and have none yet; below `_next` all are one or the other. Below `_settled` every index has its verdict, and
        # `_counted` of them passed: what passed above a gap, of a lost shard or a slower process, counts only when the
        # gap is closed, so that the kept set is that of the lowest indices.

    def next_batch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `size` new candidates, (labels, indices) int64; both empty when every class is finished, or when what
        is handed out is expected to do.

        Each class in turn gets what it lacks, divided by its rate of acceptance so far. If that does not fill the
        batch, these classes get more of the same: a batch costs as much when it is short.
        """
        lacking = self.quotas - self._passed
        expected = np.ceil(lacking * (self._known + 1) / (self._passed + 1)).astype(np.int64) - self._open
        ends = np.array([len(verdicts) for verdicts in self._verdicts])
        gaps = np.maximum(self._next, ends) - self._known - self._open  # below the last known, and in nobody's hand
        wanted = np.where(self.missing > 0, np.maximum(expected, gaps), 0)
        labels, indices, room = [np.empty(0, np.int64)], [np.empty(0, np.int64)], size
        while room > 0 and (wanted > 0).any():
            for c in np.flatnonzero(wanted > 0).tolist():
                taken = self._take(c, min(int(wanted[c]), room))
                wanted[c] = 0 if len(taken) < wanted[c] else wanted[c]
                labels.append(np.full_like(taken, c))
                indices.append(taken)
                room -= len(taken)
                if room == 0:
                    break
        return np.concatenate(labels), np.concatenate(indices)

    def _take(self, c: int, wanted: int) -> np.ndarray:
        """The lowest `wanted` candidates that are neither known nor handed out, as far as the limit allows."""
        begin, limit = int(self._next[c]), int(self.limits[c])
        verdicts = np.frombuffer(self._verdicts[c], np.uint8)
        gaps = begin + np.flatnonzero(verdicts[begin:limit] == ord(_UNKNOWN))[:wanted]
        beyond = max(begin, len(verdicts)) + np.arange(wanted - len(gaps))
        taken = np.concatenate([gaps, beyond[beyond < limit]])
        self._next[c] = taken[-1] + 1 if len(taken) else limit
        self._open[c] += len(taken)
        return taken

    def record(self, labels: np.ndarray, indices: np.ndarray, verdict: np.ndarray) -> None:
        """Enters the verdicts of candidates: int64 [B], int64 [B], `Verdict` values uint8 [B]. The first one counts."""
        order = np.argsort(labels, kind="stable")
        classes, first = np.unique(labels[order], return_index=True)
        for c, rows in zip(classes.tolist(), np.split(order, first)[1:], strict=True):
            self._record(c, indices[rows], verdict[rows])

    def _record(self, c: int, indices: np.ndarray, verdict: np.ndarray) -> None:
        verdicts = self._verdicts[c]
        verdicts.extend(_UNKNOWN * (int(indices.max()) + 1 - len(verdicts)))
        table = np.frombuffer(verdicts, np.uint8)
        new = table[indices] == ord(_UNKNOWN)
        table[indices[new]] = verdict[new]
        self._known[c] += new.sum()
        self._passed[c] += self.filter.accepts(verdict[new]).sum()
        self._open[c] -= (indices[new] < self._next[c]).sum()
        settled = verdicts.find(_UNKNOWN, self._settled[c])
        settled = len(verdicts) if settled < 0 else settled
        self._counted[c] += sum(verdicts.count(int(value), self._settled[c], settled) for value in self.filter.keeps)
        self._settled[c] = settled

    @property
    def missing(self) -> np.ndarray:
        """How many accepted samples each class lacks, int64 [num_classes]; 0 where it is finished."""
        return np.where(self._known >= self.limits, 0, np.maximum(self.quotas - self._counted, 0))

    @property
    def drawn(self) -> np.ndarray:
        """How many candidates of each class have their verdict, int64 [num_classes]."""
        return self._known.copy()

    @property
    def accepted(self) -> np.ndarray:
        """How many samples each class keeps, int64 [num_classes]."""
        return np.minimum(self._counted, self.quotas)

    def kept(self, c: int) -> np.ndarray:
        """The kept indices of class c, int64, rising: the lowest that passed, up to the quota."""
        passed = self.filter.accepts(np.frombuffer(self._verdicts[c], np.uint8))
        return np.flatnonzero(passed)[: self.quotas[c]]

    def kept_names(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels and indices of all kept samples, int64 [N] each, in the order (class, index)."""
        kept = [self.kept(c) for c in range(len(self.quotas))]
        return np.repeat(np.arange(len(kept)), [len(indices) for indices in kept]), np.concatenate(kept)

    def tally(self, c: int) -> dict[str, int]:
        """How many candidates of class c were drawn and accepted, and their verdicts, by name.

        Counts those up to the last one kept, or all if the class is short, so that the figures do not depend on the
        batch size.
        """
        kept = self.kept(c)
        end = int(kept[-1]) + 1 if len(kept) and len(kept) == self.quotas[c] else int(self.limits[c])
        verdicts = {v.name.lower(): self._verdicts[c].count(int(v), 0, end) for v in Verdict}
        return {"drawn": sum(verdicts.values()), "accepted": len(kept)} | verdicts
