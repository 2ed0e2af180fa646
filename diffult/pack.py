"""Stage pack: every source to train, val and test .beton files, decoded once.

Writes pack/{train,val,test}.beton and pack/packed.json (class names, counts, fingerprint). What follows reads nothing
else: the source may be moved, renamed or deleted.
"""

from __future__ import annotations

import logging

from diffult.cli import PresetOption, RunOption, SetOption, main
from diffult.data.packing import open_data, pack_images, source_differences
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.runs.run_dir import RunDir

log = logging.getLogger(__name__)


def pack(run: RunDir, world: World = ALONE) -> None:
    """Packs the images or, if they are packed already, logs how the source has changed since."""
    source = open_data(run.config.data) if run.done("pack") is None and world.is_main else None
    with run.stage("pack", world) as record:
        if record is not None and source is not None:
            packed = pack_images(run.config.data, source, run.folder("pack"))
            record["fingerprint"] = packed["fingerprint"]
            sizes = ", ".join(f"{sum(counts)} {split}" for split, counts in packed["counts"].items())
            log.info("pack: %d classes; images: %s", len(packed["classes"]), sizes)
    if record is None and world.is_main:
        for difference in source_differences(run.config.data, run.packed()):
            log.warning("%s has changed since it was packed: %s", run.config.data.path, difference)


def command(run: RunOption, preset: PresetOption = None, set_: SetOption = None) -> None:
    """Decode the images of a set once and write its train, val and test splits as .beton files."""
    world = init_distributed()
    pack(RunDir.open(run, preset, set_), world)


if __name__ == "__main__":
    main(command)
