"""The engine: draws against a plain computation, counted work, compiling, samples without a disk."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_solver import solve
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffult.diffusion.samplers import SAMPLERS, timestep_grid
from diffult.diffusion.schedule import Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.generate import command, open_sampler, open_store
from diffult.generation.candidates import accepted
from diffult.generation.config import GenerateConfig
from diffult.generation.fill import _shares, fill, speed
from diffult.generation.sampler import Sampler
from diffult.generation.shards import open_kept
from diffult.longtail.extractor import load_extractor
from diffult.longtail.quota import Quota
from diffult.models.config import UNetConfig
from diffult.models.unet import UNet
from diffult.runs.run_dir import RunDir
from kernels.random import normal

SHAPE, NULL, SEED = (3, 8, 8), 5, 11
SCHEDULE = Schedule("cosine", 1000)
LABELS, INDICES = torch.tensor([3, 1, 4]), torch.tensor([0, 7, 2])
NETWORKS = {
    "ddpm": UNetConfig(channels=8, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,)),
    "adm": UNetConfig(
        channels=8,
        multipliers=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(4,),
        scale_shift=True,
        resample_in_block=True,
    ),
    "one level": UNetConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=()),
}


def network(name: str, channels: int = 3) -> UNet:
    torch.manual_seed(0)
    unet = UNet(NETWORKS[name], 8, channels, NULL)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # undo the zeros, so that every part acts
    return unet.eval().requires_grad_(False)


def engine(unet: UNet, compiled: bool = False, **settings: object) -> Sampler:
    config = GenerateConfig(balance_to=0, batch_size=3, **settings)
    cpu = torch.device("cpu")
    return Sampler(unet, SCHEDULE, "v", config, SHAPE, NULL, SEED, torch.float32, cpu, compiled)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_real_network_draws_what_a_plain_computation_says(name, guidance):
    """With and without class in two passes of the network, where the sampler makes one of a doubled batch."""
    unet, steps = network(name), 12
    drawn = engine(unet, sampler="dpm++", steps=steps, guidance=guidance).draw(LABELS, INDICES)

    def denoise(x, t):
        times, without = torch.full((3,), t), torch.full((3,), NULL)
        out = unet(x.float(), times, LABELS).double()
        out = out + guidance * (out - unet(x.float(), times, without).double())
        abar = SCHEDULE.alphas_cumprod[t]
        return (abar.sqrt() * x - (1 - abar).sqrt() * out).clamp(-1, 1)

    noise = functools.partial(normal, SEED, LABELS, INDICES, shape=SHAPE)
    grid = timestep_grid(1000, steps)
    rows = SAMPLERS["dpm++"](grid, SCHEDULE.alphas_cumprod, 0.0)
    grey = (solve(denoise, noise(0).double(), grid, rows, noise).permute(0, 2, 3, 1) + 1) * 127.5
    assert (drawn.double() - grey).abs().max() < 0.51  # rounding to whole grey levels


def test_listed_timesteps_are_drawn_at():
    unet, spaced = network("one level"), {"spacing": "sigma", "sigma_max": 40.0, "sigma_min": 0.05, "rho": 3.0}
    listed = engine(unet, sampler="dpm++", steps=5, timesteps=(983, 965, 905, 611, 24)).draw(LABELS, INDICES)
    assert torch.equal(listed, engine(unet, sampler="dpm++", steps=5, **spaced).draw(LABELS, INDICES))
    assert not torch.equal(listed, engine(unet, sampler="dpm++", steps=5).draw(LABELS, INDICES))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_work_reported_is_the_work_done(name):
    sampler = engine(network(name), steps=5, guidance=1.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sampler.draw(LABELS, INDICES)
    assert sampler.flops() * len(LABELS) == counter.get_total_flops()
    assert sampler.flops() == 2 * engine(network(name), steps=5).flops()


@pytest.mark.parametrize("channels", [1, 3])  # of one channel, strides may differ that mean the same
def test_a_compiled_network_holds_in_one_graph_and_draws_the_same(channels, front_end_alone, caplog):
    settings = {"steps": 6, "guidance": 1.0}
    unet, shape = network("one level", channels), (channels, *SHAPE[1:])
    sampler = replace(engine(unet, compiled=True, **settings), shape=shape)
    with caplog.at_level("INFO", "diffult.generation.sampler"):
        sampler.prepare()
    assert caplog.text.count("network compiled in") == 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    drawn = sampler.draw(LABELS, INDICES)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing was left to compile
    assert torch.equal(drawn, replace(engine(unet, **settings), shape=shape).draw(LABELS, INDICES))


def test_samples_without_a_disk_are_those_of_the_command(tiny_run, tmp_path):
    """As the engine's docstring shows; candidates of a batch that pass beyond the quota are not among them."""
    run = RunDir.open(tiny_run.path)
    quotas = np.array([0, 3, 0, 5, 1, 0, 0, 0, 9, 4])
    settings = run.config.generate.model_copy(update={"max_draws": 6.0})
    sampler = open_sampler(run, settings, seed=3)
    extractor = load_extractor(run.folder("extractor"), sampler.device)
    batches = list(accepted(sampler, extractor, Quota(quotas, settings.max_draws)))
    images, labels, indices = (np.concatenate(parts) for parts in zip(*batches, strict=True))

    store = open_store(tmp_path, run, settings, quotas, seed=3)
    fill(sampler, extractor, store, Quota(quotas, settings.max_draws), tuple("0123456789"))
    kept = open_kept(tmp_path)
    order = np.lexsort((indices, labels))
    assert np.array_equal(labels[order], kept.labels) and np.array_equal(indices[order], kept.index)
    assert np.array_equal(images[order], kept.take(np.arange(len(kept))))


def test_command_counts_and_profiles(tiny_run, tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        command(run=tiny_run.path, fast=True, steps=4, per_class=1, out=tmp_path / "out", profile=True)
    assert "4 evaluations each (dpm++, 4 steps)\n" in caplog.text
    printed = json.loads(capsys.readouterr().out)
    assert (printed["nfe"], printed["accepted"]) == (4, 10)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["sampler"], manifest["steps"], manifest["guidance"]) == ("dpm++", 4, 0.0)
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == "aten::pixel_shuffle"]
    assert len(steps) == 2 * 4  # two batches of four evaluations


def test_live_line():
    quota = Quota(np.array([2, 4, 4, 0]), 10.0)
    quota.record(np.repeat([0, 1, 2], [2, 5, 4]), np.array([0, 1, *range(5), *range(4)]), np.array([0] * 6 + [2] * 5))
    assert _shares(quota, ("a", "b", "c", "d")) == "55% of 11 kept (c: 0%)"
    assert speed(200.0, 5e9, 4e12) == "200 drawn/s, 1 TFLOP/s, 25% of peak"
    assert speed(200.0, 5e9, 0.0) == "200 drawn/s, 1 TFLOP/s"


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "dpm++sde"])
def test_recorded_evaluations_are_those_of_the_network(tiny_run, sampler, monkeypatch):
    """The first evaluations run as they are, the fourth is recorded, the others are replayed."""
    settings = tiny_run.config.generate.model_copy(update={"sampler": sampler, "steps": 6, "guidance": 1.0})
    recording, plain = (open_sampler(tiny_run, settings, seed=3) for _ in range(2))
    recording.prepare()
    for start in range(0, 32, 8):
        names = torch.arange(start, start + 8).cuda()
        drawn = recording.draw(names % 10, names)
        with monkeypatch.context() as patch:
            patch.setattr(CUDAGraphRunner, "__call__", lambda self, *tensors: self.function(*tensors))
            assert torch.equal(drawn, plain.draw(names % 10, names))
