"""A loss that diverges, through the whole diffusion stage: refused, or gone back from once, and no bad model saved."""

import json
import shutil
from functools import partial

import pytest
import torch
from conftest import TINY

from diffult.engine.loop import LRBackoff
from diffult.errors import UserError
from diffult.runs.files import load_state, load_tensors
from diffult.runs.run_dir import RunDir
from diffult.train_diffusion import train_diffusion


@pytest.fixture
def train(tiny_run, tmp_path):
    """Trains the tiny run's diffusion model anew, with settings of its own, and returns the run."""

    def train(name: str, *settings: str) -> RunDir:
        run = RunDir.open(tmp_path / name, "digits-lt", [*TINY, *settings])
        for stage in ("pack", "extractor"):
            shutil.copytree(tiny_run.folder(stage), run.folder(stage), dirs_exist_ok=True)
        run.save_config()
        train_diffusion(run)
        return run

    return train


@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.parametrize("on_divergence", ["stop", "go_back"])
def test_a_rate_that_explodes_stops_with_the_step_and_what_to_do(train, tmp_path, every, on_divergence):
    """From the first step on, so that the first look and the first checkpoint may see it exploded already."""
    settings = [f"diffusion.checkpoint_every={every}", f"diffusion.on_divergence={on_divergence}"]
    for _ in range(2):  # typed again it must not take what it left for a good start
        with pytest.raises(UserError, match=r"the loss diverged by step \d \(.*\); lower the learning rate") as caught:
            train("run", "diffusion.learning_rate=30", *settings)
        assert "\n" not in str(caught.value) and "nan" not in str(caught.value)  # large, but a number
        folder = tmp_path / "run" / "diffusion"
        assert not (folder / "ema.safetensors").exists() and not (folder / "done.json").exists()


def test_the_noise_of_aid_is_no_divergence(train, monkeypatch):
    """From one step to the next it may be a thousand times as large, as it is divided by the noise level's square."""
    monkeypatch.setattr("diffult.engine.loop._LOG_EVERY", 1)
    run = train("run")
    lines = [json.loads(line) for line in (run.folder("diffusion") / "metrics.jsonl").read_text().splitlines()]
    assert max(line["loss"] for line in lines) > 10 * lines[0]["loss"]


@pytest.fixture
def spike(monkeypatch):
    """The rate is 2^20 times what it should be from step 3 on, where the first checkpoint is."""
    monkeypatch.setattr("diffult.diffusion.trainer.learning_rate_factor", lambda i, *_, **__: 2.0**20 if i >= 3 else 1)


def test_it_goes_back_once_to_the_good_checkpoint_and_ends_as_if_nothing_had_been(train, monkeypatch, request):
    monkeypatch.setattr("diffult.diffusion.trainer.learning_rate_factor", lambda *_, **__: 1.0)
    plain = train("plain")
    request.getfixturevalue("spike")
    monkeypatch.setattr(
        "diffult.train_diffusion.LRBackoff", partial(LRBackoff, after=2.0**-20)
    )  # undoes the spike to the bit
    back = train("back", "diffusion.on_divergence=go_back")

    assert json.loads((back.folder("diffusion") / "done.json").read_text())["learning_rate_factor"] == 2.0**-20
    losses = [
        [json.loads(line)["loss"] for line in (run.folder("diffusion") / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, back)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    weights = [load_tensors(run.folder("diffusion") / "ema.safetensors")[0] for run in (plain, back)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize(("on_divergence", "attempts"), [("stop", 1), ("go_back", 2)])
def test_a_rate_that_explodes_late_keeps_the_good_checkpoint(train, spike, tmp_path, caplog, on_divergence, attempts):
    with pytest.raises(UserError, match=r"diverged by step 6 .*last good checkpoint: .*state.pt"):
        train("run", f"diffusion.on_divergence={on_divergence}")
    assert caplog.text.count("at 0.5 times the learning rate") == attempts - 1
    folder = tmp_path / "run" / "diffusion"
    assert not (folder / "ema.safetensors").exists() and not (folder / "done.json").exists()
    state = load_state(folder / "state.pt")
    assert state["step"] == 3
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [3]
