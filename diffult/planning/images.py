"""Which images a plan trains, validates and tests on, and what becomes of classes that are too small for that."""

from __future__ import annotations

import numpy as np
from pydantic import ValidationError

from diffult.data.config import DataConfig
from diffult.data.profiles import class_counts, draw
from diffult.data.splits import MIN_IMAGES_FOR_TEST, test_sizes
from diffult.data.survey import Survey
from diffult.errors import UserError
from diffult.longtail.metrics import class_groups
from diffult.longtail.statistics import MIN_IMAGES_FOR_RADIUS
from diffult.planning.cost import Amounts, Speeds, radius_flops
from diffult.planning.draft import Draft
from diffult.reporting.text import counted, shortened

_ENOUGH_TESTS, _FEW_TESTS = 20, 50  # test images of a group: the usual groups need so many; below, the plan says so


def choose_images(draft: Draft, survey: Survey, speeds: Speeds, seconds: float) -> Amounts:
    """Splits, and how many images of each class are left to train on. `seconds`: that packing may take.

    Raises:
        UserError: settings of the user that the images cannot meet, or no class has images enough.
    """
    where = survey.place["path"]
    for key, value in survey.place.items():
        if draft.set_by_user(f"data.{key}") is not None:
            raise UserError(f"--set data.{key}: --data {where} says where the images are; leave one of the two out")
        draft.put(f"data.{key}", value)
    draft.put("data.channels", 3 if survey.colour else 1, "" if survey.colour else "None of the images has colours.")
    draft.put("data.profile", "natural", "All images, as the set has them.")
    tests = _tests(draft, survey)
    available = survey.counts - tests if survey.test is None else survey.counts
    others = int(tests.sum()) + (survey.val or 0)
    counts = _drawn(draft, survey, available, others, speeds, seconds)
    packed, val = int(counts.sum()) + others, np.zeros_like(counts)
    if survey.val is None:
        limit = draft.put(
            "data.val_per_class", max(1, min(50, 2000 // len(counts))),
            "Held out to choose settings by: at most a tenth of a class, so none of a class of fewer than ten images.",
        )  # fmt: skip
        natural = draft.document["data"]["profile"] == "natural"
        val = np.minimum(limit, available // 10 if natural else available - counts)
        if limit and (small := val == 0).any():
            draft.notes.append(
                f"fewer than 10 images besides those for test, so none for validation: {_named(survey, small)}"
                if natural else f"all images are drawn to train on, so none for validation: {_named(survey, small)}"
            )  # fmt: skip
        if natural:  # out of all there are, so a class that is cut loses fewer
            counts = np.maximum(counts - np.rint(val * counts / available).astype(np.int64), 1)
        else:
            packed += int(val.sum())
    if (small := counts < MIN_IMAGES_FOR_RADIUS).all():
        raise UserError(
            f"{where}: no class has {MIN_IMAGES_FOR_RADIUS} images left to train on: there is nothing to learn a "
            "class's spread from; add images"
        )
    if small.any():
        draft.notes.append(
            f"fewer than {MIN_IMAGES_FOR_RADIUS} training images, so the filter takes the median radius of the other "
            f"classes: {_named(survey, small)}"
        )
    return Amounts(counts, tests, int(tests.sum() + val.sum()) + (survey.val or 0), packed, survey.seconds_per_image)


def _tests(draft: Draft, survey: Survey) -> np.ndarray:
    """Test images of each class, float64 [C]; of a split of the set's own, whose classes are not counted, the mean."""
    counts, total = survey.counts, int(survey.counts.sum())
    if survey.test is not None:
        return np.full(len(counts), survey.test / len(counts))
    share = round(min(0.2, max(0.02, 50_000 / total)), 2)
    share = draft.put(
        "data.test_share", share, "The set has no test split: so much of each class, at least one image, becomes it."
    )
    tests = test_sizes(counts, share)
    if not tests.any():
        raise UserError(
            f"{survey.place['path']}: has no test split, and none can be taken out of it: that needs a class of "
            f"{MIN_IMAGES_FOR_TEST} images and data.test_share above 0"
        )
    draft.notes.append(
        f"no test split: {share:.0%} of each class is set aside, {counted(int(tests.sum()), 'image', 'images')}"
    )
    if (small := tests == 0).any():
        draft.notes.append(
            f"fewer than {MIN_IMAGES_FOR_TEST} images, so all are trained on and none is tested: "
            f"{_named(survey, small)}"
        )
    return tests


def _drawn(
    draft: Draft, survey: Survey, available: np.ndarray, others: int, speeds: Speeds, seconds: float
) -> np.ndarray:
    """Images of each class that the profile draws, int64 [C]; the largest classes are cut where reading takes long."""
    data = draft.fixed.get("data", {})
    if draft.document["data"]["profile"] == "natural" and data.get("n_max") is None:
        cap = _most_per_class(available, others, survey, speeds, seconds)
        if cap is not None:
            draft.put("data.n_max", cap, "Larger classes are cut to so many images: reading all would take too long.")
            cut = counted(int((available > cap).sum()), "class is", "classes are")
            draft.notes.append(f"{cut} cut to {cap:,} images: reading all takes too long")
    try:
        settings = DataConfig.model_validate(draft.document["data"] | data)
    except ValidationError as error:
        raise UserError(f"--set: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    counts = class_counts(settings, available)
    if settings.profile != "natural":  # refuses what cannot be drawn
        draw(np.repeat(np.arange(len(available)), available), counts, 0)
    return np.array(counts, np.int64)


def _most_per_class(counts: np.ndarray, others: int, survey: Survey, speeds: Speeds, seconds: float) -> int | None:
    """The most images of a class with which packing, and measuring radii, take these seconds; None: all."""

    def takes(cap: int) -> float:
        kept = np.minimum(counts, cap)
        return (kept.sum() + others) * survey.seconds_per_image / speeds.decode + radius_flops(kept) / speeds.classify

    cap, most = int(counts.max()), int(counts.max())
    while cap > 20 and takes(cap) > seconds:
        cap = max(20, int(cap * 0.9))
    return cap if cap < most else None


def choose_groups(draft: Draft, amounts: Amounts) -> None:
    """100 and 20 images as in the literature where each group then has classes and test images enough to be measured;
    else thirds of the classes."""
    counts, tests = amounts.counts, amounts.tests

    def groups(many: int, few: int) -> dict[str, np.ndarray]:
        return class_groups(counts, many, few)

    def least(many: int, few: int) -> float:
        """Test images of the group that has fewest; -1: it has no class."""
        return min(tests[members].sum() if len(members) else -1.0 for members in groups(many, few).values())

    ordered, third = np.sort(counts), max(1, len(counts) // 3)
    many, few = max(1, int(ordered[-third]) - 1), int(ordered[third - 1]) + 1
    if few > many + 1:
        many = few = max(1, int(ordered[0]))
    why = "A third of the classes: the usual 100 and 20 images would leave a group without classes or test images."
    if 0 <= least(100, 20) >= min(_ENOUGH_TESTS, least(many, few)):
        many, few, why = 100, 20, ""
    elif ordered[0] == ordered[-1]:
        why = "No groups: all classes are of one size, and are medium."
    many = draft.put("groups.many", many, why)
    few = draft.put("groups.few", min(few, many + 1), why)
    members = groups(many, few)["few"]
    tested = round(float(tests[members].sum()))
    if len(members) and tested < _FEW_TESTS:
        rests = (
            f"rests on {counted(tested, 'test image', 'test images')} ({round(100 / max(tested, 1), 1):g} points each)"
        )
        draft.notes.append(
            f"few-shot accuracy {rests if tested else 'is not measured: no test image is of these classes'}"
        )


def _named(survey: Survey, which: np.ndarray) -> str:
    """`class7, class8 (2 of 9 classes)`."""
    names = [shortened(survey.classes[label], 40) for label in np.flatnonzero(which)[:5]]
    return f"{', '.join(names)}{', ...' if which.sum() > 5 else ''} ({which.sum()} of {len(which)} classes)"
