"""What a run costs before it is run: counted work a stage; with a machine's speeds, seconds, memory and disk."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffult.config import ClassifierConfig, Config, TrainingConfig
from diffult.diffusion.objective import stride
from diffult.generation.checks import CHECK_SHARE
from diffult.generation.levels import pilot_names
from diffult.generation.timesteps import trial_names
from diffult.longtail.copies import rows_at_a_time
from diffult.longtail.methods import find_method, in_waves, trained_share
from diffult.longtail.quota import quotas_to
from diffult.models.config import UNetConfig
from diffult.models.cost import parameters
from diffult.models.resnet import build_classifier
from diffult.models.unet import UNet
from kernels.adamw_ema import bytes_per_parameter

# Seconds of evaluation's start, plots and report, and for each class of the search for copies.
_REPORT_S, _COPIES_S = 10.0, 0.01


def pass_rate(filter: str) -> float:
    """Of the candidates, what a filter keeps; measured: nearly all by distance, 0.22 to 0.97 with the label."""
    return {"none": 1.0, "distance": 0.9}.get(filter, 0.5)


class Work(NamedTuple):
    """Of a stage: its units (images packed, training steps of all methods, samples drawn, held-out images times
    classifiers), the FLOP of all of them, and seconds on one core that FLOP do not count."""

    units: float
    flops: float = 0.0
    core_seconds: float = 0.0


class Machine(Protocol):
    """What a run takes its time from: counted work and rates, or seconds that were measured."""

    @property
    def processes(self) -> int:
        """That share each batch."""

    def seconds(self, stage: str, work: Work) -> float:
        """That the stage takes."""


@dataclass(frozen=True)
class Speeds:
    """What a machine does, over all processes of the run.

    Attributes:
        train, sample, classify: FLOP/s at a UNet's training, at its sampling and at a classifier's training.
        decode: cores that pack images.
        start: seconds that go by before any work, compiling included.
        memory: bytes that the device of one process has free.
        disk: bytes free where the run is written.
        processes: that share each batch.
    """

    train: float
    sample: float
    classify: float
    decode: int = 2
    start: float = 20.0
    memory: float = 8e9
    disk: float = 1e12
    processes: int = 1

    def seconds(self, stage: str, work: Work) -> float:
        """See `Machine`; packing includes the start of the program."""
        rate = {"diffusion": self.train, "generate": self.sample}.get(stage, self.classify)
        if stage == "pack":
            return self.start + work.core_seconds / self.decode
        return work.flops / rate + work.core_seconds


@dataclass(frozen=True)
class Amounts:
    """How many images a plan is for.

    Attributes:
        counts: training images of each class, int64 [C].
        tests: test images of each class, [C]; where only their sum is known, the mean.
        held_out: for validation and test.
        packed: that packing reads.
        seconds_per_image: to read one on one core.
    """

    counts: np.ndarray
    tests: np.ndarray
    held_out: int
    packed: int
    seconds_per_image: float

    def synthetic(self, balance_to: int, dose: float = 1.0) -> int:
        return int(quotas_to(balance_to, self.counts, dose).sum())


@dataclass(frozen=True)
class Cost:
    """Of a stage: seconds expected, memory and disk in bytes; `limit`: seconds that it cannot exceed by much."""

    stage: str
    seconds: float
    memory: float
    disk: float
    limit: float


def _image(channels: int, side: int) -> Tensor:
    return torch.empty(1, channels, side, side, device="meta")


class NetworkCost(NamedTuple):
    """FLOP of an evaluation on one image, parameters, and bytes that training keeps of an image, in bfloat16."""

    flops: int
    parameters: int
    kept_bytes: int


def unet_cost(unet: UNetConfig, side: int, channels: int, classes: int) -> NetworkCost:
    cost = _unet_cost(unet, side, channels)
    return cost._replace(parameters=cost.parameters + (classes - 1) * 4 * unet.channels)


@functools.cache
def _unet_cost(unet: UNetConfig, side: int, channels: int) -> NetworkCost:
    """For one class: others add to the table of labels alone."""
    label = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model = UNet(unet, side, channels, 1)
    return _cost(model, [_image(channels, side), label, label])


@functools.cache
def classifier_cost(network: str, side: int, channels: int, classes: int) -> NetworkCost:
    with torch.device("meta"):
        model = build_classifier(network, classes, channels, side)
    return _cost(model.eval(), [_image(channels, side)])


def _cost(model: nn.Module, inputs: Sequence[Tensor]) -> NetworkCost:
    """From one pass over meta tensors: what is counted, and what autograd keeps beside the parameters."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no other tensor takes the place of one
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor.numel() * tensor.element_size()
        alive.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, FlopCounterMode(display=False) as counter:
        model(*inputs)
    return NetworkCost(counter.get_total_flops(), parameters(model), sum(kept.values()) // 2)


def evaluation_flops(config: Config, classes: int) -> int:
    """Of the UNet on one image."""
    return unet_cost(config.unet, config.data.image_size, config.data.channels, classes).flops


def classifier_flops(config: Config, part: TrainingConfig, classes: int) -> int:
    """Of the extractor or the classifier on one image."""
    return classifier_cost(part.network, part.image_size, config.data.channels, classes).flops


def step_flops(config: Config, classes: int) -> dict[str, float]:
    """Of a diffusion training step by term, as `diffult.diffusion.trainer` counts them: a backward pass is two
    forwards, what is computed again to save memory is not counted, and L_AID is a mean over the steps."""
    settings = config.diffusion
    unet = 3.0 * settings.batch_size * evaluation_flops(config, classes)
    flops = {"ddpm": unet}
    if settings.cbdm:
        flops["cbdm"] = unet / stride(settings.cbdm_share)
    if settings.aid:
        phi0 = 3.0 * settings.batch_size * classifier_flops(config, config.extractor, classes)
        flops["aid"] = phi0 / stride(settings.aid_share) / stride(settings.aid_steps)
    return flops


def pilot_samples(config: Config, classes: int) -> int:
    """Samples drawn before those of `generate`: to search timesteps and to match pixel levels."""
    generate = config.generate
    pilot = generate.search * len(trial_names(np.arange(classes))[0])
    return pilot + (len(pilot_names(classes)[0]) if generate.match_histogram else 0)


def stage_flops(config: Config, classes: int, candidates: float) -> dict[str, float]:
    """Of each stage of the whole pipeline; `candidates`: samples drawn, passed or not."""
    extractor, classifier, generate = config.extractor, config.classifier, config.generate
    recomputed = 4 / 3 if config.unet.gradient_checkpointing else 1.0
    drawn = pilot_samples(config, classes) + candidates
    flops = {
        "extractor": 3.0 * extractor.steps * extractor.batch_size * classifier_flops(config, extractor, classes),
        "diffusion": recomputed * config.diffusion.steps * sum(step_flops(config, classes).values()),
        "generate": drawn * generate.evaluations * evaluation_flops(config, classes),
        "classifier": 3.0 * classifier.steps * classifier.batch_size * classifier_flops(config, classifier, classes),
    }
    flops["diffusion"] *= 1 + CHECK_SHARE * (config.diffusion.check_every > 0)
    flops["extractor"] *= 1 + (extractor.sam > 0)  # a second pass
    flops["classifier"] *= trained_share(classifier.methods) * (1 + (classifier.sam > 0))
    return flops


def method_steps(settings: ClassifierConfig, real: int, synthetic: int) -> dict[str, float]:
    """Steps of each method, and of those that they start from, on so many images."""

    def steps(name: str) -> float:
        method = find_method(name)
        if settings.epochs is None:
            return method.share * settings.steps
        return method.share * settings.epochs * (real + synthetic * method.synthetic) / settings.batch_size

    return {name: steps(name) for wave in in_waves(settings.methods) for name in wave}


def radius_flops(counts: np.ndarray) -> float:
    """Of the extractor's radii: the distances between all pairs of a class's features, 128 numbers each."""
    return 3.0 * 128 * float((counts.astype(float) ** 2).sum())


def copies_flops(config: Config, amounts: Amounts, samples: np.ndarray | None = None) -> float:
    """Of the search for copies among samples: `diffult.longtail.copies.nearest` for them, the validation images and
    some training images of each class, whose features are computed and whose distances are products. `samples`: of each
    class, int64 [C]; None: as many as it lacks."""
    generate, counts, data = config.generate, amounts.counts.astype(float), config.data
    pixels, orientations = data.channels * data.image_size**2, 1 + config.diffusion.flip
    rows = rows_at_a_time(data.image_size, data.channels)
    features, total = classifier_flops(config, config.extractor, len(counts)), 0.0
    validation = np.full(len(counts), max(0.0, amounts.held_out - amounts.tests.sum()) / len(counts))
    if samples is None:
        samples = quotas_to(generate.balance_to, amounts.counts, generate.dose)
    for images in samples, validation, counts.clip(max=256):
        embedded = orientations * images + np.ceil(images / rows) * counts
        total += float(features * embedded.sum() + 2.0 * pixels * orientations * (images * counts).sum())
    return total


def stage_work(config: Config, amounts: Amounts, passing: float) -> dict[str, Work]:
    """Of each stage; `passing`: the share of candidates that the filter keeps."""
    classes, generate = len(amounts.counts), config.generate
    synthetic = amounts.synthetic(generate.balance_to, generate.dose)
    batches = math.ceil(synthetic / passing / generate.batch_size)  # a small one takes as long as a full one
    flops = stage_flops(config, classes, batches * generate.batch_size)
    steps = sum(method_steps(config.classifier, int(amounts.counts.sum()), synthetic).values())
    planned = config.classifier.steps * trained_share(config.classifier.methods)
    shown = amounts.held_out * len(config.classifier.methods)
    evaluated = shown * classifier_flops(config, config.classifier, classes) + copies_flops(config, amounts)
    return {
        "pack": Work(amounts.packed, 0.0, amounts.packed * amounts.seconds_per_image),
        "extractor": Work(config.extractor.steps, flops["extractor"] + radius_flops(amounts.counts)),
        "diffusion": Work(config.diffusion.steps, flops["diffusion"]),
        "generate": Work(batches * generate.batch_size + pilot_samples(config, classes), flops["generate"]),
        "classifier": Work(steps, flops["classifier"] * steps / planned),
        "evaluate": Work(shown, evaluated, _REPORT_S + _COPIES_S * classes),
    }


def costs(config: Config, amounts: Amounts, machine: Machine, passing: float | None = None) -> list[Cost]:
    """Of each stage. The first includes the start of the program, the last what the report takes.

    Args:
        passing: the share of candidates that the filter keeps; None: what such filters kept elsewhere.
    """
    classes, generate, data = len(amounts.counts), config.generate, config.data
    synthetic = amounts.synthetic(generate.balance_to, generate.dose)
    passing = passing or pass_rate(generate.filter)
    work = stage_work(config, amounts, passing)
    seconds = {stage: machine.seconds(stage, part) for stage, part in work.items()}
    pixels = data.image_size**2 * data.channels
    unet = unet_cost(config.unet, data.image_size, data.channels, classes)
    head = classifier_cost(config.classifier.network, config.classifier.image_size, data.channels, classes)
    phi0 = classifier_cost(config.extractor.network, config.extractor.image_size, data.channels, classes)
    program, held = 0.75e9, 2.5  # Python, PyTorch and what they load; times what autograd keeps, as measured on a CPU

    def kept(batch_size: int, cost: NetworkCost) -> float:
        """Of a process's share of a batch."""
        return held * batch_size / machine.processes * cost.kept_bytes

    memory = {
        "extractor": program + 12.0 * phi0.parameters + kept(config.extractor.batch_size, phi0),
        "diffusion": program + bytes_per_parameter(torch.bfloat16, machine.processes) * unet.parameters
        + kept(config.diffusion.batch_size, unet) / config.diffusion.accumulate,
        "generate": program + 4.0 * unet.parameters,
        "classifier": program + 12.0 * head.parameters + kept(config.classifier.batch_size, head),
    }  # fmt: skip
    # Weights, and the last two checkpoints: of SGD two numbers a parameter, of AdamW and the average four.
    disk = {"pack": float((amounts.counts.sum() + amounts.held_out) * pixels), "extractor": 20.0 * phi0.parameters}
    disk |= {"diffusion": 36.0 * unet.parameters, "generate": synthetic * pixels + min(synthetic * pixels, 4e9)}
    disk["classifier"] = 20.0 * head.parameters * len(config.classifier.methods)
    limit = seconds | {"generate": seconds["generate"] * max(1.0, generate.max_draws * passing)}
    return [Cost(s, seconds[s], memory.get(s, program), disk.get(s, 0.0), limit[s]) for s in work]
