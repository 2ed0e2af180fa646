"""Candidates: taken from the quota, drawn, judged by the filter and recorded in the quota, batch by batch.

Exactly as many samples as each class needs, in memory, with the sampler of `diffult.generate.open_sampler` and the
extractor of `diffult.longtail.extractor.load_extractor`:

    quota = Quota(np.full(10, 100), max_draws=10.0, filter=FILTERS["distance"])
    for images, labels, indices in accepted(sampler, extractor, quota):
        ...  # uint8 [N, H, W, C], int64 [N], int64 [N]

`diffult.longtail.filter` defines which verdicts are accepted, `diffult.longtail.quota` how many samples are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from diffult.engine.device import autocast
from diffult.engine.distributed import ALONE, World
from diffult.generation.dispatch import Dispatcher
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor
from diffult.longtail.filter import Filter
from diffult.longtail.quota import Quota
from kernels.augment import normalise


@dataclass(frozen=True)
class CandidateBatch:
    """Candidates in the order they were drawn, and the images of those that passed."""

    labels: np.ndarray  # int64 [B]
    indices: np.ndarray  # int64 [B]
    distance: np.ndarray  # float32 [B], to the class centre
    verdict: np.ndarray  # uint8 [B], `Verdict` values
    passed: np.ndarray  # bool [B], accepted by the filter
    images: np.ndarray  # uint8 [passed.sum(), H, W, C]


def draw_candidates(
    sampler: Sampler, extractor: Extractor, filter: Filter, labels: np.ndarray, indices: np.ndarray
) -> CandidateBatch:
    """Draws the candidates of these names, int64 [B], at most the sampler's batch size, to which they are padded, and
    judges them as they will be stored: in whole grey levels."""
    return begin_candidates(sampler, extractor, filter, labels, indices)()


@torch.no_grad()
def begin_candidates(
    sampler: Sampler, extractor: Extractor, filter: Filter, labels: np.ndarray, indices: np.ndarray
) -> Callable[[], CandidateBatch]:
    """As `draw_candidates`; on CUDA, where drawing and the copy to the host are only queued here, what is returned
    waits for them."""
    count, size = len(labels), sampler.settings.batch_size
    padded = [np.concatenate([names, np.zeros(size - count, np.int64)]) for names in (labels, indices)]
    names = [torch.from_numpy(part).to(sampler.device) for part in padded]
    drawn = sampler.draw(*names)
    with autocast(sampler.dtype, sampler.device):
        judged = filter.judge(extractor, normalise(drawn), names[0])
    outputs = [output[:count].to("cpu", non_blocking=True) for output in (drawn, *judged)]  # to pinned memory
    copied = torch.cuda.current_stream(sampler.device).record_event() if sampler.device.type == "cuda" else None

    def finish() -> CandidateBatch:
        if copied is not None:
            copied.synchronize()
        images, distance, verdict = (output.numpy() for output in outputs)
        passed = filter.accepts(verdict)
        return CandidateBatch(labels, indices, distance, verdict, passed, images[passed])

    return finish


def generate(sampler: Sampler, extractor: Extractor, quota: Quota, world: World = ALONE) -> Iterator[CandidateBatch]:
    """Yields the batches that this process draws, until every class has its quota or has spent its limit. The kept set
    is that of one process, however many there are: see `diffult.generation.dispatch`. On CUDA a batch is queued while
    the one before is drawn, so that the card never waits for the host.

    Args:
        quota: the same on every process; candidates that it holds a verdict on are not drawn again.
    """
    dispatcher = Dispatcher(quota, sampler.settings.batch_size, world)
    drawing: deque[Callable[[], CandidateBatch]] = deque()
    for _ in range(2 if sampler.device.type == "cuda" else 1):
        dispatcher.ask()
    while True:
        while (names := dispatcher.take(wait=not drawing)) is not None:
            drawing.append(begin_candidates(sampler, extractor, quota.filter, *names))
        if not drawing:
            return
        batch = drawing.popleft()()
        dispatcher.ask(batch.verdict)
        yield batch


def accepted(
    sampler: Sampler, extractor: Extractor, quota: Quota
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the kept samples of each batch: images uint8 [N, H, W, C], labels and indices int64 [N]. Over all batches
    they are exactly what the quota asks for, except in a class that spent its limit. For one process."""
    for batch in generate(sampler, extractor, quota):
        labels, indices = batch.labels[batch.passed], batch.indices[batch.passed]
        kept = {c: set(quota.kept(c).tolist()) for c in np.unique(labels).tolist()}
        rows = [index in kept[c] for c, index in zip(labels.tolist(), indices.tolist(), strict=True)]
        yield batch.images[rows], labels[rows], indices[rows]
