"""Stage 2: the class-conditional diffusion model, from random weights, on the long-tailed set alone.

Writes diffusion/ema.safetensors, the averaged weights with which samples are drawn, metrics.jsonl, a grid of samples at
every checkpoint, and snapshots that other averages are made of where `ema_snapshots` asks for them. Alone or with
torchrun: the batch is shared by the processes, and the model is the same but for rounding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from diffult.artifacts import build_unet, load_extractor
from diffult.cli import PresetOption, RunOption, SetOption, duration, main
from diffult.data import Data, load_data
from diffult.diffusion.posthoc_ema import KEPT, PowerAverages, snapshot_steps
from diffult.diffusion.schedule import Schedule
from diffult.diffusion.trainer import Trainer, build_trainer
from diffult.engine.device import compute_dtype, peak_flops, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.engine.loop import Callback, LoopConfig, Losses, LRBackoff, train_loop
from diffult.engine.tensorboard import TensorBoardCallback
from diffult.generation.preview import Preview, preview_settings
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor
from diffult.models.cost import parameters
from diffult.runs.files import save_tensors
from diffult.runs.run_dir import RunDir
from ffcv_writers import ClassBalanced, Natural, Order

_STAGE = 2  # its number among the seeds
log = logging.getLogger(__name__)


def train_diffusion(
    run: RunDir, data: Data, extractor: Extractor, world: World = ALONE, tensorboard: bool = False
) -> None:
    """Trains the diffusion model on the long-tailed set.

    Args:
        extractor: phi0, which L_AID needs.
        world: the processes that share the batch; every one of them calls this.
        tensorboard: also write diffusion/tensorboard, event files of what metrics.jsonl holds.

    Raises:
        UserError: `tensorboard` without that package, or what `train_loop` raises.
    """
    with run.stage("diffusion", world) as note:
        if note is not None:
            events = (
                TensorBoardCallback(run.folder("diffusion") / "tensorboard") if tensorboard and world.is_main else None
            )
            _train(run, data, extractor, world, note, [events] if events else [])


def _train(
    run: RunDir, data: Data, extractor: Extractor, world: World, note: dict[str, Any], callbacks: list[Callback]
) -> None:
    config, folder = run.config.diffusion, run.folder("diffusion")
    lr_backoff = LRBackoff()
    trainer = build_trainer(run, data, extractor, world, lr_backoff)
    _tell_cost(trainer, config.batch_size)

    def batches(start: int) -> Iterator[torch.Tensor]:
        size = config.batch_size
        for draws in _order(run, data).steps(run.config.seed, size, start, config.steps):
            yield from torch.from_numpy(draws.samples).split(size)

    job = LoopConfig(
        "diffusion", config.steps, folder / "state.pt", config.checkpoint_every, (run.config.seed, _STAGE, world.rank),
        run.config.hash, config.batch_size, sum(trainer.flops.values()), peak_flops(trainer.device) * world.size,
        folder / "metrics.jsonl", world.is_main, monitor="ddpm",  # L_AID of a batch is a thousand times another's
    )  # fmt: skip
    info = {
        "config": run.config.hash,
        "num_classes": str(len(data.train.classes)),
        "unet": run.config.unet.model_dump_json(),
    }
    parts: dict[str, Any] = {"optimizer": trainer.optimizer}
    times = snapshot_steps(config.steps, config.ema_snapshots)
    if times:
        parts["averages"] = PowerAverages(trainer.optimizer)

    def step(i: int, rows: torch.Tensor) -> Losses:
        losses = trainer.step(i, rows)
        if times:
            parts["averages"].update(i + 1)
            if i + 1 in times and world.is_main:
                parts["averages"].write(folder / "snapshots", i + 1, info)
        return losses

    go_back = config.on_divergence == "go_back"
    preview = _preview(run, trainer, data.train.classes) if world.is_main else None
    callbacks = [*callbacks, preview] if preview else callbacks
    train_loop(job, batches, step, parts, lr_backoff if go_back else None, callbacks)
    if preview:
        preview.write()
        save_tensors(folder / "ema.safetensors", trainer.optimizer.ema_state_dict(), info)
    note["images"] = config.steps * config.batch_size
    note["learning_rate_factor"] = lr_backoff.factor


def _preview(run: RunDir, trainer: Trainer, classes: tuple[str, ...]) -> Preview:
    config, device = run.config, trainer.device
    dtype = compute_dtype(config.precision, device)
    sampler = Sampler(
        unet=build_unet(config, len(classes)).eval().requires_grad_(False).to(device, dtype),
        schedule=Schedule(config.diffusion.schedule, config.diffusion.timesteps, device),
        prediction=config.diffusion.prediction,
        settings=preview_settings(config.diffusion.timesteps),
        shape=(config.data.channels, config.data.image_size, config.data.image_size),
        null_label=len(classes),
        seed=config.seed,
        dtype=dtype,
        device=device,
    )
    every, steps = config.diffusion.checkpoint_every, config.diffusion.steps
    return Preview(sampler, trainer.optimizer, run.folder("diffusion"), classes, every, steps, trainer.micro_batch)


def _order(run: RunDir, data: Data) -> Order:
    balanced = run.config.diffusion.batches == "class_balanced"
    return ClassBalanced(data.train.labels) if balanced else Natural(len(data.train))


def _tell_cost(trainer: Trainer, batch_size: int) -> None:
    total = sum(trainer.flops.values())
    shares = ", ".join(f"{name} {work / total:.0%}" for name, work in trainer.flops.items())
    log.info("diffusion: %.3g GFLOP a step of %d images (%s)", total / 1e9, batch_size, shares)


def tell_cost(run: RunDir, data: Data, extractor: Extractor, world: World) -> None:
    """What training would take on this machine, from a few seconds of steps that are thrown away."""
    config = run.config.diffusion
    trainer = build_trainer(run, data, extractor, world, LRBackoff())
    _tell_cost(trainer, config.batch_size)
    rows = next(_order(run, data).steps(0, config.batch_size, 0, 1)).samples
    steps, times = 0, []
    begun = time.perf_counter()
    while steps < 5 or (time.perf_counter() - begun < 5 and steps < 100):
        start = time.perf_counter()
        trainer.step(steps, torch.from_numpy(rows))["loss"].item()
        times.append(time.perf_counter() - start)
        steps += 1
    seconds = sorted(times[4:])[len(times[4:]) // 2]  # the first few compile and record
    state = (5 + len(KEPT) * bool(config.ema_snapshots)) * 4 * parameters(trainer.model)
    memory = f"{state / 2**30:.2f} GiB of weights, gradients, moments and averages"
    if trainer.device.type == "cuda":
        memory += f"; {torch.cuda.max_memory_allocated(trainer.device) / 2**30:.2f} GiB at the peak"
    if world.is_main:
        print(
            f"{config.steps} steps of {config.batch_size} images, {seconds:.3f} s each: about "
            f"{duration(config.steps * seconds)}; {memory}"
        )


def command(
    run: RunOption,
    preset: PresetOption = None,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell steps, time and memory, and stop.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write event files, to RUN/diffusion/tensorboard.")
    ] = False,
) -> None:
    """Train the class-conditional diffusion model on the long-tailed set. Needs the extractor stage.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_diffusion --run RUN
    """
    world = init_distributed()
    run_dir = RunDir.open(run, preset, set_)
    data = load_data(run_dir.config.data)
    extractor = load_extractor(run_dir, pick_device())
    if dry_run:
        tell_cost(run_dir, data, extractor, world)
    else:
        train_diffusion(run_dir, data, extractor, world, tensorboard)


if __name__ == "__main__":
    main(command)
