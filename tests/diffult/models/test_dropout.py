"""Dropout on a CPU: shares, independence and gradients against what their definitions say."""

import pytest
import torch

from diffult.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_dropped_by_chance_and_the_rest_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(16, 8, 33, 31, dtype=dtype).contiguous(memory_format=torch.channels_last)
    out = Dropout(p).train()(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    scale = torch.tensor(1 / (1 - p)).to(dtype)
    torch.testing.assert_close(
        out, torch.where(out == 0, 0, scale), rtol=0.01 if dtype == torch.bfloat16 else 2e-3, atol=0
    )
    dropped = (out == 0).double()
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - p) < 5 * deviation + 2**-16
    # the four numbers of a draw, and draws that follow each other, know nothing of each other
    flat = dropped.permute(0, 2, 3, 1).flatten() - p
    for lag in range(1, 9):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / len(flat) ** 0.5


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5, 7), (1, 1, 1, 1)])
def test_gradients_are_of_what_was_kept(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    layer = Dropout(0.4).train()
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, x * gradient)
    assert set(gradient.flatten().tolist()) <= {0.0, 1 / (1 - round(0.4 * 2**16) / 2**16)}


def test_a_view_with_gaps_and_one_that_repeats_are_dropped_from_as_any() -> None:
    torch.manual_seed(0)
    for x in (torch.ones(40, 60)[:, ::3], torch.ones(40, 1).expand(40, 20), torch.ones(20, 40).T):
        out = Dropout(0.5).train()(x)
        assert out.shape == (40, 20) and 300 < (out == 0).sum() < 500


def test_the_seed_decides_and_evaluation_drops_nothing() -> None:
    layer, x = Dropout(0.3).train(), torch.randn(100)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    assert torch.equal(Dropout(1.0).train()(x), torch.zeros(100))
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0).train()(x), x)
