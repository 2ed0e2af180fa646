"""UNet, norms and cost against published counts, closed forms and float64 references."""

from __future__ import annotations

import math
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffult.errors import UserError
from diffult.models.config import UNetConfig
from diffult.models.cost import forward_flops, parameters, summary
from diffult.models.norm import GroupNorm
from diffult.models.resnet import build_classifier
from diffult.models.unet import Resample, ResBlock, SelfAttention, UNet, sinusoid

CIFAR = UNetConfig(channels=128, multipliers=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1)
ADM: dict[str, Any] = {
    "attention_resolutions": (32, 16, 8),
    "head_width": 64,
    "scale_shift": True,
    "resample_in_block": True,
}
ADM64 = UNetConfig(channels=192, multipliers=(1, 2, 3, 4), num_res_blocks=3, **ADM)
ADM256 = UNetConfig(channels=256, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2, **ADM)


def _tiny(**changes: Any) -> UNetConfig:
    settings = {"channels": 16, "multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
    return UNetConfig(**{**settings, **changes})


def _randomised(model: nn.Module) -> nn.Module:
    """Undo the zero initialisation, so that every part acts."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _batch(size: int, channels: int, batch: int = 3, num_classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    return x, t, torch.randint(num_classes + 1, (batch,), generator=generator)


# ---- published networks


@pytest.mark.parametrize(
    ("config", "size", "classes", "millions", "giga", "tolerance"),
    [
        # Ho et al., 2020: 35.7 M without labels
        (CIFAR, 32, 10, 35.752, 12.444, 0.001),
        (CIFAR.model_copy(update={"augment_dim": 9}), 32, 100, 35.803, 12.444, 0.001),
        # Karras et al., 2022, table: ADM at 64 pixels has 295.9 M
        (ADM64, 64, 1000, 295.9, 219.3, 0.001),
        # Dhariwal and Nichol, 2021: 554 M
        (ADM256, 256, 1000, 553.8, 2239, 0.001),
    ],
    ids=["cifar10", "cifar100-augment", "adm64", "adm256"],
)
def test_published_counts(
    config: UNetConfig, size: int, classes: int, millions: float, giga: float, tolerance: float
) -> None:
    with torch.device("meta"):
        model = UNet(config, size, 3, classes)
        x, t = torch.empty(2, 3, size, size), torch.empty(2, dtype=torch.int64)
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=tolerance)
    assert forward_flops(model, (x, t, t)) / 1e9 == pytest.approx(giga, rel=tolerance)


def test_flops_against_closed_forms() -> None:
    conv = nn.Conv2d(3, 16, 3, padding=1)
    assert forward_flops(conv, (torch.empty(5, 3, 10, 10),)) == 2 * 3 * 16 * 9 * 100
    width, tokens = 32, 36
    block = SelfAttention(width, 8)
    want = 2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width
    assert forward_flops(block, (torch.empty(2, width, 6, 6),)) == want


def test_counting_leaves_the_model_alone() -> None:
    model = build_classifier("convnet", 10, 1, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = summary("convnet", model, (torch.empty(2, 1, 8, 8),))
    assert line == "convnet: 0.16 M parameters, 0.00135 GFLOP per image"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---- norm and embedding


def _norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    x = x.double()
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
    y = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    if scale is not None and shift is not None:
        y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    return y / (1 + torch.exp(-y)) if silu else y


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (192, 32), (32, 8), (96, 16), (144, 16), (4, 1)])
def test_groups_divide_and_hold_four_channels(channels: int, groups: int) -> None:
    assert GroupNorm(channels).groups == groups


def test_sinusoid_against_closed_form() -> None:
    t = torch.tensor([0, 1, 500, 999])
    features = sinusoid(t, 8)
    for row, step in enumerate(t.tolist()):
        for i in range(4):
            angle = step / 10_000 ** (2 * i / 8)
            assert features[row, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert features[row, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)
    torch.testing.assert_close(sinusoid(t.float(), 8), features)


def test_self_attention_against_float64() -> None:
    block = _randomised(SelfAttention(32, 8))
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(2))
    h = _norm_reference(x, 8, block.norm.weight, block.norm.bias, None, None, False).flatten(2).transpose(1, 2)
    q, k, v = (h @ block.qkv.weight.double().T + block.qkv.bias.double()).chunk(3, dim=-1)
    heads = [
        ((q[..., i : i + 8] @ k[..., i : i + 8].mT) / 8**0.5).softmax(-1) @ v[..., i : i + 8] for i in range(0, 32, 8)
    ]
    out = torch.cat(heads, -1) @ block.out.weight.double().T + block.out.bias.double()
    torch.testing.assert_close(block(x).double(), x + out.mT.reshape(2, 32, 4, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resample", ["", "down", "up"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_against_float64(scale_shift: bool, resample: Resample) -> None:
    block = _randomised(ResBlock(16, 32, 24, _tiny(scale_shift=scale_shift), False, resample))
    generator = torch.Generator().manual_seed(3)
    x, embedding = torch.randn(2, 16, 4, 4, generator=generator), torch.randn(2, 24, generator=generator)

    def change(h: Tensor) -> Tensor:
        if resample == "down":
            return h.reshape(2, 16, 2, 2, 2, 2).mean((3, 5))
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else h

    w = {name: tensor.double() for name, tensor in block.named_parameters()}
    h = change(_norm_reference(x, 4, w["norm1.weight"], w["norm1.bias"], None, None, True))
    h = F.conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
    e = embedding.double() @ w["embed.weight"].T + w["embed.bias"]
    scale, shift = (e[:, :32], e[:, 32:]) if scale_shift else (None, None)
    h = h if scale_shift else h + e[:, :, None, None]
    h = _norm_reference(h, 8, w["norm2.weight"], w["norm2.bias"], scale, shift, True)
    h = F.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1)
    want = h + F.conv2d(change(x.double()), w["shortcut.weight"], w["shortcut.bias"])
    torch.testing.assert_close(block(x, embedding).double(), want, rtol=1e-4, atol=1e-4)


# ---- UNet


@pytest.mark.parametrize(
    ("size", "channels", "config"),
    [
        (8, 1, _tiny(attention_resolutions=(4,))),
        (28, 1, _tiny(multipliers=(1, 2, 2))),
        (28, 1, _tiny(patch=2, attention_resolutions=(7,), head_width=8)),
        (32, 3, _tiny(multipliers=(1, 2, 2, 2), scale_shift=True, resample_in_block=True, augment_dim=9)),
        (64, 3, _tiny(patch=4, multipliers=(1,), num_res_blocks=2)),
    ],
)
def test_shapes_start_at_zero_and_reach_every_parameter(size: int, channels: int, config: UNetConfig) -> None:
    model = UNet(config, size, channels, 5)
    x, t, y = _batch(size, channels)
    label = torch.ones(3, 9) if config.augment_dim else None
    out = model(x, t, y, label)
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert not out.any()

    _randomised(model)(x, t, y, label).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", [_tiny(patch=2), _tiny(scale_shift=True, resample_in_block=True)])
def test_activations_stay_channels_last(config: UNetConfig) -> None:
    model = _randomised(UNet(config, 16, 3, 5))
    seen = []

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | GroupNorm):
            module.register_forward_pre_hook(check)
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
    model(*_batch(16, 3))
    assert len(seen) > 10 and all(seen)


def test_an_image_depends_on_its_own_inputs_alone() -> None:
    model = _randomised(UNet(_tiny(augment_dim=9, attention_resolutions=(4,)), 8, 1, 5))
    x, t, y = _batch(8, 1)
    y, label = torch.tensor([0, 3, 5]), torch.zeros(3, 9)
    out = model(x, t, y, label)
    torch.testing.assert_close(model(x, t, y), out)  # no label is a zero label
    torch.testing.assert_close(model(x, t.float(), y), out)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
    changes = {
        "x": model(x + torch.tensor([0, 1, 0])[:, None, None, None], t, y),
        "t": model(x, torch.where(torch.arange(3) == 1, (t + 500) % 1000, t), y),
        "y": model(x, t, torch.tensor([0, 5, 5])),
        "augment": model(x, t, y, label + torch.tensor([0, 1, 0])[:, None]),
    }
    for name, other in changes.items():
        torch.testing.assert_close(other[[0, 2]], out[[0, 2]], rtol=1e-5, atol=1e-6)
        assert (other[1] - out[1]).abs().max() > 1e-3, name


def test_bfloat16_weights_stay_near_float32() -> None:
    model = _randomised(UNet(_tiny(scale_shift=True, attention_resolutions=(4,)), 8, 1, 5))
    inputs = _batch(8, 1)
    with torch.no_grad():
        want = model(*inputs)
        got = model.to(torch.bfloat16)(*inputs)
    assert got.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 0.05
    assert not torch.equal(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_gives_the_same_gradients_and_keeps_less(dropout: float) -> None:
    kept, gradients = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = _randomised(UNet(_tiny(dropout=dropout, gradient_checkpointing=recompute), 8, 1, 5)).train()
        x, t, y = torch.randn(4, 1, 8, 8), torch.arange(4), torch.arange(4)
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            torch.manual_seed(1)
            loss = model(x, t, y).square().mean()
        kept.append(saved)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.6 * kept[0]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_dropout_acts_in_training_only() -> None:
    model = _randomised(UNet(_tiny(dropout=0.5), 8, 1, 5))
    inputs = _batch(8, 1)
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_learns_a_target_that_depends_on_the_class(scale_shift: bool) -> None:
    torch.manual_seed(0)
    model = UNet(_tiny(multipliers=(1,), scale_shift=scale_shift), 4, 1, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(50):
        x, y = torch.randn(32, 1, 4, 4), torch.randint(2, (32,))
        target = x * torch.where(y == 0, 1.0, -1.0)[:, None, None, None]
        loss = F.mse_loss(model(x, torch.randint(1000, (32,)), y), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25  # 1 without the class


def test_compiles_without_a_break() -> None:
    model = _randomised(UNet(_tiny(attention_resolutions=(4,), augment_dim=9), 8, 1, 5))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = (*_batch(8, 1), torch.ones(3, 9))
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (30, {"multipliers": (1, 2, 2)}, "multiple of 4"),
        (28, {"multipliers": (1, 2, 2), "patch": 2}, "multiple of 8"),
        (2, {"multipliers": (1, 2, 2)}, "multiple of 4"),
        (28, {"attention_resolutions": (16,)}, r"\[28, 14\]"),
        (8, {"head_width": 24}, "head_width 24"),
    ],
)
def test_settings_that_do_not_fit_the_image(size: int, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        UNet(_tiny(**changes), size, 1, 5)
    assert "\n" not in str(error.value)


def test_config_refuses_what_it_does_not_know() -> None:
    for changes in ({"colour": 1}, {"channels": 30}, {"dropout": 1.0}, {"patch": 0}, {"augment_dim": 3}):
        with pytest.raises(pydantic.ValidationError):
            _tiny(**changes)
    with pytest.raises(pydantic.ValidationError):
        CIFAR.channels = 4  # type: ignore[misc]
