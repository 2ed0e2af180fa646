"""bench/gpu.sh, mostly with a stand-in for Python: no minute on a card goes to mistakes."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = [
    "setup", "doctor", "backward_in_graph", "checkpointing_in_graph", "attention_in_compile", "graph_beside_nccl",
    "kernels", "training_step", "gpu_tests", "kernel_tests",
]  # fmt: skip
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the script with a `python` that runs these lines of sh, its arguments in $*."""

    def start(part: str, lines: str = "", **environment: str) -> subprocess.Popen[str]:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{lines}\n")
        python.chmod(0o755)
        all_of_it = os.environ | {"PY": str(python), "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
        all_of_it = {key: value for key, value in all_of_it.items() if key not in ("SMOKE", "DATA")} | environment
        command = [str(ROOT / "bench/gpu.sh"), part]
        return subprocess.Popen(command, env=all_of_it, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def items(output: str) -> list[str]:
    return [line.split()[1].rstrip(",") for line in output.splitlines() if line.startswith("== ") and "at most" in line]


def archive(folder: Path, part: str) -> dict[str, str]:
    """What the one file that a part leaves holds, by name, as text; pictures and traces are in it too."""
    assert [file.name for file in folder.iterdir()] == [f"{part}.tar.gz"]
    with tarfile.open(folder / f"{part}.tar.gz") as tar:
        return {Path(member.name).name: tar.extractfile(member).read().decode(errors="replace") for member in tar}  # type: ignore[union-attr]


def test_a_part_runs_its_items_in_order_and_leaves_one_archive(start: Start, tmp_path: Path) -> None:
    process = start("check", 'echo "$*"')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert items(output) == CHECK
    assert len(output) < 12_000 and output.splitlines()[-1].startswith(f"results: {tmp_path}/out/check.tar.gz")
    logs = archive(tmp_path / "out", "check")
    assert logs.keys() == {f"{name}.log" for name in CHECK} | {"summary.txt"}
    assert logs["kernels.log"] == f"-m bench.kernels --check --budget 75 --out {tmp_path}/work/check\n"
    assert [line.split()[0] for line in logs["summary.txt"].splitlines()] == CHECK


def test_a_failed_item_stops_no_other(start: Start, tmp_path: Path) -> None:
    lines = 'case "$*" in *"-m gpu"*) echo two are wrong; exit 1;; *--check*) exit 3;; esac'
    process = start("check", lines)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert items(output) == CHECK
    assert "    two are wrong\n" in output and "error: failed or cut off: kernels gpu_tests\n" in output
    summary = archive(tmp_path / "out", "check")["summary.txt"]
    states = dict(line.split(maxsplit=1) for line in summary.splitlines()[: len(CHECK)])
    assert {name: state.split("s  ")[1] for name, state in states.items() if not state.endswith("s  ok")} == {
        "kernels": "budget spent before the end", "gpu_tests": "failed, exit code 1",
    }  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_loses_nothing_that_was_there(start: Start, tmp_path: Path, how: signal.Signals) -> None:
    pid = tmp_path / "pid"
    step = f"echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 60"
    process = start("check", f'case "$*" in *training_step*) {step};; *) echo "did $*";; esac')
    while not pid.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    if how == signal.SIGKILL:
        process.wait(timeout=30)
        os.kill(int(pid.read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    logs = archive(tmp_path / "out", "check")
    assert "did -m bench.kernels" in logs["kernels.log"] and "gpu_tests.log" not in logs
    if how == signal.SIGKILL:
        return
    assert process.returncode == 130
    assert "stopped by a signal" in logs["summary.txt"] and "error: failed or cut off: training_step" in output
    for _ in range(100):  # the item is gone as well, once somebody has asked for its exit code
        if not Path("/proc", pid.read_text().strip()).exists():
            return
        time.sleep(0.05)
    pytest.fail("the item runs on")


def test_a_part_ends_in_its_time_and_prints_what_it_did_not_reach(start: Start, tmp_path: Path) -> None:
    begun = time.monotonic()
    process = start("check", 'case "$*" in *doctor) echo begun; exec sleep 60;; esac', LIMIT="26")
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 1 and time.monotonic() - begun < 26
    assert items(output) == ["setup", "doctor"]
    assert "cut off at 1" in output and f"error: not reached in 26 s: {' '.join(CHECK[2:])}\n" in output
    assert archive(tmp_path / "out", "check")["doctor.log"] == "begun\n"


def test_a_package_that_cannot_be_installed_drops_itself_alone(start: Start, tmp_path: Path) -> None:
    lines = """case "$*" in
        -c*) echo a==1; echo b==2; echo c==3;;
        *"a==1 b==2 c==3" | *"target"*" b==2") exit 1;;
        *pip*) echo "installed $*";;
    esac"""
    process = start("tune", lines, WHEELS="some/wheels")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    log = archive(tmp_path / "out", "tune")["setup.log"].splitlines()
    assert [line.split()[-1] for line in log] == ["a==1", "c==3", "b==2"] and log[-1] == "without b==2"
    assert all("--no-deps" in line and "--no-index --find-links some/wheels" in line for line in log[:2])


def test_results_are_in_the_archive_and_what_is_too_large_is_not(start: Start, tmp_path: Path) -> None:
    lines = 'case "$*" in *--tune*) echo {} >"$RESULTS/tiles.json"; head -c 9000000 /dev/zero >"$RESULTS/large";; esac'
    process = start("tune", lines)
    output, _ = process.communicate(timeout=60)
    found = archive(tmp_path / "out", "tune")
    assert found["tiles.json"] == "{}\n" and "large" not in found
    assert f"left out, too large: {tmp_path}/work/tune/large\n" in output


def test_cifar_without_its_data_and_a_part_that_is_none_are_refused(start: Start) -> None:
    process = start("cifar")
    assert "error: DATA=PATH of CIFAR-10 is needed" in process.communicate(timeout=60)[0] and process.returncode == 1
    process = start("all")
    assert process.communicate(timeout=60)[0] == "error: no part 'all'; there are: check cifar tune\n"
    assert process.returncode == 2


def test_wheels_are_pinned_as_elsewhere_and_leave_the_machines_own_alone() -> None:
    def pins(file: Path) -> dict[str, str]:
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}

    wheels, known = pins(ROOT / "bench/wheels.txt"), pins(ROOT / "constraints.txt")
    assert not wheels.keys() & {"torch", "triton", "numpy"}
    assert wheels.pop("torchvision") == "0.26.0"  # torch 2.11's
    assert wheels.items() <= known.items()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", ["check", "cifar", "tune"])
def test_a_part_runs_on_a_cpu(part: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "SMOKE": "1", "PY": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"),
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    command = [ROOT / "bench/gpu.sh", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (tmp_path / f"out/{part}.tar.gz").stat().st_size < 16 * 2**20
    assert archive(tmp_path / "out", part)["summary.txt"]
