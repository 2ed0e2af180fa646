"""The training step: forward, backward, exchange, update; on CUDA one graph, with nothing for the host to wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from diffult.artifacts import build_unet
from diffult.data import Data
from diffult.diffusion.objective import DiffusionLoss, stride
from diffult.diffusion.schedule import Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import World
from diffult.engine.loop import Losses, LRBackoff, learning_rate_factor
from diffult.errors import UserError
from diffult.longtail.extractor import Extractor
from diffult.models.cost import forward_flops
from diffult.runs.run_dir import RunDir
from kernels.adamw_ema import AdamWEma


@dataclass
class Trainer:
    """The model, its optimizer and the step, on this process."""

    model: nn.Module
    optimizer: AdamWEma
    step: Callable[[int, torch.Tensor], Losses]
    flops: dict[str, float]  # of a step by term, over all processes
    device: torch.device
    micro_batch: int  # images that this process computes at a time


def build_trainer(run: RunDir, data: Data, extractor: Extractor, world: World, lr_backoff: LRBackoff) -> Trainer:
    """Everything a step needs. The weights are float32; where the network computes in bfloat16, it does so on a copy
    that the optimizer keeps in step."""
    config, train = run.config.diffusion, data.train
    device = pick_device()
    dtype = compute_dtype(run.config.precision, device)
    counts = torch.from_numpy(train.counts()).to(device, torch.float32)
    torch.manual_seed(run.config.seed)
    model = build_unet(run.config, len(counts)).to(device, dtype).train()
    optimizer = AdamWEma(model, weight_decay=config.weight_decay)
    network = torch.compile(model) if device.type == "cuda" else model  # compiling gains nothing on a CPU
    balanced = config.batches == "class_balanced"
    share = torch.ones_like(counts) / len(counts) if balanced else counts / counts.sum()
    schedule = Schedule(config.schedule, config.timesteps, device)
    # Not the run's own seed: samples are drawn from noise that training has never seen.
    seed = int(np.random.SeedSequence((run.config.seed, 0xD1FF)).generate_state(1, np.uint64)[0])
    loss = DiffusionLoss(network, config, schedule, share, extractor, seed, dtype)
    images = torch.from_numpy(train.load()).to(device)
    labels = torch.from_numpy(train.labels).to(device)
    mine = world.local_slice(config.batch_size, "diffusion.batch_size")
    micro_batch, rest = divmod(mine.stop - mine.start, config.accumulate)
    if rest or not micro_batch:
        raise UserError(f"diffusion.accumulate = {config.accumulate} does not divide {mine.stop - mine.start} images")

    def step_on_device(rows: torch.Tensor, positions: torch.Tensor, rates: torch.Tensor, with_aid: bool) -> Losses:
        optimizer.zero_grad()
        names: tuple[str, ...] = ()
        values = torch.zeros((), device=device)
        for row, position in zip(rows.split(micro_batch), positions.split(micro_batch), strict=True):
            losses = loss(images[row], labels[row], position, with_aid)
            (losses["loss"] / config.accumulate).backward()
            names = tuple(losses)
            values = values + torch.stack([value.detach() for value in losses.values()]) / config.accumulate
        # All gradients are one tensor: one exchange, outside autograd, so that accumulation and the graph stay whole.
        # DistributedDataParallel would overlap it with the backward pass, at the price of hooks in the graph.
        world.average_(optimizer.grad)
        world.average_(values)
        norm = optimizer.step(rates[0], rates[1], config.gradient_clip)
        return dict(zip(names, values.unbind(), strict=True)) | {"gradient": norm}

    # Two graphs, for only some steps have L_AID. With several processes their exchange stays outside graphs.
    graphs_on = device if world.size == 1 else torch.device("cpu")
    steps = [CUDAGraphRunner(partial(step_on_device, with_aid=with_aid), graphs_on) for with_aid in (False, True)]
    offsets = torch.arange(mine.start, mine.stop, device=device)

    def step(i: int, rows: torch.Tensor) -> Losses:
        factor = learning_rate_factor(i, config.steps, config.warmup_steps, cosine=config.cosine_decay)
        rate, decay = config.learning_rate * lr_backoff.factor * factor, min(config.ema, (1 + i) / (10 + i))
        rates = torch.tensor([rate, decay], dtype=torch.float64)
        with_aid = config.aid and i % stride(config.aid_steps) == 0
        positions = i * config.batch_size + offsets
        return steps[with_aid](rows[mine].to(device, non_blocking=True), positions, rates.to(device, non_blocking=True))

    return Trainer(model, optimizer, step, _step_flops(run, model, extractor), device, micro_batch)


def _step_flops(run: RunDir, model: nn.Module, extractor: Extractor) -> dict[str, float]:
    """Work of a step by term, over all processes; a network's backward is counted as two forwards."""
    config, side = run.config.diffusion, run.config.data.image_size
    image = torch.empty(1, run.config.data.channels, side, side, device="meta")
    label = torch.zeros(1, dtype=torch.int64, device="meta")
    unet = 3.0 * config.batch_size * forward_flops(model, [image, label, label])
    flops = {"ddpm": unet}
    if config.cbdm:
        flops["cbdm"] = unet / stride(config.cbdm_share)
    if config.aid:  # phi0 forward on x0, forward and back to its input on the shifted images
        seen = image[..., : extractor.image_size, : extractor.image_size]
        phi0 = 3.0 * config.batch_size * forward_flops(extractor.network, [seen])
        flops["aid"] = phi0 / stride(config.aid_share) / stride(config.aid_steps)
    return flops
