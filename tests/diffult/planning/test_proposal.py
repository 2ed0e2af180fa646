"""Proposals for sets of every kind: they validate, build, say why, keep what the user sets, and end in time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffult.config import load_preset, parse_overrides, read_config
from diffult.data.survey import Survey
from diffult.errors import UserError
from diffult.longtail.metrics import class_groups
from diffult.models.config import UNetConfig
from diffult.models.resnet import build_classifier
from diffult.models.unet import UNet, build_unet
from diffult.planning import lines, table
from diffult.planning.cost import Speeds, costs, evaluation_flops, unet_cost
from diffult.planning.proposal import Proposal, propose_settings
from kernels import dispatch

CORES = Speeds(train=3e10, sample=3e10, classify=5e10)  # two cores
CARD = Speeds(train=1e14, sample=1e14, classify=3e13, decode=16, start=150, memory=7e10)


def survey_of(
    counts: Any, side: int = 500, colour: bool = True, test: int | None = None, seconds: float = 0.005, **fields: Any
) -> Survey:
    counts = np.array(counts, np.int64)
    classes = fields.pop("classes", tuple(f"class{i}" for i in range(len(counts))))
    place = {"source": "folder", "path": "/photographs"}
    sides = np.array([[side, side + 100], [2 * side, side]])
    values = {"val": None, "test": test, "sides": sides, "arrays": False, "seconds_per_image": seconds} | fields
    return Survey(place, classes, counts, colour=colour, **values)


def long_tail(classes: int, largest: int, smallest: int = 1) -> list[int]:
    return [round(largest * (smallest / largest) ** (i / (classes - 1))) for i in range(classes)]


SETS = {
    "two classes": survey_of([500, 12]),
    "seven images": survey_of([5, 2], side=100),
    "8,142 classes": survey_of(long_tail(8142, 1000)),
    "a million": survey_of(long_tail(1000, 7000, 100), side=400, seconds=0.004),
    "a million of two classes": survey_of([999_000, 1000], test=50_000, seconds=0.002),
    "grey, 16 pixels": survey_of(long_tail(10, 2000, 20), side=16, colour=False, seconds=2e-4),
    "colour, 2000 pixels": survey_of(long_tail(8, 6800, 7), side=2000, seconds=0.04),
    "arrays of 25 pixels": survey_of([300, 30, 4], arrays=True, sides=np.array([[25, 25]]), test=90, seconds=1e-5),
}


def proposed(survey: Survey, speeds: Speeds = CORES, hours: float = 2.0, *overrides: str) -> Proposal:
    return propose_settings("own", survey, speeds, hours, parse_overrides(overrides))


@pytest.mark.parametrize("speeds", [CORES, CARD], ids=["cores", "card"])
@pytest.mark.parametrize("name", SETS)
def test_any_set_gets_a_plan_that_builds_and_ends_in_time(name: str, speeds: Speeds, tmp_path: Path) -> None:
    survey = SETS[name]
    plan = proposed(survey, speeds)
    config, counts = plan.config, plan.amounts.counts
    with torch.device("meta"):
        build_unet(config, len(counts))
        for part in (config.extractor, config.classifier):
            build_classifier(part.network, len(counts), config.data.channels, part.image_size)
    rows = costs(config, plan.amounts, speeds)
    assert sum(row.limit for row in rows) <= 2 * 3600
    diffusion = next(row for row in rows if row.stage == "diffusion")
    assert diffusion.seconds <= 3600 and max(row.memory for row in rows) <= speeds.memory
    text = config.to_toml(plan.comments)
    (tmp_path / "config.toml").write_text(text)
    assert read_config(tmp_path / "config.toml") == config
    assert all(f"# {why.split()[0]}" in text for why in plan.comments.values())
    assert config.generate.balance_to >= 1 and plan.amounts.synthetic(config.generate.balance_to) > 0
    assert all("\n" not in line for line in lines(survey, plan) + table(plan, speeds))


def test_image_size_width_and_patch_follow_the_images_and_the_machine() -> None:
    assert proposed(SETS["grey, 16 pixels"]).config.data.image_size == 16
    assert proposed(SETS["grey, 16 pixels"]).config.unet.patch == 1
    slow, fast = proposed(SETS["colour, 2000 pixels"]).config, proposed(SETS["colour, 2000 pixels"], CARD).config
    assert (slow.data.image_size, slow.unet.patch, slow.unet.channels) == (32, 2, 32)
    assert fast.data.image_size >= 64 and fast.unet.channels > 32
    assert "training at 48 would take longer than there is" in "\n".join(proposed(SETS["colour, 2000 pixels"]).notes)
    assert proposed(SETS["a million"]).config.data.image_size == 16  # less than an epoch at 32
    assert proposed(SETS["arrays of 25 pixels"], CARD).config.data.image_size == 25
    same = survey_of([50, 9], sides=np.array([[28, 28], [28, 28]]), colour=False)
    assert proposed(same, CARD).config.data.image_size == 28
    assert proposed(survey_of([50, 9], side=5)).config.data.image_size == 8  # scaled up: no network takes 5


def test_the_size_of_a_small_set_wants_no_more_time_than_its_training_takes() -> None:
    """Of 1,000 images the UNet is trained on 250,000 at the most: size 48 needs time for these, not for a million."""
    small = proposed(survey_of(long_tail(10, 400, 10), test=1000), CORES, 6.0)
    assert small.config.data.image_size >= 48 and small.config.diffusion.steps * 64 < 400_000
    for speeds in (CORES, CARD):
        plan = proposed(SETS["seven images"], speeds)
        assert plan.config.data.image_size == 32
        assert "images are scaled down to 32x32 pixels: the set is too small for 48" in plan.notes
        assert "the set is too small for 48" in plan.comments["data.image_size"]
        assert not any("longer than there is" in note for note in plan.notes)


def test_more_hours_give_more_training_but_never_more_than_the_set_bears() -> None:
    tail = survey_of(long_tail(8, 6800, 7))
    steps = [proposed(tail, CORES, hours).config.diffusion.steps for hours in (0.5, 2, 8)]
    assert steps[0] < steps[1] < steps[2]
    few = proposed(SETS["seven images"], CARD, 100).config.diffusion
    assert few.steps * few.batch_size <= 20_000
    fashion = proposed(survey_of(long_tail(10, 1000, 10), test=10_000), CARD, 100).config.diffusion
    assert fashion.steps * fashion.batch_size == pytest.approx(9000 * 64, rel=0.1)  # as the preset


def seconds_by_stage(plan: Proposal, speeds: Speeds = CORES) -> dict[str, float]:
    return {row.stage: row.seconds for row in costs(plan.config, plan.amounts, speeds)}


def test_of_less_time_the_diffusion_model_gives_up_most() -> None:
    tail = survey_of(long_tail(8, 6800, 7))
    long, short = (seconds_by_stage(proposed(tail, CORES, hours)) for hours in (12, 3))
    assert short["classifier"] / long["classifier"] > 2 * short["diffusion"] / long["diffusion"]


def test_nothing_falls_below_what_is_worth_a_run_and_the_plan_says_so() -> None:
    plan = proposed(survey_of(long_tail(8, 6800, 7)), CORES, 0.02)
    config = plan.config
    assert 19_000 <= config.diffusion.steps * config.diffusion.batch_size <= 20_000
    assert 19_000 <= config.classifier.steps * config.classifier.batch_size <= 20_000
    (note,) = (note for note in plan.notes if "does not fit into 1 min 12 s" in note)
    hours = float(note.rpartition(" ")[2])
    assert sum(row.limit for row in costs(config, plan.amounts, CORES)) <= 3600 * hours
    assert not any("does not fit" in note for note in proposed(survey_of(long_tail(8, 6800, 7)), CORES, hours).notes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.cbdm=true", "diffusion.aid=true"],
        ["generate.guidance=1.5", "generate.steps=50"],
        ["generate.match_histogram=true", "generate.search=20"],
        ["diffusion.check_every=50"],
        ["classifier.epochs=20.0"],
        ["unet.channels=64", "classifier.sam=0.05"],
    ],
)
def test_what_the_user_adds_is_made_up_for(overrides: list[str]) -> None:
    survey = survey_of(long_tail(8, 6800, 7))
    plan, plain = proposed(survey, CORES, 4.0, *overrides), proposed(survey, CORES, 4.0)
    limit = sum(row.limit for row in costs(plan.config, plan.amounts, CORES))
    assert limit <= 4 * 3600 and not any("does not fit" in note for note in plan.notes)
    spent = sum(seconds_by_stage(plan).values())
    assert spent > 0.7 * sum(seconds_by_stage(plain).values())


def test_the_pilot_of_histogram_matching_and_the_lists_of_a_search_are_counted() -> None:
    survey = survey_of(long_tail(8, 6800, 7))
    plain = proposed(survey)
    pilot = proposed(survey, CORES, 2.0, "generate.match_histogram=true", "generate.search=3")
    generate = plain.config.generate
    assert pilot.config.generate.balance_to == generate.balance_to
    samples = 8 * 16 + 3 * 8 * 64
    more = samples * generate.evaluations * evaluation_flops(plain.config, 8) / CORES.sample
    assert seconds_by_stage(pilot)["generate"] - seconds_by_stage(plain)["generate"] == pytest.approx(more)


def test_epochs_count_in_place_of_steps() -> None:
    survey = survey_of(long_tail(8, 6800, 7))
    plan = proposed(survey, CORES, 2.0, "classifier.methods=['ce', 'diffult']", "classifier.epochs=3.0")
    real, synthetic = plan.amounts.counts.sum(), plan.amounts.synthetic(plan.config.generate.balance_to)
    steps = proposed(survey, CORES, 2.0, "classifier.methods=['ce', 'diffult']").config.classifier
    by_steps = seconds_by_stage(proposed(survey, CORES, 2.0, "classifier.methods=['ce', 'diffult']"))["classifier"]
    expected = by_steps * 3 * (2 * real + synthetic) / (2 * steps.steps * steps.batch_size)
    assert seconds_by_stage(plan)["classifier"] == pytest.approx(expected, rel=0.05)


def test_training_and_drawing_are_those_of_the_preset_that_was_measured() -> None:
    preset, plan = load_preset("fashion-mnist-lt"), proposed(survey_of(long_tail(8, 6800, 7))).config
    for section, names in {
        "diffusion": "schedule prediction cbdm aid batches label_dropout flip batch_size learning_rate cosine_decay",
        "generate": "sampler steps spacing sigma_max sigma_min rho batch_size",
        "unet": "dropout scale_shift patch num_res_blocks channels",
        "extractor": "network loss learning_rate weight_decay warmup milestones",
    }.items():
        for name in names.split():
            assert getattr(getattr(plan, section), name) == getattr(getattr(preset, section), name), name
    assert (plan.generate.filter, preset.generate.filter) == ("distance", "distance+label")  # of photographs, of grey
    assert proposed(SETS["grey, 16 pixels"]).config.generate.filter == "distance+label"
    assert {"ce", "logit_adjust", "mislas", "duplicates", "diffult"} < set(plan.classifier.methods)
    small = proposed(SETS["arrays of 25 pixels"]).config
    assert small.diffusion.augment_probability > 0 and small.unet.augment_dim == 9  # as digits-lt
    assert plan.diffusion.augment_probability == 0


def test_only_pictures_that_bear_it_are_mirrored() -> None:
    def flips(survey: Survey) -> bool:
        config = proposed(survey).config
        assert config.diffusion.flip == config.classifier.augment.flip == config.extractor.augment.flip
        return config.diffusion.flip

    assert flips(survey_of([50, 9])) and flips(survey_of([50, 9], colour=False))
    assert not flips(SETS["grey, 16 pixels"])
    assert not flips(survey_of([50, 9], classes=("3", "8"))) and not flips(survey_of([50, 9], classes=("left", "up")))


@pytest.mark.parametrize("counts", [[500, 12], [6800, 7], [40, 30, 20], [9, 8, 7, 6, 5, 4], [50, 50, 50], [4, 3]])
def test_no_group_of_three_classes_or_more_is_empty_unless_all_are_alike(counts: list[int]) -> None:
    plan = proposed(survey_of(counts, test=10))
    groups = class_groups(plan.amounts.counts, plan.config.groups.many, plan.config.groups.few)
    sizes = {name: len(members) for name, members in groups.items()}
    if len(set(counts)) == 1:
        assert sizes["medium"] == len(counts)
    else:
        assert sizes["many"] and sizes["few"] and (len(counts) < 3 or sizes["medium"])


def test_usual_thresholds_stay_where_they_divide() -> None:
    assert proposed(survey_of([900, 60, 8], test=300)).config.groups.model_dump() == {"many": 100, "few": 20}


def test_groups_have_test_images_where_that_can_be_and_the_plan_says_how_few() -> None:
    plan = proposed(survey_of([5000, 3400, 2200, 1300, 700, 300, 60, 7]))  # the last alone has 1 test image
    few = class_groups(plan.amounts.counts, plan.config.groups.many, plan.config.groups.few)["few"]
    assert few.tolist() == [6, 7]
    assert "few-shot accuracy rests on 13 test images (7.7 points each)" in plan.notes
    assert "few-shot accuracy rests on 1 test image (100 points each)" in proposed(survey_of([500, 4])).notes
    none = "few-shot accuracy is not measured: no test image is of these classes"
    assert none in proposed(SETS["seven images"]).notes


def test_classes_are_filled_by_as_many_as_the_real_ones_at_the_most() -> None:
    plan = proposed(survey_of(long_tail(8, 6800, 7)), CARD)
    real, target = plan.amounts.counts.sum(), plan.config.generate.balance_to
    assert target <= plan.amounts.counts.max() and plan.amounts.synthetic(target) <= real
    assert plan.amounts.synthetic(target + 1) > real or target == plan.amounts.counts.max()
    even = proposed(survey_of([400, 400, 390]))
    assert 0 < even.amounts.synthetic(even.config.generate.balance_to) <= 1190
    assert any("nearly even" in note for note in even.notes)
    assert "to about twice the images" in even.comments["generate.balance_to"]


def test_classes_of_one_size_are_called_so() -> None:
    survey = survey_of([6000] * 10, side=28, colour=False, test=10_000)
    plan = proposed(survey)
    text = "\n".join(lines(survey, plan) + table(plan, CORES))
    assert "60,000 images of 10 classes (6,000 of each)" in text and "down to" not in text
    assert "groups: none, all classes are of one size" in text and "No groups" in plan.comments["groups.many"]
    assert "the classes are of one size: this is not the long tail that DiffuLT is made for" in plan.notes
    for speeds, hours in ((CORES, 0.1), (CARD, 2.0)):
        plan = proposed(survey, speeds, hours)
        filled = plan.amounts.synthetic(plan.config.generate.balance_to) / plan.amounts.counts.sum()
        short = "as can be drawn in the time" in plan.comments["generate.balance_to"]
        assert (filled < 0.99) == short


def test_small_classes_are_named_with_what_becomes_of_them() -> None:
    notes = "\n".join(proposed(survey_of([60, 9, 3, 2])).notes)
    assert "fewer than 3 images, so all are trained on and none is tested: class3 (1 of 4 classes)" in notes
    assert (
        "fewer than 10 images besides those for test, so none for validation: class1, class2, class3 (3 of 4 classes)"
        in notes
    )
    assert "takes the median radius of the other classes: class2, class3 (2 of 4 classes)" in notes
    with pytest.raises(UserError, match="no class has 3 images left to train on"):
        proposed(survey_of([3, 2, 1]))


def test_a_set_too_large_to_be_read_is_cut_in_its_largest_classes_alone() -> None:
    plan = proposed(SETS["colour, 2000 pixels"], CORES, 0.25)
    cap = plan.config.data.n_max
    assert cap and plan.amounts.counts.max() <= cap and plan.amounts.counts.min() == 6  # of 7, one is tested
    assert any(re.match(r"[2-8] classes are cut to", note) for note in plan.notes)
    one = proposed(survey_of([6800, 7], side=2000, seconds=0.04), CORES, 0.05)
    assert any(note.startswith("1 class is cut to") for note in one.notes)
    text = "\n".join(lines(SETS["colour, 2000 pixels"], plan) + table(plan, CORES))
    assert re.search(r"\n  at most .* min .* s, if the filter rejects most samples", text)
    assert proposed(survey_of([60, 9])).config.data.n_max is None


def test_what_the_user_sets_holds_and_the_rest_follows() -> None:
    plan = proposed(
        SETS["colour, 2000 pixels"], CORES, 2.0, "data.image_size=64", "classifier.methods=['ce', 'diffult']",
        "unet.channels=16", "generate.balance_to=33", "seed=5",
    )  # fmt: skip
    config = plan.config
    assert (config.data.image_size, config.classifier.image_size, config.extractor.image_size) == (64, 64, 64)
    assert config.unet.channels == 16 and config.generate.balance_to == 33 and config.seed == 5
    assert len(config.unet.multipliers) == 4 and config.unet.attention_resolutions == (8,)  # 32, 16, 8, 4
    assert plan.comments["data.image_size"] == "Set on the command line."
    longer = proposed(SETS["colour, 2000 pixels"], CORES, 2.0, "classifier.methods=['ce', 'diffult']").config
    assert longer.classifier.steps > proposed(SETS["colour, 2000 pixels"]).config.classifier.steps
    slow = proposed(SETS["colour, 2000 pixels"], CORES, 2.0, "diffusion.steps=90_000")
    assert any("does not fit into 2 h 00 min: with what --set asks for" in note for note in slow.notes)
    with pytest.raises(UserError, match=r"diffusion.steps: .*greater than or equal to 1, got 0"):
        proposed(SETS["two classes"], CORES, 2.0, "diffusion.steps=0")


def test_settings_of_the_images_are_reckoned_with_or_refused() -> None:
    def counts(*overrides: str) -> list[int]:
        return proposed(
            survey_of([900, 60, 8], test=300), CORES, 2.0, "data.val_per_class=0", *overrides
        ).amounts.counts

    assert list(counts("data.n_max=50")) == [50, 50, 8]
    assert list(counts("data.profile=exponential", "data.imbalance=5", "data.n_max=40")) == [40, 17, 8]
    assert list(counts("data.profile=counts", "data.counts=[9, 7, 5]")) == [9, 7, 5]
    for override, message in {
        "data.profile=exponential": "'exponential' needs imbalance",
        "data.path=/elsewhere": "--data /photographs says where the images are",
    }.items():
        with pytest.raises(UserError, match=message):
            counts(override)
    with pytest.raises(UserError, match="class 1 should get 70 training images but the source has 60"):
        counts("data.profile=counts", "data.counts=[80, 70, 5]")
    with pytest.raises(UserError, match="no test split, and none can be taken out"):
        proposed(survey_of([60, 9]), CORES, 2.0, "data.test_share=0.0")
    with pytest.raises(UserError, match="arrays of 25x25 pixels and 3 channels are taken as they are"):
        proposed(SETS["arrays of 25 pixels"], CORES, 2.0, "data.image_size=16")


def test_processes_share_each_batch_and_memory_is_kept_to() -> None:
    three = Speeds(9e13, 9e13, 9e13, 16, 150, 7e10, 1e12, processes=3)
    config = proposed(survey_of(long_tail(8, 6800, 7)), three).config
    assert not any(size % 3 for size in (config.diffusion.batch_size, config.classifier.batch_size))
    tight = Speeds(1e14, 1e14, 1e14, memory=1e9)
    settings = proposed(survey_of(long_tail(8, 6800, 7)), tight).config
    shape = (settings.unet, settings.data.image_size, 3, 8)
    micro = settings.diffusion.batch_size / settings.diffusion.accumulate
    assert settings.diffusion.accumulate > 1 and micro * unet_cost(*shape).kept_bytes <= 0.3e9


def test_kept_bytes_are_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real pass of the reference operations, which keep the most: twice the images keep twice the bytes, as
    counted without computing."""
    monkeypatch.setattr(dispatch, "_mode", "torch")
    shape = UNetConfig(channels=8, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    model = UNet(shape, 8, 1, 3)
    own = {p.data_ptr() for p in model.parameters()}

    def kept(count: int) -> int:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        label = torch.zeros(count, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.zeros(count, 1, 8, 8), label, label)
        del out
        return sum(found.values())

    counted = 2 * unet_cost(shape, 8, 1, 3).kept_bytes  # counted in bfloat16
    assert counted == pytest.approx(kept(9) - kept(8), rel=0.2)
