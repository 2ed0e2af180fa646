"""What the compiler makes of every kernel, without a GPU: registers, stack, spills, width of loads and stores.

A fake driver stands in for the card: the public functions are called as ever, on CPU tensors, and each launch is
compiled for the architecture asked for instead of run, with the very types, alignments and tiles of that launch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one launch.

    Attributes:
        stack: bytes of local memory a thread, spilled registers among them; 0 is a proof of no spills.
        wide, narrow: global loads and stores of 16 bytes a thread, and of less.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    wide: int
    narrow: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


class _FakeDriver:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device for each architecture: Triton keeps what it compiled by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def _compiling_only(arch: int) -> Iterator[list[Any]]:
    """Within, every Triton launch compiles for sm_`arch` and does not run; yields the compiled kernels."""
    seen: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        seen.append(compiled)
        return compiled

    JITFunction.run = compile_only
    active = driver._active
    driver.set_active(_FakeDriver(arch))
    try:
        yield seen
    finally:
        JITFunction.run = run
        driver._active = active


def compile_launches(call: Callable[[], object], arch: int) -> list[Compiled]:
    """The kernels that `call` launches, compiled for sm_`arch`. Their outputs stay as allocated.

    Raises:
        RuntimeError: Triton runs in interpreter mode (TRITON_INTERPRET=1) in this process, so nothing was compiled.
    """
    with _compiling_only(arch) as seen:
        call()
    if not seen:
        raise RuntimeError("no kernel was compiled: start this process without TRITON_INTERPRET=1")
    return [_inspect(compiled, arch) for compiled in seen]


def _inspect(compiled: Any, arch: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout

    def used(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        return int(found.group(1)) if found else 0

    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*?((?:\.v\d)?\.b\d+)\b", compiled.asm["ptx"])
    wide = sum(_width(access) >= 16 for access in accesses)
    return Compiled(
        compiled.metadata.name, arch, compiled.metadata.num_warps, used("REG"), compiled.metadata.shared,
        used("STACK") + used("LOCAL"), wide, len(accesses) - wide,
    )  # fmt: skip


def _width(access: str) -> int:
    """Bytes of a PTX access such as ".v4.b32" or ".b16"."""
    vector = re.match(r"\.v(\d)", access)
    return (int(vector.group(1)) if vector else 1) * int(access.rsplit(".b", 1)[1]) // 8
