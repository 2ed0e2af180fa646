"""Growth: seconds and peak memory to write, load, generate, pack and train on more and more images.

    python -m bench.growth

Each size runs in a process of its own, whose memory is looked at every 20 ms: what it holds itself (Linux's RssAnon);
pages of mapped files are the system's cache. Time should grow with the number of
images, memory should not; the columns of a set (label, flag, index) do grow, by some bytes an image.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from diffult.cli import main
from diffult.config import load_preset
from diffult.data.packing import open_data, pack_images, read_packed
from diffult.diffusion.trainer import build_trainer
from diffult.engine.device import machine
from diffult.engine.distributed import ALONE
from diffult.engine.loop import LRBackoff
from diffult.planning.stopwatch import peak_memory
from diffult.runs.files import write_json

_SIDE = 32
COUNTS = {
    "write": (1000, 10_000, 100_000),
    "load": (1000, 10_000, 100_000),
    "generate": (64, 640, 6400),
    "pack": (5000, 100_000),  # of 64 pixels, as are those trained on
    "train": (5000, 100_000),
}
_DISTINCT = 100  # image files; the others are links to them


class _Images:
    """Images made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        if i >= self.count:
            raise IndexError
        return np.full((_SIDE, _SIDE, 3), i % 256, np.uint8)


def _write(count: int, file: Path) -> None:
    from ffcv_writers import write

    numbers = np.arange(count)
    write(file, _Images(count), labels=numbers % 10, synthetic=0 * numbers, index=numbers)


def _load(count: int, file: Path) -> None:
    from ffcv_writers import Loader, Natural, open_set

    loader = Loader(open_set([file]), 128, resident=False)
    seen = 0
    for draws in Natural(count).steps(0, 128, 0, -(-count // 128)):
        for batch in loader.batches(*draws):
            seen += len(batch.labels)
    assert seen >= count


def _generate(count: int, folder: Path) -> None:
    from bench.cases import sampler_config
    from bench.contestants import CLASSES, build_extractor, build_model, build_sampler
    from diffult.generation.fill import fill
    from diffult.generation.shards import ShardStore
    from diffult.longtail.quota import Quota

    config = sampler_config("generate.steps=2", "diffusion.batch_size=64")
    model = build_model(config)
    sampler = build_sampler(model, config.generate)
    extractor = build_extractor(config, CLASSES, model.device)
    quotas = np.bincount(np.arange(count) % CLASSES, minlength=CLASSES)
    fill(sampler, extractor, ShardStore(folder, {}), Quota(quotas, 1.0), tuple(map(str, range(CLASSES))))


def _settings(folder: Path) -> list[str]:
    return [
        "data.source=folder", f"data.path={folder}", "data.image_size=64", "data.channels=3", "data.profile=natural",
        "data.val_per_class=0", "unet.channels=8", "unet.attention_resolutions=[]", "diffusion.batch_size=8",
    ]  # fmt: skip


def _image_folder(count: int, folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split, size in (("train", count), ("test", 10)):
        for c in range(10):
            (folder / split / str(c)).mkdir(parents=True)
        for i in range(size):
            file = folder / split / str(i % 10) / f"{i:06d}.png"
            if i < _DISTINCT:
                Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
            else:
                file.hardlink_to(folder / "train" / str(i % 10) / f"{i % _DISTINCT:06d}.png")


def _pack(count: int, folder: Path) -> None:
    config = load_preset("digits-lt", _settings(folder.parent / "images"))
    pack_images(config.data, open_data(config.data), folder.parent / "pack")


def _train(count: int, folder: Path) -> None:
    config = load_preset("digits-lt", _settings(folder.parent / "images"))
    trainer = build_trainer(config, read_packed(folder.parent / "pack"), None, ALONE, LRBackoff())
    for i, batch in zip(range(20), trainer.batches(0), strict=False):
        trainer.step(i, batch)


def _prepare(work: str, count: int, folder: Path) -> None:
    """What the work reads, made in another process: its memory is not counted."""
    if work in ("pack", "train"):
        _image_folder(count, folder / "images")
    if work == "train":
        _pack(count, folder / "images.beton")
    if work == "load":
        _write(count, folder / "images.beton")


def child(work: str, count: int, folder: Path) -> dict[str, Any]:
    """Does the work on `count` images here; seconds without imports, and this process's peak in MB."""
    preparing = multiprocessing.get_context("spawn").Process(target=_prepare, args=(work, count, folder))
    preparing.start()
    preparing.join()
    works = {"write": _write, "load": _load, "generate": _generate, "pack": _pack, "train": _train}
    begun = time.perf_counter()
    with peak_memory() as peak:
        works[work](count, folder / "images.beton")
        seconds = time.perf_counter() - begun
    return {"images": count, "seconds": round(seconds, 3), "peak_mb": round(peak.host / 2**20, 1)}


def command(
    only: Annotated[str | None, typer.Option(help="WORK:IMAGES: this alone, in this process, as JSON.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Measure how time and memory grow with the number of images."""
    if only is not None:
        work, _, count = only.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(child(work, int(count), Path(folder))))
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for work, counts in COUNTS.items():
        rows[work] = []
        for count in counts:
            typed = [sys.executable, "-m", "bench.growth", "--only", f"{work}:{count}"]
            told = subprocess.run(typed, check=True, capture_output=True, text=True).stdout
            rows[work].append(json.loads(told.splitlines()[-1]))
            print(f"{work}: {rows[work][-1]}")
    write_json(out / "growth.json", {"command": "python -m bench.growth", "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main(command)
