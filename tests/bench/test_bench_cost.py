"""The cost of the large presets: the plan's model on so many cards."""

import numpy as np
import pytest

from bench.cost import SETS, Cards, Rates, amounts, check_rehearsal, most_cards, stage_seconds
from diffult.config import load_preset
from diffult.planning.cost import stage_flops
from diffult.runs.files import write_json

RATES = Rates(2e14, 4e14, 1e14, "made up")
PRESET, CLASSES = "cifar100-lt-100", SETS["cifar100-lt-100"]


def test_on_one_card_time_is_work_by_rate():
    config = load_preset(PRESET)
    samples = amounts(config, CLASSES).synthetic(config.generate.balance_to)
    size = config.generate.batch_size
    flops = stage_flops(config, CLASSES, np.ceil(samples / 0.8 / size) * size)
    seconds = stage_seconds(config, CLASSES, RATES, 1, pass_rate=0.8)
    rates = {"extractor": 1e14, "diffusion": 2e14, "generate": 4e14, "classifier": 1e14}
    for stage, rate in rates.items():
        assert seconds[stage] == pytest.approx(flops[stage] / rate, rel=1e-3), stage


def test_trainings_use_cards_as_far_as_their_batches_go():
    """A batch of 128 on 16 cards and not more, with the exchange between hosts; drawing on all."""
    config = load_preset(PRESET)
    alone, many, more = (stage_seconds(config, CLASSES, RATES, n, pass_rate=0.8) for n in (1, 64, 128))
    assert config.classifier.batch_size == 128
    exchange = 2 * 15 / 16 * Cards.of(config, CLASSES, RATES, 64).gradients["extractor"] / 50e9
    assert many["extractor"] == pytest.approx(alone["extractor"] / 16 + config.extractor.steps * exchange)
    assert more["extractor"] == many["extractor"] and more["diffusion"] == many["diffusion"]
    assert many["generate"] == pytest.approx(alone["generate"] / 64)


def test_more_cards_help_until_they_save_less_than_a_twentieth():
    config = load_preset("imagenet-lt-64")
    most = most_cards(config, 1000, RATES, pass_rate=0.8)
    totals = {n: sum(stage_seconds(config, 1000, RATES, n, 0.8).values()) for n in (most // 2, most, 2 * most)}
    assert totals[most] < 0.95 * totals[most // 2] and totals[2 * most] >= 0.95 * totals[most]


def test_a_run_is_held_against_its_rehearsal(tmp_path):
    seconds = {"extractor": 10.0, "diffusion": 20.0, "generate": 0.5, "classifier": 30.0}
    stages = {stage: {"seconds": 25.0} for stage in seconds}
    write_json(tmp_path / "rehearsal.json", {"name": "some", "stages": stages})
    write_json(tmp_path / "metrics.json", {"name": "some", "seed": 0, "seconds": seconds})
    rows = {row["stage"]: row["ratio"] for row in check_rehearsal(tmp_path)}
    assert rows == {"extractor": 2.5, "diffusion": 1.25, "classifier": 0.83}  # too short a stage is left out
