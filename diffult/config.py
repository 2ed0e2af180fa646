"""The settings of a run: typed sections, presets, overrides, and one-line errors.

A run is described by one TOML document. A preset is such a document in diffult/presets; `extends = "other"` starts from
another preset. `--set section.key=value` overrides single values. Unknown keys and bad values are refused with the
nearest name, before any work starts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from diffult.comments import with_comments
from diffult.data.config import DataConfig
from diffult.diffusion.schedule import Prediction, ScheduleName
from diffult.errors import UserError, nearest, shown
from diffult.generation.config import GenerateConfig
from diffult.longtail.methods import find_method, method_name
from diffult.models.config import UNetConfig
from diffult.strict_model import StrictModel

_DEPTH = 3  # of sections: extractor.augment.pad


class AugmentConfig(StrictModel):
    """What a classifier's training images go through. Everything off is the identity."""

    pad: int = Field(0, ge=0)  # random crop after zero padding by so many pixels
    flip: bool = False  # mirror left-right with probability 1/2
    resized_crop: bool = False  # random area (8 to 100 %) and aspect (3/4 to 4/3), scaled to the input size
    jitter: float = Field(0.0, ge=0, lt=1)  # brightness, contrast and saturation by a factor in 1 -+ jitter
    # torchvision's RandAugment, or AutoAugment with the policy for CIFAR-10 up to 64 pixels and for ImageNet above. On
    # stored bytes, before crop and flip, where most code has it after them. Costs host time: one core does 6000 images
    # a second of 32x32 and 500 of 224x224.
    policy: Literal["none", "randaugment", "autoaugment"] = "none"
    cutout: int = Field(0, ge=0)  # side of a black square at a random place, partly outside at times; 0: off


class TrainingConfig(StrictModel):
    """How a classifier is trained: SGD with momentum, warm-up, step or cosine decay."""

    network: str
    image_size: int = Field(ge=1)  # what the network sees; stored images are cropped or scaled to it
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.0, ge=0, le=1)  # share of the steps
    milestones: tuple[float, ...] = ()  # shares of the steps at which the rate is multiplied by `decay`
    decay: float = Field(0.1, gt=0, le=1)
    cosine_decay: bool = False  # the rate falls to 0 along half a cosine, whatever the milestones
    augment: AugmentConfig = AugmentConfig()
    mixup: float = Field(0.0, ge=0)  # alpha: images and labels mixed in shares of Beta(alpha, alpha); 0: off
    cutmix: float = Field(0.0, ge=0)  # alpha: a rectangle of another image pasted in, its area as above; 0: off
    # This much of each label is spread over all classes, in methods whose loss is cross-entropy, adjusted or weighted.
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    sam: float = Field(0.0, ge=0)  # rho of sharpness-aware steps, which take two passes each; 0: off
    ema: float = Field(0.0, ge=0, lt=1)  # decay of an average of the weights, which predicts in their place; 0: off

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> Self:
        if self.mixup and self.cutmix:
            raise ValueError(f"mixup = {self.mixup} and cutmix = {self.cutmix}: set one of them to 0")
        return self


class DiffusionConfig(StrictModel):
    """The diffusion model's process, loss and optimiser."""

    timesteps: int = Field(1000, ge=2, le=10**6)
    schedule: ScheduleName = "linear"
    prediction: Prediction = "epsilon"
    min_snr: float = Field(0.0, ge=0)  # gamma of the min-SNR weighting; 0: off
    cbdm: bool = True
    cbdm_tau: float = Field(1.0, ge=0)
    cbdm_gamma: float = Field(0.25, ge=0)
    cbdm_share: float = Field(1.0, gt=0, le=1)  # of the batch that L_CBDM is estimated from: every 1/share-th sample
    aid: bool = True
    aid_alpha: float = Field(0.1, ge=0)
    aid_share: float = Field(1.0, gt=0, le=1)  # of the batch, as above
    aid_steps: float = Field(1.0, gt=0, le=1)  # of the steps: L_AID is in every 1/share-th
    label_dropout: float = Field(0.1, ge=0, lt=1)
    # Classes as often as they have images, as often as the square root of that, or all alike.
    batches: Literal["natural", "square_root", "class_balanced"] = "natural"
    flip: bool = False  # mirror left-right with probability 1/2, without a label
    augment_probability: float = Field(0.0, ge=0, le=1)  # adaptive augmentation with its 9-number label
    augment_flips: bool = False  # mirroring among the adaptive augmentations
    steps: int = Field(ge=1)  # with early stopping the most there are
    # Steps between checks of the averaged weights on held-out images: see diffult.generation.checks. 0: none.
    check_every: int = Field(0, ge=0)
    # Training ends when the held-out loss has not improved for `patience` checks, or more than `max_copies` of the
    # samples are copies (5 % of new real images would be); the weights are those of the best check. Best at a rate that
    # stays constant.
    early_stopping: bool = False
    patience: int = Field(5, ge=1)
    max_copies: float = Field(0.25, gt=0, le=1)
    batch_size: int = Field(ge=1)  # of a step, over all processes
    accumulate: int = Field(1, ge=1)  # parts that a process cuts its share of the batch into, to save memory
    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    cosine_decay: bool = False  # the rate falls to 0 along half a cosine; constant otherwise
    gradient_clip: float = Field(1.0, gt=0)
    ema: float = Field(0.9999, ge=0, lt=1)
    checkpoint_every: int = Field(1000, ge=1)
    # A loss that is no number, or L_DDPM ten times that of the first step: stop, or go back to the last checkpoint
    # once, at half the rate.
    on_divergence: Literal["stop", "go_back"] = "stop"

    @model_validator(mode="after")
    def _stops_by_checks(self) -> Self:
        if self.early_stopping and not self.check_every:
            raise ValueError("early_stopping needs check_every, such as a twentieth of the steps")
        return self

    @property
    def uses_extractor(self) -> bool:
        return self.aid or self.check_every > 0


MethodName = Annotated[str, AfterValidator(method_name)]


class ExtractorConfig(TrainingConfig):
    """The extractor phi0, whose features and labels the filter judges by."""

    # The paper's; or with the logits adjusted by the class counts, so that the features know the tail.
    loss: Literal["cross_entropy", "logit_adjust"] = "cross_entropy"


class ClassifierConfig(TrainingConfig):
    """The final classifier, and the ways to train it that are compared."""

    # Epochs of each method's own images in place of `steps`, the budget of the published tables.
    epochs: float | None = Field(None, gt=0)
    omega: float = Field(0.5, ge=0)  # weight of a synthetic sample in the loss
    synthetic_share: float = Field(0.25, gt=0, lt=1)  # of each batch, in the methods that mix by share
    methods: tuple[MethodName, ...] = Field(("ce", "diffult"), min_length=1)

    @model_validator(mode="after")
    def _both_kinds_in_a_batch(self) -> Self:
        if self.batch_size < 2 and any("synthetic_share" in find_method(name).reads for name in self.methods):
            raise ValueError("batch_size = 1: methods that mix by share need two images, one of either kind")
        return self

    @property
    def synthetic_images(self) -> int:
        """Synthetic images in a batch of the methods that mix by share, at least one of either kind."""
        return min(max(round(self.synthetic_share * self.batch_size), 1), self.batch_size - 1)


class GroupsConfig(StrictModel):
    """many: more than `many` training images; few: fewer than `few`; medium: between (Liu et al. 2019)."""

    many: int = Field(100, ge=1)
    few: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.few > self.many + 1:
            raise ValueError(f"few = {self.few} and many = {self.many} overlap: a class would be in both")
        return self


class Config(StrictModel):
    """All settings of a run."""

    version: Literal[3] = 3  # of the run directory's layout
    name: str
    seed: int = Field(0, ge=0, lt=2**31)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    data: DataConfig
    groups: GroupsConfig = GroupsConfig()
    extractor: ExtractorConfig
    unet: UNetConfig
    diffusion: DiffusionConfig
    generate: GenerateConfig
    classifier: ClassifierConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.generate.steps > self.diffusion.timesteps:
            raise ValueError(f"generate.steps = {self.generate.steps} exceeds diffusion.timesteps")
        if self.generate.timesteps and self.generate.timesteps[0] >= self.diffusion.timesteps:
            raise ValueError(
                f"generate.timesteps: {self.generate.timesteps[0]} is not below diffusion.timesteps = "
                f"{self.diffusion.timesteps}"
            )
        if self.extractor.image_size > self.data.image_size:
            raise ValueError(f"extractor.image_size = {self.extractor.image_size} exceeds data.image_size")
        stored = self.data.image_size if self.data.storage == "raw" else self.data.max_short_side
        if self.classifier.image_size > stored:
            raise ValueError(f"classifier.image_size = {self.classifier.image_size} exceeds the stored {stored}")
        if self.generate.guidance and not self.diffusion.label_dropout:
            raise ValueError("generate.guidance needs diffusion.label_dropout > 0: the model knows no 'no class' else")
        if self.diffusion.augment_probability and not self.unet.augment_dim:
            raise ValueError(
                "diffusion.augment_probability needs unet.augment_dim = 9, or the samples come out augmented"
            )
        return self

    def to_toml(self, comments: Mapping[str, str] | None = None) -> str:
        """The resolved document, as it stands in a run directory, with comments by `section.key`."""
        return with_comments(tomli_w.dumps(self.model_dump(mode="json", exclude_none=True)), comments or {})


def preset_names() -> list[str]:
    return sorted(
        entry.name[:-5] for entry in resources.files("diffult.presets").iterdir() if entry.name.endswith(".toml")
    )


def _preset_document(name: str, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    if name.endswith(".toml"):
        document = _read_toml(Path(name), "give the file of a preset, such as a copy of a run's config.toml")
    elif name in preset_names():
        document = tomllib.loads((resources.files("diffult.presets") / f"{name}.toml").read_text(encoding="utf-8"))
    else:
        known = f"{', '.join(preset_names())}; or a .toml"
        raise UserError(f"unknown preset {name!r}{nearest(name, preset_names())} (known: {known})")
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str) or parent in (*extending, name):
        raise UserError(f"preset {name}: extends = {shown(parent)}: expected another preset's name")
    return _merge(_preset_document(parent, (*extending, name)), document)


def preset_name(preset: str) -> str:
    """What runs of a preset are called, one of `preset_names` or a TOML file. Raises UserError as `load_preset`."""
    return str(_preset_document(preset).get("name", Path(preset).stem))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(text: str) -> dict[str, Any]:
    """`a.b=3` as {"a": {"b": 3}}. Of a setting that is a string the value is what is written, with or without quotes;
    else TOML where it parses as TOML, and a string otherwise."""
    key, equals, written = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"--set {shown(text)}: expected section.key=value, such as diffusion.steps=2000")
    if len(path) > _DEPTH:
        raise UserError(f"--set {shown(text)}: unknown key; settings are section.key")
    if key.endswith(" "):  # `a.b = 3`; the name of a folder may end in a space
        written = written.strip()
    value = _parsed(written)
    if _is_text(_annotation(path)) and not isinstance(value, str):
        value = written
    for part in reversed(path):
        value = {part: value}
    return value


def _parsed(text: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, a number of thousands of digits
        return text
    return document["value"] if list(document) == ["value"] else text


def _annotation(path: Iterable[int | str]) -> Any:
    """The type of the setting there; None if there is none."""
    kind: Any = Config
    for part in path:
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        kind = fields[part].annotation if part in fields else None
    return kind


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _fields_at(location: Iterable[int | str]) -> Iterable[str]:
    model = _annotation(location)
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else []


def _validate(document: Mapping[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise refusal(error.errors()[0], origin) from None


def refusal(first: Mapping[str, Any], origin: str) -> UserError:
    """The first of pydantic's errors on a document of that origin, in one line."""
    where = shown(".".join(str(part) for part in first["loc"]))[1:-1]
    if first["type"] == "extra_forbidden":
        hint = nearest(str(first["loc"][-1]), _fields_at(first["loc"][:-1]))
        return UserError(f"{origin}: unknown key '{where}'{hint}")
    given = "" if first["type"] in ("missing", "value_error") else f", got {shown(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{origin}: {where + ': ' if where else ''}{message}{given}")


def _read_toml(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {otherwise}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of thousands of digits
        raise UserError(f"{path}: not valid TOML ({error}); correct it or start a new run directory") from None


def load_preset(name: str, overrides: Iterable[str] = ()) -> Config:
    """The preset, one of `preset_names` or a TOML file, with `section.key=value` overrides laid over it.

    Raises:
        UserError: unknown preset, unknown key, or a value of the wrong type or range.
    """
    document = _preset_document(name)
    for text in overrides:
        document = _merge(document, _override(text))
    return _validate({"name": Path(name).stem} | document, f"preset {name}")


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The document that `section.key=value` overrides are, on their own.

    Raises:
        UserError: unknown key, or a value of the wrong type or range.
    """
    document: dict[str, Any] = {}
    for text in overrides:
        document = _merge(document, _override(text))
    try:
        Config.model_validate(document)
    except ValidationError as error:
        if wrong := [one for one in error.errors() if one["type"] != "missing"]:
            raise refusal(wrong[0], "--set") from None
    return document


def complete(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """The configuration that a document and, laid over it, the document of overrides make; UserError if it is bad."""
    return _validate(_merge(document, overrides), "--set")


def override(config: Config, overrides: Iterable[str]) -> Config:
    """The configuration with `section.key=value` overrides laid over it.

    Raises:
        UserError: unknown key, or a value of the wrong type or range.
    """
    document = config.model_dump(mode="json", exclude_none=True)
    for text in overrides:
        document = _merge(document, _override(text))
    return _validate(document, "--set")


def read_config(path: Path) -> Config:
    """A resolved configuration from a run directory.

    Raises:
        UserError: the file is missing, not TOML, invalid, or of an earlier version.
    """
    document = _read_toml(path, "give --preset NAME to start a run there")
    if not document:
        raise UserError(f"{path}: is empty; restore it or start a new run elsewhere")
    if document.get("version") != Config.model_fields["version"].default:
        raise UserError(f"{path}: a run of an earlier version, which cannot be continued; start a new one elsewhere")
    return _validate(document, str(path))


def differences(a: Config, b: Config) -> list[str]:
    """`section.key: value in a -> value in b` for every setting in which they differ."""

    def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, value in document.items():
            rows |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        return rows

    left, right = flat(a.model_dump(mode="json")), flat(b.model_dump(mode="json"))
    return [f"{key}: {left[key]} -> {right[key]}" for key in left if left[key] != right[key]]
