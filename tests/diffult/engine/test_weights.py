"""The average of the weights, and sharpness-aware steps, against their formulas in float64."""

import numpy as np
import torch
from torch import nn

from diffult.engine.weights import WeightAverage, frozen_statistics, sharpness_aware


def test_the_average_follows_its_formula_and_its_state_restores_it():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = WeightAverage(model.parameters(), 0.7)
    expected = [p.detach().numpy().copy() for p in model.parameters()]
    for n in range(30):
        if n == 20:
            state = {key: [x.clone() for x in value] if isinstance(value, list) else value.clone()
                     for key, value in average.state_dict().items()}  # fmt: skip
            average = WeightAverage(model.parameters(), 0.7)
            average.load_state_dict(state)
        for p in model.parameters():
            p.data.normal_()
        average.update()
        decay = min(0.7, (1 + n) / (10 + n))
        expected = [
            decay * e + (1 - decay) * p.detach().numpy() for e, p in zip(expected, model.parameters(), strict=True)
        ]
    statistics = model[1].running_mean.clone()
    average.copy_to_parameters()
    for p, e in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-6)
    assert torch.equal(model[1].running_mean, statistics)


def test_the_gradient_of_a_sharpness_aware_step_is_that_at_the_ascended_weights():
    """Of a linear model's squared error, whose gradient is 2 X^T (X w + b - y) / n."""
    generator = np.random.default_rng(0)
    x, y, w, b = (generator.normal(size=shape) for shape in ((9, 4), (9,), (4,), (1,)))

    def gradient(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        rest = x @ w + b - y
        return np.append(2 * x.T @ rest / 9, 2 * rest.mean())

    first = gradient(w, b)
    up = 0.3 * first / np.linalg.norm(first)
    expected = gradient(w + up[:4], b + up[4:])

    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w)), model.bias.copy_(torch.from_numpy(b))

    def backward() -> None:
        model.zero_grad()
        (model(torch.from_numpy(x))[:, 0] - torch.from_numpy(y)).square().mean().backward()

    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    backward()
    with sharpness_aware(parameters, 0.3):
        backward()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    np.testing.assert_allclose(torch.cat([p.grad.flatten() for p in parameters]).numpy(), expected, rtol=1e-12)


def test_statistics_stay_while_frozen_and_the_batch_is_normalised_all_the_same():
    norm = nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 4, 4) * 3 + 1
    expected = norm(x)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    with frozen_statistics(nn.Sequential(norm)):
        assert torch.equal(norm(x), expected)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in state.items())
    norm(x)
    assert norm.num_batches_tracked == 2
