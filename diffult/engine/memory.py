"""Memory of this machine's processes, and whether an error is for want of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

# Of torch's allocator on a CPU, which has no exception of its own; of CUDA's own calls; of the system's.
_SIGNS = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory")


def own_memory(process: int | str = "self") -> float:
    """Bytes that a process holds itself; pages of mapped files are the system's cache. 0 where it has ended, and where
    the system does not say."""
    return status_bytes("RssAnon", process)


def status_bytes(row: str, process: int | str = "self") -> float:
    """A row of /proc/PROCESS/status (proc(5)) in bytes, 0 where there is none."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{row}:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def local_processes() -> int:
    """How many processes of this training torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device had no more to give."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )
