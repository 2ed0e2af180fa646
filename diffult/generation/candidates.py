"""Candidates: taken from the quota, drawn, judged by the filter and recorded in the quota, batch by batch.

Exactly as many samples as each class needs, in memory, with the sampler of `diffult.generate.open_sampler` and the
extractor of `diffult.longtail.extractor.load_extractor`:

    quota = Quota(np.full(10, 100), max_draws=10.0, filter=FILTERS["distance"])
    for images, labels, indices in accepted(sampler, extractor, quota):
        ...  # uint8 [N, H, W, C], int64 [N], int64 [N]

`diffult.longtail.filter` defines which verdicts are accepted, `diffult.longtail.quota` how many samples are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from diffult.engine.device import autocast
from diffult.engine.distributed import ALONE, World
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor
from diffult.longtail.filter import Filter
from diffult.longtail.quota import Quota
from kernels.augment import normalise

_ROUND = 4  # batches that each process draws before they exchange their verdicts


@dataclass(frozen=True)
class CandidateBatch:
    """Candidates in the order they were drawn, and the images of those that passed."""

    labels: np.ndarray  # int64 [B]
    indices: np.ndarray  # int64 [B]
    distance: np.ndarray  # float32 [B], to the class centre
    verdict: np.ndarray  # uint8 [B], `Verdict` values
    passed: np.ndarray  # bool [B], accepted by the filter
    images: np.ndarray  # uint8 [passed.sum(), H, W, C]


@torch.no_grad()
def draw_candidates(
    sampler: Sampler, extractor: Extractor, filter: Filter, labels: np.ndarray, indices: np.ndarray
) -> CandidateBatch:
    """Draws the candidates of these names, int64 [B], at most the sampler's batch size, to which they are padded, and
    judges them as they will be stored: in whole grey levels."""
    count, size = len(labels), sampler.settings.batch_size
    padded = [np.concatenate([names, np.zeros(size - count, np.int64)]) for names in (labels, indices)]
    names = [torch.from_numpy(part).to(sampler.device) for part in padded]
    drawn = sampler.draw(*names)
    with autocast(sampler.dtype, sampler.device):
        judged = filter.judge(extractor, normalise(drawn), names[0])
    images, distance, verdict = (output[:count].cpu().numpy() for output in (drawn, *judged))
    passed = filter.accepts(verdict)
    return CandidateBatch(labels, indices, distance, verdict, passed, images[passed])


def generate(sampler: Sampler, extractor: Extractor, quota: Quota, world: World = ALONE) -> Iterator[CandidateBatch]:
    """Yields the batches that this process draws, until every class has its quota or has spent its limit.

    Several processes make the same list of candidates, each draws every size-th batch of it, and after a round of a
    few batches they exchange the verdicts. So none waits at each batch, and the kept set is that of one process.

    Args:
        quota: the same on every process; candidates that it holds a verdict on are not drawn again.
    """
    size = sampler.settings.batch_size
    while True:
        labels, indices = quota.next_batch(size if world.size == 1 else size * world.size * _ROUND)
        if len(labels) == 0:
            return
        judged: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start in range(world.rank * size, len(labels), size * world.size):
            part = slice(start, start + size)
            batch = draw_candidates(sampler, extractor, quota.filter, labels[part], indices[part])
            judged.append((batch.labels, batch.indices, batch.verdict))
            quota.record(*judged[-1])
            yield batch
        for verdicts in world.gather(judged):  # its own are among them, and count once
            for received in verdicts:
                quota.record(*received)


def accepted(
    sampler: Sampler, extractor: Extractor, quota: Quota
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the kept samples of each batch: images uint8 [N, H, W, C], labels and indices int64 [N]. Over all batches
    they are exactly what the quota asks for, except in a class that spent its limit. For one process."""
    for batch in generate(sampler, extractor, quota):
        labels, indices = batch.labels[batch.passed], batch.indices[batch.passed]
        kept = {c: set(quota.kept(c)) for c in np.unique(labels).tolist()}
        rows = [index in kept[c] for c, index in zip(labels.tolist(), indices.tolist(), strict=True)]
        yield batch.images[rows], labels[rows], indices[rows]
