"""The ways to train the final classifier that a run compares: one row of `METHODS` each.

A method differs from the others in the images it uses, the order it draws them in, its loss, and what it does after;
network, steps, rate and augmentation are those of the settings, except where a method is about them (docs/methods.md).
A method's name may be followed by modifiers, one row of `MODIFIERS` each: `diffult+logit_adjust` trains as `diffult`
does, on adjusted logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from diffult.errors import one_of
from diffult.longtail.adapt import adjust_bias, tau_normalise
from diffult.longtail.draws import (
    ClassCounts,
    Draw,
    TrainingSet,
    duplicated,
    mixed,
    mixed_balanced,
    natural,
    real_balanced,
    real_only,
    resampled,
    square_root,
)
from diffult.longtail.expert_losses import PerHead, SoftLabels, ride
from diffult.longtail.losses import (
    LDAM,
    CrossEntropy,
    Focal,
    LabelAwareSmoothing,
    Loss,
    class_balanced_weights,
    label_aware_smoothing,
    ldam_margins,
    log_prior,
)
from diffult.models.resnet import Classifier

MakeLoss = Callable[[TrainingSet, ClassCounts], Loss]
Validate = Callable[[Classifier], float]  # accuracy on the validation images
Adapt = Callable[[Classifier, torch.Tensor, Validate | None], None]  # takes `log_prior` of the real images
SPECIFIC = ("omega", "synthetic_share", "balance_to", "dose")  # settings that only some methods read
_SHARED = ("omega", "synthetic_share")
_LAST = 0.2  # share of the steps after which a deferred change sets in
_HEAD_STEPS = 0.15  # of the steps: training of a head alone, after all of them


@dataclass(frozen=True)
class Mix:
    """Images mixed with others, in place of what the settings say.

    Attributes:
        kind: mixup or cutmix.
        alpha: of Beta(alpha, alpha), from which the shares come.
        probability: that an image is mixed.
        partners: in which order the others are drawn, of cutmix alone; None: each image's partner is the one before it
            in the batch.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: float
    probability: float = 1.0
    partners: Draw | None = None


def _cross_entropy(train: TrainingSet, **options: torch.Tensor) -> CrossEntropy:
    return CrossEntropy(train.settings.omega, smoothing=train.settings.label_smoothing, **options)


def cross_entropy(train: TrainingSet, counts: ClassCounts) -> Loss:
    return _cross_entropy(train)


def logit_adjusted(train: TrainingSet, counts: ClassCounts) -> Loss:
    """Cross-entropy whose logits have the log of the class frequency in training added (Menon et al. 2021)."""
    return _cross_entropy(train, prior=log_prior(counts.effective))


def logit_adjusted_real(train: TrainingSet, counts: ClassCounts) -> Loss:
    """Logits of real images adjusted by the frequencies of real ones, those of synthetic images as they are."""
    return PerHead(_cross_entropy(train, prior=log_prior(counts.real_weight)), _cross_entropy(train))


def focal(train: TrainingSet, counts: ClassCounts) -> Loss:
    return Focal(train.settings.omega)


def class_balanced(train: TrainingSet, counts: ClassCounts) -> Loss:
    """Classes weighted by the inverse of their effective number of samples (Cui et al. 2019)."""
    return _cross_entropy(train, class_weights=class_balanced_weights(counts.effective))


def ldam(train: TrainingSet, counts: ClassCounts) -> Loss:
    return LDAM(train.settings.omega, margins=ldam_margins(counts.real))


def ldam_reweighted(train: TrainingSet, counts: ClassCounts) -> Loss:
    weights = class_balanced_weights(counts.effective)
    return LDAM(train.settings.omega, margins=ldam_margins(counts.real), class_weights=weights)


def smoothed_by_class(train: TrainingSet, counts: ClassCounts) -> Loss:
    return LabelAwareSmoothing(train.settings.omega, smoothing=label_aware_smoothing(counts.real))


def experts(train: TrainingSet, counts: ClassCounts) -> Loss:
    return ride(counts.effective, train.settings.omega, reweighted=False)


def experts_reweighted(train: TrainingSet, counts: ClassCounts) -> Loss:
    return ride(counts.effective, train.settings.omega, reweighted=True)


def soft_labels(train: TrainingSet, counts: ClassCounts) -> Loss:
    """Synthetic images with the mean of their label and what the extractor takes them for."""
    assert train.soft_labels is not None
    return SoftLabels(train.settings.omega, table=train.soft_labels())


def soft_labels_adjusted(train: TrainingSet, counts: ClassCounts) -> Loss:
    """The same, on adjusted logits."""
    assert train.soft_labels is not None
    return SoftLabels(train.settings.omega, table=train.soft_labels(), prior=log_prior(counts.effective))


def without_prior(model: Classifier, prior: torch.Tensor, validate: Validate | None) -> None:
    """Post-hoc logit adjustment (Menon et al. 2021, eq. 9)."""
    adjust_bias(model, prior)


def tau_normalised(model: Classifier, prior: torch.Tensor, validate: Validate | None) -> None:
    """tau-normalisation (Kang et al. 2020, eq. 5) with the tau of 0, 0.1, ..., 1 that is best on the validation images;
    1 where there are none."""
    if validate is None:
        return tau_normalise(model, 1.0)
    trained, scores = copy.deepcopy(model.head.state_dict()), {}
    for tau in np.linspace(0, 1, 11).tolist():
        model.head.load_state_dict(trained)
        tau_normalise(model, tau)
        scores[tau] = validate(model)
    model.head.load_state_dict(trained)
    tau_normalise(model, max(scores, key=lambda tau: scores[tau]))


@dataclass(frozen=True)
class Phase:
    """A stretch of a method's training.

    Attributes:
        draw: makes the order in which it draws images.
        loss: makes its loss.
        share: of the configured steps.
    """

    draw: Draw
    loss: MakeLoss = cross_entropy
    share: float = 1.0


@dataclass(frozen=True)
class Method:
    """One way to train the classifier.

    Attributes:
        title: its name in tables.
        phases: one after the other, under one schedule of the learning rate; none: nothing is trained.
        synthetic: whether it trains on synthetic images too.
        start: the method whose weights it starts from; None: fresh ones.
        trains: all of the network; or its head alone, on a trunk that stays as it is, or such a head drawn anew.
        heads: a name in HEADS; of two, the second learns from the synthetic images.
        mix: of the images, in place of the settings'.
        adapt: changes the trained classifier.
        reads: which of SPECIFIC it reads: its classifier is trained again when one of these changes.
    """

    title: str
    phases: tuple[Phase, ...] = (Phase(natural),)
    synthetic: bool = False
    start: str | None = None
    trains: Literal["all", "head", "new head"] = "all"
    heads: str = "linear"
    mix: Mix | None = None
    adapt: Adapt | None = None
    reads: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the configured steps, without those of the method that it starts from."""
        return sum(phase.share for phase in self.phases)

    def make_loss(self, phase: Phase, train: TrainingSet, counts: ClassCounts) -> Loss:
        """The loss of one of its phases; of two heads, the phase's for the real images."""
        if self.heads != "two":
            return phase.loss(train, counts)
        of_real = phase.loss(train, counts._replace(effective=counts.real_weight))
        return PerHead(of_real, _cross_entropy(train))


METHODS = {
    "ce": Method("Cross-entropy"),
    "focal": Method("Focal loss", (Phase(natural, focal),)),
    "class_balanced": Method("Class-balanced weights", (Phase(natural, class_balanced),)),
    "resample": Method("Re-sampling", (Phase(resampled),)),
    "resample_sqrt": Method("Re-sampling, square root", (Phase(square_root),)),
    "logit_adjust": Method("Logit adjustment", (Phase(natural, logit_adjusted),)),
    "logit_adjust_after": Method("Logit adjustment afterwards", (), start="ce", adapt=without_prior),
    "tau_norm": Method("τ-normalisation", (), start="ce", adapt=tau_normalised),
    "crt": Method("cRT", (Phase(resampled, share=_HEAD_STEPS),), start="ce", trains="new head"),
    "ldam_drw": Method(
        "LDAM-DRW", (Phase(natural, ldam, 1 - _LAST), Phase(natural, ldam_reweighted, _LAST)), heads="cosine"
    ),
    "mixup": Method("mixup", mix=Mix("mixup", 1.0)),
    "mislas": Method(
        "MiSLAS", (Phase(resampled, smoothed_by_class, _HEAD_STEPS),), start="mixup", trains="head"
    ),
    "cmo": Method("CMO", mix=Mix("cutmix", 1.0, 0.5, partners=resampled)),
    "ride": Method(
        "RIDE, three experts", (Phase(natural, experts, 1 - _LAST), Phase(natural, experts_reweighted, _LAST)),
        heads="experts",
    ),
    "duplicates": Method("Duplicates of real images", (Phase(duplicated),), reads=("balance_to", "dose")),
    # With synthetic images:
    "diffult": Method("DiffuLT", synthetic=True, reads=("omega",)),
    "mix": Method("Synthetic share", (Phase(mixed),), synthetic=True, reads=_SHARED),
    "mix_balanced": Method(
        "Synthetic share, real balanced", (Phase(mixed_balanced),), synthetic=True, reads=_SHARED
    ),
    "mix_ride": Method(
        "Synthetic share + RIDE", (Phase(mixed, experts, 1 - _LAST), Phase(mixed, experts_reweighted, _LAST)),
        synthetic=True, heads="experts", reads=_SHARED,
    ),
    "two_heads": Method("Synthetic share, own head", (Phase(mixed),), synthetic=True, heads="two", reads=_SHARED),
    "synthetic_first": Method(
        "Synthetic first, real last", (Phase(natural, share=1 - _LAST), Phase(real_only, share=_LAST)), synthetic=True,
        reads=("omega",),
    ),
}  # fmt: skip


Modifier = Callable[[str, Method], Method]


def _draws(title: str, draw: Draw) -> Modifier:
    def modify(name: str, method: Method) -> Method:
        if not method.phases or any(phase.draw is not natural for phase in method.phases):
            raise ValueError(f"{name} has an order of its own: {title} cannot take its place")
        phases = tuple(replace(phase, draw=draw) for phase in method.phases)
        return replace(method, title=f"{method.title} + {title}", phases=phases)

    return modify


def _loss(title: str, losses: dict[MakeLoss, MakeLoss]) -> Modifier:
    """`losses`: those that it can take the place of, with what it puts there."""

    def modify(name: str, method: Method) -> Method:
        if not method.phases or any(phase.loss not in losses for phase in method.phases):
            raise ValueError(f"{name} has a loss of its own: {title} cannot take its place")
        phases = tuple(replace(phase, loss=losses[phase.loss]) for phase in method.phases)
        return replace(method, title=f"{method.title} + {title}", phases=phases)

    return modify


def _softened(name: str, method: Method) -> Method:
    if not method.synthetic or method.heads == "two":
        raise ValueError(f"{name} does not train one head on synthetic images: soft labels are for these")
    return _loss("soft labels", {cross_entropy: soft_labels, logit_adjusted: soft_labels_adjusted})(name, method)


def _head_retrained(name: str, method: Method) -> Method:
    """On class-balanced real images (Kang et al. 2020)."""
    if method.heads == "experts":
        raise ValueError(f"{name} has a head for each expert: cRT retrains one alone")
    phase = Phase(real_balanced if method.synthetic else resampled, share=_HEAD_STEPS)
    return replace(
        method, title=f"{method.title} + cRT", phases=(phase,), start=name, trains="new head", heads="linear", mix=None
    )


def _head_trained_on(name: str, method: Method) -> Method:
    """MiSLAS's second stage (Zhong et al. 2021), after any training of one linear head."""
    if method.heads != "linear" or method.trains != "all" or not method.phases:
        raise ValueError(f"{name} does not train a network with one linear head: MiSLAS trains such a head on")
    phase = Phase(real_balanced if method.synthetic else resampled, smoothed_by_class, _HEAD_STEPS)
    title = f"{method.title} + MiSLAS's head"
    return replace(method, title=title, phases=(phase,), start=name, trains="head", mix=None)


def _mixes(title: str, mix: Mix) -> Modifier:
    def modify(name: str, method: Method) -> Method:
        if method.mix or not method.phases or method.trains != "all":
            raise ValueError(f"{name} mixes images already or trains a head alone: {title} has no place in it")
        return replace(method, title=f"{method.title} + {title}", mix=mix)

    return modify


MODIFIERS: dict[str, Modifier] = {
    "resample": _draws("re-sampling", resampled),
    "resample_sqrt": _draws("square-root re-sampling", square_root),
    "logit_adjust": _loss("logit adjustment", {cross_entropy: logit_adjusted}),
    "logit_adjust_real": _loss("logit adjustment of real images", {cross_entropy: logit_adjusted_real}),
    "focal": _loss("focal loss", {cross_entropy: focal}),
    "class_balanced": _loss("class-balanced weights", {cross_entropy: class_balanced}),
    "mixup": _mixes("mixup", Mix("mixup", 1.0)),
    "cutmix": _mixes("CutMix", Mix("cutmix", 1.0, 0.5)),
    "soft": _softened,
    "crt": _head_retrained,
    "mislas": _head_trained_on,
}


def find_method(name: str) -> Method:
    """The method of a name such as `diffult+logit_adjust`: a row of METHODS, then rows of MODIFIERS.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    base, *modifiers = name.split("+")
    method, done = METHODS[one_of(METHODS, base)], base
    for modifier in modifiers:
        method = MODIFIERS[one_of(MODIFIERS, modifier)](done, method)
        done += f"+{modifier}"
    return method


def method_name(name: str) -> str:
    """The name, if `find_method` knows it; ValueError otherwise."""
    find_method(name)
    return name


def in_waves(names: Iterable[str]) -> list[list[str]]:
    """The methods and those that they start from, in lists to be trained one after the other: what a method starts from
    is in a list before its own."""
    waves: list[list[str]] = []
    for name in names:
        chain = [name]
        while start := find_method(chain[0]).start:
            chain.insert(0, start)
        for depth, member in enumerate(chain):
            waves += [[]] * (depth == len(waves))
            waves[depth] = list(dict.fromkeys([*waves[depth], member]))
    return waves


def trained_share(names: Iterable[str]) -> float:
    """How many times the configured steps the training of these methods takes, with those that they start from."""
    return sum(find_method(name).share for wave in in_waves(names) for name in wave)
