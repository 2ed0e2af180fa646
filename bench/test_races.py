"""The races of `python -m bench` under pytest-benchmark, with its statistics, storage and comparison.

pytest bench/test_races.py --benchmark-enable -k "writer or loader"
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import cases, cases_data  # noqa: F401  (enter their races)
from bench.ceilings import synchronise
from bench.race import OURS, RACES
from diffult.engine.device import pick_device

CONTESTANTS = [(race.name, contestant) for race in RACES.values() for contestant in (OURS, *race.rivals)]


@pytest.mark.parametrize(("name", "contestant"), CONTESTANTS)
def test_race(benchmark: BenchmarkFixture, tmp_path: Path, name: str, contestant: str) -> None:
    work, device = RACES[name].work(tmp_path), pick_device()
    if contestant in work.absent:
        pytest.skip(work.absent[contestant])
    call = work.run[contestant]

    def run() -> None:
        call()
        synchronise(device)

    benchmark.group = name
    benchmark.extra_info |= {"images": work.images, "flops": work.flops, "moved": work.moved}
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["images_per_s"] = work.images / benchmark.stats.stats.median
