"""A training takes as many threads as others leave it cores."""

import os
import time

import pytest
import torch

from diffult.engine import threads
from diffult.engine.threads import ThreadWatch

CORES = sorted(os.sched_getaffinity(0))[:2]
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


class Machine:
    """Two cores with a load of their own making: /proc/stat, a clock and this process's processor time."""

    def __init__(self, tmp_path, monkeypatch):
        self.file, self.now, self.own, self.idle = tmp_path / "stat", 100.0, 0.0, 0.0
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(CORES))
        monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
        monkeypatch.setattr(time, "process_time", lambda: self.own)
        for name in threads._CHOSEN:
            monkeypatch.delenv(name, raising=False)
        torch.set_num_threads(2)
        self.passes(0, 0, 0)

    def passes(self, seconds: float, own: float, others: float) -> None:
        """So many seconds, in which this process and others are so many cores busy."""
        self.now += seconds
        self.own += own * seconds
        self.idle += (2 - own - others) * seconds
        lines = [f"cpu{core} 5 0 7 {round(50 * self.idle)} 0 0 0 9 0 0" for core in CORES]
        self.file.write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 0 0", *lines, "cpu999 0 0 0 999999 0", "intr 1"]) + "\n")

    def watch(self) -> ThreadWatch:
        return ThreadWatch(self.file, lambda: self.now)


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_busy_neighbour_takes_a_thread_and_gives_it_back(machine):
    seen = []
    with machine.watch() as watch:
        for own, others in ((2, 0), (1.3, 0.7), (1, 1), (1, 0.2), (2, 0), (1.8, 0.2), (0.7, 1.3)):
            machine.passes(1.1, own, others)
            watch()
            seen.append(torch.get_num_threads())
    assert seen == [2, 1, 1, 2, 2, 2, 1]
    assert torch.get_num_threads() == 2  # afterwards as before


def test_it_looks_once_a_second_at_the_most(machine):
    with machine.watch() as watch:
        machine.passes(0.9, 0.1, 1.9)
        watch()
        assert torch.get_num_threads() == 2
        machine.passes(0.2, 0.1, 1.9)
        watch()
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", threads._CHOSEN)
def test_a_number_that_the_user_chose_is_obeyed(machine, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with machine.watch() as watch:
        machine.passes(5, 0.1, 1.9)
        watch()
        assert torch.get_num_threads() == 2


def test_without_proc_stat_nothing_is_done(machine):
    machine.file.unlink()
    with machine.watch() as watch:
        machine.now += 5
        watch()
    assert torch.get_num_threads() == 2
