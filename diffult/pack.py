"""Stage pack: every source to train, val and test .beton files, decoded once.

Writes pack/{train,val,test}.beton and pack/packed.json (class names, counts, fingerprint). What follows reads nothing
else: the source may be moved, renamed or deleted.
"""

from __future__ import annotations

import logging

from diffult.cli import PresetOption, RunOption, SetOption, main
from diffult.data.packing import open_data, pack_images, source_differences
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError
from diffult.runs.files import read_json
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES

log = logging.getLogger(__name__)


def pack(run: RunDir, world: World = ALONE) -> None:
    """Packs the images or, if they are packed already, logs how the source has changed since."""
    data, folder = run.config.data, run.folder("pack")
    place = data.model_dump(include={"path", "train_list", "val_list", "test_list"})
    source = open_data(data) if run.done("pack") is None and world.is_main else None
    again = run.started("pack") in (None, run.hash("pack"))
    with run.stage("pack", world) as record:
        if record is not None and source is not None:
            packed = pack_images(data, source, folder)
            if again:
                _refuse_other_images(run, packed["fingerprint"])
            record |= {"fingerprint": packed["fingerprint"], "held_out": packed["held_out"], "place": place}
            sizes = ", ".join(f"{sum(counts)} {split}" for split, counts in packed["counts"].items())
            log.info("pack: %d classes; images: %s", len(packed["classes"]), sizes)
    if record is None and world.is_main:
        differences = source_differences(data, run.packed())
        if differences and place != run.require("pack")["place"]:
            raise UserError(
                f"data.path = {data.path!r} does not hold the images that were packed ({differences[0]}); give their "
                "new place, or start another run"
            )
        for difference in differences:
            log.warning("%s has changed since it was packed: %s", data.path, difference)


def _refuse_other_images(run: RunDir, fingerprint: str) -> None:
    """Images that are packed again with the same settings must be those that finished stages were made from.

    Raises:
        UserError: they are not.
    """
    files = {stage: run.folder(stage) / "done.json" for stage in STAGES[1:]}
    made = [stage for stage, file in files.items() if file.exists() and read_json(file).get("packed") != fingerprint]
    if made:
        raise UserError(
            f"{run.path}: the source no longer gives the images that {', '.join(made)} were made from; restore it, "
            "start another run, or delete the folders of these stages to redo them"
        )


def command(run: RunOption, preset: PresetOption = None, set_: SetOption = None) -> None:
    """Decode the images of a set once and write its train, val and test splits as .beton files."""
    world = init_distributed()
    pack(RunDir.open(run, preset, set_, world), world)


if __name__ == "__main__":
    main(command)
