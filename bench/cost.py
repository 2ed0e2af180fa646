"""What a preset costs: operations counted on the networks themselves, time and money from them and a measured rate.

    python -m bench.cost --price 3.0                          # with an assumed share of an H100's peak
    python -m bench.cost --rates bench/results/CARD-DATE.json # with the rates that `python -m bench` measured

The cost model is the plan's and the rehearsal's, `diffult.planning.cost`, on a machine of so many cards: time is
operations / rate. Trainings on n cards add the exchange of gradients, not overlapped, and use no more cards than leave
each 8 images of the batch; drawing uses all. Not in it: decoding and other host work, which these loaders keep off the
path, packing, evaluation and starting up. `python -m diffult.run --rehearse` measures these, too.

Held against runs that were rehearsed on the same machine just before: --run DIR, repeatable. Runs of another day or
preset do not serve: beside other work the same stage took up to 6.5 times as long.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from bench.standin import class_counts as imagenet_lt_counts
from diffult.cli import main
from diffult.config import Config, load_preset
from diffult.data.profiles import class_counts
from diffult.errors import UserError
from diffult.planning.cost import Amounts, Work, classifier_cost, costs, unet_cost
from diffult.reporting.text import duration
from diffult.runs.files import read_json, write_json
from diffult.runs.run_dir import REHEARSAL

SETS = {"cifar10-lt-100-fast": 10, "cifar100-lt-100": 100, "imagenet-lt-64": 1000, "imagenet-lt-256": 1000}
CARDS = (1, 8, 64)
LEAST = 8  # images of the batch that a card gets: below that it idles
_STAGES = ("extractor", "diffusion", "generate", "classifier")
_NVLINK, _NETWORK = 450e9, 50e9  # bytes/s a card: an H100's NVLink one way, and 400 Gbit/s between hosts of eight
_GAIN = 0.05  # of the time: twice the cards that save less do not help


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one device at each kind of work, and where they are from."""

    train: float
    sample: float
    classify: float
    source: str


@dataclass(frozen=True)
class Cards:
    """So many cards of these rates; a `Machine` of the cost model.

    Attributes:
        batches: images of a batch of each training.
        gradients: bytes that its cards exchange in a step.
    """

    rates: Rates
    processes: int
    batches: dict[str, int]
    gradients: dict[str, float]

    @classmethod
    def of(cls, config: Config, classes: int, rates: Rates, cards: int) -> Cards:
        parts = {"extractor": config.extractor, "classifier": config.classifier}
        batches = {stage: part.batch_size for stage, part in parts.items()} | {"diffusion": config.diffusion.batch_size}
        gradients = {
            stage: 4.0 * classifier_cost(part.network, part.image_size, config.data.channels, classes).parameters
            for stage, part in parts.items()
        }
        unet = unet_cost(config.unet, config.data.image_size, config.data.channels, classes)
        return cls(rates, cards, batches, gradients | {"diffusion": 2.0 * unet.parameters})  # these in bfloat16

    def seconds(self, stage: str, work: Work) -> float:
        """See `Machine`; none for what is done on the host."""
        if stage == "generate":
            return work.flops / self.rates.sample / self.processes
        if stage not in self.batches:
            return 0.0
        rate = self.rates.train if stage == "diffusion" else self.rates.classify
        busy = max(1, min(self.processes, self.batches[stage] // LEAST))
        exchange = 2 * (busy - 1) / busy * self.gradients[stage] / (_NVLINK if busy <= 8 else _NETWORK)
        return work.flops / rate / busy + work.units * exchange


def amounts(config: Config, classes: int) -> Amounts:
    """Of a preset in SETS: CIFAR's, or ImageNet-LT's."""
    if config.data.profile == "natural":
        return Amounts(imagenet_lt_counts(), np.full(classes, 50.0), 70 * classes, 0, 0.0)
    counts = class_counts(config.data, np.full(classes, config.data.n_max or 50_000 // classes))
    return Amounts(np.array(counts, np.int64), np.full(classes, 10_000 / classes), 10_000, 0, 0.0)


def synthetic_images(config: Config, classes: int) -> int:
    """How many samples the preset asks for."""
    return amounts(config, classes).synthetic(config.generate.balance_to, config.generate.dose)


def stage_seconds(config: Config, classes: int, rates: Rates, cards: int, pass_rate: float) -> dict[str, float]:
    """Predicted seconds of each stage on so many cards."""
    rows = costs(config, amounts(config, classes), Cards.of(config, classes, rates, cards), pass_rate)
    return {row.stage: row.seconds for row in rows if row.stage in _STAGES}


def most_cards(config: Config, classes: int, rates: Rates, pass_rate: float) -> int:
    """The power of two from which twice the cards save less than _GAIN of the whole time."""

    def seconds(cards: int) -> float:
        return sum(stage_seconds(config, classes, rates, cards, pass_rate).values())

    cards = 1
    while seconds(2 * cards) < (1 - _GAIN) * seconds(cards):
        cards *= 2
    return cards


def measured_rates(file: Path) -> Rates:
    """The rates that a results file of `python -m bench` holds.

    Raises:
        UserError: a race that is needed is not in it.
    """
    rows = {row["race"]: row for row in read_json(file)["rows"]}

    def rate(race: str) -> float:
        if race not in rows:
            raise UserError(f"{file}: holds no race {race!r}; run python -m bench without --only")
        row = rows[race]
        return row["contestants"][row["ours"]]["tflop_per_s"] * 1e12

    return Rates(rate("training step"), rate("ancestral, guided, 1000 steps"), rate("classifier step"), file.name)


def pass_rates(results: Path) -> list[float]:
    """Share of the candidates that each measured run kept."""
    runs = [run for file in sorted(results.glob("*/comparison.json")) for run in read_json(file)["runs"]]
    return [run["generation"]["accepted"] / run["generation"]["drawn"] for run in runs]


def check_rehearsal(run: Path) -> list[dict[str, Any]]:
    """Of a finished run, each stage that took a second: predicted by its rehearsal beside what was measured. Not
    packing, whose start the run counts elsewhere.

    Raises:
        UserError: it was not rehearsed, or is not finished.
    """
    for file in (run / REHEARSAL, run / "metrics.json"):
        if not file.exists():
            raise UserError(f"{file}: not found; --rehearse the run, then run it, both on a quiet machine")
    rehearsal, metrics = read_json(run / REHEARSAL), read_json(run / "metrics.json")
    rows = []
    for stage, measured in metrics["seconds"].items():
        if stage != "pack" and measured >= 1:
            predicted = rehearsal["stages"][stage]["seconds"]
            row = {"preset": metrics["name"], "seed": metrics["seed"], "stage": stage, "measured_s": measured}
            rows.append(row | {"predicted_s": round(predicted, 1), "ratio": round(predicted / measured, 2)})
    return rows


def predict(rates: Rates, pass_rate: float, price: float) -> list[dict[str, Any]]:
    """Time and money of each preset in SETS on each number of cards, and the number beyond which more do not help."""
    rows = []
    for preset, classes in SETS.items():
        config = load_preset(preset)
        most = most_cards(config, classes, rates, pass_rate)
        for cards in CARDS:
            seconds = stage_seconds(config, classes, rates, cards, pass_rate)
            hours = sum(seconds.values()) / 3600
            row = {"preset": preset, "cards": cards, "hours": hours, "money": hours * cards * price, "most_cards": most}
            rows.append(row | {f"{stage}_h": value / 3600 for stage, value in seconds.items()})
    return rows


def command(
    rates: Annotated[Path | None, typer.Option(help="Results file of python -m bench on the card.")] = None,
    peak: Annotated[float, typer.Option(min=0, help="Without --rates: the card's peak, TFLOP/s.")] = 989.0,
    efficiency: Annotated[float, typer.Option(min=0, max=1, help="Without --rates: the share of it reached.")] = 0.3,
    pass_rate: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of candidates kept; default: median of measured runs.")
    ] = None,
    price: Annotated[float, typer.Option(min=0, help="Of one card for an hour.")] = 3.0,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--run", help="A run to check by, finished after --rehearse; default: those of the file."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results file, and of those read.")] = Path("bench/results"),
) -> None:
    """Predict time and money of the large presets, and hold the model against runs that were rehearsed."""
    if rates is None:
        flops = peak * 1e12 * efficiency
        used = Rates(flops, flops, flops, f"assumed: {efficiency:.0%} of {peak:g} TFLOP/s")
    else:
        used = measured_rates(rates)
    kept = pass_rates(out)
    share = pass_rate or (median(kept) if kept else 0.5)
    predicted, file = predict(used, share, price), out / "cost.json"
    checked = [row for run in runs or [] for row in check_rehearsal(run)]
    if not runs and file.exists():
        checked = read_json(file)["checked"]
    for row in predicted:
        hours = duration(row["hours"] * 3600)
        print(f"{row['preset']}, {row['cards']} cards: {hours}, {row['money']:,.0f} at {price:g} an hour and card")
    for preset, most in {row["preset"]: row["most_cards"] for row in predicted}.items():
        print(f"{preset}: more than {most} cards hardly help, with {LEAST} images of a training's batch each at least")
    content = {"rates": used.__dict__, "pass_rate": share, "price": price, "predicted": predicted, "checked": checked}
    write_json(file, content)
    ratios = [row["ratio"] for row in checked]
    if ratios:
        print(f"predicted / measured over {len(ratios)} stages: {min(ratios)} to {max(ratios)}")
    print(json.dumps({"results": str(file)}))


if __name__ == "__main__":
    main(command)
