"""What the presets ask of the kernels: which operators they call on which shapes, recorded, not typed.

A training step, a draw and the augmentation of the classifiers' batches run on the meta device, where nothing is
computed, and every call of one of our operators is written down.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.contestants import build_model, build_step, our_draw
from diffult.config import Config, load_preset
from diffult.diffusion.objective import stride
from kernels import dispatch
from kernels.augment import augment

META = torch.device("meta")
_KINDS = ["generate.steps=3"]  # a first, a middle and a last step: all kinds that a sampler has


@dataclass(frozen=True)
class Workload:
    """A preset with changed settings, on data of so many classes."""

    preset: str
    overrides: tuple[str, ...] = ()
    classes: int = 10

    def __str__(self) -> str:
        return " ".join((self.preset, *self.overrides))

    def config(self, *more: str) -> Config:
        return load_preset(self.preset, [*self.overrides, "precision=bfloat16", *more])


# In the order in which they are checked and tuned.
WORKLOADS = (
    Workload("cifar10-lt-100-fast", ("unet.patch=2",)),
    Workload("cifar10-lt-100-fast", ("unet.patch=1",)),
    Workload("cifar10-lt-100"),
    Workload("imagenet-lt-64", classes=1000),
    Workload("imagenet-lt-256", classes=1000),
    Workload("fashion-mnist-lt"),
    Workload("digits-lt"),
)
# Every kernel at sizes for a CPU: a step and a draw with all that an operator may do, and a classifier that crops.
SMOKE = (
    Workload("digits-lt", (
        "unet.channels=8", "unet.multipliers=[1]", "unet.attention_resolutions=[]", "diffusion.batch_size=2",
        "generate.guidance=1.0", "generate.sampler=ddpm", "generate.batch_size=2", "classifier.batch_size=2",
        "extractor.batch_size=2",
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Asked:
    """An operator's name and its arguments by name: tensors as Spec, others as they are, the seed left out."""

    operator: str
    arguments: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Asked] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "diffult":
            named = zip((argument.name for argument in func._schema.arguments), args, strict=True)
            seen = ((name, _spec(value)) for name, value in named if name != "seed")
            self.calls[Asked(func._opname, tuple(seen))] += 1
        return func(*args, **(kwargs or {}))


def _spec(value: Any) -> Any:
    return Spec(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


@functools.cache
def asked(workload: Workload) -> Counter[Asked]:
    """The operators' calls in a training step (forward, backward, update), in a draw of three steps and in the
    augmentation of one batch of the extractor and of the classifier, and how often each is made."""
    config = workload.config(*_KINDS)
    drawn = workload.config(*_KINDS, f"diffusion.batch_size={config.generate.batch_size}")
    mode = dispatch.mode()
    dispatch.set_mode("triton")
    try:
        with _Recorder() as recorder:
            step = build_step(config, workload.classes, META)
            for _ in range(min(2, stride(config.diffusion.aid_steps))):
                step()
            our_draw(build_model(drawn, device=META), drawn.generate)()
            _augment(config)
    finally:
        dispatch.set_mode(mode)
    return recorder.calls


def _augment(config: Config) -> None:
    channels, side = config.data.channels, config.data.image_size
    for part in (config.extractor, config.classifier):
        if part.augment.jitter:  # PyTorch's whatever the switch says
            continue
        loaded = part.image_size if part.augment.resized_crop or config.data.storage == "jpg" else side
        images = torch.empty(part.batch_size, loaded, loaded, channels, dtype=torch.uint8, device=META)
        positions = torch.arange(part.batch_size, device=META)
        options = {"pad": part.augment.pad, "flip": part.augment.flip}
        augment(images, 0, positions, size=part.image_size, dtype=torch.bfloat16, **options)
