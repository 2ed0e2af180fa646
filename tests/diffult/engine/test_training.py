"""The training loop, the learning rate, and the diffusion loss put together."""

import contextlib
import json
import math
import time
from unittest.mock import patch

import pytest
import torch
from torch import nn

from diffult.config import load_preset
from diffult.diffusion.losses import ddpm_loss
from diffult.diffusion.objective import DiffusionLoss
from diffult.diffusion.schedule import Schedule
from diffult.engine.loop import LoopConfig, LRBackoff, learning_rate_factor, train_loop
from diffult.errors import UserError
from diffult.longtail.extractor import Extractor
from diffult.longtail.statistics import ClassStatistics
from diffult.models.resnet import build_classifier
from diffult.runs.files import load_state


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
        return (torch.full((4, 1), float(i % 3)) for i in range(start, steps))

    job = LoopConfig("t", steps, path, 3, (5, 1), config_hash)
    train_loop(job, batches, step, {"model": model, "optimizer": optimizer})
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

    with pytest.raises(UserError, match=r"the loss diverged by step 6 .*; lower the learning rate") as caught:
        train_loop(LoopConfig("t", 9, tmp_path / "s.pt", 3, (0, 0), "a"), batches, step, {"model": model})
    assert "\n" not in str(caught.value)
    assert torch.load(tmp_path / "s.pt", weights_only=True)["step"] == 3


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(small_disk):
    """Told in one line, and with room the training ends as if nothing had been."""

    def train(path, fills=False):
        model = nn.Linear(40, 40)  # with the optimizer's momentum 14 KB; two of them fit the disk
        nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def step(i, batch):
            if fills and i == 4:
                while not path.exists():  # a thread writes it
                    time.sleep(0.01)
                fill(path.with_name("other"))
            loss = model(torch.randn(8, 40)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.detach()}

        parts = {"model": model, "optimizer": optimizer}
        train_loop(LoopConfig("t", 9, path, 3, (5, 1), "a"), lambda start: iter(range(start, 9)), step, parts)
        return model.weight.detach()

    def fill(other):
        with contextlib.suppress(OSError), other.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    state = small_disk / "state.pt"
    with pytest.raises(UserError, match=r"state.pt: cannot be written .*disk full.*make room$"):
        train(state, fills=True)
    assert sorted(file.name for file in small_disk.iterdir()) == ["other", "state.pt"]
    assert load_state(state)["step"] == 3
    (small_disk / "other").unlink()
    assert torch.equal(train(state), train(small_disk.parent / "unbroken.pt"))


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
    plain = {"cbdm": False, "aid": False, "augment_probability": 0.0}
    config = load_preset("digits-lt").diffusion.model_copy(update=plain | settings)
    network = build_classifier("convnet", 10, 1, 8).eval().requires_grad_(False)
    statistics = ClassStatistics(torch.zeros(10, 128), torch.ones(10))
    share = torch.tensor([0.5, 0.5] + [0.0] * 8)
    schedule = Schedule(config.schedule, config.timesteps)
    model = Recorder()
    extractor = Extractor(network, 8, statistics, torch.zeros(10))
    return model, DiffusionLoss(model, config, schedule, share, extractor, seed=3)


def batch(n, start=0):
    images = torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return images, torch.arange(n) % 10, torch.arange(start, start + n)


def test_labels_are_dropped_per_sample_at_the_given_rate():
    model, loss = diffusion_loss(label_dropout=0.25)
    images, y, positions = batch(2000)
    loss(images, y, positions)
    labels = model.calls[0][2]
    dropped = labels == 10
    assert torch.equal(labels[~dropped], y[~dropped])
    assert abs(dropped.float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_timesteps_are_uniform_over_all():
    model, loss = diffusion_loss(timesteps=5)
    loss(*batch(5000))
    share = torch.bincount(model.calls[0][1], minlength=5) / 5000
    assert len(share) == 5 and (share - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / 5000)


def test_terms_are_switchable_and_sum_up():
    for cbdm in (False, True):
        for aid in (False, True):
            _, loss = diffusion_loss(cbdm=cbdm, aid=aid)
            terms = loss(*batch(8))
            expected = {"loss", "ddpm"} | ({"cbdm"} if cbdm else set()) | ({"aid"} if aid else set())
            assert set(terms) == expected
            assert terms["loss"].item() == pytest.approx(
                sum(float(v) for k, v in terms.items() if k != "loss"), rel=1e-5
            )
            assert set(loss(*batch(8), with_aid=False)) == expected - {"aid"}


@pytest.mark.parametrize(("share", "every"), [(1.0, 1), (0.25, 4)])
def test_cbdm_draws_other_labels_from_the_given_share_in_one_pass(share, every):
    model, loss = diffusion_loss(cbdm=True, cbdm_share=share)
    images, _, positions = batch(400)
    loss(images, torch.full((400,), 7), positions)
    ((x, t, y, _),) = model.calls
    assert torch.equal(x[:400][::every], x[400:]) and torch.equal(t[:400][::every], t[400:])
    assert len(y) == 400 + 400 // every and set(y[400:].tolist()) == {0, 1}


def test_epsilon_loss_is_the_plain_ddpm_loss():
    model, loss = diffusion_loss(prediction="epsilon", label_dropout=0.0)
    images, y, positions = batch(6)
    value = loss(images, y, positions)["loss"]
    x_t, t, _, _ = model.calls[0]
    a, s = loss.schedule.levels(t)
    eps = (x_t - a * (images.permute(0, 3, 1, 2) / 127.5 - 1)) / s
    assert value.item() == pytest.approx(ddpm_loss(model(x_t, t, y), eps).item(), rel=1e-3)


def test_gradients_reach_the_network_through_every_term():
    for settings in ({"cbdm": True}, {"aid": True}, {"cbdm": True, "aid": True, "aid_share": 0.5}):
        model, loss = diffusion_loss(**settings)
        terms = loss(*batch(8))
        terms["loss"].backward()
        assert model.gain.grad is not None and math.isfinite(model.gain.grad)


@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(augment):
    """Timestep, noise, flip, dropped and other labels depend on a sample's position alone."""
    settings = {"cbdm": True, "cbdm_share": 0.5, "aid": True, "aid_share": 0.25, "flip": True}
    _, loss = diffusion_loss(**settings, augment_probability=augment)
    images, y, positions = batch(24, start=2**32 - 10)
    whole = loss(images, y, positions)
    parts = [loss(images[i : i + 8], y[i : i + 8], positions[i : i + 8]) for i in range(0, 24, 8)]
    for name in whole:
        mean = sum(part[name].item() for part in parts) / 3
        assert whole[name].item() == pytest.approx(mean, rel=1e-5), name


def diverging(tmp_path, lr_backoff, worst):
    """Step 7 diverges while the rate is 1; steps before and after it do not."""
    model, rates = nn.Linear(1, 1), []

    def step(i, batch):
        rates.append((i, lr_backoff.factor if lr_backoff else 1.0))
        bad = i == 6 and rates[-1][1] == 1.0
        return {"loss": torch.tensor(worst if bad else 1.0)}

    job = LoopConfig("t", 9, tmp_path / "s.pt", 3, (0, 0), "a", images=4, metrics=tmp_path / "metrics.jsonl")
    with patch("diffult.engine.loop._LOG_EVERY", 1):
        train_loop(job, lambda start: iter(range(start, 9)), step, {"model": model}, lr_backoff)
    return rates


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 11.0])
def test_a_loss_that_diverges_goes_back_once_at_half_the_rate(tmp_path, worst):
    lr_backoff = LRBackoff()
    rates = diverging(tmp_path, lr_backoff, worst)
    assert rates == [(i, 1.0) for i in range(7)] + [(i, 0.5) for i in (6, 7, 8)]
    assert lr_backoff.factor == 0.5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert all(line["images_per_s"] > 0 and line["loss"] == 1 for line in lines)


def test_without_leave_to_go_back_a_diverged_loss_stops(tmp_path):
    with pytest.raises(UserError, match=r"the loss diverged by step 7 \(loss 11\)"):
        diverging(tmp_path, None, 11.0)
    assert torch.load(tmp_path / "s.pt", weights_only=True)["step"] == 6


def test_a_loss_that_diverges_again_after_going_back_stops(tmp_path):
    lr_backoff, steps = LRBackoff(), []

    def step(i, batch):
        steps.append(i)
        return {"loss": torch.tensor(math.nan if i >= 5 else 1.0)}

    job = LoopConfig("t", 9, tmp_path / "s.pt", 3, (0, 0), "a")
    with (
        patch("diffult.engine.loop._LOG_EVERY", 1),
        pytest.raises(UserError, match=r"the loss diverged by step 6 .*last good checkpoint: .*s.pt"),
    ):
        train_loop(job, lambda start: iter(range(start, 9)), step, {"model": nn.Linear(1, 1)}, lr_backoff)
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5] and lr_backoff.factor == 0.5


def test_a_loss_that_diverges_before_any_checkpoint_stops(tmp_path):
    job = LoopConfig("t", 9, tmp_path / "s.pt", 3, (0, 0), "a")
    with pytest.raises(UserError, match="last good checkpoint: none"):
        train_loop(
            job, lambda start: iter(range(start, 9)), lambda i, _: {"loss": torch.tensor(math.nan)}, {}, LRBackoff()
        )


@pytest.mark.parametrize("stop_at", [None, 3])
def test_what_has_exploded_is_measured_by_the_first_step_of_all(tmp_path, stop_at):
    """Not by the first look, when it may have exploded already; nor by the first step after a restart."""

    def step(i, batch):
        if i == stop_at:
            raise KeyboardInterrupt
        return {"loss": torch.tensor(1.0 + 4 * min(i, 5))}  # 1, 5, 9, 13, 17, 21, 21, ...

    def train():
        train_loop(LoopConfig("t", 9, tmp_path / "s.pt", 2, (0, 0), "a"), lambda start: iter(range(start, 9)), step, {})

    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            train()
        stop_at = None
    with pytest.raises(UserError, match=r"diverged by step 4 \(loss 13\)"):
        train()


def test_a_share_of_the_batch_estimates_the_whole_term():
    """With share 1/2 every second sample is taken: over both halves of a batch the mean is the whole batch's term."""
    images, labels, positions = batch(16)
    torch.manual_seed(0)
    _, whole = diffusion_loss(cbdm=True, aid=True)
    torch.manual_seed(0)  # the same extractor
    _, half = diffusion_loss(cbdm=True, aid=True, cbdm_share=0.5, aid_share=0.5)
    swapped = torch.arange(16) ^ 1  # the odd samples come where the even ones were
    parts = [half(images[rows], labels[rows], positions[rows]) for rows in (torch.arange(16), swapped)]
    expected = whole(images, labels, positions)
    for name in ("cbdm", "aid"):
        assert float(sum(part[name] for part in parts) / 2) == pytest.approx(float(expected[name]), rel=1e-5)
        assert float(parts[0][name]) != pytest.approx(float(parts[1][name]), rel=1e-3)
