"""Own images without a preset: what a set is like, the settings proposed for it, and what they cost here.

propose(path, hours, overrides) -> Plan
    data/survey.py   looks at the images           timing.py     times a few steps on this machine
    proposal.py      chooses settings, and why     cost.py       seconds, memory and disk of each stage
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffult.config import Config, parse_overrides
from diffult.data.survey import Survey, take_survey
from diffult.engine.distributed import ALONE, World
from diffult.longtail.metrics import class_groups
from diffult.planning.cost import Speeds, costs
from diffult.planning.proposal import Proposal, propose_settings
from diffult.planning.timing import guess, measure
from diffult.reporting.text import duration, size

__all__ = ["DEFAULT_HOURS", "Plan", "Survey", "lines", "plan_name", "planned_hours", "propose", "table"]

DEFAULT_HOURS = 2.0
_FOR_HOURS = "Planned for --hours "


@dataclass(frozen=True)
class Plan:
    """Proposed settings, why each was chosen by `section.key`, and for a terminal what is proposed and its cost."""

    config: Config
    comments: dict[str, str]
    lines: list[str]
    table: list[str]


def plan_name(path: Path) -> str:
    """What a run of the images at `path` is called."""
    path = path.expanduser().absolute().resolve()
    return (path.name if path.is_dir() else path.stem) or "images"


def propose(
    path: Path,
    hours: float = DEFAULT_HOURS,
    overrides: Iterable[str] = (),
    place: Path = Path("runs"),
    world: World = ALONE,
) -> Plan:
    """Looks at the images at `path`, times some steps of the networks that suit them, and fits a run into `hours` on
    the processes of `world`. Takes some ten seconds; writes nothing.

    Args:
        overrides: `section.key=value`, which win over what is proposed.
        place: where the run will be written.

    Raises:
        UserError: nothing readable there, one class alone, no class with images enough, or bad overrides.
    """
    fixed = parse_overrides(overrides)
    survey = take_survey(path)
    classes = len(survey.classes)
    speeds = guess(place, world)
    proposal = propose_settings(plan_name(path), survey, speeds, hours, fixed)
    for _ in range(2):  # with measured speeds other networks may be right, and other networks have other speeds
        timed = proposal.config
        speeds = measure(timed, classes, place, world)
        proposal = propose_settings(plan_name(path), survey, speeds, hours, fixed)
        if _networks(timed) == _networks(proposal.config):
            break
    comments = proposal.comments | {"name": f"{_FOR_HOURS}{hours:g}."}
    return Plan(proposal.config, comments, lines(survey, proposal), table(proposal, speeds))


def planned_hours(comments: Mapping[str, str]) -> str | None:
    """The hours that a plan with these comments was made for, as written there; None if they do not say."""
    _, found, hours = comments.get("name", "").partition(_FOR_HOURS)
    return hours.removesuffix(".") if found else None


def _networks(config: Config) -> tuple[object, ...]:
    return config.unet, config.data.image_size, config.classifier.network


def lines(survey: Survey, proposal: Proposal) -> list[str]:
    """The plan as text: the set and the settings."""
    config, counts, shorter = proposal.config, proposal.amounts.counts, survey.sides.min(1)
    low, middle, high = (int(value) for value in (shorter.min(), np.median(shorter), shorter.max()))
    sides = (
        f"{low} pixels" if low == high else f"{low} to {high} pixels on the shorter side, half of them from {middle} up"
    )
    synthetic = proposal.amounts.synthetic(config.generate.balance_to, config.generate.dose)
    return [
        f"{survey.place['path']}: {survey.counts.sum():,} images of {len(counts):,} classes "
        f"({_range(survey.counts)}), {sides}, {'colour' if survey.colour else 'grey'}",
        *(f"  note: {note}" for note in proposal.notes),
        f"  train on {counts.sum():,}, {config.data.image_size}x{config.data.image_size} pixels, "
        f"{'colour' if config.data.channels == 3 else 'grey'}; {proposal.amounts.held_out:,} for validation and test",
        f"  groups: {_groups(counts, config.groups.many, config.groups.few)}",
        f"  extractor and classifiers: {config.classifier.network}, {config.extractor.steps:,} and "
        f"{config.classifier.steps:,} steps of {config.classifier.batch_size}; {', '.join(config.classifier.methods)}",
        f"  diffusion: UNet of {config.unet.channels} channels, {config.diffusion.steps:,} steps of "
        f"{config.diffusion.batch_size}",
        f"  generate: every class filled up to {config.generate.balance_to:,}, {synthetic:,} images, "
        f"filter {config.generate.filter}",
    ]


def _range(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{high:,} of each" if low == high else f"{high:,} down to {low:,}"


def _groups(counts: np.ndarray, many: int, few: int) -> str:
    if counts.min() == counts.max():
        return "none, all classes are of one size"
    sizes = [len(members) for members in class_groups(counts, many, few).values()]
    return (
        f"many above {many}, few below {few} training images: {sizes[0]}, {sizes[1]} and {sizes[2]} classes "
        "(many, medium, few)"
    )


def table(proposal: Proposal, speeds: Speeds) -> list[str]:
    """Time, memory and disk of each stage, and of what there is too little."""
    rows = costs(proposal.config, proposal.amounts, speeds)
    text = [f"  {'stage':12}{'time':>15}{'memory':>12}{'disk':>12}"]
    text += [f"  {row.stage:12}{duration(row.seconds):>15}{size(row.memory):>12}{size(row.disk):>12}" for row in rows]
    seconds, limit = sum(row.seconds for row in rows), sum(row.limit for row in rows)
    disk, memory = sum(row.disk for row in rows), max(row.memory for row in rows)
    text.append(f"  {'together':12}{duration(seconds):>15}{size(memory):>12}{size(disk):>12}")
    if limit > 1.02 * seconds:
        text.append(f"  at most {duration(limit)}, if the filter rejects most samples")
    if memory > speeds.memory:
        text.append(f"  note: {size(speeds.memory)} of memory are free; --set data.image_size takes a smaller size")
    if disk > speeds.disk:
        text.append(f"  note: {size(speeds.disk)} of disk are free; --run DIR writes elsewhere")
    return text
