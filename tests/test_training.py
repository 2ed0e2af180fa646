"""The training loop, the moving average, the learning rate, and the diffusion loss put together."""

import math

import pytest
import torch
from torch import nn

from diffult.config import load_preset
from diffult.device import seed_step
from diffult.diffusion.losses import ddpm_loss
from diffult.diffusion.schedule import Schedule
from diffult.errors import UserError
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import build_classifier
from diffult.train_diffusion import DiffusionLoss
from diffult.training import Ema, learning_rate_factor, train_loop


def noisy_sgd(path, steps, stop_at=None, config_hash="one"):
    """Trains a weight on random numbers; optionally dies after a step. Returns the weight."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step(i, batch):
        if i == stop_at:
            raise KeyboardInterrupt
        loss = (model(torch.randn(4, 3)) - batch).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    def batches(start):
        return (torch.full((4, 1), float(i)) for i in range(start, steps))

    train_loop("t", steps, batches, step, {"model": model, "optimizer": optimizer}, path, 3, (5, 1), config_hash)
    return model.weight.detach()


def test_an_interrupted_loop_ends_as_an_unbroken_one(tmp_path):
    unbroken = noisy_sgd(tmp_path / "a.pt", 10)
    with pytest.raises(KeyboardInterrupt):
        noisy_sgd(tmp_path / "b.pt", 10, stop_at=7)
    assert torch.equal(noisy_sgd(tmp_path / "b.pt", 10), unbroken)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        noisy_sgd(tmp_path / "a.pt", 10, stop_at=7)
    with pytest.raises(UserError, match=r"a.pt: written under another configuration \(one, now two\)"):
        noisy_sgd(tmp_path / "a.pt", 10, config_hash="two")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model = nn.Linear(1, 1)

    def step(i, batch):
        return {"loss": torch.tensor(float("nan") if i >= 5 else 1.0)}

    def batches(start):
        return iter(range(start, 9))

    with pytest.raises(UserError, match=r"the loss is nan at step 6; lower the learning rate") as caught:
        train_loop("t", 9, batches, step, {"model": model}, tmp_path / "s.pt", 3, (0, 0), "a")
    assert "\n" not in str(caught.value)
    assert torch.load(tmp_path / "s.pt", weights_only=True)["step"] == 3


def test_ema_is_the_naive_recursion():
    model = nn.Linear(2, 2)
    ema, naive = Ema(model, 0.9), model.weight.detach().double().clone()
    for step in range(30):
        nn.init.normal_(model.weight)
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        naive = decay * naive + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.state["weight"].double(), naive, rtol=1e-5, atol=1e-6)


def test_learning_rate_warms_up_and_decays():
    factors = [learning_rate_factor(i, 100, 10, (0.6, 0.8), 0.1) for i in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert (factors[59], factors[60], factors[79], factors[80]) == pytest.approx((1, 0.1, 0.1, 0.01))
    cosine = [learning_rate_factor(i, 100, 0, cosine=True) for i in range(101)]
    assert (cosine[0], cosine[50]) == pytest.approx((1, 0.5)) and cosine[100] == pytest.approx(0, abs=1e-12)


class Recorder(nn.Module):
    """Stands for the UNet: remembers what it was asked, answers with a fixed map of it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.calls = []

    def forward(self, x, t, y, augment=None):
        self.calls.append((x, t, y, augment))
        return self.gain * x + 0.01 * y.view(-1, 1, 1, 1)


def diffusion_loss(**settings):
    config = load_preset("digits-lt").diffusion.model_copy(update=settings)
    network = build_classifier("smallcnn", 10, 1, 8).eval().requires_grad_(False)
    statistics = ClassStatistics(torch.zeros(10, 128), torch.ones(10), torch.ones(10, dtype=torch.int64))
    share = torch.tensor([0.5, 0.5] + [0.0] * 8)
    schedule = Schedule(config.schedule, config.timesteps)
    model = Recorder()
    return model, DiffusionLoss(model, config, schedule, share, 10, Extractor(network, 8, statistics))


def test_labels_are_dropped_per_sample_at_the_given_rate():
    model, loss = diffusion_loss(cbdm=False, label_dropout=0.25)
    y = torch.arange(2000) % 10
    loss(torch.zeros(2000, 1, 8, 8), y)
    labels = model.calls[0][2]
    dropped = labels == 10
    assert torch.equal(labels[~dropped], y[~dropped])
    assert abs(dropped.float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_terms_are_switchable_and_sum_up():
    x0, y = torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8)
    for cbdm in (False, True):
        for aid in (False, True):
            _, loss = diffusion_loss(cbdm=cbdm, aid=aid)
            terms = loss(x0, y)
            expected = {"loss", "ddpm"} | ({"cbdm"} if cbdm else set()) | ({"aid"} if aid else set())
            assert set(terms) == expected
            assert terms["loss"].item() == pytest.approx(
                sum(float(v) for k, v in terms.items() if k != "loss"), rel=1e-5
            )


def test_cbdm_draws_other_labels_from_the_given_share_in_one_doubled_pass():
    model, loss = diffusion_loss(cbdm=True)
    loss(torch.zeros(500, 1, 8, 8), torch.full((500,), 7))
    ((x, t, y, _),) = model.calls
    assert torch.equal(x[:500], x[500:]) and torch.equal(t[:500], t[500:])
    assert set(y[500:].tolist()) == {0, 1}


def test_epsilon_loss_is_the_plain_ddpm_loss():
    model, loss = diffusion_loss(prediction="epsilon", cbdm=False, label_dropout=0.0)
    x0, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    seed_step(1)
    value = loss(x0, y)["loss"]
    x_t, t, _, _ = model.calls[0]
    a, s = loss.schedule.levels(t)
    eps = (x_t - a * x0) / s
    assert float(value) == pytest.approx(float(ddpm_loss(model(x_t, t, y), eps)), rel=1e-4)


def test_gradients_reach_the_network_through_every_term():
    for settings in ({"cbdm": True, "aid": False}, {"cbdm": False, "aid": True}):
        model, loss = diffusion_loss(**settings)
        terms = loss(torch.rand(8, 1, 8, 8), torch.arange(8))
        terms["loss"].backward()
        assert model.gain.grad is not None and math.isfinite(model.gain.grad)
