"""Races around the model: generation end to end, writer, loader, classifier step, kernels, and the whole pipeline."""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from bench import loaders, peers
from bench.cases import sampler_config
from bench.contestants import CLASSES, build_extractor, build_model, build_sampler
from bench.race import Call, Work, race
from diffult.engine.device import autocast, compute_dtype, pick_device
from diffult.generation.fill import fill
from diffult.generation.shards import ShardStore
from diffult.longtail.quota import Quota
from diffult.models.cost import forward_flops
from diffult.models.resnet import build_classifier
from diffult.run import run_pipeline
from diffult.runs.run_dir import RunDir
from ffcv_writers import Loader, open_set, write
from ffcv_writers.readers import open_source
from kernels.adamw_ema import AdamWEma
from kernels.augment import augment
from kernels.group_norm_silu import group_norm_silu

HAVE_FFCV = find_spec("ffcv") is not None
PIPELINE = [
    "extractor.steps=40", "diffusion.steps=20", "diffusion.batch_size=32", "generate.steps=10", "generate.max_draws=2",
    "generate.filter=none", "generate.balance_to=30", "classifier.steps=40", "classifier.methods=['ce', 'diffult']",
]  # fmt: skip


@contextlib.contextmanager
def quiet():
    """Without progress bars and tables."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def random_images(count: int, side: int) -> np.ndarray:
    """uint8 [count, side, side, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@race("generation end to end", *(f"{name} draws alone" for name in peers.SETTINGS))
def generation(folder: Path) -> Work:
    """DDIM, 20 steps: ours draws, judges by an extractor and writes a file; rivals draw as many and keep nothing."""
    config = sampler_config("generate.sampler='ddim'", "generate.steps=20", "generate.guidance=0.0")
    model = build_model(config)
    sampler = build_sampler(model, config.generate)
    extractor = build_extractor(config, CLASSES, model.device)
    numbers, batches = itertools.count(), 3
    wanted = np.bincount(np.arange(batches * model.size) % CLASSES, minlength=CLASSES)

    def ours() -> None:
        store = ShardStore(folder / f"samples-{next(numbers)}", {})
        with quiet():
            result = fill(sampler, extractor, store, Quota(wanted, 1.0), tuple(map(str, range(CLASSES))))
        assert result["accepted"] == batches * model.size
        shutil.rmtree(store.folder)

    def theirs(peer: peers.Peer) -> Call:
        def run() -> None:
            for _ in range(batches):
                x = torch.randn_like(model.inputs[0])
                labels = model.inputs[2]
                peers.sample(peer, config.diffusion, sampler.schedule, "ddim", 20, x, labels).cpu().numpy()

        return run

    run: dict[str, Call] = {"ours": ours}
    run |= {f"{name} draws alone": theirs(peer) for name, peer in model.peers().items()}
    images = batches * model.size
    flops = 20.0 * images * forward_flops(model.unet, model.inputs)
    equal = "same network, evaluations and number of images"
    return Work(run, images, flops, equal=equal, absent=peers.absent(" draws alone"))


@race("writer", "ffcv's writer")
def writer(folder: Path) -> Work:
    """2,000 images of 32 x 32 from memory to one file."""
    images = random_images(2000, 32)
    labels = np.arange(len(images)) % CLASSES

    def ours() -> None:
        write(folder / "ours.beton", images, labels=labels, synthetic=0 * labels, index=labels)

    def ffcv() -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        with quiet():
            DatasetWriter(str(folder / "ffcv.beton"), fields, num_workers=2).from_indexed_dataset(
                list(zip(images, labels.tolist(), strict=True))
            )

    run: dict[str, Call] = {"ours": ours}
    if HAVE_FFCV:
        run["ffcv's writer"] = ffcv
    absent = {} if HAVE_FFCV else {"ffcv's writer": "ffcv is not installed, or does not load"}
    return Work(run, len(images), moved=images.nbytes, absent=absent)


@race("loader", "torch DataLoader", "torch DataLoader, 2 workers")
def loader(folder: Path) -> Work:
    """An epoch of 1,000 images of 32 x 32, cropped and mirrored; torch decodes PNG files, ours reads its raw file."""
    files = folder / "images"
    for number, image in enumerate(random_images(1000, 32)):
        path = files / str(number % CLASSES) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    source, path = open_source("folder", files).splits["train"], folder / "images.beton"
    write(path, source.samples, labels=source.labels, synthetic=0 * source.labels, index=np.arange(len(source.labels)))
    image_set = open_set([path])
    checked = loaders.checked(loaders.check_small(files, image_set))
    run: dict[str, Call] = {
        "ours": loaders.our_epoch(Loader(image_set, 128, device=pick_device()), loaders.small_ready),
        "torch DataLoader": loaders.torch_epoch(files, loaders.SMALL, 128, 0),
        "torch DataLoader, 2 workers": loaders.torch_epoch(files, loaders.SMALL, 128, 2),
    }
    return Work(run, len(source.labels), equal=f"largest difference of outputs {checked['largest_difference']:.1e}")


@race("classifier step", "plain PyTorch", "plain PyTorch channels-last")
def classifier(folder: Path) -> Work:
    """ResNet-32 on a batch of 128, SGD; ours augments the batch too, the rivals get theirs ready."""
    device = pick_device()
    dtype = compute_dtype("auto", device)
    images = torch.from_numpy(random_images(128, 32)).to(device)
    labels, positions = torch.arange(128, device=device) % CLASSES, torch.arange(128, device=device)
    ready = augment(images, 0, positions, size=32, pad=4, flip=True)

    def step(layout: torch.memory_format, batch: Callable[[], torch.Tensor]) -> Call:
        network = build_classifier("resnet32", CLASSES, 3, 32).to(device).to(memory_format=layout)
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=2e-4)

        def run() -> None:
            x = batch()
            with autocast(dtype, device):
                logits = network.head(network.trunk(x))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        return run

    contiguous, last = ready.contiguous(), ready.contiguous(memory_format=torch.channels_last)
    run = {
        "ours": step(
            torch.channels_last, lambda: augment(images, 0, positions, size=32, pad=4, flip=True, dtype=dtype)
        ),
        "plain PyTorch": step(torch.contiguous_format, lambda: contiguous),
        "plain PyTorch channels-last": step(torch.channels_last, lambda: last),
    }
    network = build_classifier("resnet32", CLASSES, 3, 32)
    return Work(run, 128, 3.0 * 128 * forward_flops(network, [ready]), equal="same network")


@race("kernel group_norm_silu", "PyTorch contiguous", "PyTorch channels-last")
def group_norm(folder: Path) -> Work:
    """Scaled and shifted group normalisation with SiLU, forward and backward, in the compute type."""
    device = pick_device()
    dtype = compute_dtype("auto", device)
    batch, channels, side = (8, 64, 32) if device.type == "cpu" else (128, 128, 32)
    x, out = (torch.randn(batch, channels, side, side, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(channels, device=device, requires_grad=True) for _ in range(2))
    scale, shift = (torch.randn(batch, channels, device=device).to(dtype).requires_grad_() for _ in range(2))

    def plain(y: torch.Tensor) -> torch.Tensor:
        with autocast(dtype, device):
            y = F.group_norm(y, 16, weight, bias)
        return F.silu(y * (1 + scale)[:, :, None, None] + shift[:, :, None, None])

    def call(function: Callable[[torch.Tensor], torch.Tensor], layout: torch.memory_format) -> Call:
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        gradient = out.contiguous(memory_format=layout)
        return lambda: torch.autograd.grad(function(leaf), (leaf, weight, bias, scale, shift), gradient)

    run = {
        "ours": call(lambda y: group_norm_silu(y, 16, weight, bias, scale, shift), torch.channels_last),
        "PyTorch contiguous": call(plain, torch.contiguous_format),
        "PyTorch channels-last": call(plain, torch.channels_last),
    }
    return Work(run, batch, moved=5.0 * x.nbytes)


@race("kernel adamw_ema", "PyTorch default", "PyTorch fused")
def adamw_ema(folder: Path) -> Work:
    """Clip, AdamW and moving average over a network's parameters, in float32."""
    device = pick_device()
    layers, width = (16, 512) if device.type == "cpu" else (64, 1024)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device)

    model = network()
    optimizer = AdamWEma(model)
    optimizer.grad.normal_()

    def theirs(fused: bool) -> Call:
        parameters = list(network().parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        average = [parameter.detach().clone() for parameter in parameters]
        adamw = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0, fused=fused or None)

        def run() -> None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.step()
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1e-3)

        return run

    run: dict[str, Call] = {
        "ours": lambda: optimizer.step(1e-4, 0.999, 1.0),
        "PyTorch default": theirs(False),
        "PyTorch fused": theirs(True),
    }
    count = sum(parameter.numel() for parameter in model.parameters())
    return Work(run, 1, moved=40.0 * count)  # gradient twice, moments, weights and average read and written


@race("whole pipeline")
def pipeline(folder: Path) -> Work:
    """digits-lt from images to report with a few steps a stage: what is not arithmetic. Images: those generated."""
    numbers = itertools.count()

    def ours() -> None:
        run = RunDir.open(folder / f"run-{next(numbers)}", "digits-lt", PIPELINE)
        with quiet():
            run_pipeline(run)
        shutil.rmtree(run.path)

    counts = [60, 43, 30, 22, 15, 11, 8, 5, 4, 3]  # of digits-lt
    return Work({"ours": ours}, sum(max(0, 30 - count) for count in counts))
