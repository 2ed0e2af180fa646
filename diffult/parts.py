"""The balanced set's parts on disk: betons/{real,synthetic,val,test}, written by `balance`, read by what follows."""

from __future__ import annotations

from pathlib import Path

from diffult.errors import UserError
from diffult.runs.run_dir import RunDir
from ffcv_writers import ImageSet, open_set, suffix


def part_path(run: RunDir, name: str) -> Path:
    """Where a part lies: "real", "synthetic", "val" or "test"."""
    return run.folder("betons") / f"{name}{suffix()}"


def open_part(run: RunDir, *names: str) -> ImageSet:
    """Parts joined to one set; the synthetic part is left out where no class needed a sample.

    Raises:
        UserError: the stage is not finished, or a file is damaged.
    """
    run.require("betons", "balance")
    sizes = run.done("betons") or {}
    try:
        return open_set([part_path(run, name) for name in names if sizes[name] or name != "synthetic"])
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
