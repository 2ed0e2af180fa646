"""The order in which samples are drawn: a function of (seed, epoch), so that training resumes at any step on any rank.

The endless stream is epoch 0, epoch 1, ... end to end; batches are cut from it and always full. A draw is named by its
position in the stream, which keys whatever is random about it. Of `world` processes, step s of rank r takes the draws
from position (s world + r) B on, so none is taken twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_CHUNK = 4096  # batches whose draws are in memory at a time


class Draws(NamedTuple):
    """n draws: int64 (n,) numbers of samples, and their int64 (n,) positions in the stream."""

    samples: np.ndarray
    positions: np.ndarray


class Order(ABC):
    """An order of samples.

    Attributes:
        length: draws an epoch.
        group: draws that belong together; a batch holds whole groups.
    """

    def __init__(self, length: int, group: int = 1) -> None:
        self.length, self.group = length, group

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The draws of one epoch, int64 (length,) sample numbers.

        Raises:
            ValueError: a negative seed or epoch.
        """
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed and epoch must not be negative, got seed {seed} and epoch {epoch}")
        return self._draw(seed, epoch).astype(np.int64, copy=False)

    @abstractmethod
    def _draw(self, seed: int, epoch: int) -> np.ndarray: ...

    def stream(self, seed: int, start: int, count: int) -> np.ndarray:
        """Draws `start` to `start + count` of the endless stream, int64 (count,).

        An epoch that it touches costs O(N): ask for many batches at once.

        Raises:
            ValueError: a negative seed, start or count.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative, got {start} and {count}")
        first, last = start // self.length, (start + max(count, 1) - 1) // self.length
        epochs = [self.epoch(seed, epoch) for epoch in range(first, last + 1)]
        return np.concatenate(epochs)[start - first * self.length :][:count]

    def steps(
        self, seed: int, batch_size: int, start: int, stop: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[Draws]:
        """One process's draws for the steps `start` to `stop`, some thousands of whole batches at a time.

        Args:
            batch_size: draws a step and process.
            rank, world: this process's number, and how many there are.

        Raises:
            ValueError: no such rank, or a batch_size below 1 or not made of whole groups.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..world - 1, got rank {rank} of {world}")
        if batch_size < 1 or batch_size % self.group:
            raise ValueError(f"the batch size must be a multiple of {self.group}, got {batch_size}")
        together = max(1, _CHUNK // world)
        for first in range(start, stop, together):
            begin, batches = first * world * batch_size, min(together, stop - first)
            draws = self.stream(seed, begin, batches * world * batch_size)
            places = begin + np.arange(len(draws))
            yield Draws(*(x.reshape(batches, world, batch_size)[:, rank].ravel() for x in (draws, places)))


class Natural(Order):
    """Each of `count` samples once an epoch."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError("an order needs samples, the set is empty")
        super().__init__(count)

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        return _generator(seed, epoch).permutation(self.length)


class ClassBalanced(Order):
    """In an epoch of N draws every class of `labels`, (N,) integers, equally often, give or take one drawn at random,
    and within a class every sample equally often, give or take one."""

    def __init__(self, labels: np.ndarray) -> None:
        labels = _row("labels", labels, "iu")
        super().__init__(len(labels))
        _, sizes = np.unique(labels, return_counts=True)
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        generator, classes = _generator(seed, epoch), len(self._members)
        draws = np.full(classes, self.length // classes)
        draws[generator.permutation(classes)[: self.length % classes]] += 1
        order = [np.resize(generator.permutation(m), d) for m, d in zip(self._members, draws, strict=True)]
        return generator.permutation(np.concatenate(order))


class Weighted(Order):
    """Every sample in proportion to its weight, give or take one draw in each epoch, and exactly on average.

    Systematic sampling: the N w_i / sum(w), laid end to end, are cut at u, u + 1, u + 2, ... Samples of equal weight
    lie side by side, in random order, so that such a group, too, is drawn as often as it should be.

    Args:
        weights: (N,) numbers, none negative, not all zero.
    """

    def __init__(self, weights: np.ndarray) -> None:
        weights = _row("weights", weights, "iuf").astype(np.float64)
        if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
            raise ValueError("weights must be finite, none negative and not all zero")
        super().__init__(len(weights))
        self._expected = weights * (len(weights) / weights.sum())

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        generator = _generator(seed, epoch)
        mixed = generator.permutation(self.length)
        mixed = mixed[np.argsort(self._expected[mixed], kind="stable")]
        ends = np.floor(np.cumsum(self._expected[mixed]) + generator.random()).astype(np.int64)
        ends = np.minimum(ends, self.length)
        ends[-1] = self.length  # whatever rounding made of it
        return generator.permutation(np.repeat(mixed, np.diff(ends, prepend=0)))


class Ratio(Order):
    """An exact number of real and of synthetic samples in each batch, in random order, each kind from a stream of its
    own. In an epoch every real sample comes once, unless `of_real` says otherwise; its last batch may reach into the
    next pass over them.

    Args:
        synthetic: (N,) booleans, which samples are synthetic.
        real, generated: of either kind a batch; the loader's batch size is a multiple of their sum.
        of_real: the order of the real samples, numbered among themselves; None: each once an epoch.

    Raises:
        ValueError: a kind that is asked for has no sample; `of_real` is of another number of samples.
    """

    def __init__(self, synthetic: np.ndarray, real: int, generated: int, of_real: Order | None = None) -> None:
        synthetic = _row("synthetic", synthetic, "b")
        if real < 1 or generated < 0:
            raise ValueError(f"a batch needs real >= 1 and generated >= 0, got {real} and {generated}")
        self._kinds: list[tuple[int, np.ndarray, Order]] = []
        for name, share, kind in (("real", real, ~synthetic), ("synthetic", generated, synthetic)):
            if share and not kind.any():
                raise ValueError(f"a batch should hold {share} {name} samples, the set has none")
            if share:
                order = of_real if name == "real" and of_real is not None else Natural(int(kind.sum()))
                if order.length != kind.sum():
                    raise ValueError(f"of_real draws {order.length} an epoch, the set has {kind.sum()} real samples")
                self._kinds.append((share, np.flatnonzero(kind), order))
        self._batches = -(-int((~synthetic).sum()) // real)
        super().__init__(self._batches * (real + generated), real + generated)

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        parts = []
        for kind, (share, numbers, order) in enumerate(self._kinds):
            own_seed = int(_generator(seed, kind).integers(2**63))
            draws = order.stream(own_seed, epoch * self._batches * share, self._batches * share)
            parts.append(numbers[draws].reshape(self._batches, share))
        return _generator(seed, epoch, len(parts)).permuted(np.concatenate(parts, axis=1), axis=1).ravel()


def _generator(*name: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(name))


def _row(name: str, values: np.ndarray, kinds: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in kinds:
        raise ValueError(f"{name} must be one a sample and not empty, got {values.dtype} of shape {values.shape}")
    return values
