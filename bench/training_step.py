"""The diffusion training step and a draw of ten steps: ours, diffusers' at its best, ours without a kernel at a time.

    python -m bench.training_step --preset cifar10-lt-100      # on a CUDA card: the figures that count
    python -m bench.training_step --smoke                      # tiny, on any machine: the references serve

All train the preset's network on the plain DDPM loss; diffusers is channels-last, in our compute type, with the fused
AdamW. Each contestant is built, warmed up, timed and let go on its own. Beside the times a profile of our step is left:
the twenty costliest operators in profile.txt, all of it in trace.json.gz.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from bench import peers
from bench.budget import Ledger, Piece
from bench.contestants import (
    CLASSES,
    PLAIN_LOSS,
    SAME_NETWORK,
    build_model,
    build_peer_step,
    build_step,
    compiled,
    our_draw,
    peer_draw,
    without,
)
from bench.race import Call, turn, warm_up
from diffult.cli import main
from diffult.config import Config, load_preset
from diffult.engine.device import machine, peak_flops, pick_device
from diffult.planning.cost import evaluation_flops, step_flops
from kernels import dispatch

_PEER = "diffusers channels-last"  # of peers.SETTINGS
_TRAINING, _DRAWING = ("group_norm_silu", "adamw_ema", "diffuse"), ("group_norm_silu", "denoise_step")
_TRACE = 3 * 2**20  # bytes; a larger trace is not kept
_DRAW = ["generate.sampler=dpm++", "generate.steps=10", "generate.guidance=0.0", "generate.spacing=time"]
_SMOKE = [
    "unet.channels=8", "unet.multipliers=[1]", "unet.num_res_blocks=1", "unet.attention_resolutions=[]",
    "diffusion.batch_size=2", "generate.batch_size=2",
]  # fmt: skip
Compiler = Callable[[Any], Any]


def settings(preset: str, smoke: bool = False) -> tuple[Config, Config]:
    """The preset on the plain loss, and with its batch of a draw, by ten steps without guidance."""
    overrides = [*SAME_NETWORK, *PLAIN_LOSS, *_DRAW, *_SMOKE * smoke]
    config = load_preset(preset, overrides)
    return config, load_preset(preset, [*overrides, f"diffusion.batch_size={config.generate.batch_size}"])


def step_of_ours(config: Config) -> Call:
    return build_step(config, CLASSES, pick_device())


def step_of_peer(config: Config, compiler: Compiler | None = None) -> Call:
    model = build_model(config, training=True)
    peer = peers.build_peer(model.unet, config.data.image_size).in_setting(_PEER)
    return build_peer_step(model, compiler(peer) if compiler else peer, plain=False)


def draw_of_ours(config: Config) -> Call:
    """As the product draws: compiled on a card."""
    return our_draw(build_model(config), config.generate, compiled=pick_device().type == "cuda")


def draw_of_peer(config: Config, compiler: Compiler | None = None) -> Call:
    model = build_model(config)
    peer = peers.build_peer(model.unet, config.data.image_size).in_setting(_PEER)
    return peer_draw(model, config.generate, compiler(peer) if compiler else peer)


def timed(
    build: Callable[[], Call], images: int, flops: float, turn_s: float, kernel: str | None = None
) -> dict[str, Any]:
    """Seconds of the first call, which compiles, and of a call in each of five turns; images/s and share of the peak.

    Args:
        images, flops: of one call.
        turn_s: that a turn takes about.
        kernel: PyTorch serves it.
    """
    device = pick_device()
    torch._dynamo.reset()
    with without(kernel):
        call = build()
        first = warm_up(call, device)
        calls = max(1, round(turn_s / turn(call, 1, device)))
        seconds = [turn(call, calls, device) for _ in range(5)]
    row = {"first_s": first, "seconds": seconds, "images_per_s": images / median(seconds)}
    row["tflop_per_s"] = flops / median(seconds) / 1e12
    if peak := peak_flops(device):
        row["share_of_peak"] = flops / median(seconds) / peak
    return {key: _short(value) for key, value in row.items()}


def _short(value: Any) -> Any:
    return [_short(each) for each in value] if isinstance(value, list) else float(f"{value:.4g}")


def profile(config: Config, out: Path) -> dict[str, Any]:
    """Of one step of ours, once it is recorded: the table and the trace, and their sizes."""
    from torch.profiler import ProfilerActivity, profile

    device = pick_device()
    torch._dynamo.reset()
    step = step_of_ours(config)
    warm_up(step, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as record:
        turn(step, 1, device)
    table, trace = out / "profile.txt", out / "trace.json.gz"
    costliest = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table.write_text(record.key_averages().table(sort_by=costliest, row_limit=20))
    record.export_chrome_trace(str(trace))
    size = trace.stat().st_size
    if size > _TRACE:
        trace.unlink()
    return {"table": table.name, "trace": trace.name if size <= _TRACE else f"{size} bytes, not kept"}


def pieces(preset: str, out: Path, smoke: bool) -> Iterator[Piece]:
    """The most valuable first: ours, diffusers compiled, the profile, diffusers as it is, ours without each kernel."""
    trained, drawn = settings(preset, smoke)
    turn_s, one = (0.01 if smoke else 0.5), float(evaluation_flops(drawn, CLASSES))

    def training(name: str, build: Callable[[], Call], kernel: str | None = None) -> Piece:
        flops = step_flops(trained, CLASSES)["ddpm"]
        return f"training step, {name}", partial(timed, build, trained.diffusion.batch_size, flops, turn_s, kernel)

    def drawing(name: str, build: Callable[[], Call], kernel: str | None = None) -> Piece:
        images, steps = drawn.diffusion.batch_size, drawn.generate.steps
        return f"{steps}-step draw, {name}", partial(timed, build, images, steps * images * one, turn_s, kernel)

    # The CPU's compiler takes over a minute for diffusers' smallest network; all but its back end runs in a smoke test.
    stand_in = partial(torch.compile, backend="aot_eager")
    yield training("ours", partial(step_of_ours, trained))
    yield drawing("ours", partial(draw_of_ours, drawn))
    if not peers.missing():
        yield training(f"{_PEER} compiled", partial(step_of_peer, trained, stand_in if smoke else torch.compile))
        yield drawing(f"{_PEER} compiled", partial(draw_of_peer, drawn, stand_in if smoke else compiled))
    yield "profile", partial(profile, trained, out)
    if not peers.missing():
        yield training(_PEER, partial(step_of_peer, trained))
        yield drawing(_PEER, partial(draw_of_peer, drawn))
    if dispatch.refusal(pick_device()) is None:
        for kernel in _TRAINING:
            yield training(f"ours without {kernel}", partial(step_of_ours, trained), kernel)
        for kernel in _DRAWING:
            yield drawing(f"ours without {kernel}", partial(draw_of_ours, drawn), kernel)


def summary(done: dict[str, Any]) -> str:
    """A line a contestant: images/s, share of the peak, and how many times as fast ours is."""
    lines = []
    for name, row in done.items():
        race, _, contestant = name.partition(", ")
        if contestant:
            line = f"{name}: {row['images_per_s']:,.0f} images/s, {row['tflop_per_s']:.3g} TFLOP/s"
            if "share_of_peak" in row:
                line += f" ({row['share_of_peak']:.0%} of the peak)"
            ours = done.get(f"{race}, ours")
            if ours and contestant != "ours":
                line += f", ours {ours['images_per_s'] / row['images_per_s']:.2f} x as fast"
            lines.append(line)
    return "\n".join(lines)


def command(
    preset: Annotated[str, typer.Option(help="Whose network and batch.")] = "cifar10-lt-100",
    budget: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds; default: never.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench/results"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the results file holds.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny network and few calls, on any machine.")] = False,
) -> None:
    """Time the diffusion training step and a draw beside diffusers, and what each kernel is worth in them.

    Exit code 1 where a contestant fails, 3 where the budget ended before the work.
    """
    out.mkdir(parents=True, exist_ok=True)
    about = machine()
    card = re.sub(r"[^A-Za-z0-9.]+", "-", about["device"]).strip("-")
    content: dict[str, Any] = {"preset": preset, "smoke": smoke, "machine": about}
    if reason := peers.missing():
        content["absent"] = {"diffusers": reason}
        print(reason)
    ledger = Ledger(out / f"training-step-{card}.json", content, budget, resume)
    code = ledger.run(pieces(preset, out, smoke))
    print(summary(ledger.done))
    raise typer.Exit(code)


if __name__ == "__main__":
    main(command)
