"""The balanced set's parts on disk: betons/{real,val,test}, written by `balance`, and generate/synthetic.beton."""

from __future__ import annotations

from pathlib import Path

from diffult.errors import UserError
from diffult.runs.run_dir import RunDir
from ffcv_writers import ImageSet, open_set


def part_path(run: RunDir, name: str) -> Path:
    """Where a part lies: "real", "synthetic", "val" or "test"."""
    return run.folder("generate" if name == "synthetic" else "betons") / f"{name}.beton"


def open_part(run: RunDir, *names: str) -> ImageSet:
    """Parts joined to one set; the synthetic part is left out where no class needed a sample.

    Raises:
        UserError: the stage is not finished, or a file is damaged.
    """
    run.require("betons", "balance")
    if "synthetic" in names:
        run.require("generate", "generate")
    paths = [part_path(run, name) for name in names]
    try:
        return open_set([path for path in paths if path.stem != "synthetic" or path.exists()])
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
