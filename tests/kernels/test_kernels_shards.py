"""The optimizer's state shared by two processes: the same numbers as in one, half the memory, and an exchange that
begins while the backward pass runs."""

import subprocess
import sys

import pytest
import torch

from kernels.adamw_ema import AdamWEma, bytes_per_parameter

# Each process trains a network on its half of each batch, in buckets smaller than a layer, and stores what it has.
PROGRAM = """
import gc, sys, torch, torch.distributed as dist
from torch import nn
from kernels import shards
from kernels.adamw_ema import AdamWEma

shards._BUCKET = 2 * shards.ROW

def network(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 48)]
    model = nn.Sequential(*layers)
    model.unused = nn.Parameter(torch.ones(5000))  # its gradient never comes
    model[0].bias.requires_grad_(False)
    return model.to(dtype)

def train(dtype, rank, size, group, steps, state=None):
    model = network(dtype)
    optimizer = AdamWEma(model, weight_decay=0.1, group=group)
    if state is not None:
        optimizer.load_state_dict(state)
    started, norms = [], []
    first = lambda _: started.append(len(optimizer._exchange._sent) if group else 0)
    model[0].weight.register_post_accumulate_grad_hook(first)  # the last to come
    for i in steps:
        batch = torch.randn(8, 48, generator=torch.Generator().manual_seed(i))[rank * 8 // size :][: 8 // size]
        optimizer.zero_grad()
        for part in (0, 1):
            if part:
                optimizer.overlap_exchange()
            x = batch.chunk(2)[part].to(dtype)
            ((model(x) - x).float().square().mean() / 2).backward()
        norms.append(float(optimizer.step(0.01, 0.9, 0.5)))
    return optimizer, norms, started

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16):
        optimizer, norms, started = train(dtype, rank, 2, dist.group.WORLD, range(6))
        flat = {name: getattr(optimizer, name) for name in ("master", "m", "v", "ema", "grad", "work")}
        result = {"norms": norms, "started": started, "buckets": optimizer._shards.buckets,
                  "length": {name: len(x) for name, x in flat.items()}, "state": optimizer.state_dict(),
                  "ema": optimizer.ema_state_dict(), "model": optimizer.model.state_dict()}
        # On from what one process left after three steps.
        alone, _, _ = train(dtype, 0, 1, None, range(3))
        resumed, _, _ = train(dtype, rank, 2, dist.group.WORLD, range(3, 6), alone.state_dict())
        torch.save(result | {"resumed": resumed.state_dict()}, f"{sys.argv[1]}/{str(dtype)[6:]}-{rank}.pt")
    del optimizer, resumed, flat, result  # a group that outlives the interpreter ends it in an abort
    gc.collect()
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program as a module, and the folder in which two processes have run it."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(folder / "program.py"), str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    module = {"__name__": "program"}
    exec(compile(PROGRAM, "program", "exec"), module)
    module["shards"]._BUCKET = 1 << 24  # here all is as it was
    return module, folder


@pytest.fixture(params=["float32", "bfloat16"])
def trained(request, program):
    """What each of two processes has, the optimizer and norms of one, the type, and how near they must be."""
    module, folder = program
    dtype = getattr(torch, request.param)
    alone, norms, _ = module["train"](dtype, 0, 1, None, range(6))
    near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in (0, 1)], alone, norms, near


def test_two_processes_train_as_one(trained):
    both, alone, norms, near = trained
    for one in both:
        torch.testing.assert_close(torch.tensor(one["norms"]), torch.tensor(norms), **near)
        for name, value in one["ema"].items():
            torch.testing.assert_close(value, alone.ema_state_dict()[name], **near)
    assert both[0]["norms"] == both[1]["norms"]
    for name in both[0]["model"]:
        assert torch.equal(both[0]["model"][name], both[1]["model"][name]), name
        assert torch.equal(both[0]["ema"][name], both[1]["ema"][name]), name


@pytest.mark.parametrize("which", ["state", "resumed"])
def test_a_state_is_the_same_whatever_the_number_of_processes(trained, which):
    (first, second), alone, _, near = trained
    want, got = alone.state_dict(), first[which]
    assert second[which] == {} and got["step"] == want["step"] == 6
    for part in ("parameters", "m", "v", "ema"):
        assert list(got[part]) == list(want[part])
        for name, value in want[part].items():
            torch.testing.assert_close(got[part][name], value, **near, msg=f"{part} {name}")
    again = AdamWEma(alone.model)
    again.load_state_dict(got)
    for part in ("parameters", "m", "v", "ema"):
        assert all(torch.equal(again.state_dict()[part][name], value) for name, value in got[part].items())


def test_each_process_keeps_half_of_the_state(trained):
    both, alone, _, _ = trained
    for one in both:
        length = one["length"]
        assert one["buckets"] > 2 and length["grad"] == length["work"] == 2 * length["master"]
        assert length["m"] == length["v"] == length["ema"] == length["master"] >= len(alone.master) / 2
    assert bytes_per_parameter(torch.bfloat16, 8) == 2 + 2 + (4 * 4 + 2 + 2) / 8
    assert bytes_per_parameter(torch.float32, 8) == 4 + 4 + (4 * 4 + 4) / 8
    assert bytes_per_parameter(torch.float32) == bytes_per_parameter(torch.bfloat16) == 20


def test_the_exchange_begins_while_the_backward_pass_runs(trained):
    """As the first layer's gradient comes, last of all, buckets of the last layer are on their way; never before the
    last micro-batch."""
    for one in trained[0]:
        assert one["started"][0::2] == [0] * 6
        assert all(0 < sent < one["buckets"] for sent in one["started"][1::2])
