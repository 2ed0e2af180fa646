"""A run of many images under torchrun, killed again and again: it must end with the metrics of one left alone.

    python -m bench.standin --source imagenet-sample-400.tar --out STANDIN
    python -m bench.kills --images STANDIN --work WORK

Packs STANDIN, loads an epoch of it at 224 pixels, then runs imagenet-lt-64 at a tiny size in two processes of gloo,
once undisturbed and once with kills at random times: SIGKILL to one of the two processes, which torchrun then starts
again, or to torchrun and all that it started, as when a host dies, which a loop then starts again. Peak memory is what
all processes of a command hold themselves (Linux's RssAnon). Finished parts in WORK are not repeated.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from diffult.cli import main
from diffult.engine.device import machine
from diffult.engine.memory import own_memory
from diffult.errors import UserError
from diffult.runs.files import read_json, write_json
from diffult.runs.run_dir import RunDir
from ffcv_writers import Loader, Natural, RandomResizedCrop

SAMPLES, CROP = 2000, 224
_SETTINGS = (
    "precision=float32", "extractor.steps=40", "extractor.batch_size=32", "extractor.learning_rate=0.02",
    "unet.channels=8", "unet.multipliers=[1,2]", "unet.num_res_blocks=1", "unet.attention_resolutions=[]",
    "unet.head_width=8", "unet.dropout=0.0", "unet.gradient_checkpointing=false", "diffusion.steps=20",
    "diffusion.batch_size=8", "diffusion.checkpoint_every=10", "generate.sampler=dpm++", "generate.steps=5",
    "generate.batch_size=50", "generate.filter=distance", "generate.max_draws=2", "classifier.image_size=64",
    "classifier.epochs=1", "classifier.batch_size=64", "classifier.learning_rate=0.02",
    "classifier.methods=['diffult']",
)  # fmt: skip
_VARIES = ("seconds", "images_per_s")  # in metrics.json, from run to run


def _processes(root: int) -> list[int]:
    """The process and all that it started, without those that are gone."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _cpu_s() -> float:
    """Of this process and its ended children."""
    return sum(os.times()[:4])


def measured(command: list[str], watch: Callable[[subprocess.Popen[bytes]], None] = lambda _: None) -> dict[str, Any]:
    """Runs a command to its end, calling `watch` five times a second; its exit code, seconds, seconds of cores and peak
    memory."""
    begun, used, peak = time.perf_counter(), _cpu_s(), 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, sum(map(own_memory, _processes(process.pid))) / 2**20)
        watch(process)
        time.sleep(0.2)
    seconds, cpu_s = time.perf_counter() - begun, _cpu_s() - used
    return {"code": process.returncode, "seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "peak_mb": round(peak)}


def _finished(command: list[str]) -> dict[str, Any]:
    result = measured(command)
    if result.pop("code"):
        raise UserError(f"failed: {' '.join(command)}")
    return result


def _settings(images: Path, *more: str) -> list[str]:
    lists = [f"data.{split}_list={images}/ImageNet_LT_{split}.txt" for split in ("train", "val", "test")]
    settings = (f"data.path={images}", *lists, *more)
    return ["--preset", "imagenet-lt-64", *(part for setting in settings for part in ("--set", setting))]


def pack(images: Path, run: Path) -> dict[str, Any]:
    """Packs with the preset's settings, on the cores that this process may use."""
    row = _finished([sys.executable, "-m", "diffult.pack", "--run", str(run), *_settings(images)])
    packed = RunDir.open(run).packed()
    count = len(packed.train) + len(packed.test) + (len(packed.val) if packed.val else 0)
    row["packed_mb"] = round(sum(file.stat().st_size for file in (run / "pack").glob("*.beton")) / 2**20)
    return {"images": count, "cores": len(os.sched_getaffinity(0))} | row


def load(run: Path) -> dict[str, Any]:
    """An epoch of random resized crops."""
    images, peak, seen = RunDir.open(run).packed().train, 0.0, 0
    begun, used = time.perf_counter(), _cpu_s()
    for batch in Loader(images, 512, crop=RandomResizedCrop(CROP, 0)).batches(Natural(len(images)).epoch(0, 0)):
        seen += len(batch.labels)
        peak = max(peak, own_memory() / 2**20)
    seconds, cpu_s, cores = time.perf_counter() - begun, _cpu_s() - used, len(os.sched_getaffinity(0))
    times = {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1)}
    return {"images": seen, "cores": cores} | times | {"peak_mb": round(peak)}


def balance_to(counts: np.ndarray) -> int:
    """The N_t that asks for about SAMPLES samples."""
    return min(range(1, 1000), key=lambda n: abs(int(np.maximum(n - counts, 0).sum()) - SAMPLES))


def _pipeline(images: Path, packed: Path, run: Path) -> list[str]:
    counts = RunDir.open(packed).packed().counts
    settings = _settings(images, *_SETTINGS, f"generate.balance_to={balance_to(counts)}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=100", "-m", "--"]
    return [sys.executable, *torchrun, "diffult.run", "--run", str(run), "--from", str(packed), *settings]


def _victims(launcher: int, at: random.Random) -> tuple[str, list[int]]:
    """Whom to kill: one of torchrun's two processes, or everything."""
    workers = sorted(_processes(launcher)[1:])
    kinds = ["host", *(f"process {rank}" for rank in range(len(workers[:2])))]
    kind = at.choice(kinds)
    return kind, [launcher, *workers] if kind == "host" else [workers[int(kind.split()[1])]]


def killed(command: list[str], run: Path, kills: int, seconds: float, seed: int) -> dict[str, Any]:
    """Runs the command from the beginning until it succeeds, killing it so often on the way, at intervals of about
    seconds / kills. Returns the seconds that it took, and what was killed and when.

    Raises:
        UserError: it fails by itself, or ends before it was killed so often.
    """
    shutil.rmtree(run, ignore_errors=True)
    at, done = random.Random(seed), list[dict[str, Any]]()
    begun = time.perf_counter()
    due = begun + at.uniform(0.5, 1.5) * seconds / kills

    def watch(launcher: subprocess.Popen[bytes]) -> None:
        nonlocal due
        if len(done) < kills and time.perf_counter() > due:
            kind, victims = _victims(launcher.pid, at)
            for process in victims:
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(process, signal.SIGKILL)
            done.append({"killed": kind, "after_s": round(time.perf_counter() - begun, 1)})
            print(f"kill {len(done)} of {kills}: {kind}", flush=True)
            due = time.perf_counter() + at.uniform(0.5, 1.5) * seconds / kills

    while code := measured(command, watch)["code"]:
        if code != -signal.SIGKILL:
            raise UserError(f"exit code {code}: {' '.join(command)}")
    if len(done) < kills:
        raise UserError(f"{run}: ended after {len(done)} of {kills} kills; it takes a run of more work")
    return {"seconds": round(time.perf_counter() - begun, 1), "kills": done}


def _comparable(metrics: Any) -> Any:
    if isinstance(metrics, dict):
        return {key: _comparable(value) for key, value in metrics.items() if key not in _VARIES}
    return metrics


def compared(calm: Path, disturbed: Path) -> dict[str, bool]:
    """Whether the two runs made the same: metrics.json without times, and the bytes of weights and samples."""
    a, b = (_comparable(read_json(run / "metrics.json")) for run in (calm, disturbed))
    same = {"metrics.json": a == b}
    for name in ("extractor/weights", "diffusion/ema", "classifier/diffult"):
        same[name] = _tensors(calm / f"{name}.safetensors") == _tensors(disturbed / f"{name}.safetensors")
    samples = "generate/synthetic.beton"
    return same | {samples: (calm / samples).read_bytes() == (disturbed / samples).read_bytes()}


def _tensors(file: Path) -> str:
    """A hash of the tensors: the order of a file's metadata is arbitrary."""
    from diffult.runs.files import load_tensors

    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(file)[0].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def command(
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The set that is packed and loaded.")],
    work: Annotated[Path, typer.Option(file_okay=False, help="Folder for the runs, outside the repository.")],
    smaller: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Another set for the two runs; default: IMAGES.")
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="How often the second run is killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the times and victims.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Pack and load a large set, then compare a run that is killed at random with an undisturbed one."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # equal sums, and two processes to two cores
    work.mkdir(parents=True, exist_ok=True)
    images, work = images.absolute(), work.absolute()
    smaller = smaller.absolute() if smaller else images

    def part(name: str, run: Callable[[], Any]) -> Any:
        file = work / f"{name}.json"
        if not file.exists():
            write_json(file, {"result": run()})
            print(f"{name}: {read_json(file)['result']}", flush=True)
        return read_json(file)["result"]

    rows = {"pack": part("pack", lambda: pack(images, work / "whole"))}
    rows["load"] = part("load", lambda: load(work / "whole"))
    packed = work / "whole"
    if smaller != images:
        packed = work / "smaller"
        part("pack-smaller", lambda: pack(smaller, packed))
    calm = part("calm", lambda: _finished(_pipeline(smaller, packed, work / "calm")))
    command = _pipeline(smaller, packed, work / "killed")
    disturbed = part(f"killed-{kills}-{seed}", lambda: killed(command, work / "killed", kills, calm["seconds"], seed))
    drawn = read_json(work / "killed" / "metrics.json")["generation"]
    content = {
        "command": "python -m bench.kills", "machine": machine(), "rows": rows, "calm": calm,
        "run": {"images": len(RunDir.open(packed).packed().train)} | {key: drawn[key] for key in ("drawn", "accepted")},
        "killed": disturbed, "same": compared(work / "calm", work / "killed"),
    }  # fmt: skip
    write_json(out / "kills.json", content)


if __name__ == "__main__":
    main(command)
