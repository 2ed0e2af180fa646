"""The suite: every race of `bench.cases` and `bench.cases_data`, in one run, beside the machine's ceilings.

    python -m bench --quick                # minutes on two cores: small networks, nothing compiled
    python -m bench                        # also torch.compile of each, more rounds
    python -m bench --only "training step" --only writer

Prints a table of ratios and writes bench/results/CARD-DATE.json: machine, versions, ceilings, and every round's times.
`python -m bench.compare` tells regressions between two such files, `python -m bench.report` makes the README's tables.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from bench import cases, cases_data  # noqa: F401  (enter their races)
from bench.ceilings import Ceilings, measure
from bench.race import RACES, row, run_race
from bench.tables import suite_table
from diffult.cli import main
from diffult.engine.device import compute_dtype, machine, pick_device
from diffult.errors import UserError
from diffult.runs.files import read_json, write_json

PACKAGES = ("torch", "triton", "diffusers", "ffcv", "xformers", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that matter here and are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def run_suite(
    names: list[str], device: torch.device, ceilings: Ceilings, quick: bool
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Of each race by name, in order, its row, or in words why there is none: the others run all the same."""
    threads = torch.get_num_threads()
    for name in names:
        begun = time.perf_counter()
        torch.set_num_threads(threads)  # ffcv sets it to 1
        torch._dynamo.reset()
        with TemporaryDirectory() as folder:
            try:
                work = RACES[name].work(Path(folder))
                rounds, turn_s = (5, 0.1) if quick else (15, 0.5)
                results = run_race(work, device, rounds, turn_s, compiled=not quick)
                yield name, row(RACES[name], work, results, ceilings)
            except Exception as error:  # a rival that is missing, or that does not run on this machine
                yield name, f"{type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, nothing compiled: minutes on two cores.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only the race of this name. Repeatable.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the races that this very command measured today.")
    ] = False,
    note: Annotated[str, typer.Option(help="What else ran on the machine, for the results file.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Race this code against its best peers and write a results file."""
    names = only or list(RACES)
    if unknown := [name for name in names if name not in RACES]:
        raise UserError(f"--only {unknown[0]!r}: no such race; there are {', '.join(map(repr, RACES))}")
    begun, device, today, about = time.perf_counter(), pick_device(), datetime.date.today().isoformat(), machine()
    content: dict[str, Any] = {
        "command": "python -m bench" + " --quick" * quick + "".join(f" --only {name!r}" for name in only or []),
        "date": today, "machine": about, "versions": versions(), "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(), "note": note,
    }  # fmt: skip
    file = out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', about['device']).strip('-')}-{today}.json"
    before = read_json(file) if resume and file.exists() else {}
    if before.get("command") != content["command"]:  # of the same command alone: one file, one way of measuring
        measured = measure(device, compute_dtype("auto", device), 0.3 if quick else 2.0)
        before = {"seconds": 0.0, "ceilings": measured.row(), "rows": []}
    rows, failed, ceilings = list(before["rows"]), dict[str, str](), Ceilings(**before["ceilings"])
    names = [name for name in names if name not in {row["race"] for row in rows}]
    logging.disable(logging.WARNING)  # the stages' own lines
    try:
        for name, result in run_suite(names, device, ceilings, quick):
            if isinstance(result, str):
                failed[name] = result
            else:
                rows = sorted([*rows, result], key=lambda row: list(RACES).index(row["race"]))
            seconds = round(before["seconds"] + time.perf_counter() - begun, 1)
            write_json(file, content | {"seconds": seconds, "ceilings": ceilings.row(), "failed": failed, "rows": rows})
    finally:
        logging.disable(logging.NOTSET)
    print(suite_table({"rows": rows}))
    print(json.dumps({"results": str(file), "seconds": round(time.perf_counter() - begun, 1)}))
    if failed:
        told = "; ".join(f"{name!r}: {words}" for name, words in failed.items())
        raise UserError(f"{len(failed)} of {len(names)} races did not run, the others are in {file}: {told}")


if __name__ == "__main__":
    main(command)
