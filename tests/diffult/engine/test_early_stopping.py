"""When a training ends by its score: on made-up scores, and killed and taken up again."""

import math

import pytest
import torch
from torch import nn

from diffult.engine.early_stopping import EarlyStopping, Judgement
from diffult.engine.loop import LoopConfig, train_loop
from diffult.runs.files import load_state

NAN = math.nan


def run(scores, patience, faults=()):
    """Feeds scores, one each 10 steps, until it wants to end. Returns it with how many it took."""
    feed = iter(scores)
    step = [0]
    stopping = EarlyStopping(
        10,
        lambda: Judgement({}, next(feed), "too many copies" if step[0] in faults else ""),
        lambda: {"w": torch.tensor(float(step[0]))},
        patience,
        "loss",
    )
    for step[0] in range(10, 10 * len(scores) + 1, 10):
        stopping(step[0])
        if stopping.reason:
            break
    return stopping


@pytest.mark.parametrize(
    ("scores", "faults", "best", "ended", "reason"),
    [
        ([5, 4, 3, 2, 1], (), 50, 50, ""),
        ([5, 3, 4, 4, 9, 1], (), 20, 50, "the loss has not improved since step 20"),
        ([5, 3, 4, 4, 2, 3, 3], (), 50, 70, ""),  # two without an improvement are not three
        ([3, 3, 3, 3, 3], (), 10, 40, "the loss has not improved since step 10"),  # the same is no improvement
        ([5, NAN, NAN, NAN], (), 10, 40, "the loss has not improved since step 10"),
        ([5, 4, 3, 2], (30,), 20, 30, "too many copies"),  # the better score of step 30 does not count
        ([5, 4], (10,), 10, 10, "too many copies"),  # there is nothing better
    ],
)
def test_it_ends_after_so_many_scores_without_an_improvement(scores, faults, best, ended, reason):
    stopping = run(scores, 3, faults)
    assert (stopping.best_step, stopping.step, stopping.reason) == (best, ended, reason)
    assert stopping.best["w"] == best


def test_without_patience_it_only_watches():
    stopping = run([1, 2, 3, 4, 5, 6], None, faults=(20,))
    assert (stopping.step, stopping.reason, stopping.best) == (60, "", {})


def train(path, die_at=None):
    """A weight that overshoots a target, judged every 3 steps by its distance, a checkpoint every 4; 40 steps at most.
    Returns the weight, what stops it, and the steps that were done."""
    model, done = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step(i, batch):
        if i == die_at:
            raise KeyboardInterrupt
        done.append(i)
        optimizer.zero_grad()
        loss = -model(1 + 0.1 * torch.randn(2, 1)).mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach().abs()}

    def judge():
        value = abs(model.weight.item() - 0.5)
        return Judgement({"far": value}, value)

    stopping = EarlyStopping(3, judge, lambda: {"w": model.weight.detach().clone()}, 2)
    config = LoopConfig("t", 40, path, 4, (5, 1), "a")
    parts = {"model": model, "optimizer": optimizer}
    train_loop(config, lambda start: iter(range(start, 40)), step, parts, check=stopping)
    return model.weight.detach(), stopping, done


@pytest.mark.parametrize("die_at", [2, 5, 9, 13])  # before a checkpoint, between checkpoint and check, ...
def test_killed_and_taken_up_it_ends_at_the_same_step_with_the_same_weights(tmp_path, monkeypatch, die_at):
    monkeypatch.setattr("diffult.engine.divergence._EXPLODED", math.inf)
    weight, stopping, done = train(tmp_path / "a.pt")
    assert stopping.reason and 0 < stopping.best_step < stopping.step < 40
    assert done == list(range(stopping.step)) and stopping.step > 13
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b.pt", die_at)
    again, resumed, _ = train(tmp_path / "b.pt")
    assert torch.equal(again, weight) and torch.equal(resumed.best["w"], stopping.best["w"])
    for name in ("best_step", "best_score", "reason", "step"):
        assert getattr(resumed, name) == getattr(stopping, name)


def test_what_has_ended_stays_ended(tmp_path, monkeypatch):
    """Killed after its last checkpoint, before its weights were used: no further step."""
    monkeypatch.setattr("diffult.engine.divergence._EXPLODED", math.inf)
    weight, stopping, _ = train(tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt")["step"] == stopping.step
    again, resumed, done = train(tmp_path / "a.pt")
    assert not done and resumed.reason == stopping.reason
    assert torch.equal(again, weight) and torch.equal(resumed.best["w"], stopping.best["w"])
