"""Samples a second at equal quality: ours and diffusers drawing with the same trained weights.

    python -m bench.equal_quality --run RUN

Quality is the Fréchet distance by class to the validation images in the features of a judge (see `bench.quality`), mean
over classes, of the first `--per-class` samples of every class. Ours draws as `generate --fast` does. The network of
diffusers holds the same weights and starts from the same noise; it draws by each of its solvers and spacings of few
steps (`bench.peers.SOLVERS`), with x0 clipped as ours, and with our solver at our timesteps. Then it races ours at the
fewest evaluations with which any of its own schedulers came as near as ours, in each of its settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench import peers
from bench.contestants import Model
from bench.quality import train_judge
from bench.race import OURS, Work, ratios, run_race
from diffult.cli import main
from diffult.diffusion.schedule import Schedule
from diffult.engine.device import machine, pick_device
from diffult.errors import UserError
from diffult.generate import FAST
from diffult.generation.sampler import Sampler
from diffult.longtail.classification import extract_features
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.longtail.frechet import frechet_distance
from diffult.runs.files import write_json
from diffult.runs.run_dir import RunDir
from diffult.runs.sampler import open_sampler
from ffcv_writers import Loader
from kernels.augment import normalise
from kernels.random import normal

STEPS = (*range(5, 13), 15, 20, 25)  # tried until one is enough
_BEST = "diffusers channels-last"  # draws what is judged; all settings race
Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # labels and indices, int64 [B] -> uint8 [B, H, W, C]


def our_sampler(run: RunDir) -> tuple[Sampler, Model]:
    """As `generate --fast` has it, and the trained network as a contestant has it."""
    settings = run.config.generate.model_copy(update=FAST | {"match_histogram": False})
    sampler = open_sampler(run, settings, run.config.seed)
    nothing = torch.empty(0)
    model = Model(run.config, sampler.unet, (nothing, nothing, nothing), sampler.dtype, sampler.device)
    return sampler, model


def peer_draws(model: Model, seed: int, peer: Any, make: Callable[[], Any]) -> Draw:
    """The same samples by diffusers, with a scheduler that `make` builds for each batch."""
    data = model.config.data
    shape = (data.channels, data.image_size, data.image_size)

    def draw(labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        noise = normal(seed, labels, indices, torch.zeros_like(labels), shape)
        return peers.sample(peer, make(), noise, labels)

    return draw


class Yardstick:
    """Fréchet distance of a draw's first samples of every class to the run's validation images."""

    def __init__(self, run: RunDir, judge: Extractor, per_class: int) -> None:
        packed, data, device = run.packed(), run.config.data, pick_device()
        if packed.val is None:
            raise UserError(f"{run.path}: has no validation images to measure with; set data.val_per_class")
        loader = Loader(packed.val, 256, device=device, crop=data.view(data.image_size))
        features, labels = extract_features(judge.network, loader, torch.float32)
        self.real = [features[labels == c].cpu().numpy() for c in range(len(packed.classes))]
        self.judge, self.per_class, self.device = judge, per_class, device
        self.batch_size = run.config.generate.batch_size

    def __call__(self, draw: Draw) -> float:
        classes = len(self.real)
        labels = torch.arange(classes, device=self.device).repeat_interleave(self.per_class)
        indices = torch.arange(self.per_class, device=self.device).repeat(classes)
        features = []
        with torch.inference_mode():
            for names in zip(labels.split(self.batch_size), indices.split(self.batch_size), strict=True):
                features.append(self.judge.features(normalise(draw(*names))).float().cpu())
        drawn = torch.cat(features).view(classes, self.per_class, -1).numpy()
        return float(np.mean([frechet_distance(a, b) for a, b in zip(drawn, self.real, strict=True)]))


def measure_distances(run: RunDir, yardstick: Yardstick) -> dict[str, Any]:
    """ "ours", "at our timesteps" and by own scheduler and number of steps "theirs": Fréchet distances."""
    sampler, model = our_sampler(run)
    config, seed = run.config.diffusion, run.config.seed
    schedule = Schedule(config.schedule, config.timesteps, model.device)
    peer = peers.build_peer(model.unet, run.config.data.image_size).in_setting(_BEST)
    result: dict[str, Any] = {"ours": yardstick(sampler.draw), "theirs": {name: {} for name in peers.SOLVERS}}
    print(f"ours, {FAST['steps']} evaluations: {result['ours']:.2f}", flush=True)
    grid = sampler.timesteps

    def at_ours() -> Any:
        made, _ = peers.scheduler(config, schedule, "dpm++", len(grid), model.device)
        made.set_timesteps(timesteps=grid, device=model.device)
        return made

    result["at our timesteps"] = yardstick(peer_draws(model, seed, peer, at_ours))
    print(f"diffusers at our timesteps: {result['at our timesteps']:.2f}", flush=True)
    for steps in STEPS:
        for name, distances in result["theirs"].items():
            make = partial(peers.own_scheduler, config, schedule, name, steps, model.device)
            distances[steps] = yardstick(peer_draws(model, seed, peer, make))
            print(f"diffusers, {name}, {steps} evaluations: {distances[steps]:.2f}", flush=True)
        if fewest(result)[2]:
            break
    return result


def fewest(distances: dict[str, Any]) -> tuple[str, int, bool]:
    """Of diffusers' own schedulers: name and evaluations of the one that comes as near as ours with the fewest, and
    whether one does; otherwise the nearest."""
    rows = [(name, steps, d) for name, row in distances["theirs"].items() for steps, d in row.items()]
    equal = [row for row in rows if row[2] <= distances["ours"]]
    name, steps, _ = min(equal, key=lambda row: row[1:]) if equal else min(rows, key=lambda row: row[2])
    return name, steps, bool(equal)


def race(run: RunDir, name: str, steps: int, rounds: int, turn_s: float) -> dict[str, dict[str, Any]]:
    """Seconds of a batch: ours, and diffusers with this scheduler in each of its settings."""
    sampler, model = our_sampler(run)
    config, size = run.config.diffusion, run.config.generate.batch_size
    schedule = Schedule(config.schedule, config.timesteps, model.device)
    indices = torch.arange(size, device=model.device)
    labels = indices % len(run.packed().classes)
    peer = peers.build_peer(model.unet, run.config.data.image_size)
    calls: dict[str, Callable[[], object]] = {OURS: lambda: sampler.draw(labels, indices)}
    for setting in peers.SETTINGS:
        draw = peer_draws(
            model, run.config.seed, peer.in_setting(setting),
            lambda: peers.own_scheduler(config, schedule, name, steps, model.device),
        )  # fmt: skip
        calls[setting] = lambda draw=draw: draw(labels, indices)  # type: ignore[misc]
    return run_race(Work(calls, size), model.device, rounds, turn_s)


def command(
    run: Annotated[Path, typer.Option(help="A run of a preset whose stage diffusion is finished.")],
    per_class: Annotated[int, typer.Option(min=2, help="Samples of each class that are judged.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the race.")] = 7,
    turn_s: Annotated[float, typer.Option(help="Seconds that a contestant's turn takes about.")] = 3.0,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Race samples a second beside diffusers at equal Fréchet distance, with one trained network."""
    if reason := peers.missing():
        raise UserError(reason)
    opened = RunDir.open(run)
    judge = train_judge(opened.config.name, opened.config.seed, run.parent)
    extractor = load_extractor(judge.folder("extractor"), pick_device())
    distances = measure_distances(opened, Yardstick(opened, extractor, per_class))
    name, steps, equal = fewest(distances)
    results = race(opened, name, steps, rounds, turn_s)
    content = {
        "command": f"python -m bench.equal_quality --run {run}", "machine": machine(),
        "threads": torch.get_num_threads(), "preset": opened.config.name, "evaluations": FAST["steps"],
        "per_class": per_class, "distances": distances, "rival": name, "rival_evaluations": steps, "equal": equal,
        "images": opened.config.generate.batch_size,
        "ratios": {setting: ratios(results, setting) for setting in peers.SETTINGS}, "race": results,
    }  # fmt: skip
    file = out / f"equal-quality-{opened.config.name}.json"
    write_json(file, content)
    print(json.dumps({"results": str(file)}))


if __name__ == "__main__":
    main(command)
