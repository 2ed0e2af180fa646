"""Every kernel against float64, its share of the card's copy bandwidth, and beside PyTorch.

    python -m bench.kernels                 # all three; bench/results/kernels-CARD.json
    python -m bench.kernels --check         # the first two; bench/results/check-CARD.json
    python -m bench.kernels --tune          # choose tiles and fall-backs, write them to kernels/tiles.json

The shapes are those that the presets ask for (bench/kernel_shapes.py). The rivals are the same formula in eager
PyTorch, channels-last and contiguous, and under torch.compile. Bytes are what must move (bench/kernel_cases.py), so a
kernel that reads twice shows a lower rate. What is timed is a CUDA graph of the call, without the host.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

if "--smoke" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before `kernels` is imported

from bench.budget import Ledger, Piece
from bench.kernel_cases import Call, Case, cases, outputs
from bench.kernel_shapes import SMOKE, WORKLOADS
from diffult.cli import main
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import machine, pick_device
from diffult.errors import UserError
from diffult.runs.files import write_text
from kernels import dispatch

_TRIAL_MS = 20  # for which a choice of sizes is timed
_BOUND = 2e-2  # relative error against float64; one last bit of a bfloat16 is up to 0.8 %
_COPY = 2**28  # float32 numbers: 1 GiB
TILES = Path(dispatch.__file__).with_name("tiles.json")


class WrongResult(Exception):
    """A kernel's, against float64."""


def milliseconds(call: Callable[[], object], budget_ms: int = 100) -> float:
    """Median time of a call, on a card as a CUDA graph; the L2 cache is cleared between calls."""
    if not torch.cuda.is_available():
        call()
        times, end = [], time.perf_counter() + budget_ms / 1e3
        while not times or time.perf_counter() < end:
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return 1e3 * median(times)
    from triton.testing import do_bench

    graph = CUDAGraphRunner(call, pick_device())
    for _ in range(graph.warm_up + 1):
        graph()
    return do_bench(graph, warmup=budget_ms // 5, rep=budget_ms, return_mode="median")


def copy_bandwidth(device: torch.device) -> float:
    """GB/s read and written by a copy of 1 GiB: the ceiling of every kernel here."""
    source = torch.empty(_COPY if device.type == "cuda" else _COPY // 64, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within, new memory holds NaN: what a kernel leaves out cannot pass for the result of the call before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def relative_error(case: Case, device: torch.device) -> float:
    """Of one call, fresh inputs, against float64, gradients included: the largest over its results, each by norm and by
    its largest element."""
    torch.manual_seed(0)
    call = case.build(device, torch.channels_last)
    gradient = None
    if call.leaves:
        gradient = torch.randn_like(call.exact()[0]).to(call.leaves[0].dtype)
    exact = outputs(call.exact, call.leaves, gradient)
    with unwritten_is_nan():
        out = outputs(call.run, call.leaves, gradient)
    errors = []
    for a, b in zip(out, exact, strict=True):
        difference, b = (a.double() - b.double()).abs(), b.double()
        errors += [difference.norm() / b.norm(), difference.max() / b.abs().max()]
    return torch.stack(errors).max().item()  # where a result is no number, so is this


def checked_error(case: Case, device: torch.device) -> float:
    """`relative_error`.

    Raises:
        WrongResult: it is too large, or no number.
    """
    error = relative_error(case, device)
    if not error < _BOUND:
        raise WrongResult(f"relative error {error:.2g} against float64")
    return error


def forward_backward(call: Call, run: Callable[[], Any] | None = None) -> Callable[[], object]:
    """A pass of `call` and back, or of `run` in its place; forward alone where nothing takes a gradient."""
    work = run or call.timed or call.run
    if not call.leaves:
        return work
    gradient = torch.randn_like(call.run()[0])
    return lambda: torch.autograd.grad(work()[0], call.leaves, gradient)  # type: ignore[index]


def time_call(call: Call, run: Callable[[], Any] | None = None) -> dict[str, float]:
    """Milliseconds of a pass and, where there is one, of a pass and back."""
    with torch.no_grad():
        times = {"ms": milliseconds(run or call.timed or call.run)}
    if call.leaves:
        times["ms, backward too"] = milliseconds(forward_backward(call, run))
    return times


def time_ours(case: Case, device: torch.device, copy: float) -> dict[str, float]:
    """Our kernel's milliseconds, its GB/s and its share of the copy's GB/s."""
    row = time_call(case.build(device, torch.channels_last))
    row["GB/s"] = case.bytes / row["ms"] / 1e6
    row["share of copy"] = row["GB/s"] / copy
    if case.bytes_backward:
        row["share of copy, backward too"] = (case.bytes + case.bytes_backward) / row["ms, backward too"] / 1e6 / copy
    return row


def reference(case: Case, call: Call, compiled: bool) -> Callable[[], Any]:
    """What serves `call` in the mode "torch", compiled or as it is."""
    torch._dynamo.reset()  # or shapes of earlier cases make it compile for shapes of any size
    return torch.compile(call.run) if compiled else call.timed or call.run


def time_rivals(case: Case, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of the reference in each of its layouts, and compiled where it can be."""
    rows = {}
    with _mode("torch"):
        for layout in case.layouts:
            call = case.build(device, layout)
            rows[f"eager {str(layout).removeprefix('torch.')}"] = time_call(call, reference(case, call, False))
        if case.compilable:
            call = case.build(device, torch.channels_last)
            rows["compiled"] = time_call(call, reference(case, call, True))
    return rows


@contextmanager
def _mode(name: dispatch.Mode) -> Iterator[None]:
    before = dispatch.mode()
    dispatch.set_mode(name)
    try:
        yield
    finally:
        dispatch.set_mode(before)


def measurements(some: list[Case], device: torch.device, ledger: Ledger, timed: bool, rivals: bool) -> Iterator[Piece]:
    """Of each case whether it is right and, where it is, the share of the copy bandwidth; then the rivals' times."""
    if timed:
        yield "copy GB/s", partial(copy_bandwidth, device)
    for case in some:
        yield f"{case}: error", partial(checked_error, case, device)
        if timed and f"{case}: error" not in ledger.failed:
            yield f"{case}: ours", lambda case=case: time_ours(case, device, ledger.done["copy GB/s"])
    if rivals:
        for case in some:
            yield f"{case}: rivals", partial(time_rivals, case, device)


def summary(some: list[Case], done: dict[str, Any]) -> str:
    """A line a kernel: cases, the largest error, the lowest and the highest share of the copy bandwidth."""
    lines = []
    for kernel in dict.fromkeys(case.kernel for case in some):
        names = [str(case) for case in some if case.kernel == kernel]
        errors = [done[key] for name in names if (key := f"{name}: error") in done]
        line = f"{kernel}: {len(errors)} of {len(names)} shapes right"
        if errors:
            line += f", error up to {max(errors):.1g}"
        for share in ("share of copy", "share of copy, backward too"):
            rows = [done[key] for name in names if (key := f"{name}: ours") in done]
            if shares := [row[share] for row in rows if share in row]:
                line += f"; {share} {min(shares):.0%} to {max(shares):.0%}, median {median(shares):.0%}"
        lines.append(line)
    return "\n".join(lines)


def fastest(
    work: Callable[[], object], right: Callable[[], bool], default: dict[str, int], row: dict[str, int]
) -> float:
    """Leaves in `row`, the table's, the sizes with which `work` is fastest and `right`, and returns its milliseconds:
    from the kernel's own, each size in turn is halved or doubled as long as that gains 2 %."""
    row.clear()
    row.update(default)
    best = milliseconds(work, _TRIAL_MS)
    for name in default:
        for factor in (0.5, 2):
            while (size := int(row[name] * factor)) >= 1:
                before = row[name]
                row[name] = size
                try:
                    time = milliseconds(work, _TRIAL_MS) if right() else float("inf")
                except Exception:  # sizes that do not compile, or ask for more than the card has
                    time = float("inf")
                if time > 0.98 * best:
                    row[name] = before
                    break
                best = time
    return best


def tune_case(case: Case, device: torch.device, files: list[Path]) -> dict[str, dict[str, int]]:
    """Adds to the table, and writes to the files, the rows of this case that it lacks: the fastest sizes, and the
    reference where it is faster still. Returns them by kernel and key. A row that is there is kept: it is measured anew
    once it is deleted. If anything fails none is added.

    Raises:
        WrongResult: the kernel is wrong with its own sizes.
    """
    rows: dict[tuple[str, str], dict[str, int]] = {}
    known = dispatch.table().setdefault(dispatch.card(device), {})
    try:
        with _mode("triton"):
            dispatch.asked.clear()
            call = case.build(device, torch.channels_last)
            work = forward_backward(call)
            work()
            lacking = {at: size for at, size in dispatch.asked.items() if at[1] not in known.get(at[0], {})}
            if lacking:
                checked_error(case, device)
            for (kernel, key), default in lacking.items():
                row = rows[kernel, key] = known.setdefault(kernel, {}).setdefault(key, {})
                best = fastest(work, lambda: relative_error(case, device) < _BOUND, default, row)
        if rows:
            with _mode("torch"):
                served = reference(case, call, compiled=case.in_network)
                if milliseconds(forward_backward(call, served), _TRIAL_MS) < best:
                    for row in rows.values():
                        row["torch"] = 1
            for file in files:
                write_text(file, json.dumps(dispatch.table(), indent=1, sort_keys=True) + "\n")
    except BaseException:
        for kernel, key in rows:
            del known[kernel][key]
        raise
    return {f"{kernel} {key}": row for (kernel, key), row in rows.items()}


def command(
    check: Annotated[bool, typer.Option("--check", help="Without PyTorch's times.")] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Choose the tiles that kernels/tiles.json lacks and write them, there and to OUT."),
    ] = False,
    budget: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds; default: never.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the results file holds.")] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Tiny shapes, by Triton's interpreter where there is no card; tiles go to OUT alone."
        ),
    ] = False,
) -> None:
    """Check every kernel against float64 and time it, on a CUDA card, at the shapes of the presets.

    Exit code 1 where a kernel is wrong or fails, 3 where the budget ended before the work.
    """
    device = pick_device()
    if device.type != "cuda" and not smoke:
        raise UserError(
            "no CUDA card: times cannot be measured here; python -m bench.cubin_table compiles every kernel for sm_80, "
            "sm_90 and sm_100, pytest checks them in Triton's interpreter, and --smoke runs this at tiny shapes"
        )
    some = cases(workloads=SMOKE if smoke else WORKLOADS)
    about = {"command": "bench.kernels" + " --tune" * tune + " --check" * check + " --smoke" * smoke}
    about |= {"machine": machine(), "tiles": dispatch.table().get(dispatch.card(device), {})}
    kind = "tune" if tune else "check" if check else "kernels"
    card = re.sub(r"[^A-Za-z0-9.]+", "-", about["machine"]["device"]).strip("-")
    ledger = Ledger(out / f"{kind}-{card}.json", about, budget, resume)
    if tune:
        files = [out / "tiles.json"] + [TILES] * (not smoke)
        pieces: Any = ((str(case), partial(tune_case, case, device, files)) for case in some)
    else:
        pieces = measurements(some, device, ledger, timed=not smoke, rivals=not (check or smoke))
    with _mode("triton"):
        code = ledger.run(pieces)
    if not tune:
        print(summary(some, ledger.done))
    raise typer.Exit(code)


if __name__ == "__main__":
    main(command)
