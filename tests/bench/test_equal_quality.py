"""Samples a second at equal Fréchet distance, at a tiny size."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the bench extra (diffusers) is not installed")

from bench import equal_quality as bench
from bench import peers
from bench.contestants import SAME_NETWORK
from diffult.diffusion.schedule import Schedule
from diffult.longtail.extractor import load_extractor
from diffult.longtail.frechet import frechet_distance
from diffult.runs.run_dir import RunDir
from diffult.train_diffusion import train_diffusion

CPU = torch.device("cpu")


@pytest.fixture
def run(fresh: RunDir) -> RunDir:
    """With a network that diffusers has, too."""
    run = RunDir.open(fresh.path, overrides=SAME_NETWORK)
    train_diffusion(run)
    return run


def test_at_our_timesteps_both_draw_the_same_samples(run: RunDir) -> None:
    sampler, model = bench.our_sampler(run)
    config = run.config.diffusion
    schedule = Schedule(config.schedule, config.timesteps)
    grid = sampler.timesteps

    def make():
        made, _ = peers.scheduler(config, schedule, "dpm++", len(grid), CPU)
        made.set_timesteps(timesteps=grid)
        return made

    peer = peers.build_peer(model.unet, run.config.data.image_size)
    theirs = bench.peer_draws(model, run.config.seed, peer, make)
    labels, indices = torch.arange(8), torch.arange(8) + 3
    difference = (sampler.draw(labels, indices).int() - theirs(labels, indices).int()).abs()
    assert difference.float().mean() < 0.5  # grey levels; in bfloat16 both round


def test_the_yardstick_is_the_mean_over_classes(run: RunDir) -> None:
    judge, packed = load_extractor(run.folder("extractor"), CPU), run.packed()

    def draw(labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Training images of the class."""
        rows = [
            np.flatnonzero(packed.train.labels == c)[i] for c, i in zip(labels.tolist(), indices.tolist(), strict=True)
        ]
        return torch.from_numpy(packed.train.take(np.array(rows)))

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return judge.network.features(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).numpy()

    expected = [
        frechet_distance(
            features(packed.train.take(np.flatnonzero(packed.train.labels == c)[:3])),
            features(packed.val.take(np.flatnonzero(packed.val.labels == c))),
        )
        for c in range(10)
    ]
    assert bench.Yardstick(run, judge, 3)(draw) == pytest.approx(np.mean(expected), rel=1e-2)


def test_the_rival_is_the_scheduler_that_comes_as_near_with_the_fewest_evaluations() -> None:
    theirs = {"a": {5: 9.0, 10: 4.0, 20: 2.0}, "b": {5: 8.0, 10: 3.0, 20: 1.0}}
    assert bench.fewest({"ours": 4.5, "theirs": theirs}) == ("b", 10, True)  # of two with ten the nearer
    assert bench.fewest({"ours": 0.5, "theirs": theirs}) == ("b", 20, False)


def test_all_settings_race(run: RunDir, tmp_path: Path) -> None:
    results = bench.race(run, "UniPC", 5, rounds=2, turn_s=0.01)
    assert list(results) == ["ours", *peers.SETTINGS] and all(len(r["seconds"]) == 2 for r in results.values())
