"""Stage diffusion: the class-conditional diffusion model, from random weights, on the long-tailed set alone.

Writes diffusion/ema.safetensors, the averaged weights that samples are drawn with, metrics.jsonl, and a grid of samples
at every checkpoint. With diffusion.early_stopping it ends when the model no longer improves on held-out images. Under
torchrun the processes share the batch; the model is the same but for rounding.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from typing import Annotated, Any

import torch
import typer

from diffult.cli import RunOption, SetOption, main
from diffult.data.packing import Packed
from diffult.diffusion.trainer import Trainer, build_trainer
from diffult.engine.device import compute_dtype, peak_flops, pick_device
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.engine.early_stopping import EarlyStopping
from diffult.engine.loop import Callback, LoopConfig, LRBackoff, train_loop
from diffult.engine.tensorboard import TensorBoardCallback
from diffult.generation.checks import ModelChecks, early_stopping
from diffult.generation.preview import Preview, preview_settings
from diffult.generation.sampler import Sampler
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.models.cost import parameters
from diffult.models.unet import build_unet, save_unet
from diffult.reporting.text import duration
from diffult.runs.run_dir import RunDir
from kernels.adamw_ema import bytes_per_parameter

_STAGE = 2  # its number among the seeds
# Of a collapse: a network of CIFAR10-LT went from a loss of 0.15 to 0.58 within 50 steps, and stayed there.
_COLLAPSED, _STEADY = 2.0, 32  # times its loss; images of a batch from which losses vary less than this
log = logging.getLogger(__name__)


def train_diffusion(run: RunDir, world: World = ALONE, tensorboard: bool = False) -> None:
    """Trains the diffusion model on the packed training images. Every process of `world` calls this.

    Args:
        tensorboard: also write event files to diffusion/tensorboard, of what metrics.jsonl holds.

    Raises:
        UserError: a stage before is not finished, `tensorboard` without that package, or see `train_loop`.
    """
    packed = run.packed()
    extractor = _extractor(run)
    world.local_slice(run.config.diffusion.batch_size, "diffusion.batch_size")
    with run.stage("diffusion", world) as record:
        if record is not None:
            folder = run.folder("diffusion") / "tensorboard"
            callbacks: list[Callback] = [TensorBoardCallback(folder)] if tensorboard and world.is_main else []
            _train(run, packed, extractor, world, record, callbacks)


def _extractor(run: RunDir) -> Extractor | None:
    """phi0 if L_AID or the checks need it."""
    if not run.config.diffusion.uses_extractor:
        return None
    run.require("extractor")
    return load_extractor(run.folder("extractor"), pick_device())


def _train(
    run: RunDir,
    packed: Packed,
    extractor: Extractor | None,
    world: World,
    record: dict[str, Any],
    callbacks: list[Callback],
) -> None:
    config, folder, digest = run.config.diffusion, run.folder("diffusion"), run.hash("diffusion")
    lr_backoff = LRBackoff()
    trainer = build_trainer(run.config, packed, extractor, world, lr_backoff)
    _log_flops(trainer, config.batch_size)
    loop = LoopConfig(
        "diffusion", config.steps, folder / "state.pt", config.checkpoint_every, (run.config.seed, _STAGE, world.rank),
        digest, config.batch_size, sum(trainer.flops.values()), peak_flops(trainer.device) * world.size,
        folder / "metrics.jsonl", world, monitor="ddpm",  # L_AID of a batch is a thousand times another's
        collapsed=_COLLAPSED if config.batch_size >= _STEADY else math.inf,
    )  # fmt: skip
    preview = build_preview(run, trainer, packed.classes, world)
    callbacks = [*callbacks, preview]
    go_back = lr_backoff if config.on_divergence == "go_back" else None
    check = _early_stopping(run, trainer, packed, extractor, world)
    train_loop(loop, trainer.batches, trainer.step, {"optimizer": trainer.optimizer}, go_back, callbacks, check)
    preview.write()
    weights = (check and check.best) or trainer.optimizer.ema_state_dict()
    if world.is_main:
        save_unet(folder / "ema.safetensors", weights, run.config, len(packed.classes), digest)
    record["steps"] = check.step if check else config.steps
    record["images"] = record["steps"] * config.batch_size
    record["learning_rate_factor"] = lr_backoff.factor
    if check and check.best:
        record["stopped"] = check.reason or f"diffusion.steps = {config.steps}"
        record["best_step"] = check.best_step
        log.info(
            "diffusion: ended at step %d: %s; the weights are those of step %d, %s %.4g",
            check.step, record["stopped"], check.best_step, check.what, check.best_score,
        )  # fmt: skip


def _early_stopping(
    run: RunDir, trainer: Trainer, packed: Packed, extractor: Extractor | None, world: World
) -> EarlyStopping | None:
    """The checks of the model in training; None where there are none."""
    config = run.config.diffusion
    if not config.check_every:
        return None
    if packed.val is None:
        log.warning(
            "diffusion: no validation images to check the model with, so it trains all of its %d steps; "
            "data.val_per_class keeps some",
            config.steps,
        )
        return None
    assert extractor is not None  # config.uses_extractor
    checks = ModelChecks(run.config, packed, extractor, trainer.optimizer, trainer.micro_batch, world)
    return early_stopping(checks, config)


def build_preview(run: RunDir, trainer: Trainer, classes: tuple[str, ...], world: World) -> Preview:
    """Of the model in training, into the stage's folder. Drawn by the first process; the others take part in gathering
    the weights."""
    config, sampler = run.config.diffusion, None
    if world.is_main:
        dtype = compute_dtype(run.config.precision, trainer.device)
        unet = build_unet(run.config, len(classes)).eval().requires_grad_(False).to(trainer.device, dtype)
        sampler = Sampler.for_run(run.config, unet, preview_settings(config.timesteps), run.config.seed)
    return Preview(config, sampler, trainer.optimizer, run.folder("diffusion"), classes, trainer.micro_batch)


def _log_flops(trainer: Trainer, batch_size: int) -> None:
    total = sum(trainer.flops.values())
    shares = ", ".join(f"{name} {work / total:.0%}" for name, work in trainer.flops.items())
    log.info("diffusion: %.3g GFLOP a step of %d images (%s)", total / 1e9, batch_size, shares)


def seconds_per_step(run: RunDir, world: World = ALONE) -> float:
    """Median time of a training step on this machine, from a few seconds of steps whose result is discarded."""
    trainer = build_trainer(run.config, run.packed(), _extractor(run), world, LRBackoff())
    _log_flops(trainer, run.config.diffusion.batch_size)
    batch, times = next(trainer.batches(0)), list[float]()
    for i in range(5):  # these compile and capture
        trainer.step(i, batch)["loss"].item()
    while world.gather(len(times) < 3 or (sum(times) < 5 and len(times) < 100))[0]:
        start = time.perf_counter()
        trainer.step(len(times), batch)["loss"].item()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def print_cost(run: RunDir, world: World) -> None:
    """Prints steps, time and memory of the training on this machine."""
    config, seconds, device = run.config.diffusion, seconds_per_step(run, world), pick_device()
    with torch.device("meta"):
        count = parameters(build_unet(run.config, len(run.packed().classes)))
    state = bytes_per_parameter(compute_dtype(run.config.precision, device), world.size) * count
    memory = f"{state / 2**30:.2f} GiB of weights, gradients, moments and averages"
    if device.type == "cuda":
        memory += f"; {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at the peak"
    if world.is_main:
        most = "at most " if config.early_stopping else ""
        print(
            f"{most}{config.steps} steps of {config.batch_size} images, {seconds:.3f} s each: about "
            f"{duration(config.steps * seconds)}; {memory}"
        )


def command(
    run: RunOption,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print steps, time and memory, and stop.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write event files to RUN/diffusion/tensorboard.")
    ] = False,
) -> None:
    """Train the class-conditional diffusion model on the long-tailed set. Needs the stages pack and extractor.

    On several GPUs: torchrun --nproc-per-node=N -m -- diffult.train_diffusion --run RUN
    """
    world = init_distributed()
    run_dir = RunDir.open(run, overrides=set_, world=world)
    if dry_run:
        print_cost(run_dir, world)
    else:
        train_diffusion(run_dir, world, tensorboard)


if __name__ == "__main__":
    main(command)
