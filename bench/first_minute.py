"""What a card may refuse in its first minute, each alone: a graph of a training step, checkpointing in it, xformers in
compiled code, a graph beside NCCL.

    python -m bench.first_minute backward_in_graph

Each result is compared with the same work done without the thing that may fail. On a CPU the same code runs as far as
one can: nothing is recorded, gloo stands for NCCL, torch's attention for xformers'. Exit code 0 where all agrees.
"""

from __future__ import annotations

import enum
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from diffult.cli import main
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import compute_dtype, pick_device
from diffult.errors import UserError
from diffult.models.config import UNetConfig
from diffult.models.unet import UNet
from kernels.adamw_ema import AdamWEma
from kernels.attention import attention, attention_backend

_BOUND = 2e-2  # relative, in bfloat16
_STEPS = 6  # of training: three warm up, then a graph is recorded and replayed three times


def backward_in_graph(device: torch.device) -> None:
    """Forward, backward and update as one CUDA graph, the network as it is."""
    _compare("losses", losses(device, graph=True), losses(device, graph=False))


def checkpointing_in_graph(device: torch.device) -> None:
    """The same where the backward pass computes the activations again; then with dropout, its mask drawn again."""
    for dropout in (0.0, 0.1):
        recomputed = losses(device, graph=True, gradient_checkpointing=True, dropout=dropout)
        _compare(f"losses at dropout {dropout}", recomputed, losses(device, graph=False, dropout=dropout))


def attention_in_compile(device: torch.device) -> None:
    """Attention and its gradients in code that torch.compile made, beside the same in float64."""
    print("attention: {}, {}".format(*attention_backend(device)))
    q, k, v, weight = torch.randn(4, 8, 256, 4, 64, dtype=torch.float64, device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # the front end is what a CPU can show quickly
    compiled = torch.compile(attention, fullgraph=True, backend=backend)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        gradients = torch.autograd.grad(out, inputs, weight.to(dtype))
        return torch.stack([x.detach().double() for x in (out, *gradients)])

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhw,bkhw->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhw->bqhw", scores.softmax(3), v)

    exact = results(formula, torch.float64)
    _compare("output and gradients", results(compiled, compute_dtype("auto", device)), exact)


def graph_beside_nccl(device: torch.device) -> None:
    """A graph recorded and replayed while a group of one process is there, its watchdog running."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            ones = torch.ones(1024, device=device)
            dist.all_reduce(ones)
            recorded = losses(device, graph=True)
            dist.all_reduce(ones)
            print(f"{backend}: the sum of one process is {ones.mean().item():g}")
        finally:
            dist.destroy_process_group()
    _compare("losses", recorded, losses(device, graph=False))


def losses(device: torch.device, *, graph: bool, gradient_checkpointing: bool = False, dropout: float = 0.0) -> Tensor:
    """The losses [steps] of a small network learning one fixed batch, from fixed weights."""
    torch.manual_seed(0)
    config = UNetConfig(
        channels=32, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(8,),
        gradient_checkpointing=gradient_checkpointing, dropout=dropout,
    )  # fmt: skip
    model = UNet(config, image_size=16, channels=3, num_classes=10).to(device, compute_dtype("auto", device)).train()
    optimizer = AdamWEma(model)
    images, noise = torch.randn(2, 16, 3, 16, 16, device=device)
    times, labels = torch.arange(16, device=device) * 60, torch.arange(16, device=device) % 10

    def step(rates: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(images, times, labels) - noise).square().mean()
        loss.backward()
        optimizer.step(rates[0], rates[1], 1.0)
        return loss.detach()

    run = CUDAGraphRunner(step, device) if graph else step
    rates = torch.tensor([1e-3, 0.9], dtype=torch.float64, device=device)
    return torch.stack([run(rates).clone() for _ in range(_STEPS)]).double()


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"{what}: relative difference {error:.2g}")
    if not error < _BOUND:  # NaN too
        raise UserError(f"{what} differ by {error:.2g}, at most {_BOUND} is rounding: {found.flatten()[:6].tolist()}")


CHECKS = {f.__name__: f for f in (backward_in_graph, checkpointing_in_graph, attention_in_compile, graph_beside_nccl)}
Name = enum.StrEnum("Name", {name: name for name in CHECKS})


def command(name: Annotated[Name, typer.Argument(help="Which one.", show_default=False)]) -> None:
    """Try one thing that a card may refuse."""
    torch.manual_seed(1)
    CHECKS[name](pick_device())


if __name__ == "__main__":
    main(command)
