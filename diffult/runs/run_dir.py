"""A run directory: one configuration, a folder for each stage, and what is finished.

    config.toml   extractor/   diffusion/   generate/   betons/   classifier/   metrics.json   report.html

A stage is finished when its folder holds done.json, which is written last. A finished stage is skipped, an interrupted
one goes on from its own files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from diffult.config import Config, differences, load_preset, read_config
from diffult.engine.distributed import ALONE, World
from diffult.errors import UserError
from diffult.runs.files import lock_folder, read_json, write_json, write_text

log = logging.getLogger(__name__)
_NOT_NEEDED = (".tmp", ".damaged", ".png")  # by later stages: these may be deleted, as may a stage's folders

Stage = Literal["extractor", "diffusion", "generate", "betons", "classifier", "report"]


class RunDir:
    """An open run directory. `config` is the resolved configuration it was started with."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def open(cls, path: Path, preset: str | None = None, overrides: list[str] | None = None) -> RunDir:
        """Opens the run at `path`, or makes one from a preset; nothing is written before a stage starts.

        Raises:
            UserError: no run there and no preset given; or the run there has another configuration.
        """
        file = path / "config.toml"
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; --run names a directory")
        if preset is None:
            if overrides:
                raise UserError("--set needs --preset: the settings of a started run are fixed in its config.toml")
            return cls(path, read_config(file))
        config = load_preset(preset, overrides or [])
        if file.exists():
            if changed := differences(read_config(file), config):
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise UserError(
                    f"{path}: holds a run of another configuration ({changed[0]}{more}); give another directory"
                )
        elif path.is_dir() and any(file.suffix != ".tmp" for file in path.iterdir()):  # .tmp: what a kill left
            raise UserError(f"{path}: is not empty and holds no config.toml; give another directory")
        return cls(path, config)

    def start(self) -> None:
        """Writes config.toml where it is not there. Called as the first stage starts, when all that can be refused has
        been: a command refused for a bad path can be typed again, corrected."""
        if not (self.path / "config.toml").exists():
            write_text(self.path / "config.toml", self.config.to_toml())

    def folder(self, stage: Stage) -> Path:
        return self.path / stage

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """What the finished stage noted, or None. A stage one of whose files has gone is not finished: it runs again.

        Raises:
            UserError: it was finished under another configuration.
        """
        file = self.folder(stage) / "done.json"
        if not file.exists():
            return None
        note = read_json(file)
        if note.get("config") != self.config.hash:
            raise UserError(
                f"{file}: written under another configuration ({note.get('config')}, now {self.config.hash}) or by "
                "another version; restore config.toml or start a new run directory"
            )
        if gone := [name for name in note["files"] if not (self.folder(stage) / name).exists()]:
            log.warning("%s: %s is gone, the stage is not finished", self.folder(stage), gone[0])
            return None
        return note

    def require(self, stage: Stage, verb: str) -> None:
        """Raises UserError unless the stage is finished; `verb` is the command that does it."""
        if self.done(stage) is None:
            raise UserError(
                f"{self.path}: stage {stage!r} is not finished; run python -m diffult.{verb} --run {self.path}"
            )

    @contextmanager
    def stage(self, stage: Stage, world: World = ALONE) -> Iterator[dict[str, Any] | None]:
        """Marks the stage finished when the block ends well. Yields a dict for its notes, or None where it is finished.

        "seconds" counts the last attempt: where a stage was interrupted, what came before is not in it. Of several
        processes in one stage the first writes, and none leaves before it is finished.
        """
        if self.done(stage) is not None:
            log.info("%s: finished before, skipped", stage)
            yield None
            return
        if world.is_main:
            self.start()
            with lock_folder(self.path):
                yield from self._work(stage)
        else:
            yield {}
        world.barrier()

    def _work(self, stage: Stage) -> Iterator[dict[str, Any]]:
        self.folder(stage).mkdir(parents=True, exist_ok=True)
        for orphan in self.folder(stage).rglob(".*.tmp"):  # what a killed attempt was writing
            orphan.unlink()
        log.info("%s: started", stage)
        begun = time.perf_counter()
        note: dict[str, Any] = {"config": self.config.hash}
        yield note
        note["seconds"] = round(time.perf_counter() - begun, 2)
        files = {f.name for f in self.folder(stage).iterdir() if f.is_file() and f.suffix not in _NOT_NEEDED}
        note["files"] = sorted(name for name in files if not name.endswith("state.pt"))
        write_json(self.folder(stage) / "done.json", note)
        log.info("%s: finished in %.0f s", stage, note["seconds"])
