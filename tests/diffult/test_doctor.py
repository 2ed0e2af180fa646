"""What doctor says of this machine, and of machines that this one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
import torch

from diffult import doctor
from diffult.doctor import Row
from kernels import group_norm_silu_cpu

OPERATIONS = [
    "Python", "torch", "device", "convolutions, products", "attention",
    "norms", "noise, sampler, AdamW, crops",
    "JPEG decoding", "memory", "disk", "presets",
]  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cpu_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {row.operation: row for row in doctor.rows()}


def test_every_operation_has_an_answer_and_a_reason(cpu_rows: dict[str, Row]) -> None:
    assert list(cpu_rows) == OPERATIONS
    assert all(row.used and row.why for row in cpu_rows.values())


def test_cpu_rows(cpu_rows: dict[str, Row]) -> None:
    assert cpu_rows["Python"].used == sys.version.split()[0]
    assert cpu_rows["torch"].used == torch.__version__
    assert cpu_rows["device"].used == f"CPU, {torch.get_num_threads()} threads"
    assert cpu_rows["attention"].used == "torch SDPA"
    assert "CUDA device" in cpu_rows["attention"].why
    assert cpu_rows["norms"].used == ("C++" if which("g++") else "torch")
    assert cpu_rows["noise, sampler, AdamW, crops"].used == "torch"
    assert "CUDA device" in cpu_rows["noise, sampler, AdamW, crops"].why
    assert "digits-lt" in cpu_rows["presets"].why


def test_the_switch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.dispatch._mode", "torch")
    assert "DIFFULT_KERNELS is set to torch" in doctor.kernels_row(CPU).why
    assert "DIFFULT_KERNELS is set to torch" in doctor.norms_row(CPU).why
    monkeypatch.setattr("kernels.dispatch._mode", "triton")
    row = doctor.kernels_row(CPU)
    assert row.used.startswith("Triton 3.") and "knows 0 shapes" in row.why
    assert doctor.norms_row(CPU) == row._replace(operation="norms")


def test_what_is_missing_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kernels.group_norm_silu_cpu._library", group_norm_silu_cpu._library.__wrapped__)
    assert doctor.norms_row(CPU)[1:2] == ("torch",) and doctor.norms_row(CPU).why.startswith("there is no g++; ")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the CPU has")
def test_number_format_follows_the_cpu_flags(cpu_rows: dict[str, Row]) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    fast = bool(flags & {"avx512_bf16", "amx_tile"})
    row = cpu_rows["convolutions, products"]
    assert row.used == ("bfloat16" if fast else "float32")
    assert row.why.startswith(f"the CPU {'has' if fast else 'has no'} bfloat16 instructions")


@pytest.mark.parametrize(
    ("built_for", "visible", "reason"),
    [(None, None, "without CUDA"), ("13.0", "", "CUDA_VISIBLE_DEVICES"), ("13.0", None, "driver")],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, visible: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert reason in doctor.device_row(CPU).why


@pytest.mark.parametrize(("capability", "used"), [((9, 0), "bfloat16"), ((7, 5), "float32")])
def test_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], used: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**29, 2**31))
    monkeypatch.setattr(doctor, "attention_backend", lambda device: ("xformers", "it runs here"))
    monkeypatch.setattr(doctor, "installed", lambda package: "1.2.3")
    assert doctor.device_row(CUDA) == Row("device", "NVIDIA X1", "the first of 4 GPUs")
    assert doctor.dtype_row(CUDA).used == used
    assert "{}.{}".format(*capability) in doctor.dtype_row(CUDA).why
    assert doctor.attention_row(CUDA) == Row("attention", "xformers 1.2.3", "it runs here")
    assert doctor.memory_row(CUDA) == Row("memory", "1.5 GiB free", "of 2.0 GiB on the GPU")


def test_what_decodes_jpegs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.jpeg_row().used.startswith("TurboJPEG" if find_spec("ffcv") else "Pillow")
    monkeypatch.setattr(doctor, "decoder_name", lambda: "Pillow (no ffcv)")
    assert doctor.jpeg_row().used == "Pillow (no ffcv)"


def test_version_of_a_package_that_is_not_there() -> None:
    assert doctor.installed("no-such-package-here") is None
    assert doctor.installed("torch") == torch.__version__.split("+")[0]


def test_table_is_aligned_and_wraps_the_reasons() -> None:
    lines = doctor.table([Row("one", "a", "word " * 60), Row("another", "bcd", "short")]).splitlines()
    start = lines[0].index("why")
    assert lines[0].index("used") == len("operation  ") and start == len("operation  used  ")
    assert all(len(line) <= 110 for line in lines)
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    assert " ".join(line[start:] for line in lines[1:-1]).split() == ["word"] * 60
    assert lines[-1] == "another    bcd   short"


def test_command_prints_the_table_and_no_warning() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "diffult.doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""  # importing xformers without a GPU would warn
    first = [line.split("  ")[0] for line in done.stdout.splitlines() if line[0] != " "]
    assert first == ["operation", *OPERATIONS]
