"""The shapes of the kernel benchmarks are those that the presets' networks ask for, counted here another way."""

import math

import pytest
import torch

from bench.kernel_cases import cases
from bench.kernel_shapes import SMOKE, WORKLOADS, Spec, Workload, asked
from diffult.models.norm import GroupNorm
from diffult.models.unet import build_unet

CIFAR = Workload("cifar10-lt-100")


def norms(workload: Workload, batch: int) -> set[tuple[int, ...]]:
    """The shapes that reach a network's norms, by hooks on its modules."""
    config, seen = workload.config(), set()
    with torch.device("meta"):
        unet = build_unet(config, workload.classes)
        x = torch.empty(batch, config.data.channels, config.data.image_size, config.data.image_size)
        label = torch.zeros(batch, dtype=torch.int64)
    for module in unet.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(lambda _, inputs, __: seen.add(tuple(inputs[0].shape)))
    unet(x, label, label)
    return seen


@pytest.mark.parametrize(
    ("workload", "batch"), [(CIFAR, 256), (WORKLOADS[0], 512), (Workload("imagenet-lt-64", classes=1000), 128)], ids=str
)
def test_every_norm_of_the_network_is_there_forward_and_backward(workload, batch):
    """At the batch of a training step, which L_CBDM doubles."""
    expected = norms(workload, batch)
    assert len(expected) >= 11
    for operator in ("group_norm_silu", "group_norm_silu_backward"):
        shapes = {ask["x"].shape for ask in asked(workload) if ask.operator == operator}
        assert expected == {shape for shape in shapes if shape[0] == batch}


def test_what_was_missing_while_shapes_were_typed_is_there():
    calls = asked(CIFAR)
    (diffuse,) = (ask for ask in calls if ask.operator == "diffuse")
    assert diffuse["images"] == Spec((128, 3, 32, 32), torch.float32)  # augmented images are no bytes any more
    outs = {ask["out"] for ask in calls if ask.operator == "denoise_step"}
    assert outs == {Spec((1000, 3, 32, 32), torch.float32)}  # two of 500: guidance
    (adamw,) = (ask for ask in calls if ask.operator == "adamw_ema")
    with torch.device("meta"):
        sizes = [p.numel() for p in build_unet(CIFAR.config(), 10).parameters()]
    assert adamw["grad"].shape == (4096 * math.ceil(sum(16 * math.ceil(size / 16) for size in sizes) / 4096),)


def test_what_is_trained_comes_first_and_every_kernel_early():
    some = cases()
    first = [case.kernel for case in some[:6]]
    assert sorted(first) == sorted({case.kernel for case in some})
    assert some[first.index("group_norm_silu")].bytes_backward
    names = [str(case) for case in some]
    assert len(set(names)) == len(names)
    imagenet = {str(case) for case in cases(workloads=[Workload("imagenet-lt-64", classes=1000)])}
    cifar = {str(case) for case in cases(workloads=WORKLOADS[:3])}
    assert max(map(names.index, cifar)) < min(map(names.index, imagenet - cifar))


def test_the_smoke_workload_asks_for_every_kernel():
    operators = {ask.operator for workload in WORKLOADS for ask in asked(workload)}
    assert {ask.operator for ask in asked(SMOKE[0])} == operators
