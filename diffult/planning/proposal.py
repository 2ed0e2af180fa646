"""Settings for a set of images, from what it is like, a machine's speeds and the hours that it may take.

Every number is a rule of thumb with its reason beside it, and the reason goes into config.toml. Training and drawing
follow the presets for small sets, fashion-mnist-lt first, as docs/experiments.md measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from diffult.config import Config, complete
from diffult.data.survey import Survey
from diffult.errors import UserError
from diffult.longtail.methods import trained_share
from diffult.models.config import UNetConfig
from diffult.planning.cost import Amounts, Cost, Speeds, classifier_cost, costs, pass_rate, radius_flops, unet_cost
from diffult.planning.draft import Draft
from diffult.planning.images import choose_groups, choose_images
from diffult.reporting.text import duration

# Shares of the time: packing at most; training the UNet, reckoned with when its images are chosen and at the most;
# drawing, were every class as hard as max_draws allows; extractor and classifiers at most. A tenth is kept for what
# cannot be foreseen.
_PACK, _DIFFUSION, _DIFFUSION_MOST, _DRAW, _CLASSIFY, _USED = 0.15, 0.4, 0.5, 0.15, 0.4, 0.9
# Pixels; the UNet's training images that they want, at a width: fewer learn less than a smaller size would show. A set
# that bears fewer gets the size all the same, as classifiers see more in it, unless it bears less than this share.
_SIZES = ((8, 0, 32), (16, 0, 32), (32, 100_000, 32), (48, 1_000_000, 64), (64, 2_000_000, 64), (128, 50_000_000, 128))
_BORNE = 0.1
_WIDTHS = (32, 48, 64, 96, 128, 192)
# Training images below which a run is not worth its time: samples are blots, and what classifiers reach is chance.
_LEAST_DIFFUSION, _LEAST_DIFFUSION_32, _LEAST_CLASSIFY = 20_000, 100_000, 20_000
_LEAST_EPOCHS = 3  # of the classifiers: with fewer they learn less from 32 pixels than with more from 16
_METHODS = ["ce", "logit_adjust", "mislas", "duplicates", "diffult", "mix+logit_adjust"]
_MANY_CLASSES = 20  # above, the extractor's label is wrong too often to be asked for
_SMALL = 1000  # training images: smaller sets are copied early, so the diffusion model's images are augmented
_NOT_FLIPPED = "Small grey images, single letters or digits, left and right: mirrored, they may be another class."


@dataclass(frozen=True)
class Proposal:
    """Settings, why each was chosen by `section.key`, what the user should know, and the images they are for."""

    config: Config
    comments: dict[str, str]
    notes: list[str]
    amounts: Amounts


class _Set(NamedTuple):
    """What the settings of all networks depend on; `flip`: why images may be mirrored, "" if they may not."""

    amounts: Amounts
    speeds: Speeds
    side: int
    channels: int
    flip: str


def propose_settings(name: str, survey: Survey, speeds: Speeds, hours: float, fixed: Mapping[str, Any]) -> Proposal:
    """The settings of a run that ends within `hours` where that can be done at all: of what costs time, the training
    of the diffusion model is cut first.

    Args:
        fixed: settings of the user, as `parse_overrides` gives them: kept, and reckoned with.

    Raises:
        UserError: no class has images enough to train, or the user's settings do not fit each other.
    """
    draft = Draft(fixed)
    draft.put("name", name)
    seconds = 3600 * hours
    work = max(_USED * seconds - speeds.start - 10, 0.25 * seconds)
    amounts = choose_images(draft, survey, speeds, _PACK * seconds)
    images = _Set(amounts, speeds, *_unet(draft, survey, amounts, speeds, work), _photographs(survey))
    packing = amounts.packed * amounts.seconds_per_image / speeds.decode
    least = _least_images(images) / _images_per_second(draft, images)
    rest = (1 - _DRAW) * work - packing
    classify = _classifiers(draft, images, min(_CLASSIFY * work, max(rest - least, rest / 3)))
    draw = _generate(draft, images, _DRAW * work)
    choose_groups(draft, amounts)
    left = min(_DIFFUSION_MOST * seconds, work - classify - draw - packing)
    for _ in range(3):  # what the user's settings take beyond what was reckoned with, the diffusion model gives up
        _diffusion(draft, images, left)
        config = complete(draft.document, fixed)
        rows = costs(config, amounts, speeds)
        if (over := sum(row.limit for row in rows) - seconds) <= 0:
            break
        left -= over * _share_of_plain_steps(config, rows, images, draft)
    if over > 0:
        why = "with what --set asks for" if fixed else "less than this would not be worth its time"
        draft.notes.append(
            f"does not fit into {duration(seconds)}: {why}, and this takes up to {duration(seconds + over)}; "
            f"give --hours {math.ceil(10.5 * (1 + over / seconds) * hours) / 10:g}"
        )
    return Proposal(config, draft.comments, draft.notes, amounts)


def _share_of_plain_steps(config: Config, rows: list[Cost], images: _Set, draft: Draft) -> float:
    """Seconds of a diffusion step as `_diffusion` reckons with it to those that it takes."""
    plain = config.diffusion.steps * config.diffusion.batch_size / _images_per_second(draft, images)
    return plain / next(row.seconds for row in rows if row.stage == "diffusion")


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
        attention_resolutions=tuple(grid for grid in grids if grid <= 8)[:1], scale_shift=True, patch=patch,
    )  # fmt: skip


def _most_images(amounts: Amounts) -> int:
    """Images to train the UNet on at the most. On small sets the held-out loss rises from 120 epochs on and samples
    become copies, while their distance to real images falls up to 230 (docs/experiments.md). Of larger ones less is
    known: cifar10-lt-100-fast trains for 650."""
    real = int(amounts.counts.sum())
    return max(_LEAST_DIFFUSION, (250 if real < 5000 else 650) * real)


def _least_images(images: _Set) -> int:
    return min(_LEAST_DIFFUSION_32 if images.side >= 32 else _LEAST_DIFFUSION, _most_images(images.amounts))


def _unet(draft: Draft, survey: Survey, amounts: Amounts, speeds: Speeds, seconds: float) -> tuple[int, int]:
    """Image size and network, for a run of these seconds; returns the size and the channels."""
    channels, classes = int(draft.document["data"]["channels"]), len(amounts.counts)
    trained = 1 + trained_share(draft.set_by_user("classifier.methods") or _METHODS)

    def images(side: int, width: int) -> float:
        cost = unet_cost(_shape(side, width), side, channels, classes)
        return _DIFFUSION * seconds * speeds.train / (3.0 * cost.flops)

    def epochs(side: int) -> float:
        cost = classifier_cost("convnet", side, channels, classes)
        return _CLASSIFY * seconds / trained * speeds.classify / (3.0 * cost.flops) / amounts.counts.sum()

    def obstacle(size: tuple[int, int, int]) -> str:
        """Why not to train at a size, "" if nothing is against it."""
        side, least, width = size
        if most < _BORNE * least:
            return f"the set is too small for {side}"
        enough = images(side, width) >= least if most >= least else images(side, _WIDTHS[0]) >= most
        if enough and (side <= 16 or epochs(side) >= _LEAST_EPOCHS):
            return ""
        return f"training at {side} would take longer than there is"

    most = _most_images(amounts)
    shorter = int(np.median(survey.sides.min(1)))
    if survey.arrays:
        side, why = shorter, "The arrays' size."
    elif (survey.sides == shorter).all() and shorter <= 64 and shorter % 4 == 0:
        side, why = shorter, "The images' size."
    else:
        fitting = [row for row in _SIZES if row[0] <= shorter] or [_SIZES[0]]
        side = [z for z, *_ in takewhile(lambda row: not obstacle(row), fitting)][-1]
        why = f"Half of the images have {shorter} pixels or more on the shorter side"
        limit = next((obstacle(row) for row in fitting if row[0] > side), "")
        why += f"; {limit}." if limit else "."
        if limit and draft.set_by_user("data.image_size") is None:
            draft.notes.append(f"images are scaled down to {side}x{side} pixels: {limit}")
    own = side
    side = draft.put("data.image_size", side, why)
    if survey.arrays and (side, channels) != (own, 3 if survey.colour else 1):
        raise UserError(
            f"{survey.place['path']}: arrays of {own}x{own} pixels and {3 if survey.colour else 1} channels are taken "
            "as they are; leave out --set data.image_size and data.channels"
        )
    wide = takewhile(lambda w: min(images(side, w), most) >= 400_000 * (w / 32) ** 2, _WIDTHS[1:])
    width = [_WIDTHS[0], *wide][-1]
    affordable = images(side, width)
    why = (
        f"Time for about {affordable:,.0f} training images." if affordable < most else f"For {most:,} training images."
    )
    width = draft.put("unet.channels", width, why)
    shape = _shape(side, width)
    for key, value in shape.model_dump(mode="json", exclude_defaults=True, exclude={"channels"}).items():
        why = "2x2 pixels are one position: three times as fast." if key == "patch" else ""
        draft.put(f"unet.{key}", value, why)
    if amounts.counts.sum() < _SMALL:
        draft.put("unet.augment_dim", 9)
    return side, channels


def _shape_of(draft: Draft) -> UNetConfig:
    """The network with the user's settings."""
    return UNetConfig(**draft.document["unet"] | draft.fixed.get("unet", {}))


def _images_per_second(draft: Draft, images: _Set) -> float:
    """That the UNet is trained on by L_DDPM alone."""
    cost = unet_cost(_shape_of(draft), images.side, images.channels, len(images.amounts.counts))
    return images.speeds.train / (3.0 * cost.flops)


def _classifiers(draft: Draft, images: _Set, seconds: float) -> float:
    """Extractor and classifiers, alike; returns the seconds that they take."""
    amounts, speeds, side = images.amounts, images.speeds, images.side
    real = int(amounts.counts.sum())
    methods = draft.put(
        "classifier.methods", _METHODS,
        "Cross-entropy; the strongest methods without synthetic images; real images as often as DiffuLT has synthetic "
        "ones; DiffuLT; and a quarter of each batch synthetic.",
    )  # fmt: skip
    trained = trained_share(methods)
    share = seconds / (trained + 1)

    def flops(network: str, size: int = side) -> float:
        passes = 1 + bool(draft.set_by_user("classifier.sam"))
        return 3.0 * passes * classifier_cost(network, size, images.channels, len(amounts.counts)).flops

    def affordable(network: str) -> float:
        return share * speeds.classify / flops(network)

    wanted = min(30_000 + 50 * real, 5_000_000)  # as the presets for small sets; longer gained nothing there
    large = min(150 * real, 15_000_000)  # CIFAR's 200 epochs, or most of them
    if side >= 64 and affordable("resnet10") >= wanted / 4:
        network, reason, wanted = "resnet10", "For images from 64 pixels up.", max(wanted, large)
    elif side >= 32 and real >= 5000 and affordable("resnet32") >= large / 2:
        network, reason, wanted = "resnet32", "CIFAR's network: there are images and time for it.", large
    else:
        network, reason = "convnet", "Sees the whole image: better than residual networks on small sets, and faster."
    augment = {"pad": max(1, side // (8 if images.flip else 12)), "flip": bool(images.flip)}
    total = 0.0
    for section in ("extractor", "classifier"):
        chosen = draft.put(f"{section}.network", network, reason)
        size = draft.put(f"{section}.image_size", side)
        batch = draft.put(f"{section}.batch_size", _batch(64 if network == "convnet" else 128, speeds))
        count = min(max(share * speeds.classify / flops(chosen, size), _LEAST_CLASSIFY), wanted)
        why = f"{count / real:.0f} epochs of the {real:,} real images" + ("." if count == wanted else ": the time.")
        steps = draft.put(f"{section}.steps", max(1, int(count / batch)), why)
        _recipe(draft, section, chosen, augment, images.flip)
        total += steps * batch * flops(chosen, size) / speeds.classify * (trained if section == "classifier" else 1)
    tested = amounts.held_out * len(methods) * flops(chosen, size) / 3.0  # of the final classifiers
    total += (tested + radius_flops(amounts.counts)) / speeds.classify
    draft.put("extractor.loss", "logit_adjust", "Knows rare classes better, and its label is asked for by the filter.")
    draft.put("classifier.omega", 0.5, "Weight of a synthetic image; from 0.3 to 1 it hardly mattered in our runs.")
    return total


def _recipe(draft: Draft, section: str, network: str, augment: Mapping[str, Any], flip: str) -> None:
    """Rate, decay and augmentation, as in the presets."""
    recipe: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 5e-4, "warmup": 0.05, "milestones": [0.6, 0.85]}
    if network == "resnet32":
        recipe |= {"learning_rate": 0.1, "weight_decay": 2e-4, "warmup": 0.025, "milestones": [0.8, 0.9], "decay": 0.01}
    for key, value in recipe.items():
        draft.put(f"{section}.{key}", value)
    for key, value in augment.items():
        draft.put(f"{section}.augment.{key}", value, (flip or _NOT_FLIPPED) if key == "flip" else "")


def _batch(size: int, speeds: Speeds) -> int:
    """A batch that the processes share evenly."""
    return -(-size // speeds.processes) * speeds.processes


def _generate(draft: Draft, images: _Set, seconds: float) -> float:
    """N_t, sampler and filter; returns the seconds that drawing takes at the most."""
    amounts, speeds = images.amounts, images.speeds
    counts = amounts.counts
    draft.put("generate.sampler", "dpm++sde", "Eight evaluations, between these levels of noise: the best samples of "
              "fashion-mnist-lt.")  # fmt: skip
    steps = draft.put("generate.steps", 8)
    for key, value in {"spacing": "sigma", "sigma_max": 40.0, "sigma_min": 0.05, "rho": 3.0}.items():
        draft.put(f"generate.{key}", value)
    draft.put("generate.batch_size", 64 if images.side < 16 else 128)
    evaluation = unet_cost(_shape_of(draft), images.side, images.channels, len(counts)).flops
    evaluation *= 1 + (draft.put("generate.guidance", 0.0) > 0)
    candidates = seconds * speeds.sample / (steps * evaluation)
    passing = pass_rate(_filter(draft, images))
    most = int(counts.max()) * (1 if counts.max() >= 2 * counts.min() else 2)
    target = _level(counts, min(counts.sum(), passing * candidates / 1.5), most)
    why = "At most as many synthetic images as real ones, and no class larger than the largest."
    if most > counts.max():
        even = "of one size" if counts.max() == counts.min() else "nearly even"
        why = f"The classes are {even}: each is filled up beyond the largest, to about twice the images."
        draft.notes.append(f"the classes are {even}: this is not the long tail that DiffuLT is made for")
    if target < _level(counts, counts.sum(), most):
        why = "As many synthetic images as can be drawn in the time."
    target = draft.put("generate.balance_to", max(target, int(counts.min()) + 1), why)
    needed = amounts.synthetic(target, draft.put("generate.dose", 1.0))
    draws = round(min(10.0, max(1.5 / passing, candidates / max(needed, 1))), 1)
    draws = draft.put(
        "generate.max_draws", draws, "Candidates for each sample needed: so that a hard class ends in time."
    )
    return needed * max(draws, 1.0) * steps * evaluation / speeds.sample


def _filter(draft: Draft, images: _Set) -> str:
    classes = len(images.amounts.counts)
    if classes > _MANY_CLASSES:
        name, why = "distance", f"With {classes:,} classes the extractor is wrong too often to be asked for the class."
    elif images.channels == 3:
        name, why = (
            "distance",
            "Asked for the class, too, an extractor refused 98 % of the rarest class of photographs.",
        )
    else:
        name, why = "distance+label", "The extractor must also see the sample's own class, as on the small grey sets."
    return str(draft.put("generate.filter", name, why))


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


def _diffusion(draft: Draft, images: _Set, seconds: float) -> None:
    """Training of the UNet for these seconds, as far as that is neither too little nor too much for the set."""
    amounts, speeds, flip = images.amounts, images.speeds, images.flip
    least, most = _least_images(images), _most_images(amounts)
    affordable = seconds * _images_per_second(draft, images)
    count = min(max(affordable, least), most)
    for key, value in {"schedule": "cosine", "prediction": "v"}.items():
        draft.put(f"diffusion.{key}", value)
    for key in ("cbdm", "aid"):
        draft.put(f"diffusion.{key}", False, "Twice the time a step, or nearly, and no gain in short trainings.")
    draft.put("diffusion.batches", "square_root", "Rare classes more often than they have images, less than all alike.")
    draft.put("diffusion.flip", bool(flip), flip or _NOT_FLIPPED)
    if amounts.counts.sum() < _SMALL:
        draft.put("diffusion.augment_probability", 0.15, "The set is small: fewer of the samples are copies.")
    batch = 64 if count < 2e6 else 128 if count < 5e6 else 256 if count < 2e7 else 512
    rate = 3e-3 if batch == 64 else 2e-3
    batch = draft.put("diffusion.batch_size", _batch(batch, speeds))
    _accumulate(draft, images, batch)
    why = f"What {duration(max(seconds, 0))} allow: {count:,.0f} images. Quality grows with them: give --hours more."
    if count == most:
        why = f"{count / amounts.counts.sum():,.0f} epochs: beyond, samples become copies."
    elif count == least:
        why = f"{count:,.0f} images, the least that is worth the time: give --hours more."
    steps = draft.put("diffusion.steps", max(1, int(count / batch)), why)
    draft.put("diffusion.learning_rate", round(rate * math.sqrt(32 / _shape_of(draft).channels), 5))
    draft.put("diffusion.warmup_steps", min(50 if rate == 3e-3 else 500, steps // 10))
    draft.put("diffusion.cosine_decay", True)
    average = min(10_000, max(steps / 9, min(500, steps), 2))
    draft.put("diffusion.ema", round(1 - 1 / average, 5), f"Over {average:,.0f} steps.")
    draft.put("diffusion.checkpoint_every", max(1, min(5000, steps // 10)))


def _accumulate(draft: Draft, images: _Set, batch: int) -> None:
    """Cuts the batch into parts that the memory holds."""
    cost = unet_cost(_shape_of(draft), images.side, images.channels, len(images.amounts.counts))
    local = max(1, batch // images.speeds.processes)
    fits = max(1.0, 0.3 * images.speeds.memory / max(cost.kept_bytes, 1))
    parts = next(n for n in range(1, local + 1) if (local % n == 0 and local / n <= fits) or n == local)
    if parts > 1:
        draft.put("diffusion.accumulate", parts, "Parts of a batch, for the memory.")
