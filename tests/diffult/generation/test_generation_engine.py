"""The engine: deep-feature caching against a plain computation, counted work, compiling, samples without a disk."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffult.artifacts import load_extractor
from plain_solver import solve
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffult.config import GenerateConfig
from diffult.diffusion.samplers import SAMPLERS
from diffult.diffusion.schedule import Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.generate import command, open_sampler, open_store
from diffult.generation.candidates import accepted
from diffult.generation.fill import _shares, fill, speed
from diffult.generation.sampler import Sampler
from diffult.generation.shards import open_kept
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


def test_the_plan_of_caching_and_guidance():
    settings = GenerateConfig(balance_to=0, steps=10, guidance=1.0, guidance_interval=(0.2, 0.6), cache_interval=3)
    plan = settings.plan(SCHEDULE)
    assert [step.t for step in plan if step.guided] == [599, 499, 399, 299]
    # Every third step, and the one where guidance begins: "no class" has nothing cached there.
    assert [i for i, step in enumerate(plan) if step.full] == [0, 3, 4, 6, 9]
    assert settings.evaluations(SCHEDULE) == (14, 7)
    assert GenerateConfig(balance_to=0, steps=10).evaluations(SCHEDULE) == (10, 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_cached_features_are_those_put_in_by_a_hook(name):
    unet = network(name)
    x, other = torch.randn(2, 3, *SHAPE[1:], 3).permute(0, 1, 4, 2, 3).unbind(0)
    (_, features), t = unet.forward_with_features(other, torch.tensor([900] * 3), LABELS), torch.tensor([850] * 3)
    assert features.shape[1:] == unet.features_shape
    last_inner = unet.upsample[-1] if len(unet.upsample) else unet.middle[-1]
    handle = last_inner.register_forward_hook(lambda *_: features)
    expected = unet(x, t, LABELS)
    handle.remove()
    assert torch.equal(unet(x, t, LABELS, cached_features=features), expected)
    assert not torch.allclose(unet(x, t, LABELS), expected)  # what is cached matters
    assert torch.equal(unet.forward_with_features(x, t, LABELS)[0], unet(x, t, LABELS))


class PlainCache:
    """One pass of the network, of those with or those without a class, with its inner levels swapped by a hook."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.kept = unet, None

    def __call__(self, x: torch.Tensor, t: int, labels: torch.Tensor, full: bool) -> torch.Tensor:
        def hook(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
            self.kept = output if full else self.kept
            return self.kept

        handle = self.unet.upsample[-1].register_forward_hook(hook)
        out = self.unet(x.float(), torch.full((len(x),), t), labels)
        handle.remove()
        return out.double()


@pytest.mark.parametrize("interval", [1, 2, 4])
@pytest.mark.parametrize(("guidance", "between"), [(0.0, (0.0, 1.0)), (1.5, (0.0, 1.0)), (1.5, (0.25, 0.75))])
def test_caching_draws_what_a_plain_computation_says(interval, guidance, between):
    unet, steps = network("ddpm"), 12
    settings = {"sampler": "dpm++", "steps": steps, "guidance": guidance, "guidance_interval": between}
    drawn = engine(unet, cache_interval=interval, **settings).draw(LABELS, INDICES)

    plan = GenerateConfig(balance_to=0, **settings).plan(SCHEDULE)
    grid, acts = [step.t for step in plan], {step.t: step.guided for step in plan}
    with_class, without = PlainCache(unet), PlainCache(unet)
    count = iter(range(steps))

    def denoise(x, t):
        i = next(count)
        full = i % interval == 0 or (acts[t] and not acts[grid[i - 1]])
        out = with_class(x, t, LABELS, full)
        if acts[t]:
            out = out + guidance * (out - without(x, t, torch.full((3,), NULL), full))
        abar = SCHEDULE.alphas_cumprod[t]
        return (abar.sqrt() * x - (1 - abar).sqrt() * out).clamp(-1, 1)

    noise = functools.partial(normal, SEED, LABELS, INDICES, shape=SHAPE)
    rows = SAMPLERS["dpm++"](grid, SCHEDULE.alphas_cumprod, 0.0)
    grey = (solve(denoise, noise(0).double(), grid, rows, noise).permute(0, 2, 3, 1) + 1) * 127.5
    assert (drawn.double() - grey).abs().max() < 0.51  # rounding to whole grey levels
    uncached = engine(unet, **settings).draw(LABELS, INDICES)
    assert torch.equal(drawn, uncached) == (interval == 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_work_reported_is_the_work_done(name):
    settings = {"steps": 5, "guidance": 1.0, "guidance_interval": (0.0, 0.5)}
    sampler = engine(network(name), cache_interval=2, **settings)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sampler.draw(LABELS, INDICES)
    assert sampler.flops() * len(LABELS) == counter.get_total_flops()
    assert sampler.flops() < engine(network(name), **settings).flops()


@pytest.mark.parametrize("channels", [1, 3])  # of one channel, strides may differ that mean the same
def test_a_compiled_network_holds_in_one_graph_and_draws_the_same(channels, front_end_alone, caplog):
    settings = {"steps": 6, "guidance": 1.0, "guidance_interval": (0.2, 0.7), "cache_interval": 2}
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
    extractor = load_extractor(run, sampler.device)
    batches = list(accepted(sampler, extractor, Quota(quotas, settings.max_draws)))
    images, labels, indices = (np.concatenate(parts) for parts in zip(*batches, strict=True))

    store = open_store(tmp_path, run, settings, quotas, seed=3)
    fill(sampler, extractor, store, Quota(quotas, settings.max_draws), tuple("0123456789"))
    kept = open_kept(tmp_path)
    order = np.lexsort((indices, labels))
    assert np.array_equal(labels[order], kept.labels) and np.array_equal(indices[order], kept.index)
    assert np.array_equal(images[order], kept.take(np.arange(len(kept))))


def test_command_caches_and_profiles(tiny_run, tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        command(run=tiny_run.path, fast=True, steps=4, cache=2, per_class=1, out=tmp_path / "out", profile=True)
    assert "4 evaluations each (dpm++, 4 steps), 2 of them of the first level alone" in caplog.text
    printed = json.loads(capsys.readouterr().out)
    assert (printed["nfe"], printed["nfe_first_level"], printed["accepted"]) == (4, 2, 10)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["cache_interval"] == 2
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
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_recorded_evaluations_are_those_of_the_network(tiny_run, sampler, monkeypatch):
    """The first evaluations of a kind run as they are, the fourth is recorded, the others are replayed."""
    settings = tiny_run.config.generate.model_copy(
        update={"sampler": sampler, "steps": 6, "guidance": 1.0, "guidance_interval": (0.2, 0.7), "cache_interval": 2}
    )
    recording, plain = (open_sampler(tiny_run, settings, seed=3) for _ in range(2))
    recording.prepare()
    for start in range(0, 32, 8):
        names = torch.arange(start, start + 8).cuda()
        drawn = recording.draw(names % 10, names)
        with monkeypatch.context() as patch:
            patch.setattr(CUDAGraphRunner, "__call__", lambda self, *tensors: self.function(*tensors))
            assert torch.equal(drawn, plain.draw(names % 10, names))
