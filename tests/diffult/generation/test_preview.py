"""Grids of samples at checkpoints: they are there, show the averaged weights, and leave the training as it was."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffult.engine.distributed import ALONE, World
from diffult.generate import open_sampler
from diffult.generation.config import GenerateConfig
from diffult.generation.preview import Preview
from diffult.reporting.pictures import ArraySamples, sample_grid
from diffult.runs.files import load_tensors
from diffult.runs.run_dir import RunDir
from diffult.train_diffusion import train_diffusion


def train(run: RunDir, world: World = ALONE) -> None:
    train_diffusion(run, world)


def grids(run: RunDir) -> list[Path]:
    return sorted((run.path / "diffusion").glob("samples-*"))


def test_a_grid_shows_what_generate_draws_with_the_averaged_weights_of_its_step(fresh, tmp_path, monkeypatch):
    """On a card too, where a grid is drawn in a stream of its own while training goes on."""
    averages, preview = {}, Preview.__call__

    def remembering(self, step, values):
        averages[step] = self.optimizer.ema_state_dict()
        preview(self, step, values)

    monkeypatch.setattr(Preview, "__call__", remembering)
    train(fresh)
    assert [file.name for file in grids(fresh)] == ["samples-0000003.png", "samples-0000006.png"]
    assert list(averages) == [3, 6]

    sampler = open_sampler(fresh, GenerateConfig(balance_to=0, sampler="dpm++", steps=10), fresh.config.seed)
    device, classes = sampler.device, fresh.packed().classes
    labels, indices = torch.arange(10).repeat_interleave(4), torch.arange(40) % 4
    seen = []
    for file, average in zip(grids(fresh), averages.values(), strict=True):
        sampler.unet.load_state_dict(average)
        parts = zip(labels.to(device).split(8), indices.to(device).split(8), strict=True)  # diffusion.batch_size
        images = torch.cat([sampler.draw(*part) for part in parts]).cpu().numpy()
        sample_grid(ArraySamples(images, labels.numpy()), classes, tmp_path / "grid.png", 4)
        seen.append(np.asarray(Image.open(file)))
        np.testing.assert_array_equal(seen[-1], np.asarray(Image.open(tmp_path / "grid.png")))
    assert (seen[0] != seen[1]).any()


def test_the_training_is_the_same_without_grids(tiny_run, fresh, monkeypatch):
    monkeypatch.setattr(Preview, "__call__", lambda *_: None)
    train(fresh)
    assert grids(tiny_run) and not grids(fresh)
    (with_grids, _), (without, _) = (load_tensors(r.path / "diffusion" / "ema.safetensors") for r in (tiny_run, fresh))
    assert all(torch.equal(with_grids[name], without[name]) for name in with_grids)


def test_other_processes_draw_none(fresh, monkeypatch):
    monkeypatch.setattr(World, "barrier", lambda _: None)
    monkeypatch.setattr(World, "gather", lambda _, mine: [mine, mine])  # nobody is there to exchange with
    monkeypatch.setattr(World, "average_", lambda *_: None)
    train(fresh, World(1, 2))
    assert not (fresh.path / "diffusion").exists()


def test_a_deleted_grid_does_not_make_the_stage_unfinished(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    grids(run)[0].unlink()
    assert run.done("diffusion")
