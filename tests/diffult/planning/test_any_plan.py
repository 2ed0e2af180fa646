"""Any set, machine, hours and settings of the user: a plan that is complete and fits, or says by how much not, or one
line that refuses."""

from __future__ import annotations

import math
import re
import tomllib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffult.config import parse_overrides
from diffult.data.survey import Survey
from diffult.errors import UserError
from diffult.longtail.metrics import class_groups
from diffult.planning import lines, table
from diffult.planning.cost import Speeds, costs
from diffult.planning.proposal import propose_settings

SETTINGS = [
    "seed=3", "data.n_max=9", "data.val_per_class=0", "data.val_per_class=500", "data.test_share=0.5",
    "data.test_share=0.0", "data.image_size=24", "data.channels=1", "data.profile=exponential", "data.imbalance=3",
    "data.profile=counts", "data.counts=[3, 2]", "data.storage=jpg", "unet.channels=16", "unet.patch=1",
    "unet.gradient_checkpointing=true", "diffusion.cbdm=true", "diffusion.aid=true", "diffusion.steps=7",
    "diffusion.check_every=5", "diffusion.early_stopping=true", "diffusion.batch_size=3", "generate.balance_to=0",
    "generate.balance_to=90", "generate.filter=none", "generate.steps=40", "generate.guidance=2.0",
    "generate.max_draws=1.0", "generate.dose=0.01", "generate.search=4", "generate.match_histogram=true",
    "generate.batch_size=1", "classifier.network=resnet32", "classifier.epochs=2.5", "classifier.sam=0.1",
    "classifier.methods=['ride', 'ce+cutmix']", "extractor.steps=9", "extractor.network=resnet10",
]  # fmt: skip
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=9)


@st.composite
def surveys(draw: st.DrawFn) -> Survey:
    largest = draw(st.sampled_from([2, 7, 60, 5000, 10**6]))
    counts = draw(st.lists(st.integers(1, largest), min_size=2, max_size=draw(st.sampled_from([2, 9, 40]))))
    classes = draw(st.lists(names, min_size=len(counts), max_size=len(counts), unique=True))
    counts *= draw(st.sampled_from([1, 1, 1, 100]))
    classes = [f"{name}{i}" for i, name in enumerate(classes * (len(counts) // len(classes)))]
    arrays = draw(st.booleans())
    side = st.integers(1, draw(st.sampled_from([16, 40, 3000])))
    sides = [[value] * 2 for value in [draw(side)]] if arrays else draw(st.lists(st.tuples(side, side), min_size=1))
    splits = [draw(st.none() | st.integers(len(counts), 10**5)) for _ in range(2)]
    return Survey(
        {"source": draw(st.sampled_from(["folder", "npz", "idx"])), "path": "/images"}, tuple(classes),
        np.array(counts), *splits, np.array(sides), arrays, draw(st.booleans()), draw(st.floats(1e-6, 1.0)),
    )  # fmt: skip


speeds = st.builds(
    Speeds, *[st.floats(1e9, 1e15)] * 3, decode=st.integers(1, 64), start=st.floats(0, 200),
    memory=st.floats(1e8, 1e11), processes=st.sampled_from([1, 1, 2, 3, 8]),
)  # fmt: skip


@given(surveys(), speeds, st.floats(1e-3, 1e4), st.lists(st.sampled_from(SETTINGS), max_size=3))
def test_any_set_is_planned_or_refused_in_a_line(
    survey: Survey, speeds: Speeds, hours: float, overrides: list[str]
) -> None:
    try:
        fixed = parse_overrides(overrides)
        plan = propose_settings("own", survey, speeds, hours, fixed)
    except UserError as error:
        assert "\n" not in str(error)
        return
    config, counts = plan.config, plan.amounts.counts
    assert tomllib.loads(config.to_toml(plan.comments))["data"]["source"] == survey.place["source"]
    assert (counts >= 1).all() and (counts <= survey.counts).all() and counts.max() >= 3
    assert sum(map(len, class_groups(counts, config.groups.many, config.groups.few).values())) == len(counts)
    for override in overrides:
        name, value = override.split("=", 1)
        section, *key = name.split(".")
        held = getattr(config, section) if not key else getattr(getattr(config, section), key[0])
        if sum(other.startswith(f"{name}=") for other in overrides) == 1:
            assert re.sub(r"[\[\]()' ]|\.0$", "", str(held)).lower() == re.sub(r"[\[\]' ]|\.0$", "", value)
    rows = costs(config, plan.amounts, speeds)
    assert all(math.isfinite(x) and x >= 0 for row in rows for x in (row.seconds, row.limit, row.memory, row.disk))
    fits = sum(row.limit for row in rows) <= 3600 * hours * (1 + 1e-9)
    assert fits != any("does not fit into" in note for note in plan.notes)
    assert not any("\n" in line for line in lines(survey, plan) + table(plan, speeds))
