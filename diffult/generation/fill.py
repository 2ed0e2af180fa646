"""Filling: draws until every class has its quota, and writes the kept samples to one file."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from diffult.engine.device import peak_flops
from diffult.engine.distributed import ALONE, World
from diffult.engine.progress import progress_bar
from diffult.generation.candidates import generate
from diffult.generation.sampler import Sampler
from diffult.generation.shards import ShardStore
from diffult.longtail.extractor import Extractor
from diffult.longtail.quota import Quota
from diffult.runs.shared_disk import wait_for_same_files

log = logging.getLogger(__name__)
_NAMED = 5  # classes that lack samples
_WRITING = 4  # batches that wait for the disk, at most


def fill(
    sampler: Sampler,
    extractor: Extractor,
    store: ShardStore,
    quota: Quota,
    classes: tuple[str, ...],
    world: World = ALONE,
) -> dict[str, Any]:
    """Draws until the quota is met, writing shards meanwhile, and finishes the store. Returns the figures for
    metrics.json; "images_per_s" is of all processes together."""
    if quota.missing.any():
        sampler.prepare()
    flops, begun = sampler.flops(), time.perf_counter()
    try:
        drawn = _draw(sampler, extractor, store, quota, classes, flops, world)
    finally:  # also when interrupted
        store.flush()
    seconds = time.perf_counter() - begun
    drawn = sum(world.gather(drawn))  # so every process has flushed
    wait_for_same_files([store.folder], world)
    if world.is_main:
        store.finish(quota)
    tallies = [quota.tally(c) for c in range(len(classes))]
    _warn_of_short(classes, quota, tallies)
    totals = {key: sum(tally[key] for tally in tallies) for key in tallies[0]}
    return totals | {
        "images_per_s": round(drawn / seconds, 2) if drawn else None,
        "nfe": sampler.settings.evaluations,
        "gflop_per_sample": round(flops / 1e9, 6),
        "by_class": {name: tally for name, tally in zip(classes, tallies, strict=True) if tally["drawn"]},
    }


def _warn_of_short(classes: tuple[str, ...], quota: Quota, tallies: list[dict[str, int]]) -> None:
    """Names the classes that lack most samples; of thousands of classes many may."""
    lacking = quota.quotas - np.array([tally["accepted"] for tally in tallies])
    short = [c for c in np.argsort(-lacking, kind="stable").tolist() if lacking[c] > 0]
    for c in short[:_NAMED]:
        log.warning(
            "class %s: only %d of %d samples after %d candidates; the filter hardly ever accepts this class "
            "(train longer, or raise generate.max_draws)", classes[c], tallies[c]["accepted"], quota.quotas[c],
            tallies[c]["drawn"],
        )  # fmt: skip
    if rest := short[_NAMED:]:
        log.warning("and %d more classes lack %d samples together", len(rest), lacking[rest].sum())


def _draw(
    sampler: Sampler,
    extractor: Extractor,
    store: ShardStore,
    quota: Quota,
    classes: tuple[str, ...],
    flops: float,
    world: World,
) -> int:
    """Returns how many candidates this process drew. flops: of a sample."""
    drawn, begun = 0, time.perf_counter()
    peak = peak_flops(sampler.device) * world.size
    bar = progress_bar(
        total=int(quota.quotas.sum()), initial=int(quota.accepted.sum()), desc="generate", unit="img",
        disable=not world.is_main,
    )  # fmt: skip
    known = quota.drawn.sum()
    writing: deque[Future[None]] = deque()
    with bar, ThreadPoolExecutor(1) as writer:
        for batch in generate(sampler, extractor, quota, world):
            writing.append(writer.submit(store.add, batch))
            if len(writing) > _WRITING:
                writing.popleft().result()  # raises when the disk is full
            drawn += len(batch.labels)
            bar.update(int(quota.accepted.sum()) - bar.n)
            rate = float(quota.drawn.sum() - known) / (time.perf_counter() - begun)  # of all processes
            bar.set_postfix_str(f"{_shares(quota, classes)}, {speed(rate, flops, peak)}", refresh=False)
        for written in writing:
            written.result()
    return drawn


def _shares(quota: Quota, classes: tuple[str, ...]) -> str:
    """The share of candidates that is kept: of all, and in the three unfinished classes where it is smallest."""
    drawn, accepted = quota.drawn, quota.accepted
    shares = accepted / np.maximum(drawn, 1)
    (unfinished,) = np.nonzero((quota.missing > 0) & (drawn > 0))
    unfinished = unfinished[np.argsort(shares[unfinished], kind="stable")]
    worst = ", ".join(f"{classes[c]}: {shares[c]:.0%}" for c in unfinished[:3])
    return f"{accepted.sum() / max(drawn.sum(), 1):.0%} of {drawn.sum()} kept" + (f" ({worst})" if worst else "")


def speed(rate: float, flops: float, peak: float) -> str:
    """Drawn samples and FLOP a second as text. flops: of a sample; peak: FLOP/s of the hardware, 0 if unknown."""
    share = f", {rate * flops / peak:.0%} of peak" if peak else ""
    return f"{rate:.4g} drawn/s, {rate * flops / 1e12:.3g} TFLOP/s{share}"
