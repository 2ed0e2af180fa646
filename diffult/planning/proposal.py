"""Settings for a set of images, from what it is like, a machine's speeds and the hours that it may take.

Every number is a rule of thumb with its reason beside it, and the reason goes into config.toml. Diffusion follows the
presets for small sets: v-prediction, cosine schedule, ten steps of DPM-Solver++, patches of 2x2 from 28 pixels up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from diffult.config import Config, complete
from diffult.data.splits import MIN_IMAGES_FOR_TEST, test_sizes
from diffult.data.survey import Survey
from diffult.errors import UserError
from diffult.longtail.statistics import MIN_IMAGES_FOR_RADIUS
from diffult.models.config import UNetConfig
from diffult.planning.cost import PASS_RATE, Amounts, Speeds, classifier_cost, radius_flops, unet_cost

# Shares of the time: packing at most; training the UNet, first and at the most; drawing, were every class as hard as
# max_draws allows; extractor and classifiers together. A tenth is kept for what cannot be foreseen.
_PACK, _DIFFUSION, _DIFFUSION_MOST, _DRAW, _CLASSIFY, _USED = 0.15, 0.4, 0.5, 0.2, 0.25, 0.9
# Pixels, and the training images at a width that must be affordable: fewer learn less than a smaller size would show.
_SIZES = ((8, 0, 32), (16, 0, 32), (32, 100_000, 32), (48, 1_000_000, 64), (64, 2_000_000, 64), (128, 50_000_000, 128))
_WIDTHS = (32, 48, 64, 96, 128, 192)
_METHODS = ["ce", "resample", "logit_adjust", "duplicates", "diffult", "mix+logit_adjust"]
_MANY_CLASSES = 20  # above, the extractor's label is wrong too often to be asked for


@dataclass(frozen=True)
class Proposal:
    """Settings, why each was chosen by `section.key`, what the user should know, and the images they are for."""

    config: Config
    comments: dict[str, str]
    notes: list[str]
    amounts: Amounts


@dataclass
class _Draft:
    """A document that grows; what the user has set wins over what is put."""

    fixed: Mapping[str, Any]
    document: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, why: str = "") -> Any:
        """Sets a value unless the user has; returns what holds."""
        *section, name = key.split(".")
        fixed: Any = self.fixed
        for part in [*section, name]:
            fixed = fixed.get(part) if isinstance(fixed, Mapping) else None
        if fixed is not None:
            value, why = fixed, "Set on the command line."
        target = self.document
        for part in section:
            target = target.setdefault(part, {})
        target[name] = value
        if why:
            self.comments[key] = why
        return value


def propose_settings(name: str, survey: Survey, speeds: Speeds, hours: float, fixed: Mapping[str, Any]) -> Proposal:
    """The settings of a run that ends within `hours` where that can be done at all.

    Args:
        fixed: settings of the user, as `parse_overrides` gives them: kept, and reckoned with.

    Raises:
        UserError: no class has images enough to train, or the user's settings do not fit each other.
    """
    draft = _Draft(fixed)
    draft.put("name", name)
    seconds = 3600 * hours
    work = max(_USED * seconds - speeds.start - 10, 0.25 * seconds)
    amounts = _data(draft, survey, speeds, seconds)
    flip = _photographs(survey)
    side, channels = _unet(draft, survey, amounts, speeds, _DIFFUSION * work)
    classify = _classifiers(draft, amounts, side, channels, flip, speeds, _CLASSIFY * work)
    draw = _generate(draft, amounts, speeds, _DRAW * work, side, channels)
    packing = amounts.packed * amounts.seconds_per_image / speeds.decode
    left = min(_DIFFUSION_MOST * seconds, max(work - classify - draw - packing, 0.05 * seconds))
    _diffusion(draft, amounts, speeds, left, side, channels, flip)
    _groups(draft, amounts.counts)
    return Proposal(complete(draft.document, fixed), draft.comments, draft.notes, amounts)


def _named(survey: Survey, which: np.ndarray) -> str:
    """`class7, class8 (2 of 9 classes)`."""
    names = [survey.classes[label] for label in np.flatnonzero(which)[:5]]
    return f"{', '.join(names)}{', ...' if which.sum() > 5 else ''} ({which.sum()} of {len(which)} classes)"


def _data(draft: _Draft, survey: Survey, speeds: Speeds, seconds: float) -> Amounts:
    """Splits, and how many images of each class are left to train on."""
    for key, value in survey.place.items():
        draft.put(f"data.{key}", value)
    draft.put("data.channels", 3 if survey.colour else 1, "" if survey.colour else "None of the images has colours.")
    draft.put("data.profile", "natural", "All images, as the set has them.")
    counts, total = survey.counts, int(survey.counts.sum())
    tests = np.zeros_like(counts)
    if survey.test is None:
        share = round(min(0.2, max(0.02, 50_000 / total)), 2)
        share = draft.put(
            "data.test_share",
            share,
            "The set has no test split: so much of each class, at least one image, becomes it.",
        )
        tests = test_sizes(counts, share)
        draft.notes.append(f"no test split: {share:.0%} of each class is set aside, {tests.sum():,} images")
        if (small := tests == 0).any():
            draft.notes.append(
                f"fewer than {MIN_IMAGES_FOR_TEST} images, so all are trained on and none is tested: "
                f"{_named(survey, small)}"
            )
    counts = counts - tests
    held_out = survey.test or int(tests.sum())
    cap = _most_per_class(counts, held_out + (survey.val or 0), survey, speeds, _PACK * seconds)
    if cap is not None:
        cap = draft.put(
            "data.n_max", cap, "Larger classes are cut to so many images: reading all of them would take too long."
        )
        draft.notes.append(f"{(counts > cap).sum()} classes are cut to {cap:,} images: reading them all takes too long")
        counts = np.minimum(counts, cap)
    packed = int(counts.sum()) + held_out + (survey.val or 0)
    if survey.val is None:
        limit = draft.put(
            "data.val_per_class", max(1, min(50, 2000 // len(counts))),
            "Held out to choose settings by: at most a tenth of a class, so none of a class of fewer than ten images.",
        )  # fmt: skip
        val = np.minimum(limit, counts // 10)
        if (small := val == 0).any():
            draft.notes.append(
                f"fewer than 10 images besides those for test, so none for validation: {_named(survey, small)}"
            )
        counts, held_out = counts - val, held_out + int(val.sum())
    if (small := counts < MIN_IMAGES_FOR_RADIUS).all():
        raise UserError(
            f"{survey.place['path']}: no class has {MIN_IMAGES_FOR_RADIUS} images left to train on: there is nothing "
            "to learn a class's spread from; add images"
        )
    if small.any():
        draft.notes.append(
            f"fewer than {MIN_IMAGES_FOR_RADIUS} training images, so the filter takes the median radius of the other "
            f"classes: {_named(survey, small)}"
        )
    return Amounts(counts, held_out, packed, survey.seconds_per_image)


def _most_per_class(counts: np.ndarray, others: int, survey: Survey, speeds: Speeds, seconds: float) -> int | None:
    """The most images of a class with which packing, and measuring radii, take these seconds; None: all."""

    def takes(cap: int) -> float:
        kept = np.minimum(counts, cap)
        return (kept.sum() + others) * survey.seconds_per_image / speeds.decode + radius_flops(kept) / speeds.classify

    cap, most = int(counts.max()), int(counts.max())
    while cap > 20 and takes(cap) > seconds:
        cap = max(20, int(cap * 0.9))
    return cap if cap < most else None


def _photographs(survey: Survey) -> str:
    """Why images may be mirrored, "" if they may not."""
    glyphs = survey.place["source"] == "folder" and all(len(name) == 1 for name in survey.classes)
    sided = any(word in name.lower() for name in survey.classes for word in ("left", "right"))
    small_grey = not survey.colour and int(np.median(survey.sides.min(1))) < 33
    return "" if glyphs or sided or small_grey else "Photographs mean the same when mirrored."


def _shape(side: int, width: int) -> UNetConfig:
    """The UNet for images of `side` pixels: halved while even and not below 4 positions, attention from 8 down."""
    patch = 2 if side >= 28 and side % 2 == 0 else 1
    grids = [side // patch]
    while grids[-1] % 2 == 0 and grids[-1] >= 8:
        grids.append(grids[-1] // 2)
    return UNetConfig(
        channels=width, multipliers=(1, *[2] * (len(grids) - 1)), num_res_blocks=2 if width >= 128 else 1,
        attention_resolutions=tuple(grid for grid in grids if grid <= 8)[:1], dropout=0.1, scale_shift=True,
        patch=patch,
    )  # fmt: skip


def _most_images(amounts: Amounts) -> int:
    """Images to train the UNet on at the most: later it copies small sets rather than learns them."""
    return 20_000 + 1000 * int(amounts.counts.sum())


def _unet(draft: _Draft, survey: Survey, amounts: Amounts, speeds: Speeds, seconds: float) -> tuple[int, int]:
    """Image size and network; returns the size and the channels."""
    channels, classes = int(draft.document["data"]["channels"]), len(amounts.counts)

    def images(side: int, width: int) -> float:
        return seconds * speeds.train / (3.0 * unet_cost(_shape(side, width), side, channels, classes).flops)

    shorter = int(np.median(survey.sides.min(1)))
    if survey.arrays:
        side, why = shorter, "The arrays' size."
    elif (survey.sides == shorter).all() and shorter <= 64 and shorter % 4 == 0:
        side, why = shorter, "The images' size."
    else:
        fitting = [row for row in _SIZES if row[0] <= shorter] or [_SIZES[0]]
        side = [z for z, *_ in takewhile(lambda row: images(row[0], row[2]) >= row[1], fitting)][-1]
        why = f"Half of the images have {shorter} pixels or more on the shorter side"
        limits = [str(z) for z, *_ in fitting if z > side]
        why += f"; {limits[0]} would take the diffusion model longer than there is." if limits else "."
    side = draft.put("data.image_size", side, why)
    most = _most_images(amounts)
    wide = takewhile(lambda w: min(images(side, w), most) >= 400_000 * (w / 32) ** 2, _WIDTHS[1:])
    width = [_WIDTHS[0], *wide][-1]
    width = draft.put("unet.channels", width, f"Time for about {min(images(side, width), most):,.0f} training images.")
    shape = _shape(side, width)
    for key, value in shape.model_dump(mode="json", exclude_defaults=True, exclude={"channels"}).items():
        why = "2x2 pixels are one position: three times as fast." if key == "patch" else ""
        draft.put(f"unet.{key}", value, why)
    return side, channels


def _shape_of(draft: _Draft) -> UNetConfig:
    """The network with the user's settings."""
    return UNetConfig(**draft.document["unet"])


def _classifiers(
    draft: _Draft, amounts: Amounts, side: int, channels: int, flip: str, speeds: Speeds, seconds: float
) -> float:
    """Extractor and classifiers, alike; returns the seconds that they take."""
    classes, real = len(amounts.counts), int(amounts.counts.sum())
    methods = draft.put("classifier.methods", _METHODS, "Cross-entropy, the strongest rivals, and DiffuLT.")
    share = seconds / (len(methods) + 1)
    wanted = min(30_000 + 80 * real, 5_000_000)  # 40 epochs of real and as many synthetic images

    def images(network: str) -> float:
        return share * speeds.classify / (3.0 * classifier_cost(network, side, channels, classes).flops)

    if side >= 64 and images("resnet10") >= wanted / 4:
        network, reason = "resnet10", "For images from 64 pixels up."
    elif side >= 32 and images("resnet32") >= 0.75 * wanted:
        network, reason = "resnet32", "CIFAR's network: there is time for it."
    else:
        network, reason = "convnet", "Sees the whole image, and is the fastest."
    augment = {"pad": max(1, side // (8 if flip else 12)), "flip": bool(flip)}
    total = 0.0
    for section in ("extractor", "classifier"):
        chosen = draft.put(f"{section}.network", network, reason)
        size = draft.put(f"{section}.image_size", side)
        batch = draft.put(f"{section}.batch_size", _batch(64 if network == "convnet" else 128, speeds))
        flops = 3.0 * classifier_cost(chosen, size, channels, classes).flops
        affordable = share * speeds.classify / flops
        count = min(affordable, wanted if section == "classifier" else 30_000 + 60 * real)
        why = f"{count / real:.0f} epochs of the {real:,} real images" + ("." if count < affordable else ": the time.")
        steps = draft.put(f"{section}.steps", max(1, int(count / batch)), why)
        _recipe(draft, section, chosen, augment, flip)
        total += steps * batch * flops / speeds.classify * (len(methods) if section == "classifier" else 1)
    tested = amounts.held_out * len(methods) * flops / 3.0  # of the final classifiers
    total += (tested + radius_flops(amounts.counts)) / speeds.classify
    draft.put("extractor.loss", "logit_adjust", "Knows rare classes better, and its label is asked for by the filter.")
    draft.put("classifier.omega", 0.5, "Weight of a synthetic image; from 0.3 to 1 it hardly mattered in our runs.")
    return total


def _recipe(draft: _Draft, section: str, network: str, augment: Mapping[str, Any], flip: str) -> None:
    """Rate, decay and augmentation, as in the presets."""
    recipe: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 5e-4, "warmup": 0.05, "milestones": [0.6, 0.85]}
    if network == "resnet32":
        recipe |= {"learning_rate": 0.1, "weight_decay": 2e-4, "warmup": 0.025, "milestones": [0.8, 0.9], "decay": 0.01}
    for key, value in recipe.items():
        draft.put(f"{section}.{key}", value)
    for key, value in augment.items():
        draft.put(f"{section}.augment.{key}", value, (flip or _NOT_FLIPPED) if key == "flip" else "")


_NOT_FLIPPED = "Small grey images, single letters or digits, left and right: mirrored, they may be another class."


def _batch(size: int, speeds: Speeds) -> int:
    """A batch that the processes share evenly."""
    return -(-size // speeds.processes) * speeds.processes


def _generate(draft: _Draft, amounts: Amounts, speeds: Speeds, seconds: float, side: int, channels: int) -> float:
    """N_t, sampler and filter; returns the seconds that drawing takes at the most."""
    counts = amounts.counts
    draft.put("generate.sampler", "dpm++sde")
    steps = draft.put("generate.steps", 8)
    for key, value in {"spacing": "sigma", "sigma_max": 40.0, "sigma_min": 0.05, "rho": 3.0}.items():
        draft.put(f"generate.{key}", value)
    draft.put("generate.batch_size", 64 if side < 16 else 128)
    evaluation = unet_cost(_shape_of(draft), side, channels, len(counts)).flops
    candidates = seconds * speeds.sample / (steps * evaluation)
    most = int(counts.max()) * (1 if counts.max() >= 2 * counts.min() else 2)
    target = _level(counts, min(counts.sum(), PASS_RATE * candidates / 1.5), most)
    why = "As many synthetic images as real ones at the most, and no class more than the largest has."
    if most > counts.max():
        why = "The classes are nearly even: each is filled up beyond the largest, to twice the images."
        draft.notes.append("the classes are nearly even: this is not the long tail that DiffuLT is made for")
    elif PASS_RATE * candidates / 1.5 < counts.sum():
        why = "As many synthetic images as can be drawn in the time."
    target = draft.put("generate.balance_to", target, why)
    needed = amounts.synthetic(target)
    draws = round(min(10.0, max(1.5 / PASS_RATE, candidates / max(needed, 1))), 1)
    draws = draft.put(
        "generate.max_draws", draws, "Candidates for each sample needed: so that a hard class ends in time."
    )
    few_classes = len(counts) <= _MANY_CLASSES
    draft.put(
        "generate.filter", "distance+label" if few_classes else "distance",
        "The extractor must also see the sample's own class." if few_classes else
        f"With {len(counts):,} classes the extractor is wrong too often to be asked for the class.",
    )  # fmt: skip
    return needed * max(draws, 1.0) * steps * evaluation / speeds.sample


def _level(counts: np.ndarray, budget: float, most: int) -> int:
    """The largest target up to `most` that takes no more than `budget` images to fill all classes to it."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if np.maximum(middle - counts, 0).sum() <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _diffusion(
    draft: _Draft, amounts: Amounts, speeds: Speeds, seconds: float, side: int, channels: int, flip: str
) -> None:
    shape = _shape_of(draft)
    cost = unet_cost(shape, side, channels, len(amounts.counts))
    most = _most_images(amounts)
    affordable = seconds * speeds.train / (3.0 * cost.flops)
    count = min(affordable, most)
    for key, value in {"schedule": "cosine", "prediction": "v"}.items():
        draft.put(f"diffusion.{key}", value)
    for key in ("cbdm", "aid"):
        draft.put(f"diffusion.{key}", False, "Twice the time a step, or nearly, and no gain in short trainings.")
    draft.put("diffusion.batches", "class_balanced", "Rare classes as often as common ones.")
    draft.put("diffusion.flip", bool(flip), flip or _NOT_FLIPPED)
    batch = 64 if side < 16 else 128 if count < 5e6 else 256 if count < 2e7 else 512
    batch = draft.put("diffusion.batch_size", _batch(batch, speeds))
    local = max(1, batch // speeds.processes)
    fits = max(1.0, 0.6 * speeds.memory / max(cost.kept_bytes, 1))
    parts = next(n for n in range(1, local + 1) if (local % n == 0 and local / n <= fits) or n == local)
    if parts > 1:
        draft.put("diffusion.accumulate", parts, "Parts of a batch, for the memory.")
    steps = draft.put(
        "diffusion.steps", max(1, int(count / batch)),
        "Until it would begin to copy: a thousand epochs." if count == most else
        f"What {seconds / 3600:.2g} hours allow: {count:,.0f} images. Quality grows with them: give --hours more.",
    )  # fmt: skip
    draft.put("diffusion.learning_rate", round(2e-3 * math.sqrt(32 / shape.channels), 5))
    draft.put("diffusion.warmup_steps", min(500, steps // 20))
    draft.put("diffusion.cosine_decay", True)
    draft.put("diffusion.ema", round(1 - 1 / min(10_000, max(20, steps / 5)), 5), "Over a fifth of the steps.")
    draft.put("diffusion.checkpoint_every", max(1, min(5000, steps // 10)))


def _groups(draft: _Draft, counts: np.ndarray) -> None:
    """100 and 20 images as in the literature where they leave no group empty; else thirds of the classes."""
    if (counts > 100).any() and (counts < 20).any() and ((counts >= 20) & (counts <= 100)).any():
        return
    ordered, third = np.sort(counts), max(1, len(counts) // 3)
    few, many = int(ordered[third - 1]) + 1, max(1, int(ordered[-third]) - 1)
    if few > many + 1:
        few = many = int(ordered[0])
    why = "A third of the classes: the usual 100 and 20 images would leave a group empty."
    draft.put("groups.many", max(1, many), why)
    draft.put("groups.few", few, why)
