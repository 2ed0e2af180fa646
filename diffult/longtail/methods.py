"""The ways to train the final classifier that a run compares: one row of `METHODS` each.

A method differs from the others in the images it uses, the order it draws them in, its loss, and what it does after:
network, steps, rate and augmentation are the same for all. A method's name may be followed by modifiers, one row of
`MODIFIERS` each: `diffult+logit_adjust` trains as `diffult` does, on adjusted logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from diffult.errors import one_of
from diffult.longtail.draws import (
    ClassCounts,
    Draw,
    TrainingSet,
    duplicated,
    mixed,
    mixed_balanced,
    natural,
    real_only,
    resampled,
    square_root,
)
from diffult.longtail.losses import CrossEntropy, Loss, log_prior

MakeLoss = Callable[[TrainingSet, ClassCounts], Loss]
SPECIFIC = ("omega", "synthetic_share", "balance_to", "dose")  # settings that only some methods read
_LAST = 0.2  # share of the steps after which a deferred change sets in
_HEAD_STEPS = 0.15  # of the steps: training of a head alone, after all of them


@dataclass(frozen=True)
class Mix:
    """Images mixed with others, in place of what the settings say.

    Attributes:
        kind: mixup or cutmix.
        alpha: of Beta(alpha, alpha), from which the shares come.
        probability: that an image is mixed.
        partners: in which order the others are drawn; None: each image's partner is the one before it in the batch.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: float
    probability: float = 1.0
    partners: Draw | None = None


def cross_entropy(train: TrainingSet, counts: ClassCounts) -> Loss:
    return CrossEntropy(train.settings.omega)


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
        trains: all of the network, or its head alone, drawn anew, on a trunk that stays as it is.
        heads: see `build_classifier`.
        mix: of the images, in place of the settings'.
        reads: which of SPECIFIC it reads: its classifier is trained again when one of these changes.
    """

    title: str
    phases: tuple[Phase, ...] = (Phase(natural),)
    synthetic: bool = False
    start: str | None = None
    trains: Literal["all", "head"] = "all"
    mix: Mix | None = None
    reads: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the configured steps, without those of the method that it starts from."""
        return sum(phase.share for phase in self.phases)


def logit_adjusted(train: TrainingSet, counts: ClassCounts) -> Loss:
    """Cross-entropy whose logits have the log of the class frequency in training added (Menon et al. 2021)."""
    return CrossEntropy(train.settings.omega, log_prior(counts.effective))


METHODS = {
    "ce": Method("Cross-entropy"),
    "resample": Method("Re-sampling", (Phase(resampled),)),
    "resample_sqrt": Method("Re-sampling, square root", (Phase(square_root),)),
    "logit_adjust": Method("Logit adjustment", (Phase(natural, logit_adjusted),)),
    "crt": Method("cRT", (Phase(resampled, share=_HEAD_STEPS),), start="ce", trains="head"),
    "duplicates": Method("Duplicates of real images", (Phase(duplicated),), reads=("balance_to", "dose")),
    # With synthetic images:
    "diffult": Method("DiffuLT", synthetic=True, reads=("omega",)),
    "mix": Method("Synthetic share", (Phase(mixed),), synthetic=True, reads=("omega", "synthetic_share")),
    "mix_balanced": Method(
        "Synthetic share, real balanced", (Phase(mixed_balanced),), synthetic=True, reads=("omega", "synthetic_share")
    ),
    "synthetic_first": Method(
        "Synthetic first, real last", (Phase(natural, share=1 - _LAST), Phase(real_only, share=_LAST)), synthetic=True,
        reads=("omega",),
    ),
}  # fmt: skip


def _draws(title: str, draw: Draw) -> Callable[[str, Method], Method]:
    def modify(name: str, method: Method) -> Method:
        phases = tuple(replace(phase, draw=draw) for phase in method.phases)
        return replace(method, title=f"{method.title} + {title}", phases=phases)

    return modify


def _loss(title: str, loss: MakeLoss) -> Callable[[str, Method], Method]:
    def modify(name: str, method: Method) -> Method:
        phases = tuple(replace(phase, loss=loss) for phase in method.phases)
        return replace(method, title=f"{method.title} + {title}", phases=phases)

    return modify


def _head_retrained(name: str, method: Method) -> Method:
    """On class-balanced real images (Kang et al. 2020)."""
    phase = Phase(real_only if method.synthetic else resampled, share=_HEAD_STEPS)
    return replace(method, title=f"{method.title} + cRT", phases=(phase,), start=name, trains="head")


MODIFIERS: dict[str, Callable[[str, Method], Method]] = {
    "resample": _draws("re-sampling", resampled),
    "resample_sqrt": _draws("square-root re-sampling", square_root),
    "logit_adjust": _loss("logit adjustment", logit_adjusted),
    "crt": _head_retrained,
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
