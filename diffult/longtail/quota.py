"""Which samples to draw next, and which of those that the filter accepts are kept.

A sample is named (class, index). The kept set of a class is its lowest indices that pass the filter, up to the quota,
so it depends on neither the batch size nor the order of the work nor on restarts.
"""

from __future__ import annotations

import numpy as np

from diffult.longtail.filter import FILTERS, Filter, Verdict


def quotas_to(target: int, counts: np.ndarray) -> np.ndarray:
    """How many samples each class lacks to have `target` images, int64 [num_classes]."""
    return np.maximum(target - counts, 0)


class Quota:
    """The ledger of a generation run.

    Candidates of a class are 0, 1, 2, ... up to a limit; each is handed out once by `next_batch` and judged once by
    `record`. A class is finished when it has its quota, or when its limit is spent: a class whose samples hardly ever
    pass ends short, it never loops for ever.
    """

    def __init__(self, quotas: np.ndarray, max_draws: float, filter: Filter = FILTERS["distance"]) -> None:
        """
        Args:
            quotas: int64 [num_classes], how many accepted samples each class needs.
            max_draws: at most ceil(quota * max_draws) candidates are drawn for a class.
            filter: says which verdicts are accepted.
        """
        self.filter = filter
        self.quotas = np.asarray(quotas, dtype=np.int64)
        self.limits = np.ceil(self.quotas * max_draws).astype(np.int64)
        self._verdicts: list[dict[int, int]] = [{} for _ in self.quotas]
        # Below `_settled` every index is judged; `_passed` counts those that passed. What passed above a gap, left by
        # a lost shard, counts only when the gap is closed: else the kept set would not be that of the lowest indices.
        self._settled = [0] * len(self.quotas)
        self._passed = np.zeros_like(self.quotas)
        self._next = [0] * len(self.quotas)  # below it, every index is judged or handed out

    def next_batch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `size` candidates, (labels, indices) int64, none judged before; both empty when nothing is left to do.

        Classes take turns in order; each asks for what it still lacks, divided by its rate of acceptance so far.
        """
        labels: list[int] = []
        indices: list[int] = []
        missing = self.missing
        for c in np.flatnonzero(missing > 0).tolist():
            judged = self._verdicts[c]
            rate = (self._passed[c] + 1) / (len(judged) + 1)
            wanted = min(int(np.ceil(missing[c] / rate)), size - len(labels))
            taken = self._take(c, wanted)
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
        for c, i, judged in zip(labels.tolist(), indices.tolist(), verdict.tolist(), strict=True):
            self._verdicts[c].setdefault(i, judged)
        for c in np.unique(labels).tolist():
            while (judged := self._verdicts[c].get(self._settled[c])) is not None:
                self._passed[c] += judged in self.filter.keeps
                self._settled[c] += 1

    @property
    def missing(self) -> np.ndarray:
        """How many accepted samples each class lacks, int64 [num_classes]; 0 where it is finished."""
        spent = np.array([len(v) for v in self._verdicts]) >= self.limits
        return np.where(spent, 0, np.maximum(self.quotas - self._passed, 0))

    @property
    def drawn(self) -> list[int]:
        """How many candidates of each class have been judged."""
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
        """How many candidates of class c were drawn, and their fates: {"drawn", "accepted", "id", "aid", "ood"}.

        Counted are those up to the last one kept, or all where the class is short: what was drawn beyond is waste of
        the batching, and would make the figures depend on the batch size.
        """
        kept = self.kept(c)
        end = kept[-1] + 1 if kept and len(kept) == self.quotas[c] else self.limits[c] if self.quotas[c] else 0
        counted = [v for i, v in self._verdicts[c].items() if i < end]
        verdicts = {v.name.lower(): counted.count(v) for v in Verdict}
        return {"drawn": len(counted), "accepted": len(kept)} | verdicts
