"""The training step: forward, backward, exchange, update; on CUDA one graph, with nothing for the host to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from diffult.config import Config
from diffult.data.packing import Packed
from diffult.diffusion.objective import DiffusionLoss, stride
from diffult.diffusion.schedule import Schedule
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.engine.device import compute_dtype, derived_seed, pick_device
from diffult.engine.distributed import World
from diffult.engine.loop import Losses, LRBackoff, learning_rate_factor
from diffult.errors import UserError
from diffult.longtail.extractor import Extractor
from diffult.models.cost import forward_flops
from diffult.models.unet import build_unet
from ffcv_writers import Batch, ClassBalanced, Loader, Natural, Order, Weighted
from kernels.adamw_ema import AdamWEma

_FREQUENCY = {"natural": 1.0, "square_root": 0.5, "class_balanced": 0.0}  # of a class in batches: count ** this


@dataclass
class Trainer:
    """The model, its optimizer, its batches and the step, on this process.

    Attributes:
        batches: the batches of this process from a given step on.
        step: does one step and returns its losses.
    """

    model: nn.Module
    optimizer: AdamWEma
    batches: Callable[[int], Iterator[Batch]]
    step: Callable[[int, Batch], Losses]
    flops: dict[str, float]  # of a step by term, over all processes
    device: torch.device
    micro_batch: int  # images that this process computes at a time


def build_trainer(
    config: Config, packed: Packed, extractor: Extractor | None, world: World, lr_backoff: LRBackoff
) -> Trainer:
    """Everything a step needs. The weights are float32; where the network computes in bfloat16, it does so on a copy
    that the optimizer keeps in step.

    Args:
        extractor: phi0, for L_AID; not used where diffusion.aid is off.

    Raises:
        UserError: the processes, or the micro-batches, do not divide the batch.
    """
    settings, device = config.diffusion, pick_device()
    extractor = extractor if settings.aid else None
    dtype = compute_dtype(config.precision, device)
    counts = torch.from_numpy(packed.counts).to(device, torch.float32)
    torch.manual_seed(config.seed)
    model = build_unet(config, len(counts)).to(device, dtype).train()
    optimizer = AdamWEma(model, weight_decay=settings.weight_decay, group=world.group)
    # Compiling gains nothing on a CPU. A network compiled whole has one backward node, after which all gradients come
    # at once: on CUDA the exchange follows the backward pass instead of overlapping it. By count, at 30 % of an H100's
    # peak, overlap would save 0.6 % (imagenet-lt-256) to 3 % (-64) of a step on eight cards of a host, and 9 to 28 % on
    # sixteen of two hosts at 50 GB/s; compiling block by block would allow it, at a price not measured yet.
    network = torch.compile(model) if device.type == "cuda" else model
    frequency = counts ** _FREQUENCY[settings.batches]
    share = frequency / frequency.sum()
    schedule = Schedule(settings.schedule, settings.timesteps, device)
    # Not the run's own seed: samples are drawn from noise that training has never seen.
    seed = derived_seed(config.seed, 0xD1FF)
    loss = DiffusionLoss(network, settings, schedule, share, extractor, seed, dtype)
    local = world.local_slice(settings.batch_size, "diffusion.batch_size")
    size = local.stop - local.start
    micro_batch, rest = divmod(size, settings.accumulate)
    if rest or not micro_batch:
        raise UserError(f"diffusion.accumulate = {settings.accumulate} does not divide {size} images")
    loader = Loader(packed.train, size, device=device, crop=config.data.view(config.data.image_size))
    order = _order(settings.batches, packed.train.labels)

    def batches(start: int) -> Iterator[Batch]:
        for draws in order.steps(config.seed, size, start, settings.steps, rank=world.rank, world=world.size):
            yield from loader.batches(*draws)

    def step_on_device(
        images: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, rates: torch.Tensor, with_aid: bool
    ) -> Losses:
        optimizer.zero_grad()
        names: tuple[str, ...] = ()
        values = torch.zeros((), device=device)
        parts = zip(images.split(micro_batch), labels.split(micro_batch), positions.split(micro_batch), strict=True)
        for part, (x, y, position) in enumerate(parts, start=1):
            losses = loss(x, y, position, with_aid)
            if part == settings.accumulate:
                optimizer.overlap_exchange()
            (losses["loss"] / settings.accumulate).backward()
            names = tuple(losses)
            values = values + torch.stack([value.detach() for value in losses.values()]) / settings.accumulate
        norm = optimizer.step(rates[0], rates[1], settings.gradient_clip)
        world.average_(values)
        return dict(zip(names, values.unbind(), strict=True)) | {"gradient": norm}

    # Two graphs, for only some steps have L_AID. With several processes their exchange stays outside graphs.
    graphs_on = device if world.size == 1 else torch.device("cpu")
    steps = [CUDAGraphRunner(partial(step_on_device, with_aid=with_aid), graphs_on) for with_aid in (False, True)]

    def step(i: int, batch: Batch) -> Losses:
        factor = learning_rate_factor(i, settings.steps, settings.warmup_steps, cosine=settings.cosine_decay)
        rate = settings.learning_rate * lr_backoff.factor * factor
        rates = torch.tensor([rate, min(settings.ema, (1 + i) / (10 + i))], dtype=torch.float64)
        with_aid = settings.aid and i % stride(settings.aid_steps) == 0
        on_device = rates.to(device, non_blocking=True)
        return steps[with_aid](batch.images, batch.labels, batch.position, on_device)

    return Trainer(model, optimizer, batches, step, _step_flops(config, model, extractor), device, micro_batch)


def _order(batches: str, labels: np.ndarray) -> Order:
    """The order of the images, each class as often as _FREQUENCY says."""
    if batches == "square_root":
        return Weighted(np.bincount(labels)[labels] ** -0.5)
    return ClassBalanced(labels) if batches == "class_balanced" else Natural(len(labels))


def _step_flops(config: Config, model: nn.Module, extractor: Extractor | None) -> dict[str, float]:
    """Work of a step by term, over all processes; a network's backward is counted as two forwards."""
    settings, side = config.diffusion, config.data.image_size
    image = torch.empty(1, config.data.channels, side, side, device="meta")
    label = torch.zeros(1, dtype=torch.int64, device="meta")
    unet = 3.0 * settings.batch_size * forward_flops(model, [image, label, label])
    flops = {"ddpm": unet}
    if settings.cbdm:
        flops["cbdm"] = unet / stride(settings.cbdm_share)
    if extractor is not None:  # phi0 forward on x0, forward and back to its input on the shifted images
        seen = image[..., : extractor.image_size, : extractor.image_size]
        phi0 = 3.0 * settings.batch_size * forward_flops(extractor.network, [seen])
        flops["aid"] = phi0 / stride(settings.aid_share) / stride(settings.aid_steps)
    return flops
