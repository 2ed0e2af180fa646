"""bench/gpu.sh at a size for CPUs: no minute on a card goes to mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path)}
    told = subprocess.run([ROOT / "bench/gpu.sh", "all"], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and "no step 'all'; there are: setup tests" in told.stdout
