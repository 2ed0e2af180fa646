"""Compiles every kernel at every shape, type and tile of the table for each architecture, without a GPU.

    python -m bench.cubin_table

Writes bench/results/cubins.json: registers, shared memory, stack, and how many loads and stores are 16 bytes wide.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # nothing compiles in the interpreter

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer

from bench.cubins import ARCHITECTURES, compile_launches
from bench.kernel_cases import BF16, FP16, FP32, Case, cases, outputs
from diffult.cli import main
from diffult.runs.files import write_json
from kernels import dispatch

_MOST = 16e9  # bytes that a case may move


def compile_all(some: Iterable[Case]) -> list[dict]:
    """One row for each kernel, case and architecture; forward and, where there is one, backward."""
    dispatch.set_mode("triton")
    rows = []
    for case in some:
        call = case.build(torch.device("cpu"), torch.channels_last)

        gradient = torch.ones_like(call.leaves[0]) if call.leaves else None

        def both(call=call, gradient=gradient) -> None:
            outputs(call.run, call.leaves, gradient)

        for arch in ARCHITECTURES:
            compiled = {row.kernel: row for row in compile_launches(both, arch)}
            rows += [{"case": str(case)} | row.row() for row in compiled.values()]
    return rows


def table(rows: list[dict]) -> str:
    """A kernel a line: the worst over its shapes and types."""
    lines = [
        "| kernel | arch | registers | shared | stack | narrow of all loads and stores |",
        "|---|---|---|---|---|---|",
    ]
    for name, arch in sorted({(row["kernel"], row["arch"]) for row in rows}):
        of = [row for row in rows if (row["kernel"], row["arch"]) == (name, arch)]
        narrow, total = sum(row["narrow"] for row in of), sum(row["narrow"] + row["wide"] for row in of)
        registers, shared, stack = (max(row[key] for row in of) for key in ("registers", "shared", "stack"))
        lines.append(f"| {name} | sm_{arch} | {registers} | {shared} | {stack} | {narrow}/{total} |")
    return "\n".join(lines)


def command(out: Annotated[Path, typer.Option(help="The results file.")] = Path("bench/results/cubins.json")) -> None:
    """Compile every kernel for every architecture and tell what the compiler made of it."""
    every = cases((BF16, FP16, FP32))
    # A norm without its backward pass is one with it at another batch; the largest network's optimizer needs 20 GB.
    rows = compile_all(c for c in every if c.bytes < _MOST and (c.bytes_backward or not c.in_network))
    write_json(out, {"triton": triton.__version__, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main(command)
