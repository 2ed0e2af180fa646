"""Who draws what: any number of processes at any pace keep what one keeps, and none waits while there is work."""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.generation import dispatch
from diffult.generation.dispatch import Dispatcher
from diffult.generation.shards import kept_files, open_kept
from diffult.longtail.quota import Quota

QUOTAS, MAX_DRAWS = np.array([0, 13, 5, 40, 1]), 4.0


def fate(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """A verdict for each name; class 2 hardly ever passes, class 4 never."""
    rate = np.array([0.5, 0.6, 0.1, 0.8, 0.0])[labels]
    roll = [np.random.default_rng([c, i]).random() for c, i in zip(labels.tolist(), indices.tolist(), strict=True)]
    return np.where(np.array(roll) < rate, 0, 2).astype(np.uint8)


def kept(quota: Quota) -> list[tuple[int, int]]:
    return list(zip(*(names.tolist() for names in quota.kept_names()), strict=True))


def alone() -> Quota:
    quota = Quota(QUOTAS, MAX_DRAWS)
    dispatcher = Dispatcher(quota, 8)
    dispatcher.ask()
    while (names := dispatcher.take(wait=True)) is not None:
        dispatcher.ask(fate(*names))
    return quota


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 2))
def test_any_order_of_the_processes_keeps_what_one_keeps(order: list[int], ahead: int) -> None:
    """Each holds one batch, or on a GPU two; whoever's turn it is judges the oldest of them and asks for another."""
    store = dist.HashStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "store", lambda _: store)
        quotas = [Quota(QUOTAS, MAX_DRAWS) for _ in range(3)]
        ends = [Dispatcher(quota, 8, World(rank, 3)) for rank, quota in enumerate(quotas)]
    holding: list[list] = [[], [], []]
    drawn: set[tuple[int, int]] = set()
    for rank in range(3):
        for _ in range(ahead):
            ends[rank].ask()
    turns = itertools.chain(order, itertools.cycle(range(3)))
    while any(quota.missing.any() for quota in quotas) or any(holding):
        rank = next(turns)
        ends[rank]._replay(store.add("events", 0))  # what is there to read
        while (names := ends[rank].take(wait=False)) is not None:
            batch = set(zip(*(part.tolist() for part in names), strict=True))
            assert drawn.isdisjoint(batch)
            drawn |= batch
            holding[rank].append(names)
        if holding[rank]:
            ends[rank].ask(fate(*holding[rank].pop(0)))
    expected = alone()
    assert all(kept(quota) == kept(expected) for quota in quotas)
    assert all(quota.tally(c) == expected.tally(c) for quota in quotas for c in range(len(QUOTAS)))


def test_whoever_waits_gets_what_falls_short_or_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 1 alone: the first batch is expected to do, the second process waits, and is called when it does not."""
    store = dist.HashStore()
    monkeypatch.setattr(World, "store", lambda _: store)
    quotas = [Quota(np.array([0, 8]), 4.0) for _ in range(2)]
    first, second = (Dispatcher(quota, 8, World(rank, 2)) for rank, quota in enumerate(quotas))
    first.ask()
    _, indices = first.take(wait=True)
    assert indices.tolist() == list(range(8))
    second.ask()
    assert second.take(wait=False) is None
    called = []
    waiting = threading.Thread(target=lambda: called.append(second.take(wait=True)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    first.ask(np.array([0, 2] * 4, np.uint8))
    waiting.join()
    assert called[0][1].tolist() == list(range(8, 16))
    second.ask(np.zeros(8, np.uint8))
    assert second.take(wait=True) is None and first.take(wait=True) is None
    assert kept(quotas[0]) == kept(quotas[1]) == [(1, i) for i in (0, 2, 4, 6, 8, 9, 10, 11)]


@pytest.mark.parametrize(("took", "patience"), [(60.0, "30 min 00 s"), (3600.0, "20 h 00 min")])
def test_a_process_that_is_gone_silently_is_not_waited_for_for_ever(monkeypatch, took: float, patience: str) -> None:
    """The first process took so long for its batch, whose rest was handed to the second."""
    now = 0.0

    def sleep(_: float) -> None:
        nonlocal now
        now += 100.0

    store = dist.HashStore()
    monkeypatch.setattr(World, "store", lambda _: store)
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    first, second = (Dispatcher(Quota(np.array([0, 8]), 4.0), 8, World(rank, 2)) for rank in range(2))
    first.ask()
    assert len(first.take(wait=True)[0]) == 8
    second.ask()
    now = took
    first.ask(np.array([0] * 6 + [2] * 2, np.uint8))
    with pytest.raises(UserError, match=f"no verdicts from process 1 for {patience}, .*; the same command resumes"):
        first.take(wait=True)
    limit = max(1800.0, 20 * took)
    assert limit < now - took <= limit + 100


# Draws with a network that costs nothing. Every batch gets a shard. The second process ends its first batch only when
# the first process has drawn so many others.
PROCESS = """
import sys, time
from pathlib import Path
import numpy as np, torch
import torch.distributed as dist
from diffult.diffusion.schedule import Schedule
from diffult.engine.distributed import init_distributed
from diffult.generation import shards
from diffult.generation.config import GenerateConfig
from diffult.generation.fill import fill
from diffult.generation.sampler import Sampler
from diffult.longtail.filter import Filter
from diffult.longtail.quota import Quota

shards.SHARD_BYTES, shards.FILE_BYTES = 0, 16 * 30
folder, pace, others, world = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), init_distributed()
table = world.store() if others else None

class Network(torch.nn.Module):
    def forward(self, x, t, labels):
        return x

class Slow(Sampler):
    def draw(self, labels, indices):
        time.sleep(pace)
        if world.rank == 0 and others:
            table.add("drawn", 1)
        if world.rank == 1 and others and not table.check(["waited"]):
            begun, end = table.add("drawn", 0), time.monotonic() + 100
            while table.add("drawn", 0) < begun + others:
                assert time.monotonic() < end, f"the first process drew {table.add('drawn', 0) - begun} batches"
                time.sleep(0.01)
            table.set("waited", "")
        return super().draw(labels, indices)

class Half(Filter):
    def judge(self, extractor, images, labels):
        passes = images.mean((1, 2, 3)) > 0
        return passes.float(), torch.where(passes, 0, 2).to(torch.uint8)

settings = GenerateConfig(balance_to=0, steps=1, batch_size=8)
sampler = Slow(Network(), Schedule("cosine", 10), "v", settings, (1, 4, 4), 3, 0, torch.float32, torch.device("cpu"))
quota = Quota(np.array([60, 90, 50]), 10.0, Half((0,)))
if world.is_main:
    shards.ShardStore(folder, {}).resume(quota)
quota, store = world.gather(quota)[0], shards.ShardStore(folder, {}, world.rank)
fill(sampler, None, store, quota, ("a", "b", "c"), world)
"""


@contextmanager
def started(count: int, folder: Path, pace: float = 0.0, others: int = 0) -> Iterator[list[subprocess.Popen]]:
    """So many processes as torchrun starts them, that draw into the folder, at so many seconds a batch. Their store is
    here, as torchrun's is in itself: nobody else comes by its port."""
    program = folder.parent / "program.py"
    program.write_text(PROCESS)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    counts = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common = os.environ | address | counts | {"PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder), str(pace), str(others)], stderr=subprocess.PIPE, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def complete(*arguments: Any) -> None:
    """What `started` starts, to its end."""
    with started(*arguments) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-3000:]


def found(folder: Path) -> list[bytes]:
    """What is kept, to the byte."""
    assert not list(folder.glob("shard-*"))
    return [file.read_bytes() for file in kept_files(folder)]


def test_a_slow_process_keeps_no_other_waiting(tmp_path: Path) -> None:
    """Two processes of gloo: while the second is at one batch the first draws ten, and what is kept is what one process
    keeps."""
    complete(1, tmp_path / "one")
    complete(2, tmp_path / "two", 0.0, 10)
    assert found(tmp_path / "one") == found(tmp_path / "two") and len(open_kept(tmp_path / "two")) == 200


@pytest.mark.slow  # a minute, most of it to import torch
def test_killed_with_one_two_and_three_processes_it_keeps_what_one_keeps(tmp_path: Path) -> None:
    complete(1, tmp_path / "whole")
    folder, rng = tmp_path / "killed", np.random.default_rng(0)
    for count in (1, 2, 3, 2, 1, 3, 2):
        with started(count, folder, 0.02) as processes:
            begun = len(list(folder.glob("shard-*")))
            more = int(rng.integers(0, 6))
            while len(list(folder.glob("shard-*"))) < begun + more:
                assert all(process.poll() is None for process in processes)
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
    assert not list(folder.glob("shard-*.damaged")) and list(folder.glob("shard-*"))  # it was never done
    complete(2, folder)
    assert found(folder) == found(tmp_path / "whole") and len(found(folder)) == 7
