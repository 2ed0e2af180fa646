"""A comparison of two seeds at a tiny size: what it leaves, that it resumes and adds methods, and what it refuses."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import TINY
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from diffult import run
from diffult.compare import command
from diffult.config import load_preset
from diffult.errors import UserError
from diffult.longtail.metrics import COLUMNS
from diffult.longtail.rows import ablation, parse_rows
from diffult.runs.children import Children
from diffult.runs.files import lock_folder, read_json
from diffult.runs.run_dir import RunDir
from diffult.runs.variants import plan

SETTINGS = [part for setting in TINY for part in ("--set", setting)]


def invoke(verb, words: list[str]):
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, words)


def compare(folder: Path, *words: str):
    return invoke(command, ["--preset", "digits-lt", "--run", str(folder), "--jobs", "1", *SETTINGS, *words])


@pytest.fixture
def inside(monkeypatch) -> list[list[str]]:
    """Runs are made in this process, which has everything imported; gives their commands."""
    started: list[list[str]] = []

    def run_inside(self, words, log, threads):
        started.append(words)
        result = invoke(run.command, words[3:])
        log.write_text(f"error: {result.exception}\n")
        return int(result.exception is not None)

    monkeypatch.setattr(Children, "run", run_inside)
    return started


def weights(folder: Path) -> dict[str, int]:
    files = [file for file in folder.rglob("*.safetensors") if file.name != "predictions.safetensors"]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


@pytest.mark.timeout(200)
def test_two_seeds_then_one_more_method(tmp_path, inside):
    result = compare(tmp_path, "--methods", "ce,diffult,diffult@generate.filter=none", "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "8 steps in batches of 64" in result.output and "4 of 4 runs, with 6 classifiers" in result.output
    assert len(inside) == 4 and all(words[-2:] == ["--until", "evaluate"] for words in inside)

    comparison = read_json(tmp_path / "comparison.json")
    assert comparison["seeds"] == [0, 1] and comparison["budget"] == {"steps": 8, "batch_size": 64}
    assert comparison["counts"] == [60, 43, 30, 22, 15, 11, 8, 5, 4, 3] and len(comparison["classes"]) == 10
    assert [row["name"] for row in comparison["rows"]] == ["ce", "diffult", "diffult@generate.filter=none"]
    for row, folder in zip(comparison["rows"], ("seed-{}", "seed-{}", "seed-{}@generate.filter=none"), strict=True):
        assert row["steps"] == 8 and row["seconds"] > 0 and len(row["mean"]["by_class"]) == 10
        for seed, values in enumerate(row["seeds"]):
            metrics = read_json(tmp_path / folder.format(seed) / "metrics.json")[row["name"].partition("@")[0]]
            assert {column: values[column] for column in COLUMNS} == {column: metrics[column] for column in COLUMNS}
    paired = comparison["rows"][1]["paired"]
    assert paired["against"] == "ce" and paired["interval"][0] <= paired["difference"] <= paired["interval"][1]
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [(line["name"], line["seed"]) for line in lines[:3]] == [("ce", "0"), ("ce", "1"), ("diffult", "0")]

    shared = ("pack/train.beton", "extractor/weights.safetensors", "diffusion/ema.safetensors")
    for name in shared:  # one file, not two
        assert (tmp_path / "seed-0" / name).samefile(tmp_path / "seed-0@generate.filter=none" / name)
    seeds = [RunDir.open(tmp_path / f"seed-{seed}").packed() for seed in (0, 1)]
    assert seeds[0].fingerprint != seeds[1].fingerprint

    before = weights(tmp_path)
    inside.clear()
    words = ("--methods", "ce,crt,duplicates,diffult,diffult@generate.filter=none", "--seeds", "2")
    result = compare(tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert "2 of 4 runs, with 4 classifiers" in result.output and len(inside) == 2
    after = weights(tmp_path)
    assert {name: after[name] for name in before} == before
    added = {f"seed-{seed}/classifier/{method}.safetensors" for seed in (0, 1) for method in ("crt", "duplicates")}
    assert set(after) - set(before) == added
    ce, crt, _, ours, _ = read_json(tmp_path / "comparison.json")["rows"]
    assert ours["paired_duplicates"]["against"] == "duplicates"
    assert ce["steps"] == 8 and crt["steps"] > 8  # those of cross-entropy, which it starts from, and its own

    inside.clear()
    out = tmp_path / "elsewhere"
    assert compare(tmp_path, *words, "--out", str(out)).exit_code == 0
    assert not inside and {file.name for file in out.iterdir()} >= {"comparison.json", "comparison.csv"}


def test_one_run_that_fails_does_not_lose_the_others(tmp_path, inside, monkeypatch):
    whole = Children.run

    def failing(self, words, log, threads):
        if "seed=1" in words:
            log.write_text("pack: started\nerror: no disk\n")
            return 2
        return whole(self, words, log, threads)

    monkeypatch.setattr(Children, "run", failing)
    result = compare(tmp_path, "--methods", "ce", "--seeds", "2")
    assert isinstance(result.exception, UserError)
    assert re.fullmatch(r"see \S*/seed-1.log \(no disk\); the same command resumes", str(result.exception))
    comparison = read_json(tmp_path / "comparison.json")
    assert comparison["seeds"] == [0] and comparison["rows"][0]["std"]["top1"] is None
    assert "one seed: no deviation and no interval" in result.output


@pytest.mark.parametrize(("given", "expected"), [("1", "1"), ("16", "4"), ("", "4"), ("3,2", "4")])
def test_a_run_takes_no_more_threads_than_the_user_allows(tmp_path, monkeypatch, given, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with Children() as children:
        words = ["sh", "-c", "echo $OMP_NUM_THREADS $MKL_NUM_THREADS"]
        assert children.run(words, tmp_path / "log", threads=4) == 0
    assert (tmp_path / "log").read_text() == f"{expected} 4\n"


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_interrupted_it_stops_its_runs(tmp_path):
    words = [sys.executable, "-m", "diffult.compare", "--preset", "digits-lt", "--run", str(tmp_path)]
    settings = [*SETTINGS, "--set", "extractor.steps=1000000"]
    process = subprocess.Popen(
        [*words, "--methods", "ce", "--seeds", "1", *settings],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    log = tmp_path / "seed-0.log"
    deadline = time.monotonic() + 90
    while not (log.exists() and "extractor: started" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the same command resumes" in process.stderr.read()
    with lock_folder(tmp_path / "seed-0"):  # no run holds it any more
        assert "interrupted" in log.read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "ce,difult"], r"--methods difult: .*did you mean 'diffult'\?"),
        (
            ["--methods", "diffult@generate.balnce_to=3"],
            r"unknown key 'generate.balnce_to'; did you mean 'balance_to'\?",
        ),
        (["--methods", "diffult@data.n_max=3"], r"own settings are of .*, not 'data.n_max'; give --set for all rows"),
        (["--methods", "diffult@classifier.methods=['ce']"], r"not 'classifier.methods'"),
        (["--methods", "ce,diffult,ce"], r"--methods ce: is there twice"),
        (["--methods", "ce,ce@generate.balance_to=10"], r"has only settings that the preset has too"),
        (["--set", "seed=3"], r"--set seed=3: a comparison sets the seeds; give --seeds N"),
        (["--set", "classifier.stps=3"], r"unknown key 'classifier.stps'; did you mean 'steps'\?"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(tmp_path, inside, words, expected):
    result = compare(tmp_path / "runs", *words)
    assert isinstance(result.exception, UserError) and re.search(expected, str(result.exception))
    assert "\n" not in str(result.exception)
    assert not inside and not (tmp_path / "runs").exists()


def test_runs_of_other_settings_are_refused(tmp_path, inside):
    assert plan(tmp_path, "digits-lt", parse_rows("ce"), ["classifier.steps=3", "extractor.steps=4"], 1).runs
    RunDir.open(tmp_path / "seed-0", "digits-lt", ["extractor.steps=77"]).save_config()
    result = invoke(command, ["--preset", "digits-lt", "--run", str(tmp_path), "--seeds", "1"])
    assert re.search(r"seed-0: was made with other settings \(extractor.steps: 77 -> 600\)", str(result.exception))
    assert not inside


def test_rows_with_the_same_settings_share_a_run(tmp_path):
    rows = parse_rows(
        "ce, diffult@classifier.omega=0.3, ce@classifier.omega=0.3,diffult@classifier.milestones=[0.5,0.9]"
    )
    planned = plan(tmp_path, "digits-lt", rows, [], 2)
    omega = "@classifier.omega=0.3"
    assert list(planned.variants)[:2] == ["", omega] and len(planned.runs) == 6
    assert planned.variants[omega][1].path == tmp_path / f"seed-1{omega}"
    assert planned.variants[omega][1].config.classifier.methods == ("diffult", "ce")
    assert planned.variants[omega][1].config.seed == planned.variants[omega][1].config.data.seed == 1
    (long,) = set(planned.variants) - {"", omega}
    assert re.fullmatch(r"@classifier.milestones=_0.5_0.9_-[0-9a-f]{12}", long)


def test_the_ablation_adds_one_part_a_row(tmp_path):
    config = load_preset("digits-lt", TINY)
    rows = ablation(config)
    planned = plan(tmp_path, "digits-lt", rows, TINY, 1)
    configs = [planned.variants[planned.settings[row.name]][0].config for row in rows]
    parts = [(c.diffusion.cbdm, c.diffusion.aid, c.generate.filter, c.classifier.omega) for c in configs]
    assert parts == [
        (True, False, "none", 1.0), (True, False, "none", 1.0), (True, True, "none", 1.0),
        (True, True, "distance", 1.0), (True, True, "distance", 0.5),
        (True, False, "id", 1.0), (True, False, "aid", 1.0), (True, False, "ood", 1.0),
    ]  # fmt: skip
    assert [row.method for row in rows] == ["ce", *["diffult"] * 7]
    *_, weighted, _, _, ood = [planned.variants[name][0] for name in planned.variants]
    filtered, generated = planned.variants[planned.settings[rows[3].name]][0], planned.runs[0]
    assert weighted.nearest(planned.before(weighted)) == filtered and ood.nearest(planned.before(ood)) == generated
    assert json.dumps([row.title for row in rows]).count("alone") == 3


@pytest.mark.slow
def test_own_images_are_compared_on_settings_that_are_proposed_once(tmp_path, inside):
    """Two classes of digits as PNGs; the plan is a preset beside the runs, which a second command goes on with."""
    digits = load_digits()
    for label, count in ((0, 60), (1, 20)):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:count]):
            Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "images" / str(label) / f"{i}.png")
    words = ["--data", str(tmp_path / "images"), "--run", str(tmp_path / "runs"), "--seeds", "1", "--hours", "0.002"]
    first = invoke(command, [*words, "--methods", "ce"])
    assert first.exception is None and "80 images of 2 classes" in first.stdout
    preset = tmp_path / "runs" / "plan.toml"
    planned, written = load_preset(str(preset)), preset.stat().st_mtime_ns
    assert planned.name == "images" and planned.data.source == "folder"
    result = read_json(tmp_path / "runs" / "comparison.json")
    assert result["classes"] == ["0", "1"] and [row["name"] for row in result["rows"]] == ["ce"]
    more = invoke(command, [*words, "--methods", "ce,crt"])
    assert more.exception is None and "80 images" not in more.stdout and preset.stat().st_mtime_ns == written
    assert len(read_json(tmp_path / "runs" / "comparison.json")["rows"]) == 2
    fewer = invoke(command, [*words, "--methods", "crt"])
    assert "left out, though trained before (name them again to show them): ce" in fewer.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], r"^give --preset NAME \(one of .*\) or --data DIR$"),
        (["--preset", "digits-lt", "--data", "images"], r"^--data proposes settings, .*: give one of the two$"),
        (["--preset", "digits-lt", "--hours", "1"], r"^--hours is for your own images: give --data DIR, too$"),
        (["--preset", "digits-lt", "--methods", ""], r"^--methods: give one at least, such as --methods ce,diffult$"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, expected):
    assert re.search(expected, str(invoke(command, words).exception))
