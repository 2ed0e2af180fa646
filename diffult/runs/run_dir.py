"""A run directory: its configuration, a folder a stage, and which stages are finished.

    config.toml   pack/   extractor/   diffusion/   generate/   classifier/   evaluate/   metrics.json   report.html

A stage is finished when its folder holds done.json, written last, with the hash of what the stage read. A finished
stage is skipped, an interrupted one resumes from its own files, one whose settings have changed is redone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffult.comments import comments_in
from diffult.config import Config, differences, load_preset, override, preset_name, read_config
from diffult.data.packing import Packed, read_packed
from diffult.engine.distributed import ALONE, World
from diffult.errors import UserError
from diffult.longtail.methods import find_method
from diffult.models.resnet import build_classifier
from diffult.models.unet import build_unet
from diffult.runs.files import read_json, temporary_path, write_json, write_text
from diffult.runs.records import check_stage
from diffult.runs.shared_disk import lock_shared, wait_for_same_files
from diffult.runs.stages import STAGES, Stage, affected, digest, reads

log = logging.getLogger(__name__)
_NOT_NEEDED = (".tmp", ".damaged", ".png", ".pt")  # by later stages: may be deleted, as may the folders in a stage's
REHEARSAL = "rehearsal.json"  # what a rehearsal leaves in a run directory, before a run begins too
_TRAINED = ("extractor", "diffusion", "classifier")


class RunDir:
    """An open run directory. `config` is its resolved configuration, with the overrides it was opened with, and
    `comments` are those of config.toml by `section.key`, without those of settings that the overrides changed."""

    def __init__(self, path: Path, config: Config, comments: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.config = config
        self.comments = dict(comments or {})

    @classmethod
    def start(cls, path: Path, config: Config, comments: Mapping[str, str] | None = None) -> RunDir:
        """A new run at `path`, where at most the plan of one lies. Nothing is written before a stage starts.

        Raises:
            UserError: something else lies there, or networks that do not fit the images.
        """
        _refuse_file(path)
        others = {entry.name for entry in path.iterdir()} - {"config.toml", REHEARSAL} if path.is_dir() else set()
        if any(name[0] != "." for name in others):  # .lock, .*.tmp: after a kill
            raise UserError(f"{path}: is not empty and holds no config.toml; give another directory")
        _check_networks(config)
        return cls(path, config, comments)

    @classmethod
    def open(
        cls, path: Path, preset: str | None = None, overrides: list[str] | None = None, world: World = ALONE
    ) -> RunDir:
        """Opens the run at `path`, or a new one from a preset. Nothing is written before a stage starts.

        Args:
            overrides: `section.key=value`, applied to the preset, or to config.toml where the run exists; what that
                redoes is logged.
            world: every process of it calls this; the first opens the run for all.

        Raises:
            UserError: no run there and no preset given; a run of another preset or of an earlier version; bad settings,
                among them networks that do not fit the images; or see `synchronise`.
        """
        opened = world.gather(cls._open(path, preset, overrides) if world.is_main else None)[0]
        assert opened is not None  # the first process's
        run = cls(path, opened.config, opened.comments)
        run.synchronise(world)
        return run

    @classmethod
    def _open(cls, path: Path, preset: str | None, overrides: list[str] | None) -> RunDir:
        _refuse_file(path)
        file = path / "config.toml"
        if not file.exists():
            if preset is None:
                raise UserError(f"{file}: not found; start a run with python -m diffult.run --preset NAME --run {path}")
            return cls.start(path, load_preset(preset, overrides or []))
        before = read_config(file)
        if preset is not None and preset_name(preset) != before.name:
            raise UserError(f"{path}: holds a run of preset {before.name!r}, not {preset!r}; give another directory")
        after = override(before, overrides or [])
        changed = {change.partition(":")[0] for change in differences(before, after)}
        comments = comments_in(file.read_text(encoding="utf-8"))
        run = cls(path, after, {key: why for key, why in comments.items() if key not in changed})
        if run.config != before:
            _check_networks(run.config)
            run._announce(before)
        return run

    def _announce(self, before: Config) -> None:
        """Logs which stages the changed settings redo and which they keep."""
        for change in differences(before, self.config):
            log.info("%s: %s", self.path, change)
        files = {stage: f"{stage}/done.json" for stage in STAGES} | {
            "evaluate": "metrics.json",
            "report": "report.html",
        }
        finished = [stage for stage in STAGES if (self.path / files[stage]).exists()]
        changed = affected(before, self.config)
        if redone := [stage for stage in finished if stage in changed]:
            kept = ", ".join(stage for stage in finished if stage not in changed)
            log.info("will be redone: %s; kept: %s", ", ".join(redone), kept or "nothing")

    def save_config(self) -> None:
        """Writes config.toml where it is missing or settings have changed.

        Raises:
            UserError: another process writes to the run.
        """
        if not self._is_saved():
            with self.lock():
                pass

    def _is_saved(self) -> bool:
        file = self.path / "config.toml"
        return file.exists() and file.read_text(encoding="utf-8") == self.config.to_toml(self.comments)

    def synchronise(self, world: World) -> None:
        """Returns once every process sees the files that the others have written. Every process calls this.

        Raises:
            UserError: they do not see the same, as on hosts whose disks are not one.
        """
        wait_for_same_files([self.path, *map(self.folder, STAGES)], world)

    @contextmanager
    def lock(self, world: World = ALONE) -> Iterator[None]:
        """Locks the run for this process and brings config.toml up to date. Taken when all that can be refused has
        been: a command refused for a bad path can be typed again, corrected. One of several processes waits for a lock
        that a host which died may have left.

        Raises:
            UserError: another process writes to the run.
        """
        with lock_shared(self.path, world):
            if not self._is_saved():
                write_text(self.path / "config.toml", self.config.to_toml(self.comments))
            yield

    def folder(self, stage: Stage) -> Path:
        return self.path / stage

    def hash(self, stage: Stage) -> str:
        """Of the settings that the stage and those upstream of it read, and of the packed images."""
        settings = reads(self.config, stage)
        if stage == "pack":
            return digest(settings)
        held_out = (self.done("pack") or {}).get("held_out", {})
        if stage in ("evaluate", "report"):
            settings["held_out"] = held_out
        elif self.reads_validation(stage):
            settings["validation"] = held_out.get("val")
        return self.digest(settings)

    def reads_validation(self, stage: Stage) -> bool:
        """Whether the validation images matter to what the stage makes, or an earlier one that it reads."""
        config = self.config
        reading: dict[Stage, bool] = {
            "diffusion": config.diffusion.early_stopping,
            "generate": config.generate.search > 0,
            "classifier": any(find_method(name).adapt for name in config.classifier.methods),
        }
        stages = list(reading)
        return stage in reading and any(reading[s] for s in stages[: stages.index(stage) + 1])

    def digest(self, settings: Any) -> str:
        """Of these settings and the packed training images."""
        return digest(settings, (self.done("pack") or {}).get("fingerprint"))

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """What the finished stage recorded; None if it never ran, was interrupted, read other settings or images, or
        has lost a file."""
        file = self.folder(stage) / "done.json"
        if not file.exists():
            return None
        record = read_json(file)
        if record.get("hash") != self.hash(stage):
            return None
        check_stage(stage, record, file)
        if gone := [name for name in record["files"] if not (self.folder(stage) / name).exists()]:
            log.warning("%s: %s is gone, the stage is not finished", self.folder(stage), gone[0])
            return None
        return record

    def started(self, stage: Stage) -> str | None:
        """The hash of what the stage read when it was last started; None if it never was."""
        file = self.folder(stage) / "started.json"
        return read_json(file).get("hash") if file.exists() else None

    def require(self, stage: Stage) -> dict[str, Any]:
        """What the finished stage recorded. Raises UserError if it is not finished."""
        record = self.done(stage)
        if record is None:
            verb = f"train_{stage}" if stage in _TRAINED else stage
            raise UserError(
                f"{self.path}: stage {stage!r} is not finished with the present settings; run "
                f"python -m diffult.{verb} --run {self.path}"
            )
        return record

    def packed(self) -> Packed:
        """The packed images. Raises UserError if they are not packed yet, or a file is damaged."""
        self.require("pack")
        return read_packed(self.folder("pack"))

    @contextmanager
    def stage(
        self, stage: Stage, world: World = ALONE, keep: Callable[[Path], bool] = lambda _: False
    ) -> Iterator[dict[str, Any] | None]:
        """Marks the stage finished when the block ends well. Yields a dict for its record, or None if it is finished.

        "seconds" counts the last attempt only. Of several processes the first writes, and none leaves before the stage
        is finished. What an attempt with other settings left is deleted, except the files for which `keep` is true.
        """
        if world.gather(world.is_main and self.done(stage) is not None)[0]:
            log.info("%s: already finished, skipped", stage)
            yield None
            return
        if world.is_main:
            with self.lock(world):
                if world.size == 1 and self.done(stage) is not None:  # by another process, since the question above
                    yield None
                    return
                self._clear_outdated(stage, keep)
                self.synchronise(world)  # the others look for checkpoints only now
                yield from self._work(stage)
        else:
            self.synchronise(world)
            yield {}
        self.synchronise(world)

    def _clear_outdated(self, stage: Stage, keep: Callable[[Path], bool]) -> None:
        folder, started = self.folder(stage), self.folder(stage) / "started.json"
        before, now = self.started(stage), self.hash(stage)
        if before == now:
            return
        if before is not None:
            for file in [path for path in folder.rglob("*") if path.is_file() and path != started]:
                if not keep(file):
                    file.unlink()
        write_json(started, {"hash": now})

    def _work(self, stage: Stage) -> Iterator[dict[str, Any]]:
        log.info("%s: started", stage)
        begun = time.perf_counter()
        record: dict[str, Any] = {"hash": self.hash(stage), "packed": (self.done("pack") or {}).get("fingerprint")}
        yield record
        record["seconds"] = round(time.perf_counter() - begun, 2)
        files = {f.name for f in self.folder(stage).iterdir() if f.is_file() and f.suffix not in _NOT_NEEDED}
        record["files"] = sorted(files - {"started.json"})
        write_json(self.folder(stage) / "done.json", record)
        log.info("%s: finished in %.0f s, in %s", stage, record["seconds"], self.folder(stage))

    def share(self, other: RunDir, world: World = ALONE) -> None:
        """Takes over the finished stages of another run that read the same settings and images, weights and
        images as hard links where the file system allows.

        Raises:
            UserError: the other run has packed other images, or another process writes to this one.
        """
        if self.done("pack") is None and self.config.data != other.config.data:
            change = differences(self.config, other.config)[0]
            raise UserError(f"--from {other.path}: its images may not be those of this run ({change})")
        for stage in STAGES[: STAGES.index("classifier")]:
            if self.done(stage) is None and other.done(stage) is not None and other.hash(stage) == self.hash(stage):
                folder = self.folder(stage)
                copy = temporary_path(folder)
                with self.lock(world):
                    shutil.copytree(other.folder(stage), copy, copy_function=_link)
                    shutil.rmtree(folder, ignore_errors=True)
                    copy.rename(folder)  # whole or not at all
                log.info("%s: taken from %s", stage, other.path)


def _refuse_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; --run names a directory")


def _check_networks(config: Config) -> None:
    """Here, before a stage deletes what an attempt with other settings made."""
    with torch.device("meta"):
        for part in (config.extractor, config.classifier):
            build_classifier(part.network, 2, config.data.channels, part.image_size)
        build_unet(config, num_classes=2)


def _link(source: str, target: str) -> None:
    if source.endswith((".beton", ".safetensors")):  # never changed in place, unlike metrics.jsonl
        with contextlib.suppress(OSError):  # another file system
            os.link(source, target)
            return
    shutil.copy2(source, target)
