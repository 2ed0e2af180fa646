"""The suite of races at a tiny size, its comparison and its report; and that ours is not the slower one."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="the bench extra (diffusers) is not installed")

from bench import compare, report
from bench.__main__ import RACES, command
from bench.cases import same
from bench.ceilings import Ceilings
from bench.race import Race, Work, ratios, row, run_race
from bench.tables import speed_table, suite_table
from diffult.engine.device import pick_device
from diffult.errors import UserError

ROOT = Path(__file__).parents[2]


def invoke(verb, *typed):
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(part) for part in typed])


def test_a_row_holds_rates_shares_and_the_ratio_to_the_best_rival():
    work = Work({"ours": int, "a": int, "b": int}, images=10, flops=100.0, moved=5.0)
    results = {
        "ours": {"first_s": 1.0, "seconds": [1.0, 2.0, 4.0]},
        "a": {"first_s": 1.0, "seconds": [9.0, 9.0, 9.0]},
        "b": {"first_s": 1.0, "seconds": [2.0, 6.0, 4.0]},
    }
    told = row(RACES["writer"], work, results, Ceilings("float32", 50.0, 200.0, 100.0, 10.0))
    assert told["best_rival"] == "b" and told["ratio"] == 2.0 and ratios(results, "b") == [2.0, 3.0, 1.0]
    ours = told["contestants"]["ours"]
    assert (ours["images_per_s"], ours["share_of_compute"]) == (5.0, 0.25)
    assert "| writer | 5 | 5e-11 TFLOP/s (25%) | b | 2.00 x (1.00 to 3.00) |" in suite_table({"rows": [told]})


def test_turns_alternate_and_compiled_contestants_are_asked_for():
    order = []
    work = Work({"ours": lambda: order.append("ours"), "rival": lambda: order.append("rival")}, 1)
    work.compilable = {"ours": lambda: lambda: order.append("compiled")}
    results = run_race(work, pick_device(), rounds=2, turn_s=0.0, compiled=True)
    assert order == ["ours"] * 2 + ["rival"] * 2 + ["compiled"] * 2 + ["ours", "rival", "compiled"] * 2
    assert all(len(result["seconds"]) == 2 for result in results.values()) and "ours, compiled" in results


def test_our_network_keeps_up_with_diffusers_on_equal_work(tmp_path):
    """A guard on the ratio, not on the time: 1.1 to 1.3 on a quiet machine."""
    told = invoke(command, "--quick", "--only", "network forward", "--out", tmp_path)
    assert told.exit_code == 0, told.output
    (file,) = tmp_path.glob("*.json")
    (result,) = json.loads(file.read_text())["rows"]
    pair = [result["contestants"][name]["seconds"] for name in ("diffusers contiguous", "ours")]
    assert median(theirs / mine for theirs, mine in zip(*pair, strict=True)) > 0.8
    assert "same number of parameters" in result["equal"]


def test_a_race_that_fails_is_named_the_others_are_kept_and_not_run_again(tmp_path, monkeypatch):
    def broken(folder):
        raise RuntimeError("no such rival")

    runs = []
    races = {
        "first": Race("first", "", (), lambda folder: Work({"ours": lambda: runs.append(1)}, 1)),
        "broken": Race("broken", "", (), broken),
        "last": Race("last", "", (), lambda folder: Work({"ours": int}, 1)),
    }
    monkeypatch.setattr("bench.__main__.RACES", races)
    monkeypatch.setattr("bench.__main__.measure", lambda *_: Ceilings("float32", 1.0, 1.0, 1.0, 1.0))
    for more in ([], ["--resume"]):
        told = invoke(command, "--quick", "--out", tmp_path, *more)
        assert "1 of" in str(told.exception) and "'broken': RuntimeError: no such rival" in str(told.exception)
        (file,) = tmp_path.glob("*.json")
        results = json.loads(file.read_text())
        assert [row["race"] for row in results["rows"]] == ["first", "last"]
        assert results["failed"] == {"broken": "RuntimeError: no such rival"}
        count, runs = len(runs), []
        assert (count > 0) == (more == [])


@pytest.mark.parametrize(("rounded", "allowed"), [(False, 40.0), (True, 0.5)])
def test_outputs_are_held_against_each_other(rounded, allowed):
    ours, theirs = torch.zeros(8, 100), torch.zeros(8, 100)
    theirs[0, 0] = 40.0
    assert f"{40 if not rounded else 0.4}, same" in same("race", [ours, theirs], allowed, rounded)
    theirs[0, :] += 1.0  # one image of eight
    with pytest.raises(UserError, match="not fair"):
        same("race", [ours, theirs], allowed, rounded)


def test_an_unknown_race_is_refused():
    with pytest.raises(UserError, match="no such race; there are 'network forward'"):
        command(only=["nothing"])


def results(file, ours, theirs):
    rows = [{
        "race": "r", "images": 1, "ours": "ours", "best_rival": "b",
        "contestants": {"ours": {"seconds": ours}, "b": {"seconds": theirs}},
    }]  # fmt: skip
    file.write_text(json.dumps({"rows": rows}))
    return file


@pytest.mark.parametrize(
    ("after", "code", "words"),
    [
        ([2.0, 2.1, 2.2], 1, "slower"),
        ([0.5, 0.51, 0.52], 0, "faster"),
        ([1.0, 1.05, 2.0], 0, "the same within the noise"),
    ],
)
def test_a_regression_beyond_the_noise_is_told(tmp_path, after, code, words):
    before = results(tmp_path / "a.json", [1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    told = invoke(compare.command, before, results(tmp_path / "b.json", after, [1.0, 1.0, 1.0]))
    assert told.exit_code == code and words in told.output


@pytest.mark.parametrize("page", report.PAGES, ids=str)
def test_tables_are_those_of_the_results_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!-- bench:end -->") >= 2
    assert report.rewritten(text, ROOT / "bench" / "results") == text


def test_the_speed_table_compares_with_a_rivals_defaults_and_with_its_fastest_setting():
    def contestant(seconds):
        return {"images_per_s": 1 / seconds, "seconds": [seconds] * 3}

    contestants = {"ours": contestant(2.0), "diffusers": contestant(5.0), "diffusers contiguous": contestant(3.0)}
    rows = [{"race": "training step", "contestants": contestants}, {"race": "whole pipeline", "contestants": {}}]
    line = "| UNet training step | 0.5 | diffusers | 2.50 x (2.50 to 2.50) | 1.50 x (1.50 to 1.50) |"
    assert speed_table({"rows": rows}).splitlines()[2:] == [line]


def test_a_table_without_its_file_is_refused():
    text = "<!-- bench:comparison gone.json -->\n<!-- bench:end -->"
    with pytest.raises(UserError, match=r"gone.json is not there"):
        report.rewritten(text, ROOT / "bench" / "results")
