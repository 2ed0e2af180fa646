"""Every kernel against float64 and against PyTorch, on a CUDA card: milliseconds, GB/s, share of the copy bandwidth.

    python -m bench.kernels                 # check and time all, write bench/results/kernels-CARD.json
    python -m bench.kernels --tune          # before that: choose tiles and fall-backs, write them to kernels/tiles.json

The rivals are the same formula in eager PyTorch, channels-last and contiguous, and under torch.compile. Bytes are what
must move (bench/kernel_cases.py), so a kernel that reads twice shows a lower rate. All in one run on one card.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.kernel_cases import Call, Case, cases
from bench.seeds import machine
from diffult.cli import main
from diffult.errors import UserError
from diffult.runs.files import read_json, write_json
from kernels import dispatch

_TRIAL_MS = 20  # for which a choice of sizes is timed
_BOUND = 1e-2  # relative error by norm against float64, in bfloat16
TILES = Path(dispatch.__file__).with_name("tiles.json")


def milliseconds(call: Callable[[], object], budget_ms: int = 100) -> float:
    """Median time of a call on the card; the L2 cache is cleared between calls."""
    from triton.testing import do_bench

    return do_bench(call, warmup=budget_ms // 5, rep=budget_ms, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy of 1 GiB: the ceiling of every kernel here."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def relative_error(case: Case, device: torch.device) -> float:
    """Of one call, fresh inputs, against float64: the largest over its outputs, by norm."""
    call = case.build(device, torch.channels_last)
    exact, out = call.exact(), call.run()
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (out, exact)), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def forward_backward(call: Call) -> Callable[[], object]:
    gradient = torch.randn_like(call.run())  # type: ignore[arg-type]
    return lambda: torch.autograd.grad(call.run(), call.leaves, gradient)


def time_case(case: Case, device: torch.device, ceiling: float) -> dict[str, Any]:
    """One row: ours and the rivals', forward and forward + backward."""
    times: dict[str, float] = {}
    rivals: list[tuple[str, dispatch.Mode, torch.memory_format, bool]] = [
        ("ours", "triton", torch.channels_last, False)
    ]
    for layout in case.layouts:
        rivals.append((f"eager {str(layout).removeprefix('torch.')}", "torch", layout, False))
    rivals.append(("compiled", "torch", torch.channels_last, True))
    for name, mode, layout, compiled in rivals:
        dispatch.set_mode(mode)
        torch._dynamo.reset()
        call = case.build(device, layout)
        if compiled and case.kernel == "adamw_ema":
            continue  # an optimizer's step over flat buffers is torch's own fused kernel already
        run = torch.compile(call.run) if compiled else call.run
        with torch.no_grad():
            times[name] = milliseconds(run)
        if call.leaves:
            timed = Call(run, call.exact, call.leaves)
            times[f"{name}, backward too"] = milliseconds(forward_backward(timed))
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "ms": times}
    row["GB/s"] = case.bytes / times["ours"] / 1e6
    row["share of copy"] = row["GB/s"] * 1e9 / ceiling
    if case.bytes_backward:
        moved = case.bytes + case.bytes_backward
        row["share of copy, backward too"] = moved / times["ours, backward too"] * 1e3 / ceiling
    for suffix in ("", ", backward too") if case.bytes_backward else ("",):
        best = min(time for name, time in times.items() if name.endswith(suffix) and not name.startswith("ours"))
        row[f"ratio to the best{suffix}"] = best / times[f"ours{suffix}"]
    return row


def fastest(work: Callable[[], object], default: dict[str, int], row: dict[str, int]) -> float:
    """Leaves in `row`, the table's, the sizes with which `work` is fastest, and returns its milliseconds: from the
    kernel's own, each size in turn is halved or doubled as long as that gains 2 %."""
    row.clear()
    row.update(default)
    best = milliseconds(work, _TRIAL_MS)
    for name in default:
        for factor in (0.5, 2):
            while (size := int(row[name] * factor)) >= 1:
                before = row[name]
                row[name] = size
                try:
                    time = milliseconds(work, _TRIAL_MS)
                except Exception:  # sizes that do not compile, or ask for more than the card has
                    time = float("inf")
                if time > 0.98 * best:
                    row[name] = before
                    break
                best = time
    return best


def tune(device: torch.device) -> None:
    """Fills the table for this card: for each shape the fastest sizes, and the reference where it is faster still.
    What the table holds is kept: an interrupted tuning goes on, and a row is measured anew once it is deleted.

    Raises:
        UserError: kernels that do not run with their own sizes; all others are tuned.
    """
    failed = []
    for case in cases():
        rows: dict[tuple[str, str], dict[str, int]] = {}
        try:
            _tune_case(case, device, rows)
        except Exception as error:
            for kernel, key in rows:  # it is tried again the next time
                del dispatch.table()[dispatch.card(device)][kernel][key]
            failed.append(f"{case.kernel} {case.shape}: {type(error).__name__}: {error}")
        TILES.write_text(json.dumps(dispatch.table(), indent=1, sort_keys=True) + "\n")
    dispatch.set_mode("auto")
    if failed:
        raise UserError(f"{len(failed)} kernels could not be tuned: {'; '.join(failed)}")


def _tune_case(case: Case, device: torch.device, rows: dict[tuple[str, str], dict[str, int]]) -> None:
    """Adds to the table the rows that it lacks of this case, also to `rows`, by kernel and key."""
    dispatch.set_mode("triton")
    dispatch.asked.clear()
    call = case.build(device, torch.channels_last)
    work = forward_backward(call) if call.leaves else call.run
    work()
    for (kernel, key), default in dispatch.asked.items():
        known = dispatch.table().setdefault(dispatch.card(device), {}).setdefault(kernel, {})
        if key not in known:
            rows[kernel, key] = known.setdefault(key, {})
            best = fastest(work, default, rows[kernel, key])
    if rows:
        dispatch.set_mode("torch")
        torch._dynamo.reset()  # or shapes of earlier cases make it compile for shapes of any size
        if milliseconds(torch.compile(work), _TRIAL_MS) < best:
            for row in rows.values():
                row["torch"] = 1
        print(f"{case.kernel} {case.shape}: {list(rows.values())}, {best:.3g} ms", flush=True)


def command(
    tune_: Annotated[
        bool, typer.Option("--tune", help="Choose the tiles that kernels/tiles.json lacks, write them, and stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that were measured with the tiles of now.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Check every kernel against float64 and time it beside PyTorch, on a CUDA card."""
    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA card: times cannot be measured here; python -m bench.cubin_table compiles every kernel for sm_80, "
            "sm_90 and sm_100, and pytest checks them in Triton's interpreter"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if tune_:
        tune(device)
        return
    name = torch.cuda.get_device_name(device).replace(" ", "-")
    file = out / f"kernels-{name}.json"
    tiles = dispatch.table().get(dispatch.card(device), {})
    content: dict[str, Any] = read_json(file) if resume and file.exists() else {}
    if content.get("tiles") != tiles:
        content = {"machine": machine(), "tiles": tiles, "copy GB/s": copy_bandwidth() / 1e9, "rows": []}
    there = {(row["kernel"], row["shape"]) for row in content["rows"]}
    wrong = []
    for case in cases():
        if (case.kernel, case.shape) in there:
            continue
        dispatch.set_mode("triton")
        error = relative_error(case, device)
        if not error < _BOUND:
            wrong.append(f"{case.kernel} {case.shape}: relative error {error:.2g} against float64")
            continue
        content["rows"].append(time_case(case, device, content["copy GB/s"] * 1e9) | {"error": error})
        print(json.dumps(content["rows"][-1]), flush=True)
        write_json(file, content)
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    main(command)
