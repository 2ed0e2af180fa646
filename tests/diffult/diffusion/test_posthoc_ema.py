"""Averages whose length is chosen after training, against averages summed step by step, and through the stages."""

import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

from diffult.artifacts import load_diffusion, load_extractor
from diffult.config import load_preset
from diffult.data import load_data
from diffult.diffusion.posthoc_ema import (
    KEPT,
    PowerAverages,
    average,
    sigma_rel_to_gamma,
    snapshot_steps,
    solve_weights,
)
from diffult.engine import device
from diffult.errors import UserError
from diffult.generate import command, open_sampler
from diffult.run import run_pipeline
from diffult.runs.files import load_state, load_tensors
from diffult.runs.run_dir import RunDir
from diffult.train_diffusion import train_diffusion
from kernels.adamw_ema import AdamWEma

CPU = torch.device("cpu")


def walk(steps: int) -> np.ndarray:
    """Weights of three parameters after each step: noise around a path that slows down, float64 [steps, 3]."""
    rng = np.random.default_rng(0)
    path = np.log1p(np.arange(1, steps + 1))[:, None] * [1.0, -2.0, 0.5]
    return path + rng.normal(size=(steps, 3))


def stepwise(weights: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The power-function average of all steps by its recursion, float64."""
    result = weights[0]
    for t in range(2, len(weights) + 1):
        beta = (1 - 1 / t) ** (sigma_rel_to_gamma(sigma_rel) + 1)
        result = beta * result + (1 - beta) * weights[t - 1]
    return result


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_profile_of_an_exponent_has_the_length_asked_for(sigma_rel):
    gamma, at = sigma_rel_to_gamma(sigma_rel), (np.arange(10**6) + 0.5) / 10**6
    profile = at**gamma / (at**gamma).sum()
    mean = (profile * at).sum()
    assert np.sqrt((profile * (at - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-5)


def test_snapshots_are_equally_far_apart_and_end_with_the_training():
    assert snapshot_steps(500, 20) == list(range(25, 501, 25))
    assert snapshot_steps(7, 3) == [3, 5, 7]
    assert snapshot_steps(3, 20) == [1, 2, 3] and snapshot_steps(500, 0) == []


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.08, 0.2])
def test_weights_are_those_of_a_fit_to_sampled_profiles(sigma_rel):
    """Least squares of the profiles at 200,000 points, by numpy's own solver."""
    times, gammas = np.repeat([2.0, 3.0, 5.0, 6.0], 2), np.tile([sigma_rel_to_gamma(kept) for kept in KEPT], 4)
    at = (np.arange(200_000) + 0.5) / 200_000 * 6

    def profile(t, gamma):
        return np.where(at <= t, (gamma + 1) * (at / t) ** gamma / t, 0)

    columns = np.stack([profile(*each) for each in zip(times, gammas, strict=True)], 1)
    gamma = sigma_rel_to_gamma(sigma_rel)
    fitted = np.linalg.lstsq(columns, profile(6.0, gamma), rcond=None)[0]
    np.testing.assert_allclose(solve_weights(times, gammas, 6.0, gamma), fitted / fitted.sum(), atol=2e-3)


def rebuilt(weights: np.ndarray, count: int, sigma_rel: float) -> np.ndarray:
    steps = snapshot_steps(len(weights), count)
    kept = np.stack([stepwise(weights[:t], length) for t in steps for length in KEPT])
    times, gammas = np.repeat(np.array(steps, float), 2), np.tile([sigma_rel_to_gamma(k) for k in KEPT], len(steps))
    return solve_weights(times, gammas, len(weights), sigma_rel_to_gamma(sigma_rel)) @ kept


@pytest.mark.parametrize(("sigma_rel", "bound"), [(0.03, 2e-3), (0.07, 1e-4), (0.15, 2e-4), (0.25, 1e-2)])
def test_snapshots_give_an_average_that_was_not_kept_and_more_of_them_a_better_one(sigma_rel, bound):
    weights = walk(1000)
    wanted = stepwise(weights, sigma_rel)
    errors = [np.abs(rebuilt(weights, count, sigma_rel) - wanted).max() for count in (5, 20, 80)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < bound
    others = [np.abs(stepwise(weights, kept) - wanted).max() for kept in KEPT]  # what would be there without
    assert errors[1] < min(others) / 10


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.28, 0.3])
def test_weights_that_do_not_move_stay_what_they_are(sigma_rel):
    np.testing.assert_allclose(rebuilt(np.ones((50, 3)), 4, sigma_rel), 1, rtol=1e-9)


def test_a_training_writes_averages_from_which_another_is_read(tmp_path):
    weights = walk(200)
    optimizer = AdamWEma(nn.Linear(3, 1, bias=False))
    averages, steps = PowerAverages(optimizer), snapshot_steps(200, 20)
    for t, row in enumerate(weights, 1):
        optimizer.views(optimizer.master)["weight"].copy_(torch.from_numpy(row))
        averages.update(t)
        if t in steps:
            averages.write(tmp_path, t, {})
    for kept in KEPT:
        mine = optimizer.views(averages.averages[kept])["weight"]
        np.testing.assert_allclose(mine[0], stepwise(weights, kept), rtol=1e-5)
    for sigma_rel in (0.05, 0.07, 0.15):
        result = average(tmp_path, steps, sigma_rel)
        assert result.keys() == {"weight"} and result["weight"].dtype == torch.float32
        np.testing.assert_allclose(result["weight"][0], stepwise(weights, sigma_rel), rtol=5e-4)
    file = tmp_path / "0000100-0.10.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"0000100-0.10.safetensors: damaged"):
        average(tmp_path, steps, 0.07)
    file.unlink()
    with pytest.raises(UserError, match=r"0000100-0.10.safetensors: not found; without it .* ema_length but 0") as told:
        average(tmp_path, steps, 0.07)
    assert "\n" not in str(told.value)


SETTINGS = [
    *TINY, "precision=float32", "diffusion.ema_snapshots=5", "diffusion.learning_rate=5e-2", "diffusion.warmup_steps=0",
    "generate.ema_length=0.15",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory) -> tuple[RunDir, dict[str, np.ndarray]]:
    """A tiny run that keeps snapshots, up to its samples; and each parameter after each step, float64."""
    run = RunDir.open(tmp_path_factory.mktemp("posthoc") / "run", "digits-lt", SETTINGS)
    seen: list[dict[str, torch.Tensor]] = []
    step = AdamWEma.step

    def recording(self, *args):
        norm = step(self, *args)
        seen.append({name: value.double().clone() for name, value in self.views(self.master).items()})
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamWEma, "step", recording)
        run_pipeline(run, "generate")
    return run, {name: torch.stack([row[name] for row in seen]).numpy() for name in seen[0]}


def test_a_run_draws_with_the_length_that_is_chosen(trained):
    run, weights = trained
    assert all(len(rows) == 6 for rows in weights.values())
    exponential, _ = load_tensors(run.path / "diffusion" / "ema.safetensors")

    def far(state, wanted) -> float:
        return sum(np.square(state[name].numpy() - wanted[name]).sum() for name in wanted) ** 0.5

    for sigma_rel in (0.07, 0.1, 0.15):
        wanted = {name: stepwise(rows, sigma_rel) for name, rows in weights.items()}
        off = far(load_diffusion(run, CPU, ema_length=sigma_rel).state_dict(), wanted)
        last = far({name: torch.from_numpy(rows[-1]) for name, rows in weights.items()}, wanted)
        assert off < last / 10 and off < far(exponential, wanted), sigma_rel
    own, drawing = load_diffusion(run, CPU), open_sampler(run, run.config.generate, 0).unet
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), drawing.parameters(), strict=True))
    settings = run.config.generate.model_copy(update={"ema_length": 0.07})
    other, drawing = load_diffusion(run, CPU, ema_length=0.07), open_sampler(run, settings, 0).unet
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), drawing.parameters(), strict=True))
    assert far(own.state_dict(), wanted) == pytest.approx(off)  # the run's own 0.15, the last of those above
    loaded = load_diffusion(run, CPU, ema_length=0.0).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in exponential.items())
    assert any(not torch.equal(value, exponential[name]) for name, value in own.named_parameters())


def test_a_training_cut_in_the_middle_ends_with_the_same_snapshots(trained, tmp_path, monkeypatch):
    whole, _ = trained
    shutil.copytree(whole.path / "extractor", tmp_path / "run" / "extractor")
    shutil.copy(whole.path / "config.toml", tmp_path / "run")
    run, seen = RunDir.open(tmp_path / "run"), []
    data, extractor = load_data(run.config.data), load_extractor(run, CPU)

    def seed_step(*key):
        seen.append(key)
        if len(seen) == 6:  # the checkpoint of step 3 is there, and snapshots beyond it
            raise KeyboardInterrupt
        device.seed_step(*key)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("diffult.engine.loop.seed_step", seed_step)
        train_diffusion(run, data, extractor)
    folder = run.path / "diffusion" / "snapshots"
    assert (folder / "0000005-0.05.safetensors").exists() and not (folder / "0000006-0.05.safetensors").exists()
    (folder / ".0000006-0.05.safetensors.1.tmp").write_text("")  # what a kill leaves
    for file in folder.glob("0000005*"):
        file.write_text("")
    train_diffusion(run, data, extractor)
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(f"{t:07d}-{kept:.2f}.safetensors" for t in (2, 3, 4, 5, 6) for kept in KEPT)
    for name in names:
        mine, other = (load_tensors(path / "diffusion" / "snapshots" / name)[0] for path in (run.path, whole.path))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine), name


def test_samples_of_another_length_are_not_mixed_in(trained, tmp_path, capsys):
    run, _ = trained
    command(run=run.path, per_class=2, ema_length=0.05, out=tmp_path)
    command(run=run.path, per_class=2, ema_length=0.05, out=tmp_path)
    with pytest.raises(UserError, match=r"samples made otherwise \(ema_length: 0.05, now 0.1\)"):
        command(run=run.path, per_class=2, ema_length=0.1, out=tmp_path)
    with pytest.raises(UserError, match=r"--ema-length 0.5: expected 0, or 0.02 to 0.3"):
        command(run=run.path, ema_length=0.5)


def test_without_snapshots_nothing_is_kept_and_a_length_is_refused(tiny_run):
    assert not (tiny_run.path / "diffusion" / "snapshots").exists()
    assert "averages" not in load_state(tiny_run.path / "diffusion" / "state.pt")
    with pytest.raises(UserError, match=r"--ema-length 0.1: the model keeps one average; train with"):
        command(run=tiny_run.path, ema_length=0.1)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["generate.ema_length=0.1"], r"generate.ema_length needs diffusion.ema_snapshots, such as 20"),
        (["generate.ema_length=0.01", "diffusion.ema_snapshots=20"], r"ema_length = 0.01 is neither 0 nor in 0.02"),
        (["generate.ema_length=0.31", "diffusion.ema_snapshots=20"], r"generate.ema_length: .*0.3, got 0.31"),
        (["diffusion.ema_snapshots=-1"], r"diffusion.ema_snapshots: .*got -1"),
    ],
)
def test_lengths_that_cannot_be_are_refused(overrides, expected):
    with pytest.raises(UserError, match=expected):
        load_preset("digits-lt", overrides)
