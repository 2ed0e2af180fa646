"""Attention against a float64 softmax written out."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import _try_xformers, attention, attention_backend


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    weights = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshd->bthd", weights.softmax(-1), v)


def _relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _qkv(shape: tuple[int, int, int, int], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, tokens, heads, width = shape
    # one tensor cut into three, as the UNet does: strided inputs
    fused = torch.randn(batch, tokens, 3, heads, width, generator=generator).to(device) * 2
    return list(fused.unbind(2))


@pytest.mark.parametrize("shape", [(2, 16, 1, 64), (3, 49, 4, 24), (1, 256, 2, 8), (2, 1, 1, 256)])
def test_against_float64_softmax(shape: tuple[int, int, int, int]) -> None:
    q, k, v = _qkv(shape)
    out = attention(q, k, v)
    assert out.shape == shape and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), _naive(q, k, v), rtol=1e-5, atol=1e-5)
    for dtype, limit in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        low = [x.to(dtype) for x in (q, k, v)]
        assert attention(*low).dtype == dtype
        assert _relative_error(attention(*low), _naive(*low)) < limit


def test_gradients_against_float64_softmax() -> None:
    q, k, v = (x.detach().clone().requires_grad_() for x in _qkv((2, 9, 2, 16)))
    weight = torch.randn(2, 9, 2, 16, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((attention(q, k, v) * weight).sum(), (q, k, v))
    want = torch.autograd.grad((_naive(q, k, v) * weight).sum(), (q, k, v))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 49, 2, 16), (2, 256, 1, 64), (1, 3, 1, 24)])
def test_training_in_bfloat16_against_float64_softmax(shape: tuple[int, int, int, int]) -> None:
    """Result and gradients, of standard normal inputs as the norm before it gives them."""
    q, k, v = ((x / 2).to(torch.bfloat16).requires_grad_() for x in _qkv(shape))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def outputs(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        out = attend(*inputs)
        return [x.detach() for x in (out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs))]

    exact = outputs(_naive, *(x.detach().double().requires_grad_() for x in (q, k, v)))
    for ours, true in zip(outputs(attention, q, k, v), exact, strict=True):
        assert ours.dtype == torch.bfloat16 and _relative_error(ours, true) < 1e-2


def test_cross_attention_has_the_queries_tokens() -> None:
    q, _, _ = _qkv((2, 5, 2, 8))
    _, k, v = _qkv((2, 11, 2, 8))
    torch.testing.assert_close(attention(q, k, v).double(), _naive(q, k, v), rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit() -> None:
    q, k, v = _qkv((2, 5, 2, 8))
    with pytest.raises(ValueError, match="batch, tokens, heads, width"):
        attention(q, k, v[:, :4])
    with pytest.raises(ValueError, match="batch, tokens, heads, width"):
        attention(q[:1], k, v)
    with pytest.raises(ValueError, match="batch, tokens, heads, width"):
        attention(q[0], k[0], v[0])


def test_backend_on_cpu_is_torch_and_leaves_xformers_alone() -> None:
    before = "xformers" in sys.modules
    name, reason = attention_backend("cpu")
    assert name == "torch" and "cpu" in reason
    assert ("xformers" in sys.modules) == before


def test_xformers_is_tried_once_and_its_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuses_wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[-1])
        if q.shape[-1] > 64:
            raise NotImplementedError("No operator found\n  for many reasons")
        return attention(q, k, v)

    fake = types.ModuleType("xformers.ops")
    fake.memory_efficient_attention = refuses_wide  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    _try_xformers.cache_clear()
    try:
        with torch.no_grad():
            assert _try_xformers(torch.device("cpu"), torch.float32, 64) is None
            refusal = _try_xformers(torch.device("cpu"), torch.float32, 96)
            assert refusal == "xformers refuses torch.float32 at width 96: No operator found"
            assert _try_xformers(torch.device("cpu"), torch.float32, 96) == refusal
        assert calls == [64, 96]
        monkeypatch.setitem(sys.modules, "xformers.ops", None)  # an import that fails
        assert "xformers" in str(_try_xformers(torch.device("cpu"), torch.float32, 8))
    finally:
        _try_xformers.cache_clear()


def test_compiles_without_a_break() -> None:
    q, k, v = _qkv((2, 9, 2, 16))
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 32, 64, 256])
def test_cuda_agrees_with_torch_and_float64(dtype: torch.dtype, width: int) -> None:
    q, k, v = (x.to(dtype) for x in _qkv((2, 64, 2, width), "cuda"))
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4 if not torch.backends.cuda.matmul.allow_tf32 else 1e-2
    out = attention(q, k, v)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out.double(), _naive(q, k, v), rtol=0, atol=tolerance)
    torch.testing.assert_close(out, sdpa, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64, 1, 64), (2, 256, 4, 32), (3, 49, 2, 8), (1, 1024, 1, 256)])
def test_xformers_and_torch_agree_where_both_run(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Forward and the three gradients; each is also held against float64, so that both cannot be wrong alike."""
    refusal = _try_xformers(torch.device("cuda"), dtype, shape[-1])
    if refusal is not None:
        pytest.skip(refusal)  # then `attention` is torch's own
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).cuda()
    inputs = [x.to(dtype) for x in _qkv(shape, "cuda")]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def results(function: Callable[[Tensor, Tensor, Tensor], Tensor], real: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(real).requires_grad_() for x in inputs)
        out = function(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), weight.to(real))]

    # float32 may run on tensor cores as TF32
    limit = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    xformers, sdpa, exact = results(attention, dtype), results(torchs, dtype), results(_naive, torch.float64)
    for name, x, y, e in zip(("out", "q", "k", "v"), xformers, sdpa, exact, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype == dtype
        assert _relative_error(x, e) < limit, name
        assert _relative_error(y, e) < limit, name
        assert _relative_error(x, y) < 2 * limit, name


@pytest.mark.gpu
def test_backend_on_cuda_is_told() -> None:
    name, reason = attention_backend("cuda")
    assert name in ("xformers", "torch") and reason and "\n" not in reason
