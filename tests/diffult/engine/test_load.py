"""How much of a machine's time goes to programs that are not part of the training."""

import os
import time

import pytest

from diffult.engine.distributed import World
from diffult.engine.load import Load, share_of_others


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Two of the cores are this process's: reads the load after so many seconds, `own` of this process's and `idle`."""
    now, stat = [100.0, 3.0, 50.0], tmp_path / "stat"

    def after(seconds: float, own: float, idle: float) -> Load:
        for i, more in enumerate((seconds, own, idle)):
            now[i] += more
        lines = [f"cpu{core} 9 9 9 {round(50 * now[2]) - 20} 20 9 0 9 0 0" for core in (4, 6)]
        stat.write_text("\n".join(["cpu 1 2 3 4 5", "cpu0 1 2 3 999999 9", *lines]) + "\n")
        return Load.now(stat, lambda: now[0])

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 6})
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    monkeypatch.setattr(time, "process_time", lambda: now[1])
    return after


@pytest.mark.parametrize(
    ("own", "idle", "others"),
    [(4, 16, 0.0), (20, 0, 0.0), (5, 7, 0.4)],  # waits are nobody's time, and two threads are ours; 8 of 20 s are not
)
def test_others_have_what_is_neither_ours_nor_idle(read, own, idle, others):
    before = read(0, 0, 0)
    assert share_of_others(before, read(10, own, idle)) == pytest.approx(others)


def test_processes_of_one_training_on_a_machine_are_no_others(read, monkeypatch):
    """Two here and one elsewhere, of 6 s each, and 5 s idle: 3 of 20 s are left for others."""
    monkeypatch.setattr(World, "gather", lambda _, mine: [mine, mine, ("elsewhere", 6.0)])
    before = read(0, 0, 0)
    assert share_of_others(before, read(10, 6, 5), World(0, 3)) == pytest.approx(0.15)


def test_where_the_system_does_not_say_nobody_else_is_there(tmp_path):
    before, now = (Load.now(tmp_path / "none", lambda seconds=seconds: seconds) for seconds in (1.0, 9.0))
    assert share_of_others(before, now) == 0
