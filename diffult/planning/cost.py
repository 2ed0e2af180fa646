"""What a run costs before it is run: counted work a stage; with a machine's speeds, seconds, memory and disk."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

# Seconds of evaluation's start, plots and report, and for each class of the search for copies.
_REPORT_S, _COPIES_S = 10.0, 0.01


def pass_rate(filter: str) -> float:
    """Of the candidates, what a filter keeps; measured: nearly all by distance, 0.22 to 0.97 with the label."""
    return {"none": 1.0, "distance": 0.9}.get(filter, 0.5)


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


def stage_flops(config: Config, classes: int, candidates: float) -> dict[str, float]:
    """Of each stage of the whole pipeline; `candidates`: samples drawn, passed or not."""
    extractor, classifier, generate = config.extractor, config.classifier, config.generate
    pilot = generate.search * len(trial_names(np.arange(classes))[0])
    if generate.match_histogram:
        pilot += len(pilot_names(classes)[0])
    recomputed = 4 / 3 if config.unet.gradient_checkpointing else 1.0
    flops = {
        "extractor": 3.0 * extractor.steps * extractor.batch_size * classifier_flops(config, extractor, classes),
        "diffusion": recomputed * config.diffusion.steps * sum(step_flops(config, classes).values()),
        "generate": (pilot + candidates) * generate.evaluations * evaluation_flops(config, classes),
        "classifier": 3.0 * classifier.steps * classifier.batch_size * classifier_flops(config, classifier, classes),
    }
    flops["diffusion"] *= 1 + CHECK_SHARE * (config.diffusion.check_every > 0)
    flops["extractor"] *= 1 + (extractor.sam > 0)  # a second pass
    flops["classifier"] *= trained_share(classifier.methods) * (1 + (classifier.sam > 0))
    return flops


def _epochs_share(settings: ClassifierConfig, real: int, synthetic: int) -> float:
    """Times the work of `steps` that methods take whose length is given in epochs of their own images; 1 if none is."""
    if settings.epochs is None:
        return 1.0
    methods = [find_method(name) for wave in in_waves(settings.methods) for name in wave]
    images = sum(method.share * (real + synthetic * method.synthetic) for method in methods)
    return settings.epochs * images / (settings.steps * settings.batch_size * trained_share(settings.methods))


def radius_flops(counts: np.ndarray) -> float:
    """Of the extractor's radii: the distances between all pairs of a class's features, 128 numbers each."""
    return 3.0 * 128 * float((counts.astype(float) ** 2).sum())


def copies_flops(config: Config, amounts: Amounts) -> float:
    """Of the search for copies among samples: `diffult.longtail.copies.nearest` for them, the validation images and
    some training images of each class, whose features are computed and whose distances are products."""
    generate, counts, data = config.generate, amounts.counts.astype(float), config.data
    pixels, orientations = data.channels * data.image_size**2, 1 + config.diffusion.flip
    rows = rows_at_a_time(data.image_size, data.channels)
    features, total = classifier_flops(config, config.extractor, len(counts)), 0.0
    validation = np.full(len(counts), max(0.0, amounts.held_out - amounts.tests.sum()) / len(counts))
    for samples in quotas_to(generate.balance_to, amounts.counts, generate.dose), validation, counts.clip(max=256):
        embedded = orientations * samples + np.ceil(samples / rows) * counts
        total += float(features * embedded.sum() + 2.0 * pixels * orientations * (samples * counts).sum())
    return total


def costs(config: Config, amounts: Amounts, speeds: Speeds) -> list[Cost]:
    """Of each stage. The first includes the start of the program, the last what the report takes."""
    classes, generate, data = len(amounts.counts), config.generate, config.data
    synthetic = amounts.synthetic(generate.balance_to, generate.dose)
    passing = pass_rate(generate.filter)
    batches = math.ceil(synthetic / passing / generate.batch_size)  # a small one takes as long as a full one
    flops = stage_flops(config, classes, batches * generate.batch_size)
    real = int(amounts.counts.sum())
    flops["classifier"] *= _epochs_share(config.classifier, real, synthetic)
    pixels = data.image_size**2 * data.channels
    unet = unet_cost(config.unet, data.image_size, data.channels, classes)
    micro = config.diffusion.batch_size / speeds.processes / config.diffusion.accumulate
    head = classifier_cost(config.classifier.network, config.classifier.image_size, data.channels, classes)
    phi0 = classifier_cost(config.extractor.network, config.extractor.image_size, data.channels, classes)
    shown = float(amounts.held_out) * len(config.classifier.methods) * head.flops
    rates = {"extractor": speeds.classify, "diffusion": speeds.train, "generate": speeds.sample}
    seconds = {stage: flops[stage] / rates.get(stage, speeds.classify) for stage in flops}
    seconds["pack"] = speeds.start + amounts.packed * amounts.seconds_per_image / speeds.decode
    seconds["extractor"] += radius_flops(amounts.counts) / speeds.classify
    seconds["evaluate"] = _REPORT_S + _COPIES_S * classes
    seconds["evaluate"] += (shown + copies_flops(config, amounts)) / speeds.classify
    program, held = 0.75e9, 2.5  # Python, PyTorch and what they load; times what autograd keeps, as measured on a CPU
    memory = {
        "extractor": program + 12.0 * phi0.parameters + held * config.extractor.batch_size * phi0.kept_bytes,
        "diffusion": program + 20.0 * unet.parameters + held * micro * unet.kept_bytes,
        "generate": program + 4.0 * unet.parameters,
        "classifier": program + 12.0 * head.parameters + held * config.classifier.batch_size * head.kept_bytes,
    }
    disk = {"pack": float((real + amounts.held_out) * pixels), "extractor": 12.0 * phi0.parameters}
    disk |= {"diffusion": 24.0 * unet.parameters, "generate": 2.0 * synthetic * pixels}
    disk["classifier"] = 12.0 * head.parameters * len(config.classifier.methods)
    limit = seconds | {"generate": seconds["generate"] * max(1.0, generate.max_draws * passing)}
    stages = ("pack", "extractor", "diffusion", "generate", "classifier", "evaluate")
    return [Cost(s, seconds[s], memory.get(s, program), disk.get(s, 0.0), limit[s]) for s in stages]
