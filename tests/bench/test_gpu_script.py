"""bench/gpu.sh at a size for CPUs: no minute on a card goes to mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_runs_leaves_its_results_and_is_not_done_twice(tmp_path: Path) -> None:
    environment = os.environ | {
        "SMOKE": "1", "PY": sys.executable, "OUT": str(tmp_path / "out"), "RUN": str(tmp_path / "run"),
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    first = subprocess.run([ROOT / "bench/gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    steps = ["setup", "tests", "tune", "kernels", "step", "suite", "cifar", "trace"]
    assert [line.removeprefix("== ") for line in first.stdout.splitlines() if line.startswith("== ")] == steps
    assert json.loads((tmp_path / "out/metrics.json").read_text())["ce"]["top1"] > 0
    assert (tmp_path / "out/trace.json.gz").stat().st_size > 1000
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*")) < 60 * 2**20
    again = subprocess.run([ROOT / "bench/gpu.sh"], env=environment, capture_output=True, text=True, check=True)
    assert "==" not in again.stdout


def test_a_failed_step_is_told_though_others_run_and_one_is_cut_off(tmp_path: Path) -> None:
    python = tmp_path / "python"  # its tests fail, and its tuning is cut off
    python.write_text('#!/bin/sh\ncase "$*" in "-m pytest"*) exit 1;; *--tune*) exit 130;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PY": str(python)}
    environment.pop("SMOKE", None)
    told = subprocess.run([ROOT / "bench/gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 1, told.stdout
    assert "tests failed (exit code 1)" in told.stdout and told.stdout.endswith("error: failed: tests\n")
    assert "tune: not finished within" in told.stdout and "== kernels" not in told.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"setup.done", "tiles.json"}
    assert not (tmp_path / "out/tests.done").exists()


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path)}
    told = subprocess.run([ROOT / "bench/gpu.sh", "all"], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and "no step 'all'; there are: setup tests" in told.stdout
