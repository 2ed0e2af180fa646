"""What the kernels compile to without a GPU, and how they are checked, timed and tuned, at tiny shapes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import kernels as bench_kernels
from bench.kernel_cases import BF16, FP32, Call, Case, cases
from bench.kernel_shapes import SMOKE
from bench.kernels import relative_error, time_rivals, tune_case
from kernels import adamw_ema, dispatch

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
COMPILE = """
import json
from bench.cubin_table import compile_all
from bench.kernel_cases import cases
some = cases()
first = {case.kernel: case for case in reversed(some)}.values()
print(json.dumps(compile_all([*first, *(case for case in some if case.shape == "128x512x8x8 bfloat16")])))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """Each kernel at one or two shapes in bfloat16; all shapes and types: python -m bench.cubin_table."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_every_architecture_without_spills(compiled):
    kernels = {row["kernel"] for row in compiled}
    assert len(kernels) >= 7, kernels  # two of the norm, one of each other
    for kernel in kernels:
        assert {row["arch"] for row in compiled if row["kernel"] == kernel} == {80, 90, 100}
    for row in compiled:
        assert row["stack"] == 0, row
        assert 0 < row["registers"] <= 255, row


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel", "_adamw_ema_kernel"])
def test_the_hot_loops_move_sixteen_bytes_a_thread(compiled, kernel):
    for row in compiled:
        if row["kernel"] == kernel:
            assert row["wide"] >= 4 and row["narrow"] <= 6, row  # narrow: per channel or per program, outside the loops


def smallest() -> list[Case]:
    return cases(workloads=SMOKE)


def test_cases_compute_what_they_claim():
    """On the CPU by the references, which must agree with the cases' own float64 formulas, gradients included."""
    small = cases((BF16, FP32), SMOKE)
    assert {case.kernel for case in small} == {
        "group_norm_silu", "denoise_step", "diffuse", "normal", "augment", "adamw_ema",
    }  # fmt: skip
    for case in small:
        assert relative_error(case, CPU) < (1e-2 if "bfloat16" in case.shape else 1e-4), case


def kinds() -> list[Case]:
    """The first case of each kernel, and of the norm one with and one without a backward pass."""
    return list({(case.kernel, case.bytes_backward > 0): case for case in reversed(smallest())}.values())


@pytest.mark.parametrize("case", kinds(), ids=str)
def test_the_rivals_are_really_compiled_and_timed(case, monkeypatch):
    """By torch's own compiler, back end and all: one that does not trace fails here as it would on a card."""
    monkeypatch.setattr(bench_kernels, "milliseconds", lambda work, *_: (work(), work(), 1.0)[-1])
    torch._dynamo.utils.counters.clear()
    rows = time_rivals(case, CPU)
    assert rows["eager channels_last"]["ms"] == 1.0
    assert ("compiled" in rows) == (case.kernel != "adamw_ema")
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == ("compiled" in rows)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert ("ms, backward too" in rows["eager channels_last"]) == (case.bytes_backward > 0)


@pytest.mark.parametrize("case", kinds(), ids=str)
def test_every_kind_of_kernel_is_tuned(case, triton_kernels, monkeypatch, tmp_path):
    """In the interpreter with a clock that always says the same: the defaults win, the reference is really made."""
    table = {}
    monkeypatch.setattr(dispatch, "table", lambda: table)
    monkeypatch.setattr(bench_kernels, "milliseconds", lambda work, *_: (work(), 1.0)[-1])
    rows = tune_case(case, CPU, [tmp_path / "tiles.json"])
    assert rows and all("torch" not in row for row in rows.values())
    assert json.loads((tmp_path / "tiles.json").read_text()) == table


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Tunes a kernel of the name "fake" for the CPU by a made-up clock; returns the table, kept from call to call."""
    table = {}
    monkeypatch.setattr(dispatch, "table", lambda: table)

    def tune(work, milliseconds, exact=lambda: (torch.ones(8),)):
        case = Case("fake", "n1", lambda *_: Call(work, exact), 1)
        monkeypatch.setattr(bench_kernels, "milliseconds", milliseconds)
        tune_case(case, CPU, [tmp_path / "tiles.json"])
        return table

    tune.table, tune.file = table, tmp_path / "tiles.json"
    return tune


def fake(used, **default):
    """Work that asks for its sizes."""

    def work():
        used.update(dispatch.tile("fake", "n1", CPU, **default))
        return (torch.ones(8),)

    return work


def test_tuning_finds_the_fastest_sizes_and_keeps_what_it_found(tuned):
    """A kernel of 1 ms at 2048 elements and 2 warps, more the farther its sizes are; larger than 2048 do not launch."""
    used = {}

    def milliseconds(call, budget_ms=100):
        call()
        if dispatch.mode() == "torch":
            return 5.0
        if used["elements"] > 2048:
            raise RuntimeError("out of resources")
        return 1 + abs(math.log2(used["elements"] / 2048)) + abs(math.log2(used["warps"] / 2))

    found = {"cpu": {"fake": {"n1": {"elements": 2048, "warps": 2}}}}
    work = fake(used, elements=256, warps=4)
    assert tuned(work, milliseconds) == found == json.loads(tuned.file.read_text())
    assert tuned(work, lambda *_: pytest.fail("measured again")) == found


def test_sizes_that_leave_something_out_cannot_win(tuned):
    """The larger the block the faster, but from 1024 elements on nothing is launched, and what lies in memory is the
    right result of an earlier call."""
    used = {}
    ask = fake(used, elements=256)

    def work():
        ask()
        out = torch.empty(8)
        return (out if used["elements"] >= 1024 else out.fill_(1.0),)

    table = tuned(work, lambda call, *_: (call(), 1e3 / used["elements"] if dispatch.mode() == "triton" else 99.0)[-1])
    assert table == {"cpu": {"fake": {"n1": {"elements": 512}}}}


def test_a_kernel_that_is_wrong_or_does_not_run_leaves_no_row(tuned):
    def broken():
        dispatch.tile("fake", "n1", CPU, warps=4)
        if tuned.table["cpu"].get("fake"):
            raise RuntimeError("out of resources")
        return (torch.ones(8),)

    with pytest.raises(RuntimeError, match="out of resources"):
        tuned(broken, lambda call, *_: call() and 1.0)
    assert tuned.table == {"cpu": {"fake": {}}} and not tuned.file.exists()
    with pytest.raises(bench_kernels.WrongResult, match=r"relative error 0\.5"):
        tuned(fake({}, warps=4), lambda *_: 1.0, exact=lambda: (2 * torch.ones(8),))
    assert not tuned.table["cpu"].get("fake")


def test_a_shape_at_which_pytorch_is_faster_is_sent_to_it(tuned):
    table = tuned(fake({}, warps=1), lambda *_: 1.0 if dispatch.mode() == "torch" else 2.0)
    assert table == {"cpu": {"fake": {"n1": {"warps": 1, "torch": 1}}}}


def test_lengths_between_two_powers_of_two_share_a_row_of_the_table():
    keys = [adamw_ema._key(torch.empty(length, device="meta")) for length in (8192, 12288, 16384, 20480)]
    assert keys == ["N8192-float32", "N16384-float32", "N16384-float32", "N32768-float32"]


@pytest.mark.parametrize("block", [3000, 8192, 2**20])
def test_a_block_that_would_leave_parameters_out_is_refused(triton_kernels, monkeypatch, block):
    """Also the one that is longer than the buffers, for which no program would run at all."""
    monkeypatch.setattr(adamw_ema, "tile", lambda *_, **sizes: sizes | {"block": block})
    optimizer = adamw_ema.AdamWEma(torch.nn.Linear(100, 100, device=triton_kernels))
    with pytest.raises(ValueError, match=f"block = {block} does not divide 4096"):
        optimizer.step(1e-3, 0.999, 1.0)


def invoke(*typed):
    app = typer.Typer()
    app.command()(bench_kernels.command)
    return CliRunner().invoke(app, [str(part) for part in typed])


def test_the_check_names_a_wrong_kernel_and_goes_on(tmp_path, monkeypatch):
    wrong = Case("wrong", "n1", lambda *_: Call(lambda: (torch.ones(2),), lambda: (torch.zeros(2),)), 1)
    lost = Case("lost", "n1", lambda *_: 1 / 0, 1)
    monkeypatch.setattr(bench_kernels, "cases", lambda **_: [wrong, lost, *kinds()])
    printed = invoke("--check", "--smoke", "--out", tmp_path)
    assert printed.exit_code == 1, printed.output
    assert "failed: wrong n1: error: WrongResult: relative error inf against float64" in printed.output
    assert "failed: lost n1: error: ZeroDivisionError" in printed.output
    assert "group_norm_silu: 2 of 2 shapes right" in printed.output
    (file,) = tmp_path.glob("check-*.json")
    content = json.loads(file.read_text())
    assert len(content["done"]) == len(kinds()) and len(content["failed"]) == 2


def test_without_a_card_only_smoke_runs(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert "no CUDA card" in str(invoke("--check", "--out", tmp_path).exception)
