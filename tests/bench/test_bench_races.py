"""Races where diffusers is missing, recording before the first round, and the training step's contestants."""

import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

import kernels.diffuse as diffuse_module
from bench import peers, race, training_step
from bench.cases import forward
from bench.ceilings import Ceilings
from bench.contestants import without
from bench.race import Race, Work, row, run_race, turn
from bench.tables import rivals_table, suite_table
from diffult.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def no_diffusers(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda: "diffusers is not there")


def test_ours_is_raced_where_diffusers_is_missing(no_diffusers, tmp_path):
    entered = Race("network forward", "", tuple(peers.SETTINGS), forward)
    work = entered.work(tmp_path)
    result = row(entered, work, run_race(work, CPU, 1, 0.0), Ceilings("float32", 1.0, 1.0, 1.0, 1.0))
    assert list(result["contestants"]) == ["ours"] and result["best_rival"] is None
    assert result["absent"] == dict.fromkeys(peers.SETTINGS, "diffusers is not there")
    assert "| network forward |" in suite_table({"rows": [result]}) and "ours" in rivals_table({"rows": [result]})


def test_a_rival_that_is_neither_built_nor_named_as_missing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="built \\['ours'\\], named \\['ours', 'rival'\\]"):
        Race("r", "", ("rival",), lambda _: Work({"ours": int}, 1)).work(tmp_path)


def test_recording_is_over_before_the_first_round(monkeypatch):
    """A graph is recorded at the fourth call, which costs a second on this clock; other calls cost nothing."""
    clock, calls = [0.0], []
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(race, "synchronise", lambda _: None)

    def ours():
        calls.append(1)
        clock[0] += 1.0 if len(calls) == 4 else 1e-3

    results = run_race(Work({"ours": ours}, 1), torch.device("cuda"), rounds=3, turn_s=0.0)
    assert results["ours"]["seconds"] == pytest.approx([1e-3] * 3)


def invoke(*typed):
    app = typer.Typer()
    app.command()(training_step.command)
    return CliRunner().invoke(app, [str(part) for part in typed])


def test_the_training_step_is_timed_profiled_and_the_peer_named_as_missing(no_diffusers, tmp_path):
    printed = invoke("--smoke", "--preset", "digits-lt", "--out", tmp_path)
    assert printed.exit_code == 0, printed.output
    (file,) = tmp_path.glob("training-step-*.json")
    content = json.loads(file.read_text())
    assert content["absent"] == {"diffusers": "diffusers is not there"}
    assert list(content["done"])[:2] == ["training step, ours", "10-step draw, ours"]
    ours = content["done"]["training step, ours"]
    assert ours["images_per_s"] == pytest.approx(2 / sorted(ours["seconds"])[2], rel=1e-3)
    assert "aten::" in (tmp_path / "profile.txt").read_text() and (tmp_path / "trace.json.gz").stat().st_size > 1000


def test_where_triton_serves_ours_is_timed_without_each_kernel(no_diffusers, triton_kernels, tmp_path, monkeypatch):
    """In the interpreter; one of these contestants is timed."""
    monkeypatch.setattr(training_step, "warm_up", lambda call, device: turn(call, 1, device))
    some = dict(training_step.pieces("digits-lt", tmp_path, smoke=True))
    assert [name.partition(" without ")[::2] for name in some if "without" in name] == [
        ("training step, ours", "group_norm_silu"), ("training step, ours", "adamw_ema"),
        ("training step, ours", "diffuse"), ("10-step draw, ours", "group_norm_silu"),
        ("10-step draw, ours", "denoise_step"),
    ]  # fmt: skip
    monkeypatch.setattr(diffuse_module, "_diffuse", lambda *_: pytest.fail("this kernel was to be left out"))
    assert some["training step, ours without diffuse"]()["images_per_s"] > 0


@pytest.mark.slow
def test_a_contestant_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="the bench extra (diffusers) is not installed")
    monkeypatch.setattr(training_step, "step_of_ours", lambda config: 1 / 0)
    printed = invoke("--smoke", "--preset", "digits-lt", "--out", tmp_path)
    assert printed.exit_code == 1 and "failed: training step, ours: ZeroDivisionError" in printed.output
    assert "10-step draw, diffusers channels-last compiled: " in printed.output
    assert re.search(r"ours \d+\.\d+ x as fast", printed.output)


def test_without_a_kernel_its_module_is_asked_no_more(triton_kernels):
    with without("diffuse"):
        assert not diffuse_module.use_triton("diffuse", "", triton_kernels)
    assert diffuse_module.use_triton("diffuse", "", triton_kernels)
