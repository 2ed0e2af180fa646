"""The runs of a comparison: one directory for each seed and each set of settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffult.config import Config, differences, load_preset
from diffult.errors import UserError
from diffult.longtail.methods import in_waves
from diffult.longtail.rows import Row
from diffult.runs.records import read_metrics
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES, digest, reads

_SHARED = STAGES[: STAGES.index("classifier")]
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Variant:
    """A run of the comparison: one seed, one set of settings, every method that is compared with these."""

    path: Path
    seed: int
    config: Config
    preset: str
    overrides: tuple[str, ...]

    def open(self) -> RunDir:
        """Raises UserError if the directory holds a run of settings that the command does not name."""
        run = RunDir.open(self.path, self.preset, list(self.overrides))
        if changes := differences(run.config, self.config):
            raise UserError(
                f"{self.path}: was made with other settings ({changes[0]}); repeat them with --set, delete the folder, "
                "or give another --run"
            )
        return run

    def metrics(self) -> dict[str, Any] | None:
        """The content of metrics.json; None if the run is not evaluated with the present settings."""
        file, run = self.path / "metrics.json", RunDir(self.path, self.config)
        return read_metrics(file, run.hash("evaluate"), self.config.classifier.methods)

    @property
    def command(self) -> list[str]:
        settings = [part for setting in self.overrides for part in ("--set", setting)]
        where = ["--run", str(self.path), "--preset", self.preset]
        return [sys.executable, "-m", "diffult.run", *where, *settings, "--until", "evaluate"]

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    def nearest(self, others: Sequence[Variant]) -> Variant:
        """The one that shares most stages with this."""
        return max(others, key=lambda other: sum(reads(other.config, s) == reads(self.config, s) for s in _SHARED))

    def untrained(self) -> list[str]:
        """Methods without weights, and those that they start from."""
        names = [name for wave in in_waves(self.config.classifier.methods) for name in wave]
        return [name for name in names if not (self.path / "classifier" / f"{name}.safetensors").exists()]


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison by the name of their settings, each list in the order of the seeds, and the name of each
    row's settings."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    variants: dict[str, list[Variant]]
    settings: dict[str, str]

    @property
    def runs(self) -> list[Variant]:
        """Every seed of the first settings, then of the next."""
        return [variant for variants in self.variants.values() for variant in variants]

    def before(self, variant: Variant) -> list[Variant]:
        """The runs of the same seed that come before."""
        same = [other for other in self.runs if other.seed == variant.seed]
        return same[: same.index(variant)]


def plan(folder: Path, preset: str, rows: Sequence[Row], overrides: Sequence[str], seeds: int) -> Plan:
    """Raises UserError for a setting that does not exist, or a row given twice."""
    for text in overrides:
        if text.partition("=")[0].strip() in ("seed", "data.seed"):
            raise UserError(f"--set {text}: a comparison sets the seeds; give --seeds N")
    base = load_preset(preset, overrides)
    settings: dict[str, str] = {}
    groups: dict[str, tuple[tuple[str, ...], list[str]]] = {}
    for row in rows:
        name = _settings_name(base, load_preset(preset, [*overrides, *row.settings]))
        methods = groups.setdefault(name, (row.settings, []))[1]
        if row.method in methods:
            raise UserError(f"--methods {row.name}: is there twice, or has only settings that the preset has too")
        methods.append(row.method)
        settings[row.name] = name
    variants = {
        name: [_variant(folder, preset, seed, name, [*overrides, *own], methods) for seed in range(seeds)]
        for name, (own, methods) in groups.items()
    }
    return Plan(tuple(rows), tuple(range(seeds)), variants, settings)


def _variant(folder: Path, preset: str, seed: int, name: str, overrides: list[str], methods: list[str]) -> Variant:
    settings = (f"seed={seed}", f"data.seed={seed}", *overrides, f"classifier.methods={methods}")
    return Variant(folder / f"seed-{seed}{name}", seed, load_preset(preset, settings), preset, settings)


def _settings_name(base: Config, config: Config) -> str:
    """Of what differs from the settings of all, fit for a folder's name; empty if nothing does."""
    changes = [re.sub(r": .* -> ", "=", change) for change in differences(base, config)]
    name = "".join(f"@{change}" for change in changes)
    plain = re.sub(r"[^\w.=+@-]+", "_", name)
    return plain if plain == name and len(name) <= _LONGEST_NAME else f"{plain[:_LONGEST_NAME]}-{digest(name)}"
