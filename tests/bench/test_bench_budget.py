"""Pieces of work within a budget: failures, the end of the time, a lost card, and what the file holds of it."""

import json
import sys
import time

import pytest

from bench import budget
from bench.budget import FAILED, NOT_REACHED, Ledger


def read(ledger):
    return json.loads(ledger.file.read_text())


def broken():
    raise RuntimeError("no such card\nand more")


def test_a_piece_that_fails_is_recorded_and_the_others_run(tmp_path, capsys):
    ledger = Ledger(tmp_path / "out" / "results.json", {"card": "none"})
    seen = []

    def look():
        seen.append(read(ledger))  # the file holds what was done before
        return 2

    assert ledger.run([("a", lambda: 1), ("b", broken), ("c", look)]) == FAILED
    content = read(ledger)
    assert content["card"] == "none" and content["done"] == {"a": 1, "c": 2}
    assert content["failed"] == seen[0]["failed"] == {"b": "RuntimeError: no such card"} and seen[0]["done"] == {"a": 1}
    assert "failed: b: RuntimeError: no such card" in capsys.readouterr().out


def test_the_end_of_the_budget_breaks_off_the_piece_at_work(tmp_path, capsys):
    def endless():
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as code that tries one way and then another
            pytest.fail("the end is no failure of the piece's own")

    ledger = Ledger(tmp_path / "results.json", {}, budget_s=0.3)
    begun = time.monotonic()
    assert ledger.run([("a", lambda: 1), ("b", endless), ("c", lambda: 3)]) == NOT_REACHED
    assert 0.2 < time.monotonic() - begun < 3
    assert read(ledger)["done"] == {"a": 1} and read(ledger)["not_reached"] == ["b", "c"]
    assert "not reached (2): b, c" in capsys.readouterr().out


def test_resuming_does_what_is_left(tmp_path):
    file, calls = tmp_path / "results.json", []
    assert Ledger(file, {}).run([("a", lambda: 1), ("b", broken)]) == FAILED
    pieces = [(name, lambda name=name: calls.append(name)) for name in "abc"]
    assert Ledger(file, {}, resume=True).run(pieces) == FAILED  # what failed before still counts
    assert calls == ["c"]
    assert Ledger(file, {}).run(pieces) == 0 and calls == ["c", "a", "b", "c"]


def test_a_process_that_lost_its_card_starts_anew_for_what_is_left(tmp_path, monkeypatch):
    class Gone(BaseException):
        pass

    def execute(path, typed):
        started.append((path, typed))
        raise Gone

    started = []
    monkeypatch.setattr(budget, "_card_is_lost", lambda: True)
    monkeypatch.setattr(budget.os, "execv", execute)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "bench.kernels", "--check", "--budget", "90"])
    ledger = Ledger(tmp_path / "results.json", {}, budget_s=60)
    with pytest.raises(Gone):
        ledger.run([("a", lambda: 1), ("b", broken), ("c", lambda: 3)])
    ((path, typed),) = started
    assert path == sys.executable and typed[1:] == [
        "-m", "bench.kernels", "--check", "--budget", "90", "--resume", "--budget", typed[-1],
    ]  # fmt: skip
    assert 50 < int(typed[-1]) <= 60
    assert read(ledger)["failed"] == {"b": "RuntimeError: no such card"} and read(ledger)["done"] == {"a": 1}
