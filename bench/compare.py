"""Two results files of `python -m bench` side by side: what became slower, beyond the noise.

    python -m bench.compare BEFORE.json AFTER.json

Compared is the ratio to the best rival, which a busy machine moves little; where we race alone, images/s. A change
counts when no round of one file reaches into the rounds of the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from diffult.cli import main
from diffult.errors import UserError
from diffult.runs.files import read_json


def figures(told: dict[str, Any]) -> tuple[str, list[float]]:
    """What a race is judged by, and its value in each round, higher is better."""
    ours = told["contestants"][told["ours"]]["seconds"]
    if told["best_rival"] is None:
        return "images/s", [told["images"] / seconds for seconds in ours]
    theirs = told["contestants"][told["best_rival"]]["seconds"]
    return "times the best rival", [b / a for a, b in zip(ours, theirs, strict=True)]


def verdict(before: list[float], after: list[float]) -> str:
    if max(after) < min(before):
        return "slower"
    return "faster" if min(after) > max(before) else "the same within the noise"


def command(
    before: Annotated[Path, typer.Argument(help="Results file.", exists=True)],
    after: Annotated[Path, typer.Argument(help="Results file of the same kind of machine.", exists=True)],
) -> None:
    """Show which races changed by more than the noise; exit code 1 where one became slower."""
    old, new = ({told["race"]: told for told in read_json(file)["rows"]} for file in (before, after))
    if not old.keys() & new.keys():
        raise UserError(f"{before} and {after} have no race in common")
    slower = False
    for name in [name for name in old if name in new]:
        (unit, a), (other, b) = figures(old[name]), figures(new[name])
        if unit != other:
            print(f"{name}: not comparable ({unit}, then {other})")
            continue
        told = verdict(a, b)
        slower |= told == "slower"
        print(f"{name}: {median(a):.4g} -> {median(b):.4g} {unit}, {told}")
    sys.exit(int(slower))


if __name__ == "__main__":
    main(command)
