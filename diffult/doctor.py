"""What serves each operation on this machine, and why."""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from diffult.cli import main
from diffult.config import preset_names
from diffult.engine.device import compute_dtype, fast_bfloat16, pick_device
from ffcv_writers.jpeg import decoder_name
from kernels import dispatch
from kernels.attention import attention_backend
from kernels.group_norm_silu_cpu import cpp_refusal

_WIDTH = 110  # of the table, in characters
_GIB = 2**30
_KERNELS = "noise, sampler, AdamW, crops"


class Row(NamedTuple):
    operation: str
    used: str
    why: str


def installed(package: str) -> str | None:
    """A package's version, None if it is missing. It is not imported: xformers warns without a GPU."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def rows() -> list[Row]:
    """The rows for the device that every verb would pick now."""
    device, cuda = pick_device(), torch.version.cuda
    return [
        Row("Python", platform.python_version(), platform.platform(terse=True)),
        Row("torch", torch.__version__, f"built for CUDA {cuda}" if cuda else "built without CUDA"),
        device_row(device),
        dtype_row(device),
        attention_row(device),
        norms_row(device),
        kernels_row(device),
        jpeg_row(),
        memory_row(device),
        Row("disk", f"{shutil.disk_usage(Path.cwd()).free / _GIB:.1f} GiB free", f"in {Path.cwd()}"),
        Row("presets", f"{len(preset_names())} known", ", ".join(preset_names())),
    ]


def device_row(device: torch.device) -> Row:
    if device.type == "cuda":
        count = torch.cuda.device_count()
        why = "the one GPU that torch finds" if count == 1 else f"the first of {count} GPUs"
        return Row("device", torch.cuda.get_device_name(device), why)
    used = f"CPU, {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        return Row("device", used, "this torch is built without CUDA")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Row("device", used, "CUDA_VISIBLE_DEVICES hides every GPU")
    return Row("device", used, "torch finds no CUDA device; if there is one, look at its driver")


def dtype_row(device: torch.device) -> Row:
    used = str(compute_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        why = f"compute capability {major}.{minor}; bfloat16 needs 8.0"
    else:
        has = "has" if fast_bfloat16(device) else "has no"
        why = f"the CPU {has} bfloat16 instructions (AVX512-BF16 or AMX)"
    return Row("convolutions, products", used, f"{why}; weights and statistics stay float32")


def attention_row(device: torch.device) -> Row:
    backend, why = attention_backend(device)
    if backend == "xformers":
        return Row("attention", f"xformers {installed('xformers')}", why)
    return Row("attention", "torch SDPA", f"{why}; {_unused('xformers')}")


def norms_row(device: torch.device) -> Row:
    """Group normalisation, which C++ serves on a CPU."""
    if device.type != "cpu" or dispatch.mode() == "triton":
        return kernels_row(device)._replace(operation="norms")
    if (refusal := cpp_refusal(device)) is not None:
        return Row("norms", "torch", f"{refusal}; with g++ a training step takes 7 to 15 % less time")
    return Row("norms", "C++", "compiled by g++ for this processor, kept in ~/.cache/diffult")


def kernels_row(device: torch.device) -> Row:
    """The operations of `kernels` except attention and norms."""
    if (refusal := dispatch.refusal(device)) is not None:
        return Row(_KERNELS, "torch", f"{refusal}; {_unused('triton')}")
    kernels = dispatch.table().get(dispatch.card(device), {}).values()
    shapes = [row for kernel in kernels for row in kernel.values()]
    why = f"DIFFULT_KERNELS={dispatch.mode()}; kernels/tiles.json knows {len(shapes)} shapes of this card, "
    why += f"{sum(row.get('torch', 0) for row in shapes)} of them faster in torch"
    return Row(_KERNELS, f"Triton {installed('triton')}", why)


def _unused(package: str) -> str:
    there = installed(package)
    return f"{package} {there} is installed, not used" if there else f"{package} is not installed"


def jpeg_row() -> Row:
    return Row("JPEG decoding", decoder_name(), "raw .beton files need numpy alone")


def memory_row(device: torch.device) -> Row:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Row("memory", f"{free / _GIB:.1f} GiB free", f"of {total / _GIB:.1f} GiB on the GPU")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Row("memory", f"{total / _GIB:.1f} GiB", "all of this machine's, whatever else is running")


def table(lines: list[Row]) -> str:
    """The rows as text in three aligned columns, the last one wrapped."""
    header = Row("operation", "used", "why")
    first, second = (max(len(row[column]) for row in [header, *lines]) for column in (0, 1))
    rest = max(_WIDTH - first - second - 4, 30)
    text = []
    for row in [header, *lines]:
        for number, why in enumerate(textwrap.wrap(row.why, rest) or [""]):
            operation, used = (row.operation, row.used) if number == 0 else ("", "")
            text.append(f"{operation:{first}}  {used:{second}}  {why}".rstrip())
    return "\n".join(text)


def command() -> None:
    """Print what serves each operation on this machine, and why."""
    print(table(rows()))


if __name__ == "__main__":
    main(command)
