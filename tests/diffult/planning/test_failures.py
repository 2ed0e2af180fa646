"""What would fail, found from small limits; and the stopwatch and the bound of memory."""

import mmap
import os
import resource
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffult.config import load_preset
from diffult.engine.memory import out_of_memory, own_memory
from diffult.planning.cost import Amounts
from diffult.planning.failures import (
    disk_failures,
    hardly_passing,
    memory_failures,
    open_file_failures,
    small_classes,
)
from diffult.planning.rehearsal import Part, Rehearsal, Rehearsed, expected_passing
from diffult.planning.stopwatch import bounded_memory, peak_memory, release, stretches

CLASSES = tuple("abcd")


def rehearsal(**stages):
    """Of stages of one second and 1 GB of disk each."""
    names = ("pack", "extractor", "diffusion", "generate", "classifier", "evaluate")
    made = {name: Rehearsed([Part("steps", (1.0,), count=1)], disk=1e9, host=2e9) for name in names}
    amounts = Amounts(np.array([40, 30, 2, 9]), np.full(4, 5.0), 20, 101, 0.0)
    return Rehearsal(load_preset("digits-lt"), amounts, stages=made | stages)


@pytest.mark.parametrize(
    ("free", "found"), [(5.9e9, "the run takes 6.0 GB"), (6.5e9, "lies there three times"), (8e9, None)]
)
def test_disk(tmp_path, monkeypatch, free, found):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free))
    one = rehearsal(diffusion=Rehearsed([Part("steps", (1.0,))], disk=1e9, checkpoint=1e9))
    failures = list(disk_failures(one, tmp_path / "runs" / "not yet there"))
    assert len(failures) == (found is not None) and (found is None or found in failures[0])


def test_inodes(tmp_path, monkeypatch):
    room = {"f_blocks": 10**9, "f_bfree": 10**9, "f_bavail": 10**9, "f_frsize": 4096}
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_files=1000, f_favail=50, **room))
    (failure,) = disk_failures(rehearsal(), tmp_path)
    assert "has inodes for 50" in failure


def test_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 4096))
    (failure,) = open_file_failures(40)
    assert failure == "open files: the limit is 100, a process needs up to 104; ulimit -n 1024"
    assert not list(open_file_failures(30))


def test_host_memory_of_all_processes(monkeypatch):
    """Each takes 2 GB at the most, of which it holds 0.5 GB now."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("diffult.planning.failures.own_memory", lambda: 0.5e9)
    (failure,) = memory_failures(rehearsal(), free=3.4e9)
    assert "4.0 GB in 2 processes, this machine has 4.4 GB for them" in failure
    assert not list(memory_failures(rehearsal(), free=3.5e9))


def test_small_classes():
    train, validation = np.array([40, 30, 2, 9]), np.array([4, 3, 0, 1])
    found = list(small_classes(train, validation, CLASSES, load_preset("digits-lt")))
    assert [line.partition(":")[0] for line in found] == ["c (1 class)", "c (1 class)"]
    searching = load_preset("digits-lt", ["generate.search=2"])
    assert "generate.search needs" in list(small_classes(train, np.array([1, 1, 0, 1]), CLASSES, searching))[-1]


def test_classes_that_hardly_pass():
    drawn, passed = np.array([100, 100, 4, 50]), np.array([90, 4, 0, 1])
    (failure,), (note,) = hardly_passing(drawn, passed, CLASSES, 5.0)
    assert failure.startswith("b, d (2 classes): the filter kept 5 of 150 candidates")
    assert note.startswith("c (1 class): the filter kept none of at most 4 candidates each")


@pytest.mark.parametrize(
    ("passed", "drawn", "max_draws", "fails"),
    [
        (0, 8, 10.0, False),  # as many as a short rehearsal draws: 31 % may pass
        (0, 28, 10.0, False),  # 1 - 0.05^(1/28) = 0.1015
        (0, 29, 10.0, True),  # 1 - 0.05^(1/29) = 0.0981
        (0, 29, 5.0, True),
        (0, 29, 11.0, False),
        (1, 45, 10.0, False),  # 0.9^45 + 45 * 0.1 * 0.9^44 = 0.0524
        (1, 46, 10.0, True),  # 0.9^46 + 46 * 0.1 * 0.9^45 = 0.0480
        (4999, 100_000, 20.0, False),  # nearly one in twenty
        (4000, 100_000, 20.0, True),
        (4000, 100_000, 30.0, False),  # one in thirty is enough
        (0, 1, 1.0, True),  # with no candidate to spare
    ],
)
def test_a_class_fails_where_candidates_and_limit_leave_no_doubt(passed, drawn, max_draws, fails):
    failures, notes = hardly_passing(np.array([drawn]), np.array([passed]), ("a",), max_draws)
    assert (bool(failures), bool(notes)) == (fails, passed == 0 and not fails)


def test_the_share_kept_follows_the_quotas_and_the_limit():
    """Nearly all candidates known: the shares are those measured, and a class is cut at its limit."""
    drawn, passed, quotas = np.array([10**6, 10**6]), np.array([5 * 10**5, 10**4]), np.array([100, 300])
    assert expected_passing(quotas, drawn, passed, max_draws=10.0) == pytest.approx(400 / (200 + 3000), rel=1e-3)
    assert expected_passing(quotas, drawn, passed, max_draws=1000.0) == pytest.approx(400 / (200 + 30_000), rel=1e-3)


def test_stretches_take_about_the_seconds_and_leave_the_start_out(monkeypatch):
    """On a clock of its own: the first step takes 5 s more than the one second of each."""
    now = [0.0]
    monkeypatch.setattr("diffult.planning.stopwatch.time.perf_counter", lambda: now[0])

    def steps():
        for i in range(1000):
            now[0] += 6.0 if i == 0 else 1.0
            yield

    start, each = stretches(steps(), 60.0)
    assert start == pytest.approx(5.0) and each == pytest.approx([1.0] * 10)
    assert now[0] == pytest.approx(60, abs=10)
    start, each = stretches(iter(range(2)), 60.0)
    assert len(each) == 1 and start == 0


def test_memory_beyond_what_is_free_is_an_error_and_not_the_end():
    def much():
        with bounded_memory(50e6):
            torch.empty(10**9, dtype=torch.uint8).fill_(1)

    with pytest.raises(RuntimeError) as caught:
        much()
    assert out_of_memory(caught.value) and not out_of_memory(RuntimeError("shapes"))
    torch.empty(10**8, dtype=torch.uint8)  # the bound is gone


def test_the_peak_is_that_of_the_work_within():
    torch.full((150_000_000,), 1, dtype=torch.uint8)
    release()  # what tests before this one have left
    with peak_memory() as low:
        held(10_000_000)
    with peak_memory() as high:
        held(100_000_000)
    assert high.host - low.host == pytest.approx(90e6, rel=0.3)


def held(count):
    """So many bytes, until they have been seen."""
    ones = torch.full((count,), 1, dtype=torch.uint8)
    time.sleep(0.3)
    return int(ones[0])


def test_pages_of_a_mapped_file_are_nobodys_memory(tmp_path):
    (tmp_path / "images").write_bytes(b"1" * 100_000_000)
    release()
    before = own_memory()
    with (tmp_path / "images").open("rb") as file, peak_memory() as peak:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[::4096]) == ord("1") * len(range(0, 100_000_000, 4096))
        time.sleep(0.1)
    assert before > 1e7 and peak.host - before < 50e6
