"""group_norm_silu in Triton and in C++ against the formula and its autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffult.models.config import UNetConfig
from diffult.models.unet import UNet
from kernels import dispatch, group_norm_silu_cpu
from kernels import group_norm_silu as module
from kernels.group_norm_silu import group_norm_silu, reference_group_norm_silu
from kernels.group_norm_silu_cpu import cpp_refusal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What the tile table may say, for the 63 pixels of most tests; the last tile and the last chunk are not full.
WAYS: dict[str, dict[str, int]] = {"one tile": {"rows": 64}, "sweep": {"rows": 8}, "split": {"rows": 8, "chunks": 3}}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """What torch.empty and its like return is full of NaN, so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["Triton", "C++"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton serves, and where C++ does."""
    if request.param == "Triton":
        return request.getfixturevalue("triton_kernels")
    if (reason := cpp_refusal("cpu")) is not None:
        pytest.skip(reason)
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 to bfloat16 off; a GPU rounds to nearest even, and so it does here."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32)
            return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def set_tile(monkeypatch: pytest.MonkeyPatch, **row: int) -> None:
    monkeypatch.setattr(module, "tile", lambda kernel, key, device, **default: {**default, **row})


def inputs(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, adaptive: bool = True) -> list[Tensor]:
    """x, weight, bias and, in one tensor, scale and shift; float32 parameters, as in the UNet under autocast."""
    batch, channels = shape[:2]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    tensors = [x, 1 + 0.5 * torch.randn(channels), torch.randn(channels)]
    if adaptive:
        tensors.append(0.5 * torch.randn(batch, 2 * channels).to(dtype))
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def halves(tensors: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    scale, shift = tensors[3].chunk(2, dim=1) if len(tensors) > 3 else (None, None)
    return scale, shift


def ours(tensors: list[Tensor], groups: int, silu: bool = True) -> Tensor:
    return group_norm_silu(tensors[0], groups, tensors[1], tensors[2], *halves(tensors), silu)


def formula(tensors: list[Tensor], groups: int, silu: bool = True) -> Tensor:
    """The definition, in the type of the tensors."""
    x, weight, bias = tensors[:3]
    scale, shift = halves(tensors)
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    y = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return y * torch.sigmoid(y) if silu else y


def torchs(tensors: list[Tensor], groups: int, silu: bool = True) -> Tensor:
    """What one writes in PyTorch, in the type of the tensors."""
    scale, shift = halves(tensors)
    y = F.group_norm(tensors[0], groups, tensors[1], tensors[2])
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


def copies(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def results(function: Any, tensors: list[Tensor], groups: int, silu: bool, dy: Tensor) -> list[Tensor]:
    """y and the gradient of every tensor."""
    y = function(tensors, groups, silu)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def check(tensors: list[Tensor], groups: int, silu: bool) -> None:
    limit = LIMIT[tensors[0].dtype]
    dy = torch.randn_like(tensors[0])
    got = results(ours, tensors, groups, silu, dy)
    want = results(formula, copies(tensors, torch.float64), groups, silu, dy)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for name, a, b, like in zip(["y", "dx", "dweight", "dbias", "dscale"], got, want, [dy, *tensors], strict=False):
        assert a.dtype == like.dtype, name
        assert relative(a, b) < limit, name


# ---- against float64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("adaptive", "silu"), [(True, True), (False, True), (True, False)])
def test_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch, adaptive: bool, silu: bool, way: str) -> None:
    set_tile(monkeypatch, **WAYS[way])
    check(inputs(device, (2, 16, 7, 9), torch.float32, adaptive), 4, silu)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_torchs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, way: str
) -> None:
    set_tile(monkeypatch, **WAYS[way])
    tensors = inputs(device, (2, 16, 7, 9), dtype)
    dy = torch.randn_like(tensors[0])
    want = results(formula, copies(tensors, torch.float64), 4, True, dy)
    theirs = results(torchs, copies(tensors, dtype), 4, True, dy)
    for a, b, c in zip(results(ours, tensors, 4, True, dy), theirs, want, strict=True):
        assert relative(a, c) < min(LIMIT[dtype], 1.1 * relative(b, c))


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to look for the simplest case
)
@given(
    shape=st.tuples(*[st.integers(1, most) for most in (2, 7, 9, 8, 8)]),
    dtype=st.sampled_from(DTYPES),
    adaptive=st.booleans(),
    silu=st.booleans(),
    rows=st.sampled_from([None, 1, 4, 16]),
    chunks=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@example((3, 32, 7, 1, 1), torch.float32, True, True, None, 1, 0)
@example((1, 6, 5, 1, 7), torch.bfloat16, True, True, None, 1, 0)
@example((2, 1, 20, 5, 3), torch.float32, True, True, 4, 2, 0)
def test_any_shape(
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    adaptive: bool,
    silu: bool,
    rows: int | None,
    chunks: int,
    seed: int,
) -> None:
    batch, groups, per_group, height, width = shape
    assume(per_group * height * width >= 6)  # fewer cancel in dx, in any arithmetic
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rows is not None:
            set_tile(monkeypatch, rows=rows, chunks=chunks)
        tensors = inputs(device, (batch, groups * per_group, height, width), dtype, adaptive)
        check(tensors, groups, silu)


def test_a_group_of_one_element(device: torch.device) -> None:
    """It is its own mean: x has no say, and gets no gradient."""
    tensors = inputs(device, (2, 3, 1, 1), torch.float32, adaptive=False)
    y, dx, dweight, dbias = results(ours, tensors, 3, True, torch.ones_like(tensors[0]))
    torch.testing.assert_close(y[:, :, 0, 0], F.silu(tensors[2]).expand(2, 3))
    assert not dweight.any() and dbias.all()
    assert dx.abs().max() < 1e-3  # of terms of 1 / sqrt(eps) = 316 that cancel


@pytest.mark.parametrize(("channels", "groups", "size"), [(32, 8, 32), (24, 2, 33), (2048, 1, 2), (96, 32, 3)])
def test_default_tiles(device: torch.device, channels: int, groups: int, size: int) -> None:
    check(inputs(device, (1, channels, size, size), torch.bfloat16), groups, True)


def test_what_is_no_number_stays_none(device: torch.device) -> None:
    tensors = inputs(device, (2, 24, 5, 6), torch.bfloat16)
    with torch.no_grad():
        tensors[0][0, 3, 2, 1], tensors[0][1, 5, 0, 0] = float("nan"), float("inf")
    for out in results(ours, tensors, 6, True, torch.ones_like(tensors[0]))[:2]:
        groups = out.reshape(2, 6, -1).isfinite()
        assert groups.all(2).eq(groups.any(2)).all() and (~groups.all(2)).nonzero().tolist() == [[0, 0], [1, 1]]


def test_a_large_batch(device: torch.device) -> None:
    check(inputs(device, (4096 if device.type == "cuda" else 50, 6, 1, 1), torch.float32), 1, True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["everywhere", "first tile", "one pixel"])
def test_a_mean_1000_times_the_deviation(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, way: str, where: str
) -> None:
    set_tile(monkeypatch, **WAYS[way])
    tensors = inputs(device, (2, 16, 7, 9), torch.float32)
    with torch.no_grad():
        flat = tensors[0].permute(0, 2, 3, 1).view(2, 63, 16)  # the memory
        flat[:, slice({"everywhere": 63, "first tile": 8, "one pixel": 1}[where])] += 1000
    dy = torch.randn_like(tensors[0])
    got = results(ours, tensors, 4, False, dy)
    want = results(formula, copies(tensors, torch.float64), 4, False, dy)
    # The mean, a float32, is right to half a unit in the last place, 2**-15 of a deviation where all are so large.
    limit = 1000 * 2**-24 * 1.5 if where == "everywhere" else 1e-5
    assert relative(got[0], want[0]) < limit
    assert relative(got[1], want[1]) < 2 * limit


# ---- against itself


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_on_every_run(device: torch.device, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    set_tile(monkeypatch, **WAYS[way])
    tensors = inputs(device, (3, 24, 7, 9), torch.bfloat16)
    dy = torch.randn_like(tensors[0])
    first, second = (results(ours, tensors, 6, True, dy) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_other_layouts_give_the_same_bits(device: torch.device) -> None:
    tensors = inputs(device, (2, 24, 5, 6), torch.bfloat16)
    dy = torch.randn_like(tensors[0])
    want = results(ours, tensors, 6, True, dy)
    x, weight, bias, both = (tensor.detach() for tensor in tensors)
    other = [x.contiguous(), weight.repeat(2)[:24], torch.stack([bias, bias], 1)[:, 0], both.T.contiguous().T]
    assert other[0].stride() != x.stride() and other[2].stride() == (2,) and other[3].stride() == (1, 2)
    got = results(ours, [tensor.requires_grad_() for tensor in other], 6, True, dy.contiguous())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_without_strides(device: torch.device) -> None:
    """sum() hands one number back, expanded."""
    tensors = inputs(device, (2, 24, 5, 6), torch.float32)
    ones = torch.ones_like(tensors[0])
    for a, b in zip(
        torch.autograd.grad(ours(tensors, 6).sum(), tensors), results(ours, tensors, 6, True, ones)[1:], strict=True
    ):
        assert torch.equal(a, b)


def test_gradients_come_in_the_type_of_their_tensor(device: torch.device) -> None:
    x, weight, bias, both = inputs(device, (2, 8, 3, 3), torch.bfloat16)
    scale, shift = (half.detach().float().requires_grad_() for half in both.chunk(2, dim=1))
    weight, bias = (tensor.detach().to(torch.float16).requires_grad_() for tensor in (weight, bias))
    wanted = [x, weight, bias, scale, shift]
    y = group_norm_silu(x, 2, weight, bias, scale, shift)
    for tensor, gradient in zip(wanted, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        assert gradient.isfinite().all() and gradient.any()


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 4096),
    groups=st.integers(1, 64),
    per_group=st.integers(1, 300),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tensors=st.sampled_from([1, 2]),
)
def test_default_tiles_cover_the_image_and_fit(
    batch: int, groups: int, per_group: int, size: tuple[int, int], dtype: torch.dtype, tensors: int
) -> None:
    x = torch.empty(batch, groups * per_group, *size, device="meta", dtype=dtype)
    t = module._tiling(x, groups, "", tensors)
    chunk = t["TILES"] * t["ROWS"]
    assert (t["CHUNKS"] - 1) * chunk < t["N"] <= t["CHUNKS"] * chunk
    assert t["C"] % t["WIDTH"] == 0 and t["WIDTH"] % t["CPG"] == 0 and t["WIDTH"] <= t["BLOCK"] < 2 * t["WIDTH"]
    assert t["ROWS"] == 1 or t["ROWS"] * t["BLOCK"] <= module._ELEMENTS
    assert batch * t["C"] // t["WIDTH"] * t["CHUNKS"] < 2**31
    assert all(t[name] & (t[name] - 1) == 0 for name in ("BLOCK", "ROWS", "num_warps"))


@pytest.mark.parametrize(
    ("batch", "channels", "size", "way"),
    [(64, 128, 32, "one tile"), (64, 128, 64, "sweep"), (1, 128, 64, "split"), (1, 512, 8, "one tile")],
)
def test_the_default_way(batch: int, channels: int, size: int, way: str) -> None:
    t = module._tiling(torch.empty(batch, channels, size, size, device="meta", dtype=torch.bfloat16), 32, "", 1)
    assert way == ("split" if t["CHUNKS"] > 1 else "sweep" if t["TILES"] > 1 else "one tile")
    assert t["WIDTH"] * 2 % 32 == 0  # whole sectors of memory
    if size > 8:
        assert batch * channels // t["WIDTH"] * t["CHUNKS"] >= 128  # else an H100 is idle in part


# ---- as an operator


@pytest.mark.parametrize(("adaptive", "way"), [(False, "one tile"), (True, "split")])
def test_opcheck(device: torch.device, monkeypatch: pytest.MonkeyPatch, adaptive: bool, way: str) -> None:
    set_tile(monkeypatch, **WAYS[way])
    tensors = inputs(device, (2, 8, 7, 9), torch.float32, adaptive)
    x, weight, bias = tensors[:3]
    scale, shift = halves(tensors)
    torch.library.opcheck(module._forward, (x, 4, weight, bias, scale, shift, True, 1e-5))
    x, weight, bias, scale, shift = (t if t is None else t.detach() for t in (x, weight, bias, scale, shift))
    _, mean, rstd = module._forward(x, 4, weight, bias, scale, shift, True, 1e-5)
    torch.library.opcheck(module._backward, (x, x, mean, rstd, 4, weight, bias, scale, shift, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(device: torch.device, dynamic: bool) -> None:
    tensors = inputs(device, (2, 8, 3, 5), torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    dy = torch.randn_like(tensors[0])
    for a, b in zip(results(compiled, tensors, 4, True, dy), results(ours, tensors, 4, True, dy), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_unet_trains_on_it(triton_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), scale_shift=True)
    model = UNet(config, 8, 1, 5).to(triton_kernels)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5])
    batch = [tensor.to(triton_kernels) for tensor in (x, t, y)]

    def run(network: Any) -> list[Tensor]:
        out = network(*batch)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    launches = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda *arguments: (launches.append(arguments[0]), launch(*arguments)))
    got = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    norms = sum(type(part).__name__ == "GroupNorm" for part in model.modules())
    assert len(launches) == 2 * norms
    dispatch.set_mode("torch")
    torch.compiler.reset()
    for a, b in zip(got, run(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


# ---- the choice


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_forward", None)
    monkeypatch.setattr(group_norm_silu_cpu, "_library", lambda: "there is no g++")
    assert dispatch.mode() == "auto"
    tensors = inputs(torch.device("cpu"), (2, 24, 7, 9), torch.bfloat16)
    y = ours(tensors, 6)
    assert torch.equal(y, reference_group_norm_silu(*tensors[:1], 6, *tensors[1:3], *halves(tensors)))
    assert relative(y, formula(copies(tensors, torch.float64), 6)) < 1e-2


def test_the_table_can_send_a_shape_to_torch(triton_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def use_triton(kernel: str, key: str, device: torch.device) -> bool:
        asked.append((kernel, key))
        return False

    monkeypatch.setattr(module, "use_triton", use_triton)
    monkeypatch.setattr(module, "_forward", None)
    ours(inputs(triton_kernels, (2, 24, 7, 9), torch.bfloat16), 6)
    assert asked == [("group_norm_silu", "C24-HW63-bfloat16")]


def test_shapes_that_do_not_fit() -> None:
    x, weight, rows = torch.ones(2, 6, 3, 3), torch.ones(6), torch.ones(2, 6)
    wrong = [(x[0], 2, weight, weight), (x, 4, weight, weight), (x, 2, weight[:3], weight), (x, 2, weight, rows)]
    for arguments in wrong:
        with pytest.raises(ValueError, match="weight and bias"):
            group_norm_silu(*arguments)
    for scale, shift in ((rows, None), (None, rows), (rows, rows[:1]), (weight, weight)):
        with pytest.raises(ValueError, match="scale and shift"):
            group_norm_silu(x, 2, weight, weight, scale, shift)


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(triton_kernels: torch.device) -> None:
    x = torch.randn(1, 256, 64, 64, device=triton_kernels, dtype=torch.bfloat16)
    x = x.expand(2100, -1, -1, -1).contiguous(memory_format=torch.channels_last)  # 2.2e9
    weight, bias = torch.randn(2, 256, device=triton_kernels)
    y = group_norm_silu(x, 32, weight, bias)
    assert torch.equal(y[-1], y[0])
    assert relative(y[-1:], formula([x[:1].double(), weight.double(), bias.double()], 32)) < 1e-2
