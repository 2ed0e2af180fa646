"""Which samples to draw next, and which of those that the filter accepts are kept.

A sample is named (class, index). The kept set of a class is its lowest indices that pass the filter, up to the quota,
so it depends on neither the batch size nor the order of the work nor on restarts.
"""

from __future__ import annotations

import numpy as np

from diffult.longtail.filter import FILTERS, Filter, Verdict


def quotas_to(target: int, counts: np.ndarray, dose: float = 1.0) -> np.ndarray:
    """How many samples each class lacks to have `target` images, times `dose`, int64 [num_classes]. The kept set of a
    smaller dose is the beginning of that of a larger one."""
    return np.rint(dose * np.maximum(target - counts, 0)).astype(np.int64)


class Quota:
    """The candidates and verdicts of a generation run.

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
        self._verdicts: list[dict[int, int]] = [{} for _ in self.quotas]
        # Below `_settled` every index has its verdict; `_passed` counts those that passed. What passed above a gap,
        # left by a lost shard, counts only when the gap is closed, so that the kept set is that of the lowest indices.
        self._settled = [0] * len(self.quotas)
        self._passed = np.zeros_like(self.quotas)
        self._next = [0] * len(self.quotas)  # below it, every index has its verdict or is handed out

    def next_batch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `size` new candidates, (labels, indices) int64; both empty when every class is finished.

        Each class in turn gets what it lacks, divided by its rate of acceptance so far.
        """
        labels: list[int] = []
        indices: list[int] = []
        missing = self.missing
        for c in np.flatnonzero(missing > 0).tolist():
            rate = (self._passed[c] + 1) / (len(self._verdicts[c]) + 1)
            taken = self._take(c, min(int(np.ceil(missing[c] / rate)), size - len(labels)))
            labels += [c] * len(taken)
            indices += taken
            if len(labels) == size:
                break
        return np.array(labels, dtype=np.int64), np.array(indices, dtype=np.int64)

    def _take(self, c: int, wanted: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < wanted and self._next[c] < self.limits[c]:
            if self._next[c] not in self._verdicts[c]:
                taken.append(self._next[c])
            self._next[c] += 1
        return taken

    def record(self, labels: np.ndarray, indices: np.ndarray, verdict: np.ndarray) -> None:
        """Enters the verdicts of candidates: int64 [B], int64 [B], `Verdict` values [B]."""
        for c, i, value in zip(labels.tolist(), indices.tolist(), verdict.tolist(), strict=True):
            self._verdicts[c].setdefault(i, value)
        for c in np.unique(labels).tolist():
            while (value := self._verdicts[c].get(self._settled[c])) is not None:
                self._passed[c] += value in self.filter.keeps
                self._settled[c] += 1

    @property
    def missing(self) -> np.ndarray:
        """How many accepted samples each class lacks, int64 [num_classes]; 0 where it is finished."""
        spent = np.array([len(v) for v in self._verdicts]) >= self.limits
        return np.where(spent, 0, np.maximum(self.quotas - self._passed, 0))

    @property
    def drawn(self) -> list[int]:
        """How many candidates of each class have their verdict."""
        return [len(verdicts) for verdicts in self._verdicts]

    @property
    def accepted(self) -> np.ndarray:
        """How many samples each class keeps, int64 [num_classes]."""
        return np.minimum(self._passed, self.quotas)

    def kept(self, c: int) -> list[int]:
        """The kept indices of class c: the lowest that passed, up to the quota."""
        passed = (i for i, v in self._verdicts[c].items() if v in self.filter.keeps)
        return sorted(passed)[: int(self.quotas[c])]

    def tally(self, c: int) -> dict[str, int]:
        """How many candidates of class c were drawn and accepted, and their verdicts, by name.

        Counts those up to the last one kept, or all if the class is short, so that the figures do not depend on the
        batch size.
        """
        kept = self.kept(c)
        end = kept[-1] + 1 if kept and len(kept) == self.quotas[c] else self.limits[c] if self.quotas[c] else 0
        counted = [v for i, v in self._verdicts[c].items() if i < end]
        verdicts = {v.name.lower(): counted.count(v) for v in Verdict}
        return {"drawn": len(counted), "accepted": len(kept)} | verdicts
