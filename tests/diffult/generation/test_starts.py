"""Samples that start from real images of other classes: which images, and what becomes of them."""

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import torch
from plain_solver import solve

from diffult.diffusion.samplers import SAMPLERS, SigmaRange, sigma_grid
from diffult.diffusion.schedule import Schedule
from diffult.generate import generate_stage, open_sampler
from diffult.generation import starts
from diffult.generation.config import GenerateConfig
from diffult.generation.sampler import Sampler
from diffult.generation.shards import open_kept
from diffult.generation.starts import OtherClasses
from diffult.models.config import UNetConfig
from diffult.models.unet import UNet
from diffult.runs.run_dir import RunDir
from kernels.random import normal

COUNTS = np.array([5, 1, 0, 4])
STARTING = ["generate.start=other_classes", "generate.spacing=sigma", "generate.sampler=dpm++", "generate.steps=3"]


def pool() -> OtherClasses:
    """Image n of the sorted set is grey n all over."""
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 8, 8, 3).contiguous()
    return OtherClasses(images, torch.tensor([0, *COUNTS.cumsum()]))


def chosen(labels, indices, seed=3) -> np.ndarray:
    return pool().choose(seed, torch.as_tensor(labels), torch.as_tensor(indices))[:, 0, 0, 0].numpy()


def test_every_image_of_every_other_class_is_as_likely_and_none_of_its_own():
    owner = np.repeat(np.arange(4), COUNTS)
    for c in range(4):
        seen = np.bincount(chosen(np.full(9000, c), np.arange(9000)), minlength=10)
        assert (seen[owner == c] == 0).all()
        expected = 9000 / (owner != c).sum()
        assert np.abs(seen[owner != c] - expected).max() < 5 * np.sqrt(expected)


def test_the_choice_follows_the_name_alone():
    labels, indices = np.tile(np.arange(4), 50), np.arange(200)
    all_at_once = chosen(labels, indices)
    order = np.random.default_rng(0).permutation(200)
    assert np.array_equal(chosen(labels[order], indices[order]), all_at_once[order])
    assert not np.array_equal(chosen(labels, indices, seed=4), all_at_once)


def test_samples_are_those_of_the_noised_image():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=()), 8, 3, 4)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unet.eval().requires_grad_(False)
    schedule, cpu = Schedule("cosine", 1000), torch.device("cpu")
    settings = GenerateConfig(
        balance_to=0, sampler="dpm++sde", steps=4, spacing="sigma", sigma_max=2.0, sigma_min=0.05, rho=3.0
    )
    sampler = Sampler(unet, schedule, "v", settings, (3, 8, 8), 4, 11, torch.float32, cpu, starts=pool())
    labels, indices = torch.tensor([3, 1, 0]), torch.tensor([0, 7, 2])
    drawn = sampler.draw(labels, indices)

    grid = sigma_grid(schedule.alphas_cumprod, 4, SigmaRange(2.0, 0.05, 3.0))
    noise = functools.partial(normal, 11, labels, indices, shape=(3, 8, 8))
    a, s = (x.sqrt() for x in (schedule.alphas_cumprod[grid[0]], 1 - schedule.alphas_cumprod[grid[0]]))
    grey = torch.from_numpy(chosen(labels, indices, seed=11)).double() / 127.5 - 1
    begin = a * grey[:, None, None, None] + s * noise(0).double()

    def denoise(x, t):
        abar = schedule.alphas_cumprod[t]
        out = unet(x.float(), torch.full((3,), t), labels).double()
        return (abar.sqrt() * x - (1 - abar).sqrt() * out).clamp(-1, 1)

    rows = SAMPLERS["dpm++sde"](grid, schedule.alphas_cumprod, 0.0)
    expected = (solve(denoise, begin, grid, rows, noise).permute(0, 2, 3, 1) + 1) * 127.5
    assert (drawn.double() - expected).abs().max() < 0.51  # rounding to whole grey levels
    assert (replace(sampler, starts=None).draw(labels, indices).double() - expected).abs().max() > 5


def test_a_run_starts_from_its_training_images(fresh, tiny_run):
    run = RunDir.open(fresh.path, overrides=STARTING)
    shutil.copytree(tiny_run.path / "diffusion", run.folder("diffusion"))
    generate_stage(run)
    train = run.packed().train
    order = np.argsort(train.labels, kind="stable")
    images = train.take(np.arange(len(train)))[order]
    sampler = open_sampler(run, run.config.generate, run.config.seed)
    assert sampler.starts is not None
    assert np.array_equal(sampler.starts.images.numpy(), images)
    assert sampler.starts.first.tolist() == [0, *np.bincount(train.labels).cumsum()]
    kept = open_kept(run.folder("generate"))
    drawn = sampler.draw_all(np.array(kept.labels), np.array(kept.index))
    assert (drawn.int() - torch.from_numpy(kept.take(np.arange(len(kept)))).int()).abs().float().mean() < 0.1
    # the manifest knows: the folder is not for samples of noise alone
    assert json.loads((run.folder("generate") / "manifest.json").read_text())["start"] == "other_classes"


def test_a_large_set_is_thinned_evenly(tiny_run, monkeypatch):
    packed = tiny_run.packed()
    monkeypatch.setattr(starts, "_MOST_BYTES", 40 * 64 + 1)
    few = OtherClasses.of(packed, torch.device("cpu"), None)
    assert len(few.images) == 40 and few.first[-1] == 40
    share = np.diff(few.first.numpy()) / 40 - packed.counts / packed.counts.sum()
    assert np.abs(share).max() <= 1 / 40 + 1e-9
