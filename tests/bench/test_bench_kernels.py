"""What the kernels compile to without a GPU, and the cases that the benchmark checks and times."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels.diffuse as diffuse_module
from bench import kernels as bench_kernels
from bench import training_step
from bench.kernel_cases import BF16, FP32, Call, Case, cases
from bench.kernels import relative_error
from diffult.config import load_preset
from diffult.errors import UserError
from kernels import dispatch

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
COMPILE = """
import json
from bench.cubin_table import compile_all
from bench.kernel_cases import cases
shapes = {"64x128x32x32 bfloat16", "64x256x8x8 bfloat16", "256x3x32x32 guided with noise bfloat16",
          "256x3x32x32 bfloat16", "128x32>32 bfloat16", "37.7M bfloat16", "256x3x32x32"}
print(json.dumps(compile_all(case for case in cases() if case.shape in shapes)))
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


def test_cases_compute_what_they_claim():
    """On the CPU by the references, which must agree with the cases' own float64 formulas."""
    small = [case for case in cases((BF16, FP32)) if case.bytes < 25e6]
    assert {case.kernel for case in small} >= {"group_norm_silu", "denoise_step", "diffuse", "normal", "augment"}
    for case in small:
        assert relative_error(case, CPU) < (1e-2 if "bfloat16" in case.shape else 1e-5), case


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Tunes kernels {shape: work} of the name "fake" for the CPU by a made-up clock; returns the table, kept from call
    to call."""
    table = {}

    def tune(works, milliseconds):
        made = [Case("fake", shape, lambda *_, work=work: Call(work, work), 1) for shape, work in works.items()]
        for module, name, value in (
            (bench_kernels, "cases", lambda: made), (bench_kernels, "milliseconds", milliseconds),
            (bench_kernels, "TILES", tmp_path / "tiles.json"), (dispatch, "table", lambda: table),
            (torch, "compile", lambda f: f),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
        bench_kernels.tune(CPU)
        return table

    tune.table, tune.file = table, tmp_path / "tiles.json"
    return tune


def test_tuning_finds_the_fastest_sizes_and_keeps_what_it_found(tuned):
    """A kernel of 1 ms at 2048 elements and 2 warps, more the farther its sizes are; larger than 2048 do not launch."""
    used = {}

    def work():
        used.update(dispatch.tile("fake", "n1", CPU, elements=256, warps=4))

    def milliseconds(call, budget_ms=100):
        call()
        if dispatch.mode() == "torch":
            return 5.0
        if used["elements"] > 2048:
            raise RuntimeError("out of resources")
        return 1 + abs(math.log2(used["elements"] / 2048)) + abs(math.log2(used["warps"] / 2))

    found = {"cpu": {"fake": {"n1": {"elements": 2048, "warps": 2}}}}
    assert tuned({"n1": work}, milliseconds) == found == json.loads(tuned.file.read_text())
    assert tuned({"n1": work}, lambda *_: pytest.fail("measured again")) == found


def test_a_kernel_that_does_not_run_is_named_and_the_others_are_tuned(tuned):
    def broken():
        dispatch.tile("fake", "n1", CPU, warps=4)
        if dispatch.mode() == "triton" and tuned.table:
            raise RuntimeError("out of resources")

    works = {"n1": broken, "n2": partial(dispatch.tile, "fake", "n2", CPU, warps=1)}
    with pytest.raises(UserError, match="1 kernels could not be tuned: fake n1: RuntimeError: out of resources"):
        tuned(works, lambda call, _: call() and 1.0)
    assert tuned.table == {"cpu": {"fake": {"n2": {"warps": 1}}}}


def test_a_shape_at_which_pytorch_is_faster_is_sent_to_it(tuned):
    work = partial(dispatch.tile, "fake", "n1", CPU, warps=1)
    table = tuned({"n1": work}, lambda *_: 1.0 if dispatch.mode() == "torch" else 2.0)
    assert table == {"cpu": {"fake": {"n1": {"warps": 1, "torch": 1}}}}


def test_training_step_with_and_without_each_kernel(triton_kernels):
    """In the interpreter at a tiny size: each variant runs, and without a kernel its module is asked no more."""
    config = load_preset(
        "digits-lt", ["unet.channels=8", "unet.multipliers=[1]", "unet.attention_resolutions=[]",
                      "diffusion.batch_size=2", "diffusion.cbdm=false"]
    )  # fmt: skip
    result = training_step.measure(config, triton_kernels, steps=1, rounds=1)
    assert set(result["times as long without"]) == set(training_step.KERNELS)
    assert result["images_per_s"] == pytest.approx(2 / result["seconds"])
    with training_step.without("diffuse"):
        assert not diffuse_module.use_triton("diffuse", "", triton_kernels)
    assert diffuse_module.use_triton("diffuse", "", triton_kernels)
